"""A process that really is slow."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back(pid: int, period: float = 0.5) -> Iterator[None]:
    """In this block a process gets a tenth of what others get of this machine: it is stopped and continued, over and
    over. What others get depends on what else runs here, so that is measured first."""
    over = threading.Event()
    begin, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < 0.3:
        pass
    share = 0.1 * min(2 / 3, (time.process_time() - cpu) / (time.perf_counter() - begin))
    handle = os.pidfd_open(pid)  # stays this process's, whatever becomes of the number

    def alternate() -> None:
        try:
            while not over.is_set():
                signal.pidfd_send_signal(handle, signal.SIGSTOP)
                over.wait(period * (1 - share))
                signal.pidfd_send_signal(handle, signal.SIGCONT)
                time.sleep(period * share)
        except ProcessLookupError:
            return  # it has ended

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        os.close(handle)
