"""The endings that take their time: a time limit, preemption, nodes that are lost. Run with -m slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirai_launch.slurm.parse import Job
from tests.slurm.conftest import Submit, Submitted
from tests.slurm.test_jobs import ENDLESS, unequal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
OFTEN = "checkpoint.every_cycles=5"
TRAINED = 100.0  # seconds: longer than the first time limit


def resumed(run: Submitted, seconds: float = 180) -> Job:
    """The job in its second attempt, once that has gone on from a checkpoint and trained."""
    run.wait(lambda job: job.restarts >= 1 and job.state == "RUNNING", seconds, "another attempt")
    run.wait(lambda _: "resumed at cycle" in run.log(), seconds, "going on from the checkpoint")
    run.training(seconds)
    return run.state()


def stopped(run: Submitted) -> None:
    """End an endless run."""
    (run.run_dir / "STOP").touch()
    assert run.ended().exit_code == 20, run.log()


def test_a_time_limit_is_no_end(submit: Submit, undisturbed: Submitted, tmp_path: Path) -> None:
    lines = (undisturbed.run_dir / "logs").glob("rank-0.log")
    pace = float(next(lines).read_text().rpartition(" s/cycle")[0].split()[-1])
    cycles = f"stages.teacher.cycles={int(TRAINED / pace)}"
    run = submit("--time", "2", cycles, name="limited", warning="50")
    job = run.ended(600)
    assert job.state == "COMPLETED" and job.restarts >= 1, run.log()
    log = run.log()
    assert log.count("warned of the time limit or of preemption, saved") == job.restarts
    assert "DUE TO TIME LIMIT" not in log
    whole = submit(cycles, name="whole")
    assert (whole.ended(600).restarts, run.checkpoints()[-1]) == (0, whole.checkpoints()[-1])
    assert unequal(run.everything(), whole.everything()) == []


@pytest.mark.parametrize("partition", ["scavenge", "grace"])
def test_a_preempted_job_goes_on_when_the_other_is_done(submit: Submit, partition: str) -> None:
    """Without grace time SLURM queues it again; with it the ranks are told and the script is not, so it must."""
    run = submit(ENDLESS, partition=partition)
    run.training()
    run.slurm.run("sbatch", "-p", "urgent", "-N", "3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    resumed(run)
    said = "stopped by a signal, saved" if partition == "grace" else "ended by SLURM"
    assert said in run.log()
    stopped(run)


@pytest.mark.parametrize("which", [0, 1], ids=["the first node", "another node"])
def test_a_node_without_power_is_replaced(submit: Submit, which: int) -> None:
    run = submit(ENDLESS, OFTEN)
    run.training(cycles=6)
    nodes = run.state().nodes
    run.slurm.cut_power(nodes[which])
    try:
        job = resumed(run)
        assert nodes[which] not in job.nodes and len(job.nodes) == 2
        stopped(run)
    finally:
        run.slurm.heal(nodes[which])


def test_a_node_whose_slurmd_is_gone_is_replaced(submit: Submit) -> None:
    run = submit(ENDLESS, OFTEN, launch="torchrun")
    run.training(cycles=6)
    nodes = run.state().nodes
    run.slurm.kill_slurmd(nodes[1])
    try:
        job = resumed(run)
        assert nodes[1] not in job.nodes and len(job.nodes) == 2
        stopped(run)
    finally:
        run.slurm.heal(nodes[1])


def test_a_job_that_gets_nowhere_gives_its_nodes_back(submit: Submit) -> None:
    first, lost, _ = submit.slurm.names
    submit.slurm.mislead(lost, about=first)
    try:
        run = submit(ENDLESS, requeues="0")
        job = run.ended()
        assert (job.state, job.exit_code, job.restarts) == ("FAILED", 20, 0), run.log()
        assert "attempts in a row without a new checkpoint: 1, of 0 allowed; the nodes are given back" in run.log()
    finally:
        submit.slurm.heal(lost)
