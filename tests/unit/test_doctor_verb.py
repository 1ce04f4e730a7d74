"""`mirai doctor`: a table that says what to do, one JSON document, and exit codes 0, 20 and 30."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirai_dist.node import software
from mirai_launch.__main__ import main
from mirai_launch.verbs import doctor
from tests.unit.test_node_findings import GPU, HEALTHY, program

ROOT = Path(__file__).parents[2]
NO_TORCH = {"findings": [], "same": {}, "usual": {}}


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`ask("--json")`: (exit code, output) of doctor on this machine, without its part in torch."""
    monkeypatch.setattr(doctor, "ask_torch", lambda gpus: NO_TORCH)
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "RANK", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)

    def run(*options: str) -> tuple[int, str]:
        code = main(["doctor", "--folder", str(tmp_path / "runs"), *options])
        return code, capsys.readouterr().out

    return run


def test_the_real_command_checks_torch_too_and_says_what_it_could_not_check(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "mirai_launch", "doctor", "--json", "--folder", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    found = json.loads(done.stdout)
    rows = {row["check"]: row for row in found["findings"]}
    assert done.returncode == found["exit_code"] == 0, rows
    product = rows["matrix products (cpu)"]
    assert product["level"] == "ok" and "TFLOP/s in float32" in product["value"]
    assert rows["gpu"]["level"] in ("skip", "warn", "ok")
    assert found["same"]["torch"] != "none" and "CUDA of torch" in found["same"]
    assert Path(found["usual"]["torch path"]).is_dir()
    assert not list(tmp_path.iterdir())


def test_the_table_has_a_line_a_finding_and_the_advice_below(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    code, output = ask()
    lines = output.splitlines()
    (at,) = [i for i, line in enumerate(lines) if " launcher variables " in line]
    assert code == 0 and lines[at].split() == ["warn", "launcher", "variables", "set", "here:", "RANK"]
    assert lines[at + 1].strip().startswith("-> a run started here would take itself for one rank of many")
    assert lines[-1].startswith(f"{software.node_name()}: 0 failed, ")


def test_something_to_repair_is_20(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    code, output = ask()
    assert code == 20 and "nope0: no such interface" in output and "repair what FAILs" in output.splitlines()[-1]
    code, output = ask("--json")
    assert code == json.loads(output)["exit_code"] == 20


def test_a_node_in_doubt_is_30(ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GPU.format(**HEALTHY | {"ecc": "4"})
    (tmp_path / "smi.xml").write_text(f"<log><driver_version>550</driver_version>{gpu}</log>")
    monkeypatch.setenv("PATH", program(tmp_path / "bin", f"/bin/cat {tmp_path}/smi.xml"))
    code, output = ask()
    assert code == 30 and "GPU 0: 4 uncorrectable errors" in output
    assert output.splitlines()[-1].endswith("this node is suspect")


def test_a_machine_without_torch_is_told_what_works(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    real = software.version
    monkeypatch.setattr(software, "version", lambda name: "" if name == "torch" else real(name))
    code, output = ask()
    assert code == 0 and "not installed: torch" in output and "check, plan and submit work" in output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo 'ImportError: libcudart.so.13: cannot open' >&2; exit 1", "ended with 1: ImportError: libcudart.so.13"),
        ("kill -SEGV $$", "ended with -11: no word on standard error"),
        ("exec /bin/sleep 30", "did not come back within 0 s"),
    ],
)
def test_a_torch_that_cannot_be_used_fails(tmp_path: Path, monkeypatch, text: str, said: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{text}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    (row,) = doctor.ask_torch(0, patience=0.4 if "sleep" in text else 30)["findings"]
    assert row["level"] == "fail" and said in row["value"]
