"""Several ranks in a test: `threads` (in this process, milliseconds) and `torchrun` (real processes, seconds)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# torch's own test helper, and the only place where this project touches it.
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

REPOSITORY = Path(__file__).parents[2]
RUN_TIMEOUT = 120.0
Body = Callable[[int], Any]
_set_thread_isolation_mode = torch._C._distributed_c10d._set_thread_isolation_mode  # pyright: ignore


@pytest.fixture(autouse=True)
def _quiet_checkpoint_log() -> None:
    """torch logs several debug lines a tensor, under which the report of a failed test could not be found."""
    for name in list(logging.root.manager.loggerDict):
        if name.endswith("dcp_logger"):
            logging.getLogger(name).setLevel(logging.WARNING)


def run_threads(world_size: int, body: Body, timeout: float) -> list[Any]:
    """Call body(rank) in one thread a rank, each with its own process group; returns what they return, by rank."""
    results: list[Any] = [None] * world_size
    errors: list[tuple[int, BaseException]] = []
    _set_thread_isolation_mode(True)
    _install_threaded_pg()
    store = dist.HashStore()

    def rank_main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            results[rank] = body(rank)
        except BaseException as error:
            errors.append((rank, error))
            ProcessLocalGroup.exception_handle(error)  # wakes the ranks that wait for this one
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    ranks = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world_size)]
    try:
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(timeout)
        stuck = [rank for rank, thread in enumerate(ranks) if thread.is_alive()]
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        _set_thread_isolation_mode(False)
    if errors:
        rank, error = errors[0]
        error.add_note(f"first raised on rank {rank} of {world_size}")
        raise error
    assert not stuck, f"ranks {stuck} of {world_size} still run after {timeout} s"
    return results


@pytest.fixture
def threads() -> Callable[..., Callable[[Body], list[Any]]]:
    """`threads(world_size)(body)`: body(rank) on each of several ranks that are threads of this process."""

    def of_size(world_size: int, timeout: float = 60.0) -> Callable[[Body], list[Any]]:
        return lambda body: run_threads(world_size, body, timeout)

    return of_size


def _first_failure(folder: Path) -> str:
    """The record of the rank that raised first, else where the ranks hung; empty when they left no record."""
    errors = sorted(folder.glob("error-*"))
    hangs = [path for path in sorted(folder.glob("hang-*")) if path.stat().st_size]
    if errors:
        return f"{errors[0].name[-6:]} failed first:\n{errors[0].read_text()}"
    return "\n".join(f"{path.name}: {path.read_text()}" for path in hangs)


@pytest.fixture
def torchrun(tmp_path: Path) -> Callable[..., Path]:
    """`torchrun(nproc, function)`: a function of the test file, called as function(folder) on each real gloo rank.

    Returns the folder. The test fails with the traceback of the rank that failed first, with where each rank stood
    when they hang for `timeout` seconds, or with the end of the output when they died without a word.
    """

    def run(nproc: int, function: Callable[[Path], None], timeout: float = RUN_TIMEOUT) -> Path:
        paths = [REPOSITORY, REPOSITORY / "launcher", REPOSITORY / "kernels"]
        environment = os.environ | {
            # What is there already goes first: it guards the ranks against the network (tests/plugin_no_network.py).
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *map(str, paths)])),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}",
                   str(Path(__file__).with_name("rank_main.py")), function.__code__.co_filename, function.__name__,
                   str(tmp_path), str(timeout)]
        # The ranks end themselves after `timeout`; torchrun then ends too, whatever state they were in.
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout + 60)
        if result.returncode:
            pytest.fail(f"{function.__name__} on {nproc} ranks: {_first_failure(tmp_path) or result.stderr[-4000:]}",
                        pytrace=False)
        return tmp_path

    return run
