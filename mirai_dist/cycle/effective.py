"""What a run really uses, printed at the start and stored as RUN/effective.yaml."""

from __future__ import annotations

import platform
from dataclasses import fields
from typing import Any

import torch

from mirai_dist.config import Resolved, schema
from mirai_dist.config.gates import bounds_of, has_reference
from mirai_dist.config.rules import accumulation
from mirai_dist.cycle.attending import attention_of
from mirai_dist.cycle.fusing import fusing_of
from mirai_dist.method.flow import warped_steps
from mirai_dist.method.foresight import PRESETS, captured_blocks
from mirai_dist.observe.alarms import dmd_alarms, silence
from mirai_dist.plan.shards import ShardPlan, predictor_plan, ranks_per_shard, wan_plan


def effective(resolved: Resolved, ranks: int, device: str) -> dict[str, Any]:
    """What the run uses; under "in stage NAME" what a stage with overrides of its own uses instead."""
    common = _effective(resolved.recipe, ranks, device)
    found = common | {"gates": _gates(resolved)}
    for name, stage in resolved.recipe.stages.items():
        if stage.overrides:
            own = _effective(resolved.of_stage(name).recipe, ranks, device)
            found[f"in stage {name}"] = {key: value for key, value in own.items() if value != common[key]}
    return found


def _effective(recipe: schema.Recipe, ranks: int, device: str) -> dict[str, Any]:
    """Mesh, dtypes, units, warped timesteps, captured blocks and derived accumulation, from the data the run uses."""
    arithmetic = PRESETS[recipe.foresight.preset]
    depth = recipe.foresight.depth
    plans = {
        "generator": wan_plan(recipe.parallel, recipe.generator.blocks, trained=True),
        "critic": wan_plan(recipe.parallel, recipe.critic.blocks, trained=True),
        "teacher and foresight encoder": wan_plan(recipe.parallel, recipe.teacher.blocks, trained=False),
        "predictor": predictor_plan(recipe.parallel, arithmetic.bf16_predictor),
    }
    return {
        "ranks": ranks,
        "mesh": {"replicas": recipe.parallel.replicas, "ranks per shard": ranks_per_shard(recipe, ranks)},
        "device": device,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "attention": attention_of(recipe, torch.device(device)).told(),
        "kernels": fusing_of(recipe, torch.device(device)).told(),
        "prompts": recipe.data.prompts or "captions of the procedural world",
        "text": f"{recipe.text.encoder} {recipe.text.path}".strip(),
        "starts": _starts(recipe),
        "denoising timesteps": list(warped_steps(recipe.rollout.steps, recipe.flow.shift)),
        "first segment's timesteps": list(warped_steps(recipe.rollout.first_steps, recipe.flow.shift)) or "the same",
        "rollout frames": recipe.rollout.total_frames or recipe.video.latent_frames,
        "segments": recipe.video.latent_frames // recipe.video.frames_per_segment,
        "foresight": {
            "generator blocks": captured_blocks(recipe.generator.blocks, depth, arithmetic),
            "encoder blocks": captured_blocks(recipe.teacher.blocks, depth, arithmetic),
            "weights": _foresight_weights(recipe),
        },
        "accumulation": {name: accumulation(stage.batch, ranks) for name, stage in recipe.stages.items()},
        "alarms": {name: _alarms(recipe, stage.cycles) for name, stage in recipe.stages.items() if stage.kind == "dmd"},
        "networks": {name: _described(plan) for name, plan in plans.items()},
    }


def _alarms(recipe: schema.Recipe, cycles: int) -> str:
    """What the alarms of a dmd stage watch, and from when on; or why they cannot say anything."""
    limits = recipe.alarms
    names = ", ".join(alarm.name for alarm in dmd_alarms(limits, draws=1))
    first = limits.warmup_cycles + limits.window_cycles
    return silence(limits, cycles) or f"{limits.on_alarm}, after {first} cycles: {names}"


def _starts(recipe: schema.Recipe) -> dict[str, str]:
    """Where the networks of each stage come from."""
    found = {}
    for name, stage in recipe.stages.items():
        for role in ("parent", "teacher", "critic"):
            source = getattr(stage, role)
            if source:
                weights = recipe.weights.get(source)
                place = f"{weights.path} ({weights.which})" if weights else f"stage {source}"
                found[f"{name} {role}"] = place
    return found


def _foresight_weights(recipe: schema.Recipe) -> dict[str, float]:
    """Stages that have foresight."""
    weights = {
        name: recipe.foresight.weight if stage.kind == "dmd" else stage.foresight.weight
        for name, stage in recipe.stages.items()
    }
    return {name: weight for name, weight in weights.items() if weight}


def _gates(resolved: Resolved) -> dict[str, str]:
    """What the start of each stage that has a gate is held against."""
    found = {}
    for name, stage in resolved.recipe.stages.items():
        if stage.gate.clips:
            recipe = resolved.of_stage(name).recipe
            bounds = bounds_of(recipe, name)
            intervals = [f"{each.name} {bounds.of(each.name)}" for each in fields(bounds) if each.name != "failing"]
            times = " times that of clean clips" if has_reference(recipe, name) else ""
            held = f"{', '.join(intervals)}{times}; {bounds.failing:.0%} may be outside"
            found[name] = f"{stage.gate.clips} clips of {stage.parent}: {held}"
    return found


def _described(plan: ShardPlan) -> dict[str, Any]:
    return {
        "storage": plan.storage_dtype,
        "compute": plan.compute_dtype,
        "reduce": str(torch.promote_types(getattr(torch, plan.compute_dtype), torch.float32)).removeprefix("torch."),
        "units": len(plan.units),
        "reshard after forward": plan.units[0].reshard_after_forward,
        "recomputed blocks": len(plan.recompute),
        "attention is kept": plan.keep_attention,
    }
