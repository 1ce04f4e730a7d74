"""The operator's verbs against a live job of two nodes: seen, saved, stopped for good, brought back, cancelled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from mirai_dist.operate import control, events
from mirai_dist.state import commit
from tests.slurm.conftest import ROOT, Submit, Submitted
from tests.slurm.test_jobs import ENDLESS


def mirai(run: Submitted, verb: str, *arguments: str, expect: int = 0) -> str:
    """What `mirai VERB RUN ...` says on the login node."""
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "launcher")]
    env = os.environ | run.slurm.env | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "mirai_launch", verb, str(run.run_dir), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == expect, done.stdout + done.stderr + run.log()
    return done.stdout + done.stderr


def state(run: Submitted) -> dict[str, Any]:
    return json.loads(mirai(run, "status", "--json"))


def test_a_live_job_is_seen_saved_stopped_and_brought_back(submit: Submit) -> None:
    run = submit(ENDLESS)
    assert state(run)["state"] in ("queued", "starting"), "nothing is written yet"
    run.training()
    seen = state(run)
    assert (seen["state"], seen["stage"], seen["ranks"], len(seen["hosts"])) == ("running", "teacher", 2, 2)
    assert seen["job_id"] == run.job and seen["queue"][0].startswith(f"{run.job} ") and "RUNNING" in seen["queue"][0]
    assert mirai(run, "save").startswith("save: saved before cycle")
    said = mirai(run, "stacks")
    assert all(f"{host}:{rank}" in said for rank, host in enumerate(seen["hosts"]))
    mirai(run, "stop")
    job = run.ended()
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 20, 0), run.log()
    saved = commit.complete(run.run_dir / "stages/teacher/checkpoints")
    seen = state(run)
    assert (seen["state"], seen["checkpoint"]) == ("stopped", str(saved[-1].relative_to(run.run_dir)))
    assert control.operator() in seen["hold"] and len(saved) == 2
    assert f"mirai requeue {run.run_dir}" in mirai(run, "status")
    assert "it is stopped, not running" in mirai(run, "save", expect=20)
    bring_back(run, seen["cycle"])


def bring_back(run: Submitted, cycle: int) -> None:
    assert f"job {run.job} is queued again" in mirai(run, "requeue")
    assert state(run)["state"] in ("queued", "starting") and not control.held(run.run_dir)
    assert "there is nothing to requeue" in mirai(run, "requeue", expect=20)
    run.wait(lambda job: job.state == "RUNNING", 60, "the requeue")
    run.training()
    assert [each["cycle"] for each in events.read(run.run_dir) if each["event"] == "resumed"] == [cycle]
    assert (state(run)["starts"], state(run)["state"]) == (2, "running")
    assert f"{run.job} told to end" in mirai(run, "cancel")
    assert run.ended().state == "CANCELLED" and control.held(run.run_dir)


def test_a_waiting_job_is_queued_and_can_be_taken_out(submit: Submit) -> None:
    run = submit("--chain", nodes=1, stages=TWO)
    first, second = run.jobs[:2]
    run.training(folder="")
    queue = state(run)["queue"]
    assert [line.split()[0] for line in queue] == list(run.jobs) and "PENDING" in queue[1]
    mirai(run, "cancel")
    assert [run.ended(job=job).state for job in (first, second)] == ["CANCELLED"] * 2


TWO = """
stages:
  teacher:
    kind: bidirectional
    cycles: 1000000
    batch: {global_size: 2}
    optimizer: {lr: 1.0e-3}
  ar_teacher:
    kind: teacher_forcing
    cycles: 1
    batch: {global_size: 2}
    optimizer: {lr: 1.0e-3}
"""
