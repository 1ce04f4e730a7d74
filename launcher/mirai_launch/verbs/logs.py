"""`mirai logs`: what a rank of a run has said, and what its failed ranks died of."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mirai_dist.config.error import RecipeError
from mirai_dist.operate import status
from mirai_launch import console, operating

LINES = 200
SHOWN = 8  # files of raw output that --errors names
SECONDS = 0.5  # between two looks of --follow


def configure(parser: argparse.ArgumentParser) -> None:
    operating.add_run(parser)
    parser.add_argument("--rank", type=int, default=0, help="whose log (default 0)")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends or Ctrl-C")
    parser.add_argument("--errors", action="store_true", help="the failures of the last start instead")
    parser.add_argument("--lines", type=int, default=LINES, help=f"last lines to show (default {LINES})")


def run(arguments: argparse.Namespace) -> int:
    """Print a log, or the failures. Raises RecipeError."""
    run_dir = arguments.run
    status.members(run_dir)
    if arguments.errors:
        return _errors(run_dir)
    path = run_dir / "logs" / f"rank-{arguments.rank}.log"
    if not path.exists():
        raise RecipeError(str(path), f"there is none; {_others(run_dir)}")
    _show(path, arguments.lines)
    if arguments.follow:
        _follow(path, run_dir)
    return 0


def _show(path: Path, lines: int) -> None:
    last: deque[str] = deque(maxlen=max(1, lines))
    count = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            last.append(line)
            count += 1
    if count > len(last):
        console.say(f"... {count - len(last)} lines before these in {path}")
    _say(last)


def _follow(path: Path, run_dir: Path) -> None:
    """Say what is added from now on, until the run has ended; a log that was begun anew is opened anew."""
    file = path.open(encoding="utf-8", errors="replace")
    file.seek(0, os.SEEK_END)
    try:
        ended = False
        while not ended:
            ended = status.of(run_dir).ended  # before the last look, so that nothing is left unsaid
            _say(file)
            if path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                file.close()
                file = path.open(encoding="utf-8", errors="replace")
                _say(file)
            time.sleep(0 if ended else SECONDS)
    finally:
        file.close()


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        console.say(line.rstrip("\n"))


def _others(run_dir: Path) -> str:
    found = sorted((run_dir / "logs").glob("rank-*.log"))
    return f"the run has logs of {len(found)} ranks" if found else "no rank of the run has said anything yet"


def _errors(run_dir: Path) -> int:
    records: list[dict[str, Any]] = [
        json.loads(path.read_text(encoding="utf-8")) for path in (run_dir / "logs").glob("failure-rank-*.json")
    ]
    if not records:
        console.say("no rank has recorded a failure")
    records.sort(key=lambda record: record["time"])
    for record in records:
        error = " ".join(f"{record['type']}: {record['message']}".split())
        console.say(f"{_moment(record['time'])} {record['host']}:{record['rank']} {error}")
    for line in records[0]["traceback"].splitlines() if records else ():
        console.say(f"  {line}")
    raw = sorted(path for path in (run_dir / "logs").glob("rank-*.out") if path.stat().st_size)
    for path in raw[:SHOWN]:
        console.say(f"raw output: {path}")
    if len(raw) > SHOWN:
        console.say(f"raw output of {len(raw) - SHOWN} more ranks beside these")
    return 0


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
