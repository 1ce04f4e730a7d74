"""The two fixtures that every test of several ranks stands on: failures must surface, and name the right rank."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def test_threads_have_a_group_each(threads) -> None:
    def body(rank: int) -> tuple[int, float]:
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        return dist.get_rank(), total.item()

    assert threads(3)(body) == [(0, 3.0), (1, 3.0), (2, 3.0)]
    assert not dist.is_initialized()


def test_the_error_of_one_thread_reaches_the_test_while_the_others_wait(threads) -> None:
    def body(rank: int) -> None:
        if rank == 1:
            raise LookupError("only here")
        dist.all_reduce(torch.zeros(1))

    started = time.monotonic()
    with pytest.raises(LookupError, match="only here") as raised:
        threads(2)(body)
    assert raised.value.__notes__ == ["first raised on rank 1 of 2"] and time.monotonic() - started < 20
    assert threads(2)(lambda rank: dist.get_world_size()) == [2, 2], "the next group starts clean"


def fails_on_rank_one(folder: Path) -> None:
    if dist.get_rank() == 1:
        raise LookupError("only here")
    dist.barrier()


def hangs(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def test_the_first_failing_process_is_shown(torchrun) -> None:
    with pytest.raises(pytest.fail.Exception, match="(?s)rank-1 failed first.*LookupError: only here"):
        torchrun(2, fails_on_rank_one)


@pytest.mark.slow
def test_processes_that_hang_end_and_say_where(torchrun, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="(?s)hang-rank-0: Timeout.*in hangs"):
        torchrun(1, hangs, timeout=15)
    ranks = [entry.name for entry in tmp_path.iterdir() if entry.name.isdigit()]
    assert ranks and not any(Path("/proc", rank).exists() for rank in ranks)
