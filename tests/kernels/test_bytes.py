"""A block with fused kernels moves at most a quarter of what the released arithmetic moves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no triton: the dev extra brings it")

ROOT = Path(__file__).resolve().parents[2]


def test_a_fused_block_moves_a_quarter(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "benchmarks/kernels/count_bytes.py", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    blocks = {(each["model"], each["arithmetic"]): each for each in json.loads(report.read_text())["blocks"]}
    for model in ("1.3B", "14B"):
        released, fused = blocks[model, "released"], blocks[model, "fused"]
        assert 4 * fused["forward"] <= released["forward"], model
        assert 4 * (fused["forward"] + fused["backward"]) <= released["forward"] + released["backward"], model
        assert fused["forward_operators"] == 7, model  # three of gates and norms, two of heads, a sum, GELU
