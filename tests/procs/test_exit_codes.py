"""What the caller of `mirai train` gets to see: an exit code, and one line, whatever the ranks died of."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mirai_dist.state import commit

REPOSITORY = Path(__file__).parents[2]
RECIPE = """
extends: {base}
name: exit-codes
video: {{latent_frames: 2, frames_per_segment: 1, latent_height: 2, latent_width: 2}}
world: {{speed: 1, radius: 3}}
text: {{dim: 8, length: 6}}
teacher: {{dim: 12, ffn_dim: 16, heads: 1, blocks: 1, freq_dim: 8}}
checkpoint: {{every_cycles: 1000000}}
stages:
  teacher:
    kind: bidirectional
    cycles: 2
    batch: {{global_size: 2}}
    optimizer: {{lr: 1.0e-3}}
"""
LONG = "stages.teacher.cycles=1000000"


def environment() -> dict[str, str]:
    """This environment without any launcher's variables."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    paths = [kept.get("PYTHONPATH"), str(REPOSITORY), str(REPOSITORY / "launcher"), str(REPOSITORY / "kernels")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | own


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(launcher: subprocess.Popen[str], timeout: float = 120) -> tuple[int, list[str]]:
    """(exit code, lines on standard error); nothing outlives the test."""
    try:
        _, said = launcher.communicate(timeout=timeout)
    finally:
        launcher.send_signal(signal.SIGQUIT)  # torchrun takes its ranks along; no effect where it has ended
    return launcher.returncode, said.splitlines()


def wait_until(true: Callable[[], bool], launcher: subprocess.Popen[str], seconds: float = 90) -> None:
    """Wait for a fact about the running launcher; fails with its output if it ends or takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        if launcher.poll() is not None or time.monotonic() > deadline:
            launcher.send_signal(signal.SIGQUIT)
            pytest.fail(f"in vain; exit code {launcher.poll()}: {launcher.communicate()[1][-3000:]}")
        time.sleep(0.05)


def train(recipe: Path, run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    return start("mirai_launch", "train", str(recipe), "--nproc", "2", "--run-dir", str(run_dir), *overrides)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage of the smallest model there can be."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE.format(base=REPOSITORY / "recipes/base/tiny_world.yaml"))
    return path


@pytest.fixture(scope="module")
def done(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a run that came to its end."""
    run_dir = tmp_path_factory.mktemp("done") / "run"
    code, said = ended(train(recipe, run_dir, "--preflight", "always", "--expect-transport", "gloo"))
    assert (code, said) == (0, [])
    return run_dir


@pytest.fixture
def run_dir(done: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(done, tmp_path / "run"))


def test_a_pre_flight_leaves_its_record_and_one_line(done: Path) -> None:
    record = json.loads((done / "preflight.json").read_text())
    assert record["verdict"] in ("pass", "warn") and len(record["ranks"]) == 2
    assert all(rank["transport"]["inside_the_host"] == ["gloo"] for rank in record["ranks"])
    log = (done / "logs/rank-0.log").read_text()
    assert log.count(f"pre-flight ({record['seconds']} s): {record['verdict']}: {record['line']}") == 1


def test_a_transport_that_is_not_used_is_one_line(recipe: Path, run_dir: Path) -> None:
    code, said = ended(train(recipe, run_dir, LONG, "--expect-transport", "nvlink"))
    assert code == 20
    [line] = said
    assert ":0 NotFit: pre-flight: " in line and "gloo inside the host, expected nvlink" in line
    assert json.loads((run_dir / "preflight.json").read_text())["verdict"] == "fail"


def test_a_stop_is_saved_and_told_once(recipe: Path, run_dir: Path) -> None:
    metrics = run_dir / "stages/teacher/metrics.jsonl"
    before = len(metrics.read_text().splitlines())
    launcher = train(recipe, run_dir, LONG)
    wait_until(lambda: len(metrics.read_text().splitlines()) > before, launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.send_signal(signal.SIGTERM)  # SLURM sends it twice
    code, said = ended(launcher)
    assert code == 10
    [line] = said
    saved = commit.latest(run_dir / "stages/teacher/checkpoints")
    assert saved is not None
    cycle = int(saved.name.split("-")[1])
    assert cycle > 2 and f":0 stopped by SIGTERM in teacher before cycle {cycle} position 0; run the same" in line
    commit.verify(saved)
    assert not list((run_dir / "logs").glob("failure-*"))


def test_torn_checkpoints_are_one_line_and_not_requeued(recipe: Path, run_dir: Path) -> None:
    [checkpoint] = (run_dir / "stages/teacher/checkpoints").iterdir()
    (checkpoint / commit.MANIFEST).unlink()
    code, said = ended(train(recipe, run_dir, LONG))
    assert code == 20
    [line] = said
    assert ":0 CheckpointError: " in line and "none is complete" in line
    assert sorted(path.name for path in (run_dir / "logs").glob("failure-*")) == [
        f"failure-rank-{rank}.json" for rank in (0, 1)
    ]


def test_ranks_refuse_the_directory_of_another_recipe(recipe: Path, run_dir: Path) -> None:
    """However they were started: nothing but rank 0's own look at it stands before the overwriting."""
    before = (run_dir / "recipe.yaml").read_bytes()
    ours = ["-m", "mirai_dist", "--recipe", str(recipe), "--run-dir", str(run_dir)]
    torchrun = ["--standalone", "--nproc-per-node=2", *ours, "flow.shift=2"]
    code, said = ended(start("mirai_dist.runtime.torchrun", *torchrun))
    assert code == 20
    [line] = said
    assert f":0 RecipeError: {run_dir}: belongs to another recipe: flow.shift: 3.0 -> 2.0; " in line
    assert (run_dir / "recipe.yaml").read_bytes() == before


RANK = """
import os, signal, sys, time
from pathlib import Path

mode, folder = sys.argv[1], Path(sys.argv[2])
rank = os.environ["RANK"]
if mode == "crash":
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    time.sleep(60)
got = []
(folder / f"ready-{rank}").touch()
time.sleep(1)  # a rank that still imports torch: it has no handler
for number in (signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: got.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, signal.SIGINT))
while len(got) < 2:
    time.sleep(0.01)
sys.exit(10)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Two ranks that do what the mode says instead of training, under our torchrun."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    def run(mode: str) -> subprocess.Popen[str]:
        torchrun = ["--standalone", "--nproc-per-node=2", str(script), mode, str(tmp_path)]
        return start("mirai_dist.runtime.torchrun", *torchrun)

    return run


def test_signals_reach_ranks_that_could_not_answer_yet(
    stand_in: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    launcher = stand_in("signals")
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, launcher)
    launcher.send_signal(signal.SIGUSR1)
    launcher.send_signal(signal.SIGINT)
    assert ended(launcher, 30) == (10, [])


def test_a_crash_keeps_torchruns_table(stand_in: Callable[[str], subprocess.Popen[str]]) -> None:
    code, said = ended(stand_in("crash"))
    assert code == 128 + signal.SIGKILL
    assert any("Signal 9 (SIGKILL) received" in line for line in said)
    assert any("failed (exitcode: -9) local_rank: 1" in line for line in said)
    assert not any("Traceback" in line for line in said)
