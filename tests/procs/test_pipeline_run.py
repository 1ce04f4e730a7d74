"""The whole recipe as users run it: from nothing to the report, again, interrupted, damaged, and on one process.

One run on two ranks comes to its end in a module-wide fixture; the others start from copies of its directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mirai_dist.state import commit
from tests.procs import tiny

REPOSITORY = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("pipeline.yaml")
STAGES = {"teacher": 2, "ar_teacher": 1, "few_step": 1, "distil": 2}  # cycles
ARMS = ("baseline", "foresight", "causal-encoder", "shuffled-targets")


def environment() -> dict[str, str]:
    """This environment without any launcher's variables; a guard against the network is on PYTHONPATH."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    paths = [REPOSITORY / "tests" / "guard", REPOSITORY, REPOSITORY / "launcher", REPOSITORY / "kernels"]
    own = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | own


def start(run_dir: Path, nproc: int = 2, more: Sequence[str] = ()) -> subprocess.Popen[str]:
    """`mirai train` on several ranks; one rank is started without any launcher."""
    arguments = ["--run-dir", str(run_dir), *more]
    mirai = ["mirai_launch", "train", str(RECIPE), "--nproc", str(nproc)]
    command = mirai if nproc > 1 else ["mirai_dist", "--recipe", str(RECIPE)]
    return subprocess.Popen([sys.executable, "-m", *command, *arguments], env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[str], timeout: float = 280) -> tuple[int, str, str]:
    """(exit code, standard output, standard error); nothing outlives the test."""
    try:
        said, errors = process.communicate(timeout=timeout)
    finally:
        process.send_signal(signal.SIGQUIT)  # torchrun takes its ranks along; no effect where it has ended
    return process.returncode, said, errors


def arm(run_dir: Path, name: str) -> Path:
    return run_dir / "stages" / "distil" / name / "seed-11"


