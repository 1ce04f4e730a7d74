"""For every test that runs in Triton's interpreter; ranks that are threads, as in tests/procs."""

from __future__ import annotations

import threading

import pytest

from tests.procs.conftest import threads  # noqa: F401  a fixture


@pytest.fixture(autouse=True)
def _one_launch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps the program it is in in globals: ranks that are threads take turns."""
    from mirai_kernels.launch import Launch  # not where this file is read: triton may be missing

    turn, run = threading.Lock(), Launch.run

    def alone(launch: Launch) -> None:
        with turn:
            run(launch)

    monkeypatch.setattr(Launch, "run", alone)
