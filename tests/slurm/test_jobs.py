"""`mirai submit` on a real cluster: what an operator sees of jobs that end well, are stopped, or cannot go on."""

from __future__ import annotations

import json
import sys
import time

import torch

from mirai_dist.runtime.rendezvous import candidates
from tests.slurm.conftest import Submit, Submitted

ENDLESS = "stages.teacher.cycles=1000000"
SHORT = "stages.teacher.cycles=2"
# What an untrained network generates moves a million times as much as clean clips do, or the gate is not passed.
GATED = """
stages:
  ar_teacher:
    kind: teacher_forcing
    cycles: 1
    batch: {global_size: 2}
    optimizer: {lr: 1.0e-3}
  few_step:
    kind: consistency
    parent: ar_teacher
    gate: {clips: 2, motion: [1.0e+6, 2.0e+6]}
    cycles: 1
    batch: {global_size: 2}
    optimizer: {lr: 1.0e-3}
"""
HOLD = """
import socket, sys, time
held = [socket.create_server(("", int(port))) for port in sys.argv[1:]]
print("held", flush=True)
time.sleep(300)
"""


def unequal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that differ in a bit."""
    return [name for name in left.keys() | right.keys() if not torch.equal(left[name], right[name])]


def test_two_nodes_with_a_torchrun_each_finish(undisturbed: Submitted) -> None:
    job = undisturbed.state()
    assert (job.state, job.restarts, job.exit_code, len(job.nodes)) == ("COMPLETED", 0, 0, 2), undisturbed.log()
    assert undisturbed.checkpoints() == ["cycle-000040-position-0"]
    assert (undisturbed.run_dir / "stages/teacher/DONE").exists()
    assert "on-slurm: 2 ranks" in undisturbed.log()
    ledger = [json.loads(line) for line in (undisturbed.run_dir / "slurm/jobs.jsonl").read_text().splitlines()]
    assert [(entry["job_id"], entry["step"], entry["nodes"]) for entry in ledger] == [(undisturbed.job, "all", 2)]
    for hint in ("squeue -j", "tail -F", "mirai status"):
        assert hint in undisturbed.said


def test_a_warned_job_saves_and_comes_back_to_the_same_end(submit: Submit, undisturbed: Submitted) -> None:
    run = submit()
    run.training(cycles=1)
    run.slurm.run("scancel", "--batch", "--signal=USR2", run.job)
    run.wait(lambda job: job.restarts == 1, 60, "the requeue")
    (saved,) = run.checkpoints()
    job = run.ended()
    assert (job.state, job.restarts) == ("COMPLETED", 1), run.log()
    assert f"resumed at cycle {int(saved[6:12])} position 0 from {saved}" in run.log()
    assert not (run.run_dir / "STOP").exists()
    assert saved < run.checkpoints()[-1] == undisturbed.checkpoints()[-1]
    assert unequal(run.everything(), undisturbed.everything()) == []


def test_a_cancelled_job_saves_and_stays_cancelled(submit: Submit) -> None:
    run = submit(ENDLESS, launch="torchrun")
    run.training()
    run.slurm.run("scancel", run.job)
    run.ended()
    run.wait(lambda _: "mirai: because" in run.log(), 30, "the last words")
    assert run.checkpoints(), run.log()
    assert "ended by SLURM" in run.log()
    time.sleep(3)  # a revived job would wait in the queue by now
    job = run.state()
    assert (job.state, job.restarts) == ("CANCELLED", 0)


def test_a_person_s_stop_is_saved_and_not_queued_again(submit: Submit) -> None:
    run = submit(ENDLESS)
    run.training()
    again = submit(ENDLESS, expect=20)
    assert f"job {run.job} of this run is running" in again.said
    (run.run_dir / "STOP").touch()
    job = run.ended()
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 20, 0)
    assert run.checkpoints()
    assert "because    stopped on request, saved" in run.log()


def test_an_element_of_an_array_comes_back_alone(submit: Submit) -> None:
    lengths = {3: "3", 200: "200", 4: "4"}
    run = submit("--array", f"stages.teacher.cycles={','.join(lengths.values())}%2", nodes=1)
    names = [f"stages.teacher.cycles={cycles}" for cycles in lengths]
    run.training(folder=names[1])
    run.slurm.run("scancel", "--batch", "--signal=USR2", f"{run.job}_1")
    for index, restarts in enumerate((0, 1, 0)):
        job = run.ended(180, f"{run.job}_{index}")
        assert (job.id, job.state, job.restarts) == (f"{run.job}_{index}", "COMPLETED", restarts), run.log()
    for name, cycles in zip(names, lengths, strict=True):
        assert json.loads((run.run_dir / name / "stages/teacher/DONE").read_text())["cycles"] == cycles
        assert (run.run_dir / name / "slurm/jobs.jsonl").exists()


def test_a_chain_stops_at_the_gate_that_fails(submit: Submit) -> None:
    run = submit("--chain", stages=GATED, nodes=1)
    trained, gate, held = run.jobs
    assert "after" in run.state(held).reason.lower() or run.state(held).reason == "Dependency"
    assert run.ended(job=trained).state == "COMPLETED", run.log()
    judged = run.ended(job=gate)
    assert (judged.state, judged.exit_code, judged.restarts) == ("FAILED", 20, 0), run.log()
    assert run.ended(60, job=held).state == "CANCELLED"
    assert "GateFailed" in run.log()
    assert not (run.run_dir / "stages/few_step/checkpoints").exists()


def test_ports_that_somebody_holds_are_passed_over(submit: Submit) -> None:
    configuration = submit.slurm.run("scontrol", "show", "config")
    following = next(line.split()[-1] for line in configuration.splitlines() if line.startswith("NEXT_JOB_ID"))
    taken = candidates({"SLURM_JOB_ID": following})[:3]
    holders = [submit.slurm.inside(node, sys.executable, "-c", HOLD, *map(str, taken)) for node in submit.slurm.names]
    try:
        run = submit(SHORT)
        assert run.job == following
        assert run.ended().state == "COMPLETED", run.log()
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def test_a_node_that_cannot_find_the_first_one_is_named_and_left_out(submit: Submit) -> None:
    first, lost, third = submit.slurm.names
    submit.slurm.mislead(lost, about=first)
    try:
        run = submit(SHORT)
        found = run.wait(lambda job: job.restarts == 1, 60, "another attempt")
        said = run.log()
        assert f"{first}: only 1 of 2 tasks came in 20 s; nothing from {lost}" in said
        assert f"queued again as job {run.job} without {lost}" in said
        assert "Traceback" not in said
        job = run.ended()
        assert (job.state, job.nodes) == ("COMPLETED", (first, third)), run.log()
        assert found.restarts == 1
    finally:
        submit.slurm.heal(lost)
