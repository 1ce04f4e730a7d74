"""Every kernel compiles for sm_90a at real shapes and stays within what a multiprocessor has. No GPU is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton: the dev extra brings it")

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 900  # seconds; it takes one minute of processor time
SHARED_BYTES = 227 * 1024  # what one program may have on sm_90


@pytest.mark.timeout(LIMIT + 20)
def test_no_spills_no_excess_of_shared_memory_and_wide_accesses(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "benchmarks/kernels/compile_sm90.py", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads(report.read_text())["kernels"]
    assert {(each["model"], each["tokens"]) for each in kernels} == {
        (model, tokens) for model in ("1.3B", "14B") for tokens in (4680, 32760)
    }
    for each in kernels:
        assert each["spilled_bytes"] == 0, each
        assert each["shared"] <= SHARED_BYTES, each
        assert each["wide_loads"] > 0, each
        assert each["narrow_loads"] == 0, each
        multiplies = each["kernel"].startswith("attention") and each["kernel"] != "attention merge"
        assert (each["wgmma"] > 0) == multiplies and each["mma_sync"] == 0, each
