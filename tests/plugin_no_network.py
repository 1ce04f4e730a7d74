"""Pytest plugin (loaded by tests/conftest.py): no test, and no process a test starts, reaches beyond this machine."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest

GUARD = Path(__file__).parent / "guard"


def _load_guard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mirai_network_guard", GUARD / "sitecustomize.py")
    assert spec and spec.loader
    guard = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = guard
    spec.loader.exec_module(guard)
    return guard


def pytest_configure(config: pytest.Config) -> None:
    """Guard this process and, through PYTHONPATH, every Python process started from it."""
    if socket.socket.__name__ != "GuardedSocket":  # an xdist worker inherits it through PYTHONPATH
        _load_guard()
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["HF_HUB_OFFLINE"] = "1"  # its downloader is not Python: the guard would not see it
    if str(GUARD) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(GUARD), *filter(None, paths)])
