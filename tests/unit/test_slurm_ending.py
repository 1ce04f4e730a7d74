"""What becomes of a job whose step has ended, ending by ending; and the records it is decided from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mirai_launch.slurm import attempt, ending
from mirai_launch.slurm.ending import Ending, Failure

PLAIN = Ending(
    code=1, terminated=False, stop="", failures=(), progressed=True, fruitless=0, cap=2, running=True
)  # fmt: skip
REFUSED = Failure(0, "n1", 20, "RecipeError: no")
SUSPECT = Failure(0, "n1", 30, "n1: nothing from n3", ("n3",))
LONELY = Failure(5, "n3", 30, "n3 cannot reach n1", ("n1",))
CRASHED = Failure(1, "n2", 1, "ValueError: x")


@pytest.mark.parametrize(
    ("changes", "exit_code"),
    [
        ({"code": 0}, 0),
        ({"code": 0, "terminated": True, "stop": "requeue", "running": False}, 0),  # it was quicker than the signal
        ({"code": 10}, 10),  # preempted with grace time: the ranks were told, the script was not
        ({"code": 137, "stop": "requeue"}, 10),  # warned; the first rank that left had the others killed
        ({"code": 143, "stop": "requeue", "progressed": False, "fruitless": 1}, 10),
        ({"code": 10, "terminated": True}, 143),  # cancelled: never brought back
        ({"code": 10, "running": False}, 143),  # cancelled, and the script does not know yet
        ({"code": 10, "stop": "somebody"}, 20),
        ({"code": 10, "stop": "requeue", "progressed": False, "fruitless": 3}, 20),
        ({"code": 137, "failures": (CRASHED, REFUSED)}, 20),
        ({"code": 20}, 20),  # refused where no record could be written
        ({"code": 1, "failures": (CRASHED,)}, 10),
        ({"code": 1, "failures": (CRASHED,), "progressed": False, "fruitless": 1}, 1),
        ({"code": 137, "progressed": False, "fruitless": 1}, 137),
    ],
)
def test_every_ending_has_its_consequence(changes: dict[str, object], exit_code: int) -> None:
    facts = replace(PLAIN, **{**changes, "failures": ending.first_of(changes.get("failures", ()))})  # type: ignore[arg-type]
    assert ending.decide(facts).exit_code == exit_code


def test_the_first_host_knows_best_whom_to_leave_out() -> None:
    decided = ending.decide(replace(PLAIN, code=30, failures=(LONELY, SUSPECT), progressed=False, fruitless=1))
    assert (decided.exit_code, decided.exclude) == (10, ("n3",))
    assert "nothing from n3" in decided.why
    tired = ending.decide(replace(PLAIN, code=30, failures=(SUSPECT,), progressed=False, fruitless=3))
    assert (tired.exit_code, tired.exclude) == (20, ())
    assert "attempts in a row without a new checkpoint: 3, of 2 allowed" in tired.why


def environment(restart: int = 0, job: str = "7") -> dict[str, str]:
    again = {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
    return {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "n[1-2]", **again}


def commit(run_dir: Path, cycle: int, whole: bool = True) -> None:
    """A checkpoint, or a torn one."""
    from mirai_dist.state.commit import Commit

    made = Commit(run_dir / "stages/s/checkpoints" / f"cycle-{cycle:06d}-position-0")
    made.write("data", b"x")
    if whole:
        made.seal({})
    else:
        made.directory.rename(made.final)


def test_attempts_without_a_new_checkpoint_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def begin(restart: int, job: str = "7") -> int:
        return attempt.begin(tmp_path, 1, environment(restart, job))

    assert [begin(0), begin(1)] == [0, 0]
    commit(tmp_path, 3)
    assert [begin(2), begin(3)] == [0, 0]
    commit(tmp_path, 4, whole=False)  # nobody can go on from it
    assert begin(4) == 20
    assert "attempts in a row without a new checkpoint: 2, of 1 allowed" in capsys.readouterr().out
    assert begin(0, job="8") == 0  # somebody submitted it again, and so wants it


def test_an_attempt_starts_without_what_ended_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "STOP").write_text("requeue\n")
    logs = tmp_path / "logs"
    logs.mkdir()
    record = {"rank": 1, "host": "n2", "exit_code": 30, "message": "m", "suspects": ["n2"], "time": 1.0}
    (logs / "failure-rank-1.json").write_text(json.dumps(record))
    assert attempt.failures(logs) == [Failure(1, "n2", 30, "m", ("n2",))]
    assert attempt.begin(tmp_path, 1, environment()) == 0
    assert not (tmp_path / "STOP").exists()
    assert attempt.failures(logs) == []
    assert len(list((logs / "earlier").glob("*-failure-rank-1.json"))) == 1


def test_an_element_of_an_array_is_not_its_parent() -> None:
    assert attempt.job_of({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}) == "9_3"
    assert attempt.job_of({"SLURM_JOB_ID": "12"}) == "12"


def test_progress_is_checkpoints_finished_stages_and_trajectories(tmp_path: Path) -> None:
    seen = {attempt.progress(tmp_path)}
    for change in (
        lambda: commit(tmp_path, 1),
        lambda: (tmp_path / "stages/s/DONE").write_text("{}"),
        lambda: (tmp_path / "stages/ode/pairs").mkdir(parents=True),
        lambda: (tmp_path / "stages/ode/pairs/shard-0").touch(),
    ):
        change()
        seen.add(attempt.progress(tmp_path))
    assert len(seen) == 4  # an empty folder is none


def test_a_run_that_was_stopped_stays_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SLURM itself may queue the job again, after a lost node."""
    (tmp_path / "HOLD").write_text("stopped by somebody\n")
    assert attempt.begin(tmp_path, 1, environment()) == 20
    assert "does not start again: stopped by somebody" in capsys.readouterr().out
    assert (tmp_path / "HOLD").exists()


