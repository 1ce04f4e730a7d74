"""Requests to stop, from signals or from a STOP file, and the ranks' agreement on them.

A handler only sets a flag; the loop asks at its cycle positions, where stopping is safe. There the flags of all ranks
meet in the reduction of the metrics (cycle/desk.py); `agreed` is for where there is none. SLURM often sends TERM twice
and torchrun passes signals on, so a repeated signal means no more than the first.

torch is imported on use: the handlers must stand before the seconds that its import takes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


class StopRequest:
    """Set by any of SIGNALS, by `ask`, or by a file that a batch script puts down (RUN/STOP)."""

    def __init__(self, stop_file: Path | None = None) -> None:
        self._stop_file = stop_file
        self._reason = ""
        self._error: BaseException | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> StopRequest:
        """Take over SIGNALS. Only from the main thread (Python's rule).

        runtime/torchrun.py starts ranks with SIGNALS blocked; those that came since are delivered here.
        """
        for each in SIGNALS:
            self._previous[each] = signal.signal(each, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for each, handler in self._previous.items():
            signal.signal(each, handler)
        self._previous.clear()

    def ask(self, reason: str) -> None:
        """Request a stop from inside, such as when the job's time runs out."""
        self._reason = self._reason or reason

    @contextmanager
    def raising(self, error: BaseException) -> Iterator[None]:
        """In this block nothing needs saving: the first signal raises `error` at once, in the main thread."""
        self._error = error
        try:
            if self._reason:
                self._raise()
            yield
        finally:
            self._error = None

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop. Looks at the STOP file, so ask once a cycle, not once a tensor."""
        if not self._reason and self._stop_file is not None and self._stop_file.exists():
            self._reason = f"{self._stop_file.name} file"
        return bool(self._reason)

    @property
    def reason(self) -> str:
        """What asked first on this rank ("SIGTERM", "STOP file"); empty if nothing has, or only another rank."""
        return self._reason

    def agreed(self, group: dist.ProcessGroup | None = None) -> bool:
        """Whether any rank was asked: one all-reduce (MAX) of one integer. Every rank of the group must call it."""
        import torch
        import torch.distributed as dist

        on_gpu = dist.get_backend(group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        flag = torch.tensor(int(self.requested), dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        return bool(flag.item())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None  # a second signal must not interrupt the way out
        if error is not None:
            raise error
