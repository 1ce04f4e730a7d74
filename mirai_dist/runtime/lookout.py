"""A thread of every rank that answers while the loop does not: stack dumps, and a sign of life.

A rank that hangs in a collective hangs in C++ without Python's lock, so a thread still runs. Where even that lock is
held, `kill -URG PID` dumps the stacks from C; nobody else uses that signal, and processes ignore it by default.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mirai_dist.operate import control, events

SECONDS = 2.0  # between two looks: one stat of RUN/control by each rank
SETTLE = 3  # looks after which every rank has seen a request
LARGEST = 16 << 20  # bytes of a rank's stack dumps


class Lookout:
    """Looks at RUN/control. host: of this rank. chore: done at every look. Stacks: RUN/logs/rank-N.stacks."""

    def __init__(
        self, run_dir: Path, rank: int, host: str, chore: Callable[[], None] = lambda: None, seconds: float = SECONDS
    ) -> None:
        self._run_dir, self._rank, self._chore, self._seconds = run_dir, rank, chore, seconds
        self._title = f"{host}:{rank}"
        self._stacks = run_dir / "logs" / f"rank-{rank}.stacks"
        self._seen = 0
        self._dumped: dict[str, int] = {}  # request -> looks since
        self._over = threading.Event()

    def start(self) -> Lookout:
        """Begin to look; needs no end, the process takes the thread along."""
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        self._signalled = self._stacks.open("a", encoding="utf-8")
        faulthandler.enable()  # what a crash in C leaves in the rank's raw output
        faulthandler.register(signal.SIGURG, file=self._signalled, all_threads=True)
        threading.Thread(target=self._run, name="lookout", daemon=True).start()
        return self

    def stop(self) -> None:
        """No more looks."""
        self._over.set()
        faulthandler.unregister(signal.SIGURG)
        self._signalled.close()

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            try:
                self.look()
            except OSError:
                # A shared disk may be away for a moment. If it stays away the run itself will say so.
                continue

    def look(self) -> None:
        """Give a sign of life, and dump stacks where asked. Raises OSError."""
        self._chore()
        if self._rank == 0:
            (self._run_dir / control.FOLDER / control.ALIVE).touch()
        for name in [*self._dumped]:
            self._dumped[name] += 1
        # The folder's time changes with its names, not with the sign of life in it.
        folder = self._run_dir / control.FOLDER
        changed = folder.stat().st_mtime_ns if folder.exists() else 0
        if changed != self._seen or self._dumped:
            self._seen = changed
            self._answer([each for each in control.pending(self._run_dir) if each.verb == "stacks"])

    def _answer(self, requests: list[control.Request]) -> None:
        names = {request.name for request in requests}
        self._dumped = {name: looks for name, looks in self._dumped.items() if name in names}
        for request in requests:
            if request.name not in self._dumped:
                self._dump(request)
                self._dumped[request.name] = 0
            elif self._dumped[request.name] >= SETTLE and self._rank == 0:
                events.append(self._run_dir, "answered", **request.answer("logs/rank-*.stacks"))
                control.remove(self._run_dir, request)

    def _dump(self, request: control.Request) -> None:
        if self._stacks.exists() and self._stacks.stat().st_size > LARGEST:
            os.truncate(self._stacks, 0)  # whoever has it open appends
        with self._stacks.open("a", encoding="utf-8") as file:
            file.write(f"=== {self._title} {time.strftime('%Y-%m-%d %H:%M:%S')} {request.name}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

