"""Signals and the STOP file set a flag, once, and are given back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirai_dist.runtime.signals import SIGNALS, StopRequest


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[StopRequest]:
    request = StopRequest(tmp_path / "STOP").install()
    yield request
    request.restore()


def test_the_signals_that_clusters_send_are_handled() -> None:
    assert {each.name for each in SIGNALS} == {"SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT"}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda each: each.name)
def test_a_signal_asks_and_a_second_one_does_no_harm(stop: StopRequest, number: signal.Signals) -> None:
    assert not stop.requested and stop.reason == ""
    os.kill(os.getpid(), number)
    assert stop.requested and stop.reason == number.name
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == number.name


def test_a_stop_file_asks(stop: StopRequest, tmp_path: Path) -> None:
    assert not stop.requested
    (tmp_path / "STOP").touch()
    assert stop.requested and stop.reason == "STOP file"


def test_the_first_reason_stays(stop: StopRequest) -> None:
    stop.ask("time limit")
    stop.ask("later")
    assert stop.requested and stop.reason == "time limit"


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    request = StopRequest().install()
    assert [signal.getsignal(each) for each in SIGNALS] != before
    request.restore()
    assert [signal.getsignal(each) for each in SIGNALS] == before


HELD_BACK = """
import os, signal
from mirai_dist.runtime.signals import SIGNALS, StopRequest
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
os.kill(os.getpid(), signal.SIGUSR2)  # deadly, were it not held back
request = StopRequest().install()
request.restore()
assert request.reason == "SIGUSR2"
assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(SIGNALS)
"""


def test_signals_that_a_launcher_held_back_arrive() -> None:
    # a process of its own: a test runner has other threads, which would take the signal
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", HELD_BACK], env=environment, timeout=60, check=False)
    assert done.returncode == 0


class Stop(Exception):
    pass


def test_where_nothing_needs_saving_a_signal_raises_once(stop: StopRequest) -> None:
    tidied = False
    with pytest.raises(Stop), stop.raising(Stop()):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # the way out is not interrupted
            tidied = True
    os.kill(os.getpid(), signal.SIGTERM)
    assert tidied


def test_a_request_from_before_raises_at_once(stop: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stop), stop.raising(Stop()):
        pytest.fail("the block ran")


def test_the_handlers_do_not_wait_for_torch() -> None:
    code = "import sys, mirai_dist.runtime.signals, mirai_dist.__main__; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False).returncode == 0
