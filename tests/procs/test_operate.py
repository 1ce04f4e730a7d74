"""A run of the real command takes every request of an operator, while it trains and while it hangs."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mirai_dist.operate import control, events, status
from mirai_dist.operate.control import Request
from mirai_dist.state import commit
from tests.procs.test_exit_codes import LONG, RECIPE, REPOSITORY, ended, environment, train, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(base=REPOSITORY / "recipes/base/tiny_world.yaml"))
    return path


def mirai(verb: str, run_dir: Path, *arguments: str, expect: int = 0) -> str:
    """What `mirai VERB RUN ...` says."""
    command = [sys.executable, "-m", "mirai_launch", verb, str(run_dir), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def state(run_dir: Path) -> dict[str, Any]:
    return json.loads(mirai("status", run_dir, "--json"))


def trained(run_dir: Path, cycles: int, launcher: subprocess.Popen[str]) -> None:
    """Wait until a run has done so many cycles."""
    metrics = run_dir / "stages/teacher/metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= cycles, launcher)


def test_a_run_takes_every_request(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launcher = train(recipe, run_dir, LONG)
    try:
        trained(run_dir, 3, launcher)
        assert (state(run_dir)["state"], state(run_dir)["stage"]) == ("running", "teacher")
        assert mirai("save", run_dir).startswith(("save: saved before cycle", "save: asked"))
        mirai("profile", run_dir, "--rank", "1", "--cycles", "2")
        wait_until(lambda: any(each["event"] == "profiled" for each in events.read(run_dir)), launcher)
        said = mirai("stacks", run_dir)
        assert ":0" in said and ":1" in said and "dumped nothing" not in said
        assert (run_dir / "logs/rank-1.stacks").read_text().count("in run\n") >= 1
        last = state(run_dir)["cycle"] + 500  # far enough that it is still to come when the verb has started
        mirai("stop", run_dir, "--after", str(last))
        code, lines = ended(launcher)
    finally:
        launcher.send_signal(signal.SIGQUIT)
    assert code == 10
    [line] = lines
    assert f"stopped by an operator in teacher before cycle {last} position 0" in line
    saved = commit.complete(run_dir / "stages/teacher/checkpoints")
    assert [path.name for path in saved][-1] == commit.directory_name(last, 0)
    [saved_on_request] = [each["answer"] for each in events.read(run_dir) if each.get("request") == "save"]
    assert commit.directory_name(int(saved_on_request.split()[3]), 0) == saved[0].name
    [profiled] = [each for each in events.read(run_dir) if each["event"] == "profiled"]
    with gzip.open(run_dir / profiled["trace"], "rt") as file:
        assert json.load(file)["traceEvents"]
    found = state(run_dir)
    assert (found["state"], found["cycle"], found["starts"]) == ("stopped", last, 1)
    assert control.operator() in found["hold"] and (run_dir / "logs/rank-1.out").exists()


def test_a_start_forgets_what_was_asked_before_and_ends_with_a_summary(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    control.ask(run_dir, Request("stop", by="ann", stage="teacher"))
    control.hold(run_dir, "ann")
    command = [sys.executable, "-m", "mirai_launch", "train", str(recipe), "--nproc", "2", "--run-dir", str(run_dir)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert [each["answer"].split(":")[0] for each in events.read(run_dir) if each["event"] == "answered"] == ["dropped"]
    assert [each["event"] for each in events.read(run_dir) if each["event"] != "answered"] == [
        "start", "begun", "saved", "finished", "done"]
    assert done.stdout.splitlines()[-len(status.lines(status.of(run_dir))) :] == status.lines(status.of(run_dir))
    assert done.stdout.count("state      done") == 1 and not control.held(run_dir)


def test_slurm_does_not_revive_what_an_operator_stopped(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    control.hold(run_dir, "ann@login")
    ours = ["-m", "mirai_dist", "--recipe", str(recipe), "--run-dir", str(run_dir)]
    env = environment() | {"SLURM_RESTART_COUNT": "1"}
    done = subprocess.run([sys.executable, *ours], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 20
    assert "was stopped by ann@login at" in done.stderr and f"mirai requeue {run_dir}" in done.stderr
    assert control.held(run_dir) and events.read(run_dir) == []


def test_a_run_that_hangs_in_a_collective_says_where(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launcher = train(recipe, run_dir, LONG)
    stopped = 0
    try:
        trained(run_dir, 3, launcher)
        [stopped] = [pid for pid in children(launcher.pid) if "RANK=1" in variables(pid)]
        os.kill(stopped, signal.SIGSTOP)
        said = mirai("stacks", run_dir)
        assert "1 of 2 ranks dumped nothing" in said
        [line] = [line for line in said.splitlines() if line.startswith("1 in ")]
        assert line.endswith(":0") and any(name in line for name in ("all_gather", "all_reduce", "reduce_scatter"))
        assert "last position ended" in mirai("status", run_dir)
    finally:
        if stopped:
            os.kill(stopped, signal.SIGCONT)
        launcher.send_signal(signal.SIGQUIT)
        launcher.communicate(timeout=60)
    assert status.of(run_dir).state == "stale", "ended without a word"
    assert "its process is gone" in status.of(run_dir).why


def children(pid: int) -> list[int]:
    """Processes that a process started, and those they did."""
    own = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*own, *(below for each in own for below in children(each))]


def variables(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")
