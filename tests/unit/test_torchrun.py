"""Which of the ranks' exit codes is the run's, when torchrun's own table is worth reading, who gets signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mirai_dist.runtime.torchrun import Forwarder, exit_code, said

TERM, KILL, SEGV = -15, -9, -11


def failures(*ranks: tuple[int, int]) -> Any:
    """(exit code, second it ended at) of each failed rank, in torchrun's form."""
    return [SimpleNamespace(exitcode=code, timestamp=second) for code, second in ranks]


@pytest.mark.parametrize(
    ("ranks", "code"),
    [
        ([(10, 0), (10, 0)], 10),
        ([(TERM, 0), (20, 1)], 20),  # torchrun ends the others by TERM, and may see that first
        ([(1, 0), (20, 1)], 20),  # a peer that lost its connection
        ([(KILL, 0), (10, 1)], 10),
        ([(10, 1), (30, 0)], 30),
        ([(20, 0), (30, 1)], 20),
        ([(10, 0), (20, 0)], 20),  # never requeued beside "do not"
        ([(20, 0), (30, 0)], 30),
        ([(1, 0), (TERM, 0)], 1),
        ([(TERM, 0), (1, 0)], 1),
        ([(1, 0), (KILL, 0)], 137),
        ([(1, 0), (KILL, 31)], 1),  # torchrun kills who does not answer TERM
        ([(KILL, 0), (1, 1)], 137),
        ([(SEGV, 0)], 139),
        ([(TERM, 0), (TERM, 0)], 143),
    ],
)
def test_the_first_that_left_on_purpose_decides(ranks: list[tuple[int, int]], code: int) -> None:
    assert exit_code(failures(*ranks)) == code


@pytest.mark.parametrize("codes", [(10, 10), (20, TERM), (1, 1), (1, TERM), (30, KILL)])
def test_ranks_that_spoke_need_no_table(codes: tuple[int, ...]) -> None:
    assert said(failures(*((code, 0) for code in codes)))


@pytest.mark.parametrize("codes", [(KILL, 1), (SEGV, TERM), (2, 2), (TERM, TERM)])
def test_ranks_that_died_without_a_word_do(codes: tuple[int, ...]) -> None:
    assert not said(failures(*((code, 0) for code in codes)))


def test_a_signal_that_comes_while_ranks_start_reaches_them() -> None:
    ranks = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    forwarder = Forwarder()
    with forwarder.starting():
        forwarder(signal.SIGUSR1, None)
        assert [rank.poll() for rank in ranks] == [None, None]
        forwarder.started(rank.pid for rank in ranks)
    assert [rank.wait(30) for rank in ranks] == [-signal.SIGUSR1, -signal.SIGUSR1]
    forwarder(signal.SIGUSR1, None)  # to ranks that are gone: no harm


def test_only_ranks_get_signals() -> None:
    """The number of a rank that is gone may be a stranger's by now."""
    shell = ["sh", "-c", "sleep 60 >&2 & echo $!"]
    stranger = int(subprocess.run(shell, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout)
    rank = subprocess.Popen(["sleep", "60"])
    forwarder = Forwarder()
    forwarder.started([stranger, rank.pid])
    forwarder(signal.SIGTERM, None)
    assert rank.wait(30) == -signal.SIGTERM
    time.sleep(0.2)
    state = Path(f"/proc/{stranger}/stat").read_text().rpartition(")")[2].split()[0]
    os.kill(stranger, signal.SIGKILL)
    assert state == "S", "neither gone nor a zombie"


def test_before_there_are_ranks_a_signal_ends_the_launcher() -> None:
    code = "import os; from mirai_dist.runtime import torchrun as t; t.Forwarder().install(); os.kill(os.getpid(), 12)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (10, "mirai: SIGUSR2 before the ranks were started\n")
