"""Ranks but rank 0 write into files of their own, of bounded size; a failure is still told on the console."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirai_dist.observe import console as console_module
from mirai_dist.observe.console import Console

ROOT = Path(__file__).parents[2]
RANK = """
import os, sys, warnings
from pathlib import Path
from mirai_dist.runtime import guard, outlet
from mirai_dist.runtime.outlet import Outlet

run_dir, rank = Path(sys.argv[1]), int(sys.argv[2])
own = Outlet(run_dir, rank).redirect()
print("printed")
os.write(2, b"said by a library\\n")
if len(sys.argv) > 3:
    outlet.LARGEST = 10
    own.bound()
    own.bound()
    os.write(1, b"after\\n")
def fail():
    raise RuntimeError("only here")
guard.guarded(fail, run_dir, rank)
"""


def ran(run_dir: Path, *arguments: str) -> tuple[str, str]:
    """(standard output, standard error) of a rank that says things and fails."""
    command = [sys.executable, "-c", RANK, str(run_dir), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    return done.stdout, done.stderr


def test_rank_zero_speaks_on_the_console(tmp_path: Path) -> None:
    out, err = ran(tmp_path, "0")
    assert out == "printed\n" and "said by a library" in err and "Traceback" in err
    assert not list((tmp_path / "logs").glob("*.out"))


def test_another_rank_tells_the_console_only_that_it_failed(tmp_path: Path) -> None:
    out, err = ran(tmp_path, "3")
    assert out == ""
    [line] = err.splitlines()
    assert ":3 RuntimeError: only here; see " in line
    kept = (tmp_path / "logs/rank-3.out").read_text()
    assert "printed" in kept and "said by a library" in kept and "Traceback" in kept


def test_a_file_that_grew_too_large_is_begun_anew_and_says_so(tmp_path: Path) -> None:
    ran(tmp_path, "3", "small")
    logs = tmp_path / "logs"
    assert (logs / "rank-3.out.1").exists() and not list(logs.glob("rank-3.out.2"))
    now = (logs / "rank-3.out").read_text()
    assert now.startswith("mirai: continued") and "after\n" in now


def test_a_log_is_bounded_and_says_where_it_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "LARGEST", 2000)
    path = tmp_path / "rank-0.log"
    console = Console(0, "n1", path, stream=io.StringIO())
    for number in range(200):
        console.say(f"line {number}")
    console.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rank-0.log", "rank-0.log.1"]
    lines = path.read_text().splitlines()
    assert lines[0].endswith("n1:0 continued from rank-0.log.1") and lines[-1].endswith("n1:0 line 199")
    assert all(each.stat().st_size < 2200 for each in tmp_path.iterdir())
