"""The tiny twin of every shipped recipe, trained by `mirai train` on two ranks from its files to the report.

A twin differs from its recipe in sizes (tests/unit/test_shrink.py), so what runs here is what the recipe will run.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mirai_dist.commands import shrink
from mirai_dist.commands.twin import RANKS, ranks_of
from mirai_dist.config import Resolved, load
from mirai_dist.config.rules import check_layout
from mirai_dist.config.schema import Recipe
from mirai_dist.models.wan.keys import WanShape, shapes_of
from mirai_dist.state import commit
from mirai_dist.weights.files import open_weights
from tests.shipped import SHIPPED

REPOSITORY = Path(__file__).parents[2]
# Each of the others differs from one of these in a number of ranks, a length, or by having no foresight.
OFTEN = ("video_mirai", "ode_framewise", "chunkwise-ode-8x8", "framewise-cd-8x8", "causal-forcing-chunkwise-mirai-8x8",
         "causal-forcing-framewise-mirai-8x8")
TWINS = [pytest.param(path, id=path.stem, marks=() if path.stem in OFTEN else pytest.mark.slow) for path in SHIPPED]
FORESIGHT = {"loss/foresight", "cosine/foresight", "grad_norm/predictor", "lr/predictor", "seconds/encoder"}
REPLAY = {"cosine/replay", "grad_norm/predictor", "lr/predictor"}


def environment() -> dict[str, str]:
    """This environment without any launcher's variables; a guard against the network is on PYTHONPATH."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    paths = [REPOSITORY / "tests" / "guard", REPOSITORY, REPOSITORY / "launcher", REPOSITORY / "kernels"]
    own = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | own


def train(recipe: Path, run_dir: Path) -> str:
    """What the uninterrupted run said; the test fails when it did not end well."""
    command = [sys.executable, "-m", "mirai_launch", "train", str(recipe), "--nproc", str(RANKS)]
    process = subprocess.Popen([*command, "--run-dir", str(run_dir)], env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=recipe.parent)
    try:
        said, errors = process.communicate(timeout=280)
    finally:
        process.send_signal(signal.SIGQUIT)  # torchrun takes its ranks along; no effect where it has ended
    assert process.returncode == 0, said[-2000:] + errors[-4000:]
    assert errors == ""
    return said


def records(job: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]


def stored(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint by what follows `prefix` in their names."""
    reader = dcp.FileSystemReader(checkpoint / "tensors")
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore
               for name, entry in entries.items() if name.startswith(prefix)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what no_dist asks for
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def newest(job: Path) -> Path:
    path = commit.latest(job / "checkpoints")
    assert path is not None, job
    commit.verify(path)
    return path


def jobs(resolved: Resolved, stage: str, run_dir: Path) -> list[tuple[Recipe, Path]]:
    """(recipe, directory) of every training run of a stage."""
    root, recipe = run_dir / "stages" / stage, resolved.recipe
    if stage != recipe.study_stage:
        return [(resolved.of_stage(stage).recipe, root)]
    return [(resolved.of_arm(arm).recipe, root / arm / f"seed-{seed}")
            for arm in recipe.study.arms for seed in recipe.study.seeds]


@pytest.mark.parametrize("path", TWINS)
def test_the_twin_runs_to_its_report(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    twin = load(shrink.write(recipe, ranks_of(path, None), tmp_path / "twin") / "recipe.yaml")
    run_dir = tmp_path / "run"
    said = train(twin.path, run_dir)
    assert f"report: {run_dir / 'report.html'}" in said and (run_dir / "report.html").stat().st_size > 10_000
    accumulated = check_layout(recipe.recipe, ranks_of(path, None))
    for name, count in accumulated.items():
        assert f"{name}: {count}\n" in (run_dir / "effective.yaml").read_text()
        for arm, job in jobs(twin, name, run_dir):
            check_job(arm, name, job)
    check_gates(twin.recipe, run_dir)
    starts_from_its_files(twin.recipe, run_dir / "stages" / "distil")


def check_gates(recipe: Recipe, run_dir: Path) -> None:
    """Every gate was run, and let the twin pass; bounds are absolute where there are prompts and no clips."""
    gated = [name for name, stage in recipe.stages.items() if stage.gate.clips]
    assert "distil" in gated
    for name in gated:
        record = json.loads((run_dir / "stages" / name / "gate.json").read_text())
        assert record["passed"] and [len(each["values"]) for each in record["measures"]] == [2] * 3
        absolute = bool(recipe.data.prompts) and not recipe.data.latents
        assert [each["reference"] == "nan" for each in record["measures"]] == [absolute] * 3


def check_job(recipe: Recipe, name: str, job: Path) -> None:
    """Both cycles ran, with finite numbers, in the phases the recipe asks for; weights of the official names."""
    stage = recipe.stages[name]
    assert json.loads((job / "DONE").read_text())["cycles"] == stage.cycles == 2
    assert (job / "samples" / "cycle-000002.mp4").stat().st_size > 0
    rows = records(job)
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, int | float)]
        assert all(math.isfinite(number) for number in numbers), row
    updates = ("generator", *("critic",) * recipe.dmd.critic_updates) if stage.kind == "dmd" else ("update",)
    assert [(row["cycle"], row["phase"]) for row in rows] == [(c, phase) for c in range(2) for phase in updates]
    if stage.kind == "dmd":
        check_foresight(recipe, rows)
    else:
        for row in rows:
            assert FORESIGHT & row.keys() == (FORESIGHT if stage.foresight.weight else set()), row
    final = newest(job)
    role = "teacher" if stage.kind == "bidirectional" else "generator"
    network = getattr(recipe, role)
    sizes = WanShape(network.dim, network.ffn_dim, network.heads, network.blocks,
                  recipe.text.dim, recipe.video.channels, network.freq_dim)
    for which, present in (("networks", True), ("averages", stage.ema.decay > 0)):
        weights = stored(final, f"{which}/{role}/")
        assert {key: tuple(each.shape) for key, each in weights.items()} == (shapes_of(sizes) if present else {})
        assert all(each.isfinite().all() for each in weights.values())


def check_foresight(recipe: Recipe, rows: list[dict[str, Any]]) -> None:
    """Foresight is seen from its first cycle on and not before; without weight never."""
    foresight, last = recipe.foresight, recipe.dmd.critic_updates
    for row in rows:
        on = foresight.weight > 0 and row["cycle"] >= foresight.start_cycle
        expected = {"generator": FORESIGHT - {"seconds/encoder"}, "critic": REPLAY}[row["phase"]] if on else set()
        if on and row["position"] == last:
            expected = expected | {"seconds/encoder"}
        assert (FORESIGHT | REPLAY) & row.keys() == expected, row


def starts_from_its_files(recipe: Recipe, stage: Path) -> None:
    """Generator and critic, where they start from files, are what these hold, moved by as little as a few updates can;
    all of it moved."""
    distil, critic = recipe.stages["distil"], recipe.dmd
    rates = {"generator": distil.optimizer.lr * distil.cycles,
             "critic": critic.critic_optimizer.lr * distil.cycles * critic.critic_updates}
    for role, entry in (("generator", distil.parent), ("critic", distil.critic or distil.teacher)):
        if entry not in recipe.weights:
            continue
        [job] = stage.glob("*/seed-*")
        source = recipe.weights[entry]
        file = open_weights(Path(source.path), "ema" if source.which == "ema" else "raw")
        for key, tensor in stored(newest(job), f"networks/{role}/").items():
            moved = (tensor - file.read(key)).abs().max()
            assert 0 < moved < 4 * rates[role], (role, key, moved)  # an update of AdamW is of about its rate
