"""The way out of an error or a stop: a record, one line, and a hard exit.

No collective and no tidy shutdown: after an error inside a collective both may wait for ever, and a rank that
does not exit holds the whole allocation.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from mirai_dist.operate import events
from mirai_dist.runtime import outlet

FAILED = 1
REQUEUE = 10
DO_NOT_REQUEUE = 20
SUSPECT_NODE = 30
PATIENCE = 5.0  # seconds another rank waits for rank 0 to fail by the same error
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_RECENT = 60.0  # seconds; an older record is of an earlier attempt


def exit_code(error: BaseException) -> int:
    """Exit code of an exception: its own `exit_code`, 20 where a disk or quota is full, else 1.

    What an exception was raised from counts too: a full disk is often reported through somebody else's error.
    """
    for each in _causes(error):
        own = getattr(each, "exit_code", None)
        if isinstance(own, int):
            return own
        if isinstance(each, OSError) and each.errno in _DISK_FULL:
            return DO_NOT_REQUEUE
    return FAILED


def guarded(main: Callable[[], int | None], run_dir: Path, rank: int | None = None) -> int:
    """Run `main` and return its exit code (None is 0); on any exception write the record and leave hard.

    run_dir: gets logs/failure-rank-N.json. rank: by default what the launcher's environment says.
    SystemExit passes through: it is how a run ends on purpose.
    """
    try:
        return main() or 0
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001  nothing may keep this process alive
        leave(error, run_dir, environment_rank() if rank is None else rank)


@contextmanager
def ending(run_dir: Path, rank: int) -> Iterator[None]:
    """Write down, once for all ranks, how a run ends whose directory is known to be its own: done, stopped, failed."""
    try:
        yield
    except BaseException as error:
        try:
            _write_end(error, run_dir, rank)
        except OSError as full:
            error.add_note(f"no event of it ({full})")
        raise
    if rank == 0:
        events.append_end(run_dir, "done")


def _write_end(error: BaseException, run_dir: Path, rank: int) -> None:
    if _class_code(error) == REQUEUE:
        if rank == 0:
            events.append_end(run_dir, "stopped", by=str(error))
        return
    events.append_end(
        run_dir,
        "failed",
        host=socket.gethostname(),
        rank=rank,
        error=" ".join(f"{type(error).__name__}: {error}".split()),
        exit_code=exit_code(error),
        record=f"logs/{_record_path(run_dir, rank).name}",
    )


def leave(error: BaseException, run_dir: Path, rank: int) -> NoReturn:
    """Record the exception, say one line on standard error and end the process at once.

    An error that all ranks share is told by rank 0 alone. A stop on request (its class says to requeue) is no
    failure: it leaves no record.
    """
    code = exit_code(error)
    try:
        if _class_code(error) == REQUEUE:
            if rank == 0:
                _say(rank, str(error))
        else:
            _tell(error, _write_record(error, code, run_dir, rank), run_dir, rank)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _tell(error: BaseException, where: str, run_dir: Path, rank: int) -> None:
    own = _class_code(error)
    # A suspect node is told by each rank that saw it, unless all saw the same.
    shared = own == DO_NOT_REQUEUE or getattr(error, "shared", False)
    if shared and rank != 0 and _rank_zero_tells(error, run_dir):
        return
    if own not in (DO_NOT_REQUEUE, SUSPECT_NODE):
        traceback.print_exception(error, file=sys.stderr)
    _say(rank, f"{type(error).__name__}: {str(error) or 'no message'}; {where}")


def _say(rank: int, text: str) -> None:
    # Not through the console: it may be what failed, or hold a lock that nobody will give back.
    outlet.tell_console(f"{socket.gethostname()}:{rank} {' '.join(text.split())}")


def _rank_zero_tells(error: BaseException, run_dir: Path) -> bool:
    """Whether rank 0 failed by the same error: its record is there, or comes within moments."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            record = json.loads(_record_path(run_dir, 0).read_text(encoding="utf-8"))
        except OSError:
            record = {"time": 0.0}
        same = (record.get("type"), record.get("message")) == (type(error).__name__, str(error))
        if same and abs(time.time() - record["time"]) < _RECENT:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def environment_rank() -> int:
    """Rank as torchrun or srun tells it, 0 without either: usable before anything is connected."""
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0


def _write_record(error: BaseException, code: int, run_dir: Path, rank: int) -> str:
    record: dict[str, Any] = {
        "type": type(error).__name__,
        "message": str(error),
        "exit_code": code,
        "host": socket.gethostname(),
        "rank": rank,
        "suspects": getattr(error, "suspects", [socket.gethostname()] if code == SUSPECT_NODE else []),
        "time": time.time(),
        "traceback": "".join(traceback.format_exception(error)),
    }
    path = _record_path(run_dir, rank)
    beside = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)  # other ranks read rank 0's
    except OSError as full:
        # The error itself is still told on the console; the reason there is no record belongs beside it.
        return f"no record ({full})"
    return f"see {path}"


def _record_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"failure-rank-{rank}.json"


def _class_code(error: BaseException) -> int | None:
    """What the exception's own class says: it then explains itself in one line."""
    code = getattr(type(error), "exit_code", None)
    return code if isinstance(code, int) else None


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
