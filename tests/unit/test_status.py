"""Where a run stands, from directories as runs leave them; and what the operator's verbs say and refuse."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirai_dist.config import load
from mirai_dist.config.digest import to_yaml
from mirai_dist.operate import control, events, status
from mirai_dist.operate.control import Request
from mirai_dist.runtime import torchrun
from mirai_dist.state import commit
from mirai_launch import operating
from mirai_launch.__main__ import OWN, main
from mirai_launch.slurm import ledger
from mirai_launch.slurm.parse import Job

ROOT = Path(__file__).parents[2]
START = 1_000_000.0
TEACHER = "stages/teacher"


class Run:
    """A run directory, written event by event; `at` seconds after START."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "logs").mkdir()
        (folder / "recipe.yaml").write_text(to_yaml(load(ROOT / "tests/unit/data/small.yaml").recipe))

    def event(self, at: float, event: str, **details: Any) -> Run:
        with (self.folder / events.FILE).open("a") as file:
            file.write(json.dumps({"time": START + at, "event": event, **details}) + "\n")
        return self

    def start(self, at: float = 0.0, **details: Any) -> Run:
        usual = {"ranks": 16, "hosts": ["n1", "n2"], "device": "cuda", "job": "", "host": "n1", "pid": 7}
        return self.event(at, "start", **{**usual, **details})

    def cycles(self, first: int, last: int, at: float, seconds: float = 10.0, stage: str = TEACHER) -> Run:
        """Cycles first..last-1, of one position each."""
        path = self.folder / stage / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            for cycle in range(first, last):
                at += seconds
                record = {"cycle": cycle, "position": 0, "time": START + at, "seconds": seconds, "loss/flow": 1.0}
                file.write(json.dumps(record) + "\n")
        return self

    def checkpoint(self, cycle: int, stage: str = TEACHER) -> Path:
        sealed = commit.Commit(self.folder / stage / "checkpoints" / commit.directory_name(cycle, 0))
        sealed.write("weights", b"w" * 100)
        sealed.seal({"cycle": cycle})
        return sealed.final

    def alive(self, at: float) -> Run:
        path = self.folder / control.FOLDER / control.ALIVE
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (START + at, START + at))
        return self

    def failure(self, at: float, rank: int, host: str, message: str) -> Run:
        record = {"type": "RuntimeError", "message": message, "exit_code": 1, "host": host, "rank": rank,
                  "time": START + at, "traceback": f"Traceback of {rank}\n  line of it\n"}
        (self.folder / f"logs/failure-rank-{rank}.json").write_text(json.dumps(record))
        return self

    def status(self, at: float) -> status.Status:
        return status.of(self.folder, START + at)

    def screen(self, at: float) -> dict[str, str]:
        """Lines by their names; of several of a name the last."""
        return dict(line.split(maxsplit=1) for line in status.lines(self.status(at), now=START + at))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_before_the_first_start(run: Run) -> None:
    found = run.status(0)
    assert (found.state, found.stage, found.cycle, found.starts) == ("not started", "teacher", 0, 0)
    assert found.checkpoint == "" and found.failure is None
    assert run.screen(0)["next"].startswith(f"mirai train {run.folder}/recipe.yaml --run-dir {run.folder}")


def test_a_submitted_run_is_known_by_its_job_s_recipe(run: Run) -> None:
    (run.folder / "slurm/20261126-100000").mkdir(parents=True)
    (run.folder / "recipe.yaml").replace(run.folder / "slurm/20261126-100000/recipe.yaml")
    assert (run.status(0).state, run.status(0).jobs) == ("not started", 9)


def test_a_running_run(run: Run) -> None:
    run.start().event(5, "begun", stage="teacher", cycles=20, cycle=0).cycles(0, 6, at=5).cycles(6, 8, 65, 30.0)
    run.checkpoint(5)
    torn = run.checkpoint(7)
    (torn / "weights").write_bytes(b"w")
    run.alive(130)
    found = run.status(140)
    assert (found.state, found.stage, found.cycle, found.cycles) == ("running", "teacher", 8, 20)
    assert found.seconds_per_cycle == 10.0, "the median, whatever two odd cycles took"
    assert found.eta == 120.0
    assert found.checkpoint == f"{TEACHER}/checkpoints/cycle-000005-position-0", "the newest complete one"
    assert found.rank_hours == pytest.approx(16 * 130 / 3600)
    screen = run.screen(140)
    assert screen["state"] == "running: sign of life 10 s ago"
    assert screen["stage"] == "teacher, cycle 8 of 20; 0 of 9 trained"
    assert screen["pace"] == "10 s a cycle, stage done in 2 min, last position ended 15 s ago"
    assert screen["spent"] == "0.578 GPU-hours, 0 restarts; 16 ranks on n1, n2"


