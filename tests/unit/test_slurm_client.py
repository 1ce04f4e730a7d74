"""SLURM's commands, played by small scripts: what is asked of them, and what their refusals become."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirai_launch.slurm.client import Scheduler, SchedulerError
from mirai_launch.slurm.ledger import Submission, append, read
from tests.unit.test_slurm_parse import RUNNING


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`play(name, script)` puts a command on an otherwise empty PATH; it notes its arguments in `<name>.args`."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def command(name: str, script: str) -> Path:
        file, noted = tmp_path / name, tmp_path / f"{name}.args"
        file.write_text(f'#!/bin/bash\necho "$@" >>{noted}\n{script}\n')
        file.chmod(0o755)
        return noted

    return command


def test_a_machine_without_slurm(play) -> None:
    for call in (lambda: Scheduler().submit(Path("x")), lambda: Scheduler().jobs(["1"]), lambda: Scheduler().job("1")):
        with pytest.raises(SchedulerError, match=r"is not on the PATH; run this on a login node"):
            call()


def test_what_a_command_refuses_is_one_line_and_exit_code_20(play) -> None:
    play("sbatch", "printf 'sbatch: error: invalid partition\\nsbatch: error: submission failed\\n' >&2; exit 1")
    with pytest.raises(SchedulerError) as refusal:
        Scheduler().submit(Path("x"))
    assert str(refusal.value) == "sbatch: sbatch: error: invalid partition / sbatch: error: submission failed"
    assert refusal.value.exit_code == 20


def test_a_command_that_does_not_answer(play) -> None:
    play("squeue", "read -r -t 20 <> <(:)")
    with pytest.raises(SchedulerError, match="squeue: did not answer in 1 s"):
        Scheduler(timeout=1.0).jobs(["1"])


def test_a_job_that_slurm_has_forgotten(play) -> None:
    play("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    play("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert Scheduler().job("9") is None
    assert Scheduler().jobs(["9"]) == []


def test_hosts_are_added_to_those_that_are_avoided_already(play) -> None:
    line = RUNNING.replace("ExcNodeList=(null)", "ExcNodeList=n[7-8]")
    noted = play("scontrol", f"[ $1 = update ] || echo '{line}'")
    Scheduler().exclude("3_1", ["n8", "n9"])
    assert noted.read_text().splitlines()[-1] == "update JobId=3_1 ExcNodeList=n7,n8,n9"


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (lambda s: s.cancel("5"), "5"),
        (lambda s: s.cancel("5", signal="USR2"), "--signal=USR2 5"),
        (lambda s: s.cancel("5_2", signal="USR2", batch_only=True), "--signal=USR2 --batch 5_2"),
    ],
)
def test_scancel_signals_tasks_or_the_script_alone(play, call, arguments: str) -> None:
    noted = play("scancel", "")
    call(Scheduler())
    assert noted.read_text() == f"{arguments}\n"


def test_the_ledger_gives_back_what_was_written(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    first = Submission("12", "teacher", 1.5, "/c.yaml", 2, "slurm/x/teacher.sbatch")
    second = Submission("13", "ar_teacher", 2.5, "/c.yaml", 2, "slurm/x/ar_teacher.sbatch", ("12",))
    for each in (first, second):
        append(tmp_path, each)
    with (tmp_path / "slurm/jobs.jsonl").open("a") as file:
        file.write('{"job_id": "14", "st')  # the disk was full
    assert read(tmp_path) == [first, second]
