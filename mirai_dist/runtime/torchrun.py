"""torchrun, with the ranks' exit codes and time to save: `python -m mirai_dist.runtime.torchrun <its arguments>`.

torchrun itself turns every failure into exit code 1, a table and a traceback; it dies of USR1 and USR2, and kills
the ranks 30 seconds after TERM. Here signals are passed on as often as they come and the ranks end by themselves,
after saving. SIGQUIT (Ctrl-\\ in a terminal) is left to torchrun: it ends the ranks at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mirai_dist.config import RecipeError
from mirai_dist.operate import status
from mirai_dist.runtime.guard import DO_NOT_REQUEUE, FAILED, REQUEUE, SUSPECT_NODE
from mirai_dist.runtime.signals import SIGNALS

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

ON_PURPOSE = (REQUEUE, DO_NOT_REQUEUE, SUSPECT_NODE)
# What torchrun logs when a rank ends with anything but 0: who failed, whom it sends TERM.
_NOISY = logging.getLogger("torch.distributed.elastic.multiprocessing.api")


class Forwarder:
    """Signal handler: passes SIGNALS on to the ranks. Before there are any, a signal ends this process."""

    def __init__(self) -> None:
        self._pids: tuple[int, ...] = ()
        self._starting = False
        self._early: list[int] = []

    def install(self) -> Forwarder:
        """Take over SIGNALS."""
        for each in SIGNALS:
            signal.signal(each, self)
        return self

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Ranks started in this block inherit SIGNALS blocked, and get them when they can answer."""
        self._starting = True
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def started(self, pids: Iterable[int]) -> None:
        """Pass signals on to these processes from now on, and those that came while they were started."""
        self._pids = tuple(pids)
        for number in self._early:
            self._pass_on(number)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._pids:
            self._pass_on(number)
        elif self._starting:
            self._early.append(number)  # another thread took it: this one holds them back
        else:
            os.write(2, f"mirai: {signal.Signals(number).name} before the ranks were started\n".encode())
            os._exit(REQUEUE)

    def _pass_on(self, number: int) -> None:
        for pid in self._pids:
            try:
                # Raises where the rank is gone and its number may be somebody else's.
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                os.kill(pid, number)
            except (ChildProcessError, ProcessLookupError):
                continue


def exit_code(failures: Iterable[ProcessFailure]) -> int:
    """Exit code of a run from its failed ranks.

    The first that left on purpose decides (within one second, the highest code: never "requeue me" beside "do not").
    Else the first that crashed, not counting those that torchrun then ended by TERM (within one second, one that a
    signal killed: the others fail because it is gone). A signal's number counts from 128, as in a shell.
    """
    every = list(failures)
    on_purpose = [each for each in every if each.exitcode in ON_PURPOSE]
    if on_purpose:
        return min(on_purpose, key=lambda each: (each.timestamp, -each.exitcode)).exitcode
    crashed = [each for each in every if each.exitcode != -signal.SIGTERM] or every
    code = min(crashed, key=lambda each: (each.timestamp, each.exitcode)).exitcode
    return code if code > 0 else 128 - code


def said(failures: Iterable[ProcessFailure]) -> bool:
    """Whether the failed ranks have told the user why (runtime/guard.py), so that torchrun's table would bury it."""
    codes = {each.exitcode for each in failures}
    return not codes.isdisjoint(ON_PURPOSE) or codes - {-signal.SIGTERM} == {FAILED}


class Held:
    """Log records of torchrun, kept back until it is known whether they are worth reading."""

    def __init__(self) -> None:
        self._records: list[logging.LogRecord] = []
        _NOISY.addFilter(self.keep)

    def keep(self, record: logging.LogRecord) -> bool:
        """A logging filter that lets nothing through."""
        self._records.append(record)
        return False

    def tell(self) -> None:
        """Log what was kept back."""
        _NOISY.removeFilter(self.keep)
        while self._records:
            _NOISY.handle(self._records.pop(0))


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments and return the exit code of its ranks."""
    forwarder = Forwarder().install()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    api.LocalElasticAgent = _agent(forwarder)  # pyright: ignore[reportAttributeAccessIssue]
    held, quiet = Held(), False
    with tempfile.TemporaryDirectory(prefix="mirai-torchrun-") as logs:  # torchrun would leave its own behind
        try:
            run.main(["--signals-to-handle", "SIGQUIT", "--log-dir", logs, *arguments])
            return 0
        except SignalException as error:
            return 128 + error.sigval
        except ChildFailedError as error:
            quiet = said(error.failures.values())
            if not quiet:
                held.tell()
                sys.stderr.write(f"{error}\n")
            return exit_code(error.failures.values())
        finally:
            if not quiet:
                held.tell()


def summary(arguments: list[str], since: float) -> list[str]:
    """The state of the run that these arguments have started on this machine alone, on one screen; empty where none
    has begun. A job of several nodes is summed up by its batch script."""
    if "--standalone" not in arguments or "--run-dir" not in arguments:
        return []
    try:
        found = status.of(Path(arguments[arguments.index("--run-dir") + 1]))
    except RecipeError:
        return []  # the ranks have said what is wrong with it
    return status.lines(found) if found.started is not None and found.started > since else []


def _agent(forwarder: Forwarder) -> type:
    """torchrun's agent, which tells `forwarder` what it starts."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            with forwarder.starting():
                pids = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]  decorated untyped
                forwarder.started(pids.values())
            return pids

    return Agent


def main_with_summary(arguments: list[str]) -> int:
    """The same, and the state of the run when it is over."""
    since = time.time()
    code = main(arguments)
    sys.stdout.write("".join(f"{line}\n" for line in summary(arguments, since)))
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main_with_summary(sys.argv[1:]))
