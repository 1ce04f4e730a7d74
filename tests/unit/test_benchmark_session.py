"""The benchmark session, rehearsed on a CPU: every section runs, what needs CUDA says so, nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.session import __main__ as session
from benchmarks.session import draw
from benchmarks.session import section as sections
from benchmarks.session.measure import NO_CUDA, Case, Desk, Work, rates

ROOT = Path(__file__).resolve().parents[2]


def rehearsed(out: Path, *sections: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    only = ["--only", *sections] if sections else []
    paths = os.pathsep.join([str(ROOT / each) for each in (".", "launcher", "kernels")])
    command = [sys.executable, "-m", "benchmarks.session", str(out), "--rehearse", *only]
    if not sections:
        command = [str(ROOT / "benchmarks/gpu_session.sh"), "--rehearse", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "session.json").read_text())["sections"]


def check(name: str, found: dict[str, Any]) -> None:
    assert found["ended"] == "done", found
    assert found["rows"], name
    died = [row for row in found["rows"] if row.get("skipped", "").startswith("fails with")]
    assert not died, died
    for row in found["rows"]:
        assert sum(kind in row for kind in ("ms", "skipped", "passed", "percent")) == 1, row
        assert row.get("ms", 1.0) > 0


def test_ceilings_and_chunks_run_without_a_gpu(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, "ceilings", "chunk_backward")
    for name, section in found.items():
        check(name, section)
    assert any("ms" in row for row in found["ceilings"]["rows"])
    assert any(row.get("skipped") == NO_CUDA for row in found["chunk_backward"]["rows"])


@pytest.mark.slow
def test_all_of_it_runs_without_a_gpu(tmp_path: Path) -> None:
    found = rehearsed(tmp_path)
    assert found.keys() == session.DEADLINES.keys()
    for name, section in found.items():
        check(name, section)
        assert f"## {name}: done" in (tmp_path / "session.md").read_text()
    assert found["certificate"]["rows"][0]["passed"]
    phases = {row["phase"] for row in found["cycle"]["rows"] if row.get("foresight")}
    assert {"generator rollout", "generator encoder", "critic backward", "replay", "all"} <= phases
    assert "## The cycle by phase" in (tmp_path / "session.md").read_text()
    parts = {row["case"] for row in found["profile"]["rows"]}
    assert parts == {f"{part}{by}" for part in ("chunk pass", "critic step") for by in ("", " by kind", " by kernel")}
    assert 0 < (tmp_path / "profile.json.gz").stat().st_size < 16 << 20
    assert [row["variant"].split(",")[0] for row in found["replay"]["rows"] if "predicted_ms" in row] == [
        "autograd",
        "static memory",
    ]
    assert (tmp_path / "session.svg").read_text().count("<rect") > 20


def test_the_budget_is_under_nine_minutes_and_holds_every_section() -> None:
    assert session.BUDGET < 540
    assert sum(session.DEADLINES.values()) <= session.BUDGET


def test_the_gates_run_every_test_that_is_marked_gpu() -> None:
    there = {path.stem.removeprefix("test_") for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert set(sections.GATES) == there and len(sections.GATES) == len(there)


def test_a_session_that_lacks_a_package_names_it_and_measures_nothing(tmp_path: Path) -> None:
    (tmp_path / "av.py").write_text("raise ModuleNotFoundError(\"No module named 'av'\", name='av')\n")
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    command = [str(ROOT / "benchmarks/gpu_session.sh"), "--rehearse", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 20 and not (tmp_path / "out/session.json").exists()
    (line,) = done.stderr.splitlines()
    assert "No module named 'av'" in line and "WHEELS" in line


def test_a_section_that_hangs_costs_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    stuck = tmp_path / "python"
    stuck.write_text("#!/bin/sh\nprintf '%s\\n' '{\"case\": \"one\"}' '{\"ca' >> $4/attention.jsonl\nsleep 60\n")
    stuck.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stuck))
    monkeypatch.setattr(session, "GRACE", 1.0)
    monkeypatch.setattr(session, "DEADLINES", {"attention": 0.5})
    found = session.run("attention", out, session.time.monotonic() + 100, rehearse=True)
    assert found["ended"] == "killed at its deadline"
    assert found["rows"] == [{"case": "one"}]
    assert session.run("attention", out, session.time.monotonic(), rehearse=True)["ended"] == "no time left"


def test_a_desk_stops_at_its_deadline_and_reports_what_fails(tmp_path: Path) -> None:
    desk = Desk("s", tmp_path, 1000.0, rehearsal=True)
    assert desk.time(Case("c", "v", "x"), lambda: torch.ones(2).sum()) is not None
    assert desk.time(Case("c", "w", "x"), lambda: {}["it"]) is None
    assert Desk("s", tmp_path, -1.0, rehearsal=True).time(Case("c", "late", "x"), lambda: pytest.fail("ran")) is None
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row.get("skipped") for row in rows] == [
        None,
        "fails with KeyError: 'it'",
        "the section's deadline was over",
    ]


def test_predictions_add_up_and_name_their_sources(tmp_path: Path) -> None:
    desk = Desk("s", tmp_path, 10.0, rehearsal=True)
    desk._rates = rates("NVIDIA H200")
    h100 = rates("NVIDIA H100 80GB HBM3")
    assert desk._rates["gemm"][0] > h100["gemm"][0] and desk._rates["attention flex"] == h100["attention flex"]
    milliseconds, sources = desk._predicted((Work("gemm", 740e12), Work("attention sdpa-flash", 376e12)))
    assert milliseconds == pytest.approx(2000.0)
    assert len(sources) == 2
    assert desk._predicted((Work("gemm", 1.0), Work("attention unheard of", 1.0))) == (None, [])
    assert rates("NVIDIA A100") == {}


def test_the_drawing_shows_rates_against_measured_ceilings() -> None:
    ceiling = {"section": "ceilings", "work": {"gemm": 8e12}, "ms": 10.0}
    row = {"work": {"gemm": 2e12, "memory": 1e9}, "ms": 5.0}
    assert draw.rate(row, draw.ceilings([ceiling])) == "400.0 TF/s (50%)"
    assert draw.rate({"work": {"memory": 1e9}, "ms": 1.0}, {}) == "1000 GB/s"
