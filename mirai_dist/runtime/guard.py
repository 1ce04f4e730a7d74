"""The way out of an error: a record, one line, and a hard exit.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

FAILED = 1
DO_NOT_REQUEUE = 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


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


def leave(error: BaseException, run_dir: Path, rank: int) -> NoReturn:
    """Record the exception, say one line on standard error and end the process at once."""
    code = exit_code(error)
    try:
        where = _write_record(error, code, run_dir, rank)
        if not _is_users(error):
            traceback.print_exception(error, file=sys.stderr)
        summary = " ".join(str(error).split()) or "no message"
        # Not through the console: it may be what failed, or hold a lock that nobody will give back.
        sys.stderr.write(f"{socket.gethostname()}:{rank} {type(error).__name__}: {summary}; {where}\n")
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


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
        "time": time.time(),
        "traceback": "".join(traceback.format_exception(error)),
    }
    path = run_dir / "logs" / f"failure-rank-{rank}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
    except OSError as full:
        # The error itself is still told on the console; the reason there is no record belongs beside it.
        return f"no record ({full})"
    return f"see {path}"


def _is_users(error: BaseException) -> bool:
    """Errors that explain themselves in one line: those whose class says not to requeue."""
    return getattr(type(error), "exit_code", None) == DO_NOT_REQUEUE


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