SCONTROL = """#!/bin/bash
echo "$@" >>{noted}
case $1 in
  -o) echo 'JobId=7 JobState={state} Restarts=0 NodeList=n[1-2] NumNodes=2 ExcNodeList=(null)' ;;
  requeue) {requeue} ;;
esac
"""


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`scheduler(state, requeue)`: a scontrol that says so; returns the file of what it was asked."""

    def play(state: str = "RUNNING", requeue: str = "true") -> Path:
        noted, program = tmp_path / "asked", tmp_path / "bin" / "scontrol"
        program.parent.mkdir()
        program.write_text(SCONTROL.format(noted=noted, state=state, requeue=requeue))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        monkeypatch.setattr(attempt.signal, "signal", lambda *_: None)  # this process is not the batch script's
        return noted

    return play


def record_of(run_dir: Path, failure: Failure) -> None:
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    (logs / f"failure-rank-{failure.rank}.json").write_text(json.dumps({**asdict(failure), "time": 0.0}))


def test_the_end_of_an_attempt_asks_the_scheduler_and_says_it_on_one_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scheduler: Callable[..., Path]
) -> None:
    asked, run_dir = scheduler(), tmp_path / "run"
    run_dir.mkdir()
    assert attempt.begin(run_dir, 2, environment()) == 0
    record_of(run_dir, SUSPECT)
    assert attempt.end(run_dir, 2, 30, False, environment()) == 10
    # A running job's hosts cannot be excluded; one that is back in the queue cannot start before this script is gone.
    assert [line for line in asked.read_text().splitlines() if not line.startswith("-o")] == [
        "requeue 7", "update JobId=7 ExcNodeList=n3",
    ]  # fmt: skip
    said = capsys.readouterr().out
    for part in ("7: queued again", "without n3", "because    n1 (rank 0): n1: nothing from n3", "checkpoint none"):
        assert part in said
    assert len(said.splitlines()) < 10


@pytest.mark.parametrize(
    ("state", "requeue", "marker", "exit_code", "part"),
    [
        ("COMPLETING", "true", "", 143, "ended by SLURM"),
        ("RUNNING", "echo 'no such job' >&2; exit 1", "", 20, "NOT queued again as it should be: scontrol: no such"),
        ("RUNNING", "true", "HOLD", 20, "stopped on request"),
        ("RUNNING", "true", "STOP", 20, "stopped on request"),
    ],
)
def test_a_job_that_must_not_or_cannot_come_back(
    state: str, requeue: str, marker: str, exit_code: int, part: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], scheduler: Callable[..., Path],
) -> None:  # fmt: skip
    asked, run_dir = scheduler(state, requeue), tmp_path / "run"
    run_dir.mkdir()
    assert attempt.begin(run_dir, 2, environment()) == 0
    if marker:
        (run_dir / marker).touch()
    assert attempt.end(run_dir, 2, 10, False, environment()) == exit_code
    assert part in capsys.readouterr().out
    assert ("requeue 7" in asked.read_text()) == ("NOT" in part)
