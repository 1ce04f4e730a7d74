"""Signals and the STOP file set a flag, once, and are given back."""

from __future__ import annotations

import os
import signal
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