def test_a_run_without_a_sign_of_life_is_stale(run: Run) -> None:
    run.start().cycles(0, 3, at=0).alive(40)
    assert run.status(40 + status.LIFELESS - 1).state == "running"
    found = run.status(400)
    assert (found.state, found.why) == ("stale", "no sign of life for 6 min")
    assert found.rank_hours == pytest.approx(16 * 40 / 3600), "nobody knows of anything after the last sign"
    assert f"mirai stacks {run.folder}" in status.following(found)


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(run: Run) -> None:
    run.start(host=socket.gethostname(), pid=2**22 + 1).alive(10)
    assert run.status(11).state == "stale" and run.status(11).why.endswith("; its process is gone")
    again = run.start(20, host=socket.gethostname(), pid=os.getpid()).alive(25)
    assert again.status(26).state == "running"


def test_a_stopped_run_and_a_resumed_one(run: Run) -> None:
    run.start().cycles(0, 3, 0).event(36, "stopped", by="SIGUSR2", stage="teacher", cycle=3, position=0)
    assert (run.status(1000).state, run.status(1000).why) == ("stopped", "by SIGUSR2")
    assert run.status(1000).rank_hours == pytest.approx(16 * 36 / 3600)
    run.start(1000).alive(1010)
    found = run.status(1011)
    assert (found.state, found.starts) == ("running", 2)
    assert found.rank_hours == pytest.approx(16 * 46 / 3600), "not the time between the starts"


def test_the_first_rank_that_failed_is_named(run: Run) -> None:
    run.failure(-50, 0, "n9", "of an earlier start").start().event(20, "begun", stage="teacher", cycles=20, cycle=0)
    run.failure(31.2, 0, "n1", "connection closed by peer").failure(31.0, 11, "n2", "out\nof memory")
    run.event(31.1, "failed", host="n2", rank=11, error="RuntimeError: out of memory", exit_code=1)
    found = run.status(100)
    assert found.state == "failed" and found.failure is not None
    assert (found.failure.host, found.failure.rank) == ("n2", 11)
    assert run.screen(100)["failed"] == "n2:11 RuntimeError: out of memory"
    assert f"mirai logs {run.folder} --errors" in status.following(found)
    run.start(200).alive(201)
    assert run.status(202).failure is None, "a new start has not failed yet"


def test_ranks_that_never_found_each_other_are_named_too(run: Run) -> None:
    run.failure(3, 1, "n2", "cannot reach rank 0 at n1:9")
    found = run.status(10)
    assert found.state == "not started" and found.failure and found.failure.host == "n2"


def test_the_end(run: Run) -> None:
    run.start().event(1, "begun", stage="distil foresight seed 1", cycles=6, cycle=0)
    where = "stages/distil/foresight/seed-1"
    run.cycles(0, 6, 1, stage=where).event(70, "done")
    (run.folder / where / "DONE").write_text('{"cycles": 6}')
    found = run.status(80)
    assert (found.state, found.stage, found.cycle, found.jobs_done, found.jobs) == (
        "done", "distil foresight seed 1", 6, 1, 9)
    assert status.following(found) == []
    (run.folder / "report.html").touch()
    assert status.following(found) == [f"open {run.folder}/report.html"]


def test_alarms_that_are_up(run: Run) -> None:
    run.start().event(1, "alarm", name="a", up=True, text="old").event(2, "begun", stage="teacher", cycles=20, cycle=0)
    run.event(3, "alarm", name="a", up=True, text="A").event(4, "alarm", name="b", up=True, text="B")
    run.event(5, "alarm", name="a", up=False, text="A no more").alive(6)
    run.event(6, "alarm", name="slow rank 3 in forward", up=True, text="n1:3 is slow")
    assert run.status(7).alarms == ("B", "n1:3 is slow")
    run.start(10).event(11, "begun", stage="teacher", cycles=20, cycle=2).alive(12)
    assert run.status(12).alarms == ("B",), "a resumed stage does not say it again, and may run on other hosts"
    assert run.screen(7)["alarm"] == "B"


def test_a_long_history_is_read_from_its_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_TAIL", 4000)
    run.start().cycles(0, 500, 0, seconds=1.0).alive(500)
    with (run.folder / TEACHER / "metrics.jsonl").open("a") as file:
        file.write('{"cycle": 500, "posi')
    assert (run.status(501).cycle, run.status(501).seconds_per_cycle) == (500, 1.0)


# The verbs.


@pytest.fixture
def live(run: Run) -> Iterator[Run]:
    """A run that runs: its rank 0 is this process."""
    control.open_for(run.folder)
    run.start(time.time() - START - 30, host=socket.gethostname(), pid=os.getpid())
    run.event(time.time() - START - 20, "begun", stage="teacher", cycles=20, cycle=0)
    yield run.cycles(0, 4, time.time() - START - 20, seconds=2.0)


