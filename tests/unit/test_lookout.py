"""A thread answers for a rank that hangs: its stacks are dumped once a request, and the request is answered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from mirai_dist.operate import control, events, stacks
from mirai_dist.operate.control import Request
from mirai_dist.runtime.lookout import SETTLE, Lookout

ROOT = Path(__file__).parents[2]


def test_every_rank_dumps_once_and_rank_zero_answers(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    control.open_for(tmp_path)
    ranks = [Lookout(tmp_path, rank, f"n{rank}") for rank in (1, 0)]
    asked = control.ask(tmp_path, Request("stacks", by="ann"))
    saved = control.ask(tmp_path, Request("save"))
    for _ in range(SETTLE + 1):
        assert asked in control.pending(tmp_path), "not every rank may have looked yet"
        for rank in ranks:
            rank.look()
    assert control.pending(tmp_path) == [saved], "the loop's requests are left to the loop"
    assert [each.rank for each in stacks.latest(tmp_path, asked.name)] == ["n0:0", "n1:1"]
    [answer] = events.read(tmp_path)
    assert (answer["request"], answer["name"], answer["by"]) == ("stacks", asked.name, "ann")
    for rank in ranks:
        rank.look()
    again = control.ask(tmp_path, Request("stacks"))
    ranks[0].look()
    assert (tmp_path / "logs/rank-1.stacks").read_text().count("=== n1:1 ") == 2
    assert [each.rank for each in stacks.latest(tmp_path, again.name)] == ["n1:1"]


def test_only_rank_zero_gives_the_sign_of_life(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    control.open_for(tmp_path)
    alive = tmp_path / control.FOLDER / control.ALIVE
    Lookout(tmp_path, 1, "n1").look()
    assert not alive.exists()
    Lookout(tmp_path, 0, "n0").look()
    assert time.time() - alive.stat().st_mtime < 10


HANGS = """
import sys, threading, time
from pathlib import Path
from mirai_dist.runtime.lookout import Lookout

def waits_for_ever(lock):
    lock.acquire()

run_dir = Path(sys.argv[1])
Lookout(run_dir, 3, "n3", seconds=0.05).start()
(run_dir / "ready").touch()
lock = threading.Lock()
lock.acquire()
waits_for_ever(lock)
"""


def test_a_hung_process_says_where_by_request_and_by_signal(tmp_path: Path) -> None:
    control.open_for(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(HANGS), str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (tmp_path / "ready").exists())
        asked = control.ask(tmp_path, Request("stacks"))
        wait_for(lambda: bool(stacks.latest(tmp_path, asked.name)))
        [stack] = stacks.latest(tmp_path, asked.name)
        assert stack.rank == "n3:3" and stack.frames[0][1] == "waits_for_ever"
        path = tmp_path / "logs/rank-3.stacks"
        before = path.stat().st_size
        process.send_signal(signal.SIGURG)
        wait_for(lambda: path.stat().st_size > before)
        assert path.read_text()[before:].count("in waits_for_ever") == 1
        assert process.poll() is None, "the signal dumps, and does not end"
        process.send_signal(signal.SIGSEGV)
        said = process.communicate(timeout=60)[1]
        assert "Segmentation fault" in said and "in waits_for_ever" in said
    finally:
        process.kill()
        process.communicate()


def wait_for(true, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ranks_that_stand_at_the_same_place_are_one_group(tmp_path: Path) -> None:
    def stack(rank: str, *frames: tuple[str, str]) -> stacks.Stack:
        return stacks.Stack(rank, frames)

    library = "/x/site-packages/torch/distributed/distributed_c10d.py:9"
    reduce = (library, "all_reduce"), ("/run/metrics.py:82", "reduce")
    stuck = ("/run/data.py:5", "read"), ("/run/phases.py:7", "flow_update")
    groups = stacks.grouped([stack("a:0", *reduce), stack("b:1", *stuck), stack("b:2", *reduce)])
    assert groups == [
        ("read (data.py:5) in flow_update (phases.py:7)", ["b:1"]),
        ("all_reduce (distributed_c10d.py:9) in reduce (metrics.py:82)", ["a:0", "b:2"]),
    ]
