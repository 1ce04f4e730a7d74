"""Exit codes, the failure record, and the hard exit."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mirai_dist.config import RecipeError
from mirai_dist.runtime.bootstrap import LaunchError
from mirai_dist.runtime.guard import exit_code, guarded
from mirai_dist.runtime.nodelist import NodeListError

ROOT = Path(__file__).parents[2]


class SuspectNode(RuntimeError):
    exit_code = 30


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("x"), 1),
        (KeyboardInterrupt(), 1),
        (RecipeError("a", "b"), 20),
        (LaunchError("x"), 20),
        (NodeListError("x"), 20),
        (SuspectNode("x"), 30),
        (OSError(errno.ENOSPC, "full"), 20),
        (OSError(errno.EDQUOT, "quota"), 20),
        (OSError(errno.EACCES, "no"), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_the_cause_of_an_error_counts() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as full:
            raise RuntimeError("cannot save") from full
    except RuntimeError as error:
        assert exit_code(error) == 20


def test_the_good_path_returns() -> None:
    assert guarded(lambda: None, Path("unused")) == 0
    assert guarded(lambda: 10, Path("unused")) == 10


def run(body: str, run_dir: Path, rank: str = "3") -> subprocess.CompletedProcess[str]:
    """A process whose guarded main is `body`; its exit handler would betray a tidy exit."""
    code = "\n".join(
        [
            "import atexit, sys, threading, time",
            "from pathlib import Path",
            "from mirai_dist.config import RecipeError",
            "from mirai_dist.runtime import guard",
            "from mirai_dist.runtime.guard import guarded",
            "atexit.register(lambda: print('tidy exit'))",
            "def main():",
            *[f"    {line}" for line in body.splitlines()],
            f"sys.exit(guarded(main, Path({str(run_dir)!r})))",
        ]
    )
    env = {"RANK": rank, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_failure_leaves_a_record_and_one_line_and_exits_hard(tmp_path: Path) -> None:
    before = time.time()
    result = run("print('started', end='')\nraise RuntimeError('first\\nsecond')", tmp_path / "run")
    assert result.returncode == 1
    assert result.stdout == "started"  # flushed, and no exit handler ran
    assert "Traceback" in result.stderr
    path = tmp_path / "run/logs/failure-rank-3.json"
    last = result.stderr.splitlines()[-1]
    assert last.endswith(f":3 RuntimeError: first second; see {path}")
    record = json.loads(path.read_text())
    told = {name: record[name] for name in ("type", "message", "rank", "exit_code")}
    assert told == {"type": "RuntimeError", "message": "first\nsecond", "rank": 3, "exit_code": 1}
    assert before <= record["time"] <= time.time()
    assert record["host"] and "in main" in record["traceback"]


def test_a_users_error_shows_no_traceback(tmp_path: Path) -> None:
    result = run("guard.PATIENCE = 0.2\nraise RecipeError('x.yaml:3', 'unknown key nmae')", tmp_path)
    assert result.returncode == 20
    assert len(result.stderr.splitlines()) == 1
    assert "RecipeError: x.yaml:3: unknown key nmae; see " in result.stderr
    assert "Traceback" in json.loads((tmp_path / "logs/failure-rank-3.json").read_text())["traceback"]


@pytest.mark.parametrize(("rank", "lines"), [("0", ["stopped by SIGTERM"]), ("1", [])])
def test_a_stop_is_no_failure_and_is_told_once(tmp_path: Path, rank: str, lines: list[str]) -> None:
    body = "class Stopped(RuntimeError):\n    exit_code = 10\nraise Stopped('stopped by\\nSIGTERM')"
    result = run(body, tmp_path, rank)
    assert result.returncode == 10
    assert [line.partition(f":{rank} ")[2] for line in result.stderr.splitlines()] == lines
    assert not (tmp_path / "logs").exists()


def test_an_error_that_all_ranks_share_is_told_by_rank_zero(tmp_path: Path) -> None:
    shared, own = ("raise RecipeError('x.yaml:3', 'unknown key nmae')", "raise RecipeError('x.yaml:4', 'no')")
    assert len(run(shared, tmp_path, "0").stderr.splitlines()) == 1
    assert run(shared, tmp_path, "1").stderr == ""
    assert json.loads((tmp_path / "logs/failure-rank-1.json").read_text())["exit_code"] == 20
    assert "x.yaml:4: no; see " in run(f"guard.PATIENCE = 0.2\n{own}", tmp_path, "1").stderr


def test_an_error_of_an_earlier_attempt_does_not_silence_this_one(tmp_path: Path) -> None:
    body = "guard.PATIENCE = 0.2\nraise RecipeError('x.yaml:3', 'unknown key nmae')"
    run(body, tmp_path, "0")
    path = tmp_path / "logs/failure-rank-0.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "time": record["time"] - 3600}))
    assert "unknown key nmae" in run(body, tmp_path, "1").stderr


def test_rank_zero_may_come_later(tmp_path: Path) -> None:
    command = "raise RecipeError('x.yaml:3', 'unknown key nmae')"
    with ThreadPoolExecutor(2) as ranks:
        other = ranks.submit(run, command, tmp_path, "1")
        zero = ranks.submit(run, f"time.sleep(1)\n{command}", tmp_path, "0")
        assert (other.result().stderr, len(zero.result().stderr.splitlines())) == ("", 1)


def test_a_thread_that_never_ends_does_not_keep_the_process(tmp_path: Path) -> None:
    started = time.monotonic()
    result = run("threading.Thread(target=time.sleep, args=(50,)).start()\nraise ValueError('x')", tmp_path)
    assert (result.returncode, time.monotonic() - started < 25) == (1, True)


def test_it_exits_even_where_no_record_can_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    result = run("raise ValueError('x')", blocked)
    assert result.returncode == 1
    assert "ValueError: x; no record (" in result.stderr


def test_an_exit_on_purpose_passes(tmp_path: Path) -> None:
    result = run("sys.exit(10)", tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (10, "tidy exit\n", "")
    assert not (tmp_path / "logs").exists()
