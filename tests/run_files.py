"""Run directories as `mirai train` leaves them, with checkpoints of random weights instead of trained ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mirai_dist.config import load
from mirai_dist.config.digest import digest
from mirai_dist.models.predictor import Predictor
from mirai_dist.models.wan import WanModel, WanShape
from mirai_dist.state.checkpoint import TrainState, save
from mirai_dist.state.commit import directory_name
from mirai_dist.state.ema import Ema, named_tensors
from tests.tiny_wan import fill

# Widths that two ranks do not divide; the teacher is not of the generator's shape.
GENERATOR = WanShape(dim=20, ffn_dim=27, heads=2, blocks=2, text_dim=7, channels=16, freq_dim=16)
TEACHER = WanShape(dim=24, ffn_dim=33, heads=2, blocks=3, text_dim=7, channels=16, freq_dim=16)

RECIPE = """
name: tiny-run
seed: 3
video: {latent_frames: 3, frames_per_segment: 1, latent_height: 4, latent_width: 4}
text: {dim: 7, length: 6}
teacher: {dim: 24, ffn_dim: 33, heads: 2, blocks: 3, freq_dim: 16}
generator: {dim: 20, ffn_dim: 27, heads: 2, blocks: 2, freq_dim: 16}
critic: ${teacher}
parallel: {compute_dtype: float32}
checkpoint: {every_cycles: 100}
rollout: {steps: [1000, 500]}
dmd: {critic_updates: 2}
foresight: {predictor_blocks: 1}
study:
  seeds: [5, 6]
  arms: {baseline: [foresight.weight=0], foresight: []}
stages:
  teacher: {kind: bidirectional, cycles: 9, batch: {global_size: 4}, optimizer: {lr: 1.0e-3}}
  ar_teacher: {kind: teacher_forcing, cycles: 9, batch: {global_size: 4}, optimizer: {lr: 1.0e-3}}
  few_step: {kind: consistency, parent: ar_teacher, cycles: 9, batch: {global_size: 4}, optimizer: {lr: 1.0e-3}}
  distil: {kind: dmd, parent: few_step, teacher: teacher, cycles: 9, batch: {global_size: 4}, optimizer: {lr: 1.0e-3}}
"""


@dataclass(frozen=True)
class Training:
    """A training run inside the run directory, and the cycle of its checkpoint."""

    stage: str = "distil"
    arm: str = "foresight"
    seed: int = 5
    cycle: int = 4
    average: bool = True

    @property
    def place(self) -> Path:
        below = Path("stages") / self.stage
        return (below / self.arm / f"seed-{self.seed}" if self.stage == "distil" else below) / "checkpoints"


def new_run(folder: Path, recipe: str = RECIPE) -> Path:
    """A run directory that holds its recipe alone."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def train(
    run_dir: Path, training: Training = Training(), shape: WanShape = GENERATOR
) -> dict[str, dict[str, Tensor]]:
    """Commit a checkpoint of one training; all ranks call it. Returns the unsharded values, {"raw": ..., "ema": ...}.

    shape: of the generator. Arms and seeds have the same values, whatever the number of ranks.
    """
    resolved = load(run_dir / "recipe.yaml")
    recipe = resolved.recipe
    if training.stage == "distil":
        recipe = resolved.with_overrides(recipe.study.arms[training.arm], training.arm).recipe
    stage = recipe.stages[training.stage]
    role = "teacher" if stage.kind == "bidirectional" else "generator"
    networks = {role: _sharded(WanModel(TEACHER if role == "teacher" else shape), 1)}
    if stage.kind == "dmd":
        networks["critic"] = _sharded(WanModel(TEACHER), 2)
        if recipe.foresight.weight:
            networks["predictor"] = _sharded(Predictor(shape.dim, TEACHER.dim, shape.heads, 1, False), 3)
    averages = {role: Ema(networks[role], 0.5)} if training.average else {}
    with torch.no_grad():
        for parameter in networks[role].parameters():
            parameter.mul_(1.25)
    for average in averages.values():
        average.update()
    passport = {
        "recipe": digest(recipe), "stage": training.stage, "kind": stage.kind, "cycle": training.cycle, "position": 0,
        "roles": list(networks), "starts": _starts(stage.parent),
    }
    extras = {"cycle": training.cycle, "position": 0, "updates": dict.fromkeys(networks, 7)}
    path = run_dir / training.place / directory_name(training.cycle, 0)
    save(path, TrainState(networks=networks, averages=averages, extras=extras), passport)
    ema = averages[role].state_dict() if training.average else {}
    return {"raw": _whole(named_tensors(networks[role])), "ema": _whole(ema)}


def _sharded(module: nn.Module, seed: int) -> nn.Module:
    """The module with random values; its blocks and itself sharded where there are ranks."""
    fill(module, seed)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
        for part in module.modules():
            if isinstance(part, nn.ModuleList):
                for block in part:
                    fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return module


def _starts(parent: str) -> dict[str, Any]:
    if not parent:
        return {}
    path = f"/somewhere/stages/{parent}/checkpoints/{directory_name(9, 0)}"
    return {"parent": {"name": parent, "path": path, "which": "ema", "kind": "cd"}}


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for name, tensor in tensors.items()}