def answering(run: Run, text: str) -> threading.Thread:
    """Somebody who answers the next request, as a run does."""

    def answer() -> None:
        deadline = time.monotonic() + 30
        while not control.pending(run.folder) and time.monotonic() < deadline:
            time.sleep(0.01)
        [request] = control.pending(run.folder)
        events.append(run.folder, "answered", **request.answer(text))
        heard.append(request)
        control.remove(run.folder, request)

    heard: list[Request] = []
    thread = threading.Thread(target=answer)
    thread.heard = heard  # type: ignore[attr-defined]
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("arguments", "expected", "held"),
    [
        (["stop"], Request("stop", stage="teacher"), True),
        (["stop", "--after", "9"], Request("stop", stage="teacher", after=9), False),
        (["save"], Request("save"), False),
        (["profile", "--rank", "5", "--cycles", "2"], Request("profile", rank=5, cycles=2), False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_request_is_put_down_and_its_answer_told(
    live: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: Request, held: bool
) -> None:
    run = answering(live, "done as asked")
    assert main([arguments[0], str(live.folder), *arguments[1:]]) == 0
    run.join()
    [heard] = run.heard  # type: ignore[attr-defined]
    assert (heard.verb, heard.stage, heard.after) == (expected.verb, expected.stage, expected.after)
    assert (heard.cycles, heard.rank, heard.by) == (expected.cycles, expected.rank, control.operator())
    assert capsys.readouterr().out == f"{arguments[0]}: done as asked\n"
    assert bool(control.held(live.folder)) == held, "a stop that is not for later holds at once"


def test_a_refusal_is_told_and_fails(live: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run = answering(live, "refused: a profile is being made")
    assert main(["profile", str(live.folder)]) == 1
    run.join()
    assert "refused: a profile" in capsys.readouterr().out


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said on standard error of a mistake: one line, exit code 20."""
    assert main(arguments) == 20
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("mirai: ")
    return said.err


@pytest.mark.parametrize("verb", ["status", "logs", "stop", "save", "profile", "stacks", "cancel", "requeue"])
def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert "is no run directory" in one_line(capsys, verb, str(tmp_path / "none"))
    assert "holds no recipe.yaml" in one_line(capsys, verb, str(tmp_path))


@pytest.mark.parametrize("verb", ["stop", "save", "profile", "stacks", "cancel"])
def test_a_run_that_is_over_takes_no_requests(run: Run, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    run.start().event(9, "done")
    assert "it is done" in one_line(capsys, verb, str(run.folder))
    assert control.pending(run.folder) == [] and not control.held(run.folder)


def test_mistakes_of_a_request_are_one_line(live: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(live.folder)
    assert "teacher has done 4 of 20 cycles" in one_line(capsys, "stop", folder, "--after", "4")
    assert "21: teacher has done" in one_line(capsys, "stop", folder, "--after", "21")
    assert "its ranks are 0 to 15" in one_line(capsys, "profile", folder, "--rank", "16")
    assert "6 is not between 1 and 5" in one_line(capsys, "profile", folder, "--cycles", "6")
    assert "no rank of the run has said anything yet" in one_line(capsys, "logs", folder, "--rank", "3")
    assert "was never submitted to SLURM" in one_line(capsys, "requeue", folder)
    assert control.pending(live.folder) == [] and not control.held(live.folder)


def test_status_for_programs(live: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(live.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["cycle"], found["ranks"], found["queue"]) == ("running", 4, 16, [])


def test_logs_show_their_end_and_errors_their_first(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (run.folder / "logs/rank-2.log").write_text("".join(f"line {i}\n" for i in range(10)))
    assert main(["logs", str(run.folder), "--rank", "2", "--lines", "3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"... 7 lines before these in {run.folder}/logs/rank-2.log", "line 7", "line 8", "line 9"]
    assert main(["logs", str(run.folder), "--errors"]) == 0
    assert capsys.readouterr().out == "no rank has recorded a failure\n"
    (run.folder / "logs/rank-1.out").touch()
    (run.folder / "logs/rank-2.out").write_text("Segmentation fault")
    run.start().failure(20, 0, "n1", "peer\nclosed").failure(19, 3, "n2", "disk is gone")
    assert main(["logs", str(run.folder), "--errors"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "n2:3 RuntimeError: disk is gone" in said[0] and "n1:0 RuntimeError: peer closed" in said[1]
    assert said[2:] == ["  Traceback of 3", "    line of it", f"raw output: {run.folder}/logs/rank-2.out"]


def test_followed_logs_end_with_the_run(live: Run, capsys: pytest.CaptureFixture[str]) -> None:
    log = live.folder / "logs/rank-0.log"
    log.write_text("first\n")

    def rest() -> None:
        time.sleep(1)
        with log.open("a") as file:
            file.write("second\n")
        log.replace(log.with_suffix(".log.1"))
        log.write_text("third, in a new file\n")
        events.append(live.folder, "done")

    writer = threading.Thread(target=rest)
    writer.start()
    assert main(["logs", str(live.folder), "--follow"]) == 0
    writer.join()
    assert capsys.readouterr().out.splitlines() == ["first", "second", "third, in a new file"]


def test_cancel_ends_a_local_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        run.start(time.time() - START, host=socket.gethostname(), pid=process.pid)
        assert main(["cancel", str(run.folder)]) == 0
        assert process.wait(20) == -15 and control.held(run.folder)
    finally:
        process.kill()
    assert f"process {process.pid} told to save and leave" in capsys.readouterr().out


def test_the_operators_verbs_load_nothing_heavy(live: Run) -> None:
    """Neither torch nor numpy nor triton, on a login node that may not have them."""
    folder = str(live.folder)
    shutil.copy(live.folder / "recipe.yaml", live.folder / "logs/rank-0.log")
    verbs = [[verb, folder] for verb in ("status", "logs", "requeue")] + [["stop", folder, "--after", "1"]]
    assert {verb for verb, *_ in verbs} <= set(OWN)
    code = (
        "import sys\nfor name in ('torch', 'numpy', 'triton'): sys.modules[name] = None\n"
        f"from mirai_launch.__main__ import main\nfor verb in {verbs!r}: print(main(verb))\n"
    )
    paths = [str(ROOT), str(ROOT / "launcher"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    codes = [line for line in done.stdout.splitlines() if line in ("0", "20")]
    assert codes == ["0", "0", "20", "20"]


def test_a_local_run_ends_with_its_state_if_it_began(run: Run) -> None:
    here = ["--standalone", "--nproc-per-node", "2", "-m", "mirai_dist", "--run-dir", str(run.folder)]
    assert torchrun.summary(here, START - 1) == [], "refused before it began: the directory may be somebody else's"
    run.start().event(9, "done")
    assert torchrun.summary(here, START - 1) == status.lines(run.status(10)) != []
    assert torchrun.summary(here, START + 1) == [], "an earlier start"
    assert torchrun.summary(here[1:], START - 1) == [], "one node of several"
    assert torchrun.summary([*here[:-1], str(run.folder / "none")], START - 1) == []


# What the scheduler knows better.

JOB = Job("7", "RUNNING", "", ("n1",), 1, 0, None, START + 50.0, None, None, 0, 0, "mirai")


@pytest.mark.parametrize(
    ("state", "jobs", "expected"),
    [
        ("stopped", ["PENDING"], "queued"),
        ("not started", ["PENDING"], "queued"),
        ("not started", ["RUNNING"], "starting"),
        ("stopped", ["COMPLETED", "PENDING"], "queued"),
        ("stopped, restarted", ["RUNNING"], "starting"),
        ("done", ["COMPLETING"], "done"),
        ("stale", ["RUNNING"], "stale"),
        ("stale", ["NODE_FAIL"], "failed"),
        ("running", ["PENDING"], "running"),
        ("stopped", ["FAILED"], "stopped"),
        ("failed", [], "failed"),
    ],
)
def test_the_scheduler_knows_what_waits_and_what_died(
    run: Run, monkeypatch: pytest.MonkeyPatch, state: str, jobs: list[str], expected: str
) -> None:
    known = [replace(JOB, id=str(7 + i), state=each) for i, each in enumerate(jobs)]
    # the last start on record came after the job's, but for a job that has just started again
    started = None if state == "not started" else START + (20 if "restarted" in state else 60)
    found = replace(run.status(0), state=state.split(",")[0], starts=1, job_id="7", started=started)
    monkeypatch.setattr(operating.status, "of", lambda run_dir: found)
    monkeypatch.setattr(operating, "scheduled", lambda run_dir: known)
    seen, queue = operating.look(run.folder)
    assert seen.state == expected and len(queue) == len(jobs)
    assert status.following(seen) or expected == "done"


def test_a_scheduler_that_does_not_answer_is_said_and_hides_nothing(
    live: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.append(live.folder, ledger.Submission("7", "all", 0.0, "cluster.yaml", 2, "slurm/all.sbatch"))
    monkeypatch.setenv("PATH", str(live.folder))
    assert main(["status", str(live.folder)]) == 0
    said = capsys.readouterr().out
    assert "state      running" in said and "job        not known: squeue: is not on the PATH" in said