def records(job: Path) -> list[dict[str, Any]]:
    """The metrics of a job, without what time they were taken at and how long things took."""
    lines = (job / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time", "seconds"))} for line in lines]


def final(job: Path) -> dict[str, Any]:
    """Every tensor of the newest checkpoint, and the rest of its state."""
    path = commit.latest(job / "checkpoints")
    assert path is not None, job
    commit.verify(path)
    reader = dcp.FileSystemReader(path / "tensors")
    stored = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}  # type: ignore
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors | {"state": json.loads((path / "state.json").read_text()), "point": path.name}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("pipeline") / "run"
    code, said, errors = ended(start(run_dir))
    assert code == 0, said[-2000:] + errors[-2000:]
    assert f"report: {run_dir / 'report.html'}" in said
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run without its report."""
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("report.html", "report.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "samples")
    return copy


def test_from_nothing_to_the_report(finished: Path) -> None:
    for name in ("recipe.yaml", "effective.yaml", "logs/rank-0.log", "logs/rank-1.log"):
        assert (finished / name).stat().st_size > 0, name
    assert not list((finished / "logs").glob("failure-*"))
    for job in [*(finished / "stages" / name for name in list(STAGES)[:3]), *(arm(finished, name) for name in ARMS)]:
        cycles = STAGES[job.relative_to(finished / "stages").parts[0]]
        assert json.loads((job / "DONE").read_text())["cycles"] == cycles
        assert {record["cycle"] for record in records(job)} == set(range(cycles))
        assert [path.name for path in commit.complete(job / "checkpoints")][-1] == f"cycle-{cycles:06d}-position-0"
        assert list((job / "samples").glob("*.mp4")) and list((job / "tensorboard").iterdir())
        assert ("distil" in job.parts) == bool(list((job / "samples").glob("*-judged.mp4")))
    document = json.loads((finished / "report.json").read_text())
    text = (finished / "report.html").read_text()
    assert all(name in json.dumps(document) and name in text for name in ARMS)
    assert len(list((finished / "samples").rglob("*.mp4"))) >= 2
    [gate] = document["gates"]
    assert gate["passed"] and gate["stage"] == "distil" and len(gate["measures"]) == 3
    assert "Gates between stages" in text and len(list((finished / "stages/distil/gate").glob("*.mp4"))) == 2


def test_a_failing_gate_is_one_line_and_not_requeued(run_dir: Path) -> None:
    """Judged by itself, with bounds that no clip meets."""
    failing = "stages.distil.gate={motion: [8, 9], failing: 0.5}"
    code, said, errors = ended(start(run_dir, more=["--only", "distil.gate", failing]))
    assert code == 20, errors
    [line] = errors.splitlines()
    assert ":0 GateFailed: distil gate: few_step (" in line and "clips stand still: motion of 2 of 2 clips" in line
    assert f"Look at {run_dir / 'stages/distil/gate'}" in line and "stages.distil.gate.clips=0" in line
    assert "distil gate: 2 clips of few_step" in said and "report" not in said
    assert not json.loads((run_dir / "stages/distil/gate.json").read_text())["passed"]
    assert len(list((run_dir / "stages/distil/gate").glob("*.mp4"))) == 2


def test_arms_start_alike_and_differ_in_what_they_say(finished: Path) -> None:
    """They share start, prompts and noise: the first DMD loss, before foresight did anything, is one number."""
    first = {name: records(arm(finished, name))[0] for name in ARMS}
    assert len({each["loss/dmd"] for each in first.values()}) == 1
    assert "loss/foresight" not in first["baseline"] and "loss/foresight" in first["foresight"]
    assert len({str(records(arm(finished, name))[1:]) for name in ARMS}) == len(ARMS)


def test_interrupted_and_torn_runs_end_with_the_same_bits(finished: Path, run_dir: Path) -> None:
    """The first arm lost its newest checkpoint half-way; the second is stopped by TERM, twice as SLURM does."""
    torn = arm(run_dir, "baseline")
    (torn / "DONE").unlink()
    newest = commit.latest(torn / "checkpoints")
    assert newest is not None
    (newest / commit.MANIFEST).unlink()
    for name in ARMS[1:]:
        shutil.rmtree(arm(run_dir, name))
    metrics = arm(run_dir, "foresight") / "metrics.jsonl"
    process = start(run_dir)
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):  # in the middle of a cycle
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    code, _, errors = ended(process)
    assert code == 10, errors
    [line] = errors.splitlines()
    stopped = re.search(r"stopped by SIGTERM in distil (.+) seed 11 before cycle (\d+) position (\d+); ", line)
    assert stopped and not (run_dir / "report.html").exists()
    saved = commit.latest(arm(run_dir, stopped[1]) / "checkpoints")
    assert saved and saved.name == commit.directory_name(int(stopped[2]), int(stopped[3]))
    code, said, errors = ended(start(run_dir))
    assert (code, errors) == (0, ""), errors
    assert ": resumed at cycle " in said and "distil baseline seed 11: already done, skipped" in said
    for name in ARMS:
        job, expected = arm(run_dir, name), arm(finished, name)
        assert not tiny.unequal(final(job), final(expected)), name
        assert records(job) == records(expected), name


def test_the_same_command_again_finishes_what_is_missing_and_skips_the_rest(finished: Path, run_dir: Path) -> None:
    """Here as one process without any launcher, which goes on with what two ranks began."""
    job = arm(run_dir, "foresight")
    (job / "DONE").unlink()
    shutil.rmtree(commit.complete(job / "checkpoints")[-1])
    before = {path: path.stat().st_mtime_ns for path in files(run_dir / "stages") if job not in path.parents}
    code, said, errors = ended(start(run_dir, nproc=1))
    assert (code, errors) == (0, ""), errors
    assert "1 ranks" in said and "resumed at cycle 1 position 0" in said
    assert said.count(": already done, skipped") == 3 + len(ARMS) - 1
    assert {path: path.stat().st_mtime_ns for path in files(run_dir / "stages") if job not in path.parents} == before
    assert (run_dir / "report.html").stat().st_size > 0
    found, expected = final(job), final(arm(finished, "foresight"))
    weights = [key for key in expected if key.startswith(("networks/", "averages/"))]
    assert not tiny.unequal({key: found[key] for key in weights}, {key: expected[key] for key in weights}, 1e-6)


def test_a_rank_leaves_without_the_interpreters_shutdown() -> None:
    """Which aborted one run in ten: a gloo thread that frees a tensor then is ended by Python in the middle of C++."""
    script = "import atexit\nfrom mirai_dist.__main__ import end\n"
    script += "atexit.register(print, 'late'); print('end'); end(7)"
    process = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (7, "end\n", "")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
