"""Runs what stands in interpreted/ in a process of its own, in Triton's interpreter: Triton decides when imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton: the dev extra brings it")

HERE = Path(__file__).parent
LIMIT = 900  # seconds; a minute and a half where nothing else runs


@pytest.mark.timeout(LIMIT + 20)
def test_kernels_agree_with_their_references() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
