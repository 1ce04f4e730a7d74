"""What a recipe's networks attend with on this machine (mirai_dist/attention/select.py)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from mirai_dist.attention.patterns import Backends
from mirai_dist.attention.select import FLEX, Choice, Need, Unavailable, select
from mirai_dist.config import RecipeError, schema
from mirai_dist.cycle.certified import (
    MAKE,
    failed_backends,
    lacking_attention,
    lacking_kernels,
    lacking_parts,
    require_attention,
)
from mirai_dist.cycle.fusing import fusing_of

JOINED = "kernels that join parts"  # named among the refused where their certificate is missing
# Backends whose calls torch's dispatcher sees (parallel/recompute.py).
SEEN = ("cudnn", "sdpa", "sdpa-flash", "sdpa-efficient", "flash-2")


def attention_of(recipe: schema.Recipe, device: torch.device, trained: bool = True) -> Choice:
    """The choice for all networks of a recipe; `trained` False: nothing needs a gradient.

    Raises RecipeError where what parallel.attention or parallel.segment_attention names cannot be used here, and in
    training where parallel.certificates requires a certificate that is missing.
    """
    networks = (recipe.teacher, recipe.generator, recipe.critic)
    head_dims = tuple(sorted({network.dim // network.heads for network in networks}))
    failed = failed_backends(recipe, device)
    need = Need(device.type, getattr(torch, recipe.parallel.compute_dtype), head_dims, trained, failed)
    if fusing_of(recipe, device).name == "fused":
        need = replace(need, no_kernels="", cached_gradient=recipe.rollout.kv_grad == "leaky")
    choice = _selected(recipe, need)
    reason = lacking_parts(recipe, device, choice)
    if reason and trained and recipe.parallel.certificates == "require":
        raise RecipeError("parallel.certificates", f"require, and the kernels that join attention {reason}; {MAKE}")
    if reason:
        choice = _selected(recipe, replace(need, no_kernels=reason))
        choice = replace(choice, refused=(*choice.refused, (JOINED, reason)))
    if trained:
        require_attention(recipe, device, choice)
        _check_kept(recipe, choice)
    return choice


def _check_kept(recipe: schema.Recipe, choice: Choice) -> None:
    """RecipeError where selective recomputation would not see the attention that it is to keep."""
    if recipe.parallel.recompute != "selective":
        return
    by_rule = any(stage.kind not in ("bidirectional", "dmd") for stage in recipe.stages.values())
    unseen = [choice.dense] * (choice.dense not in SEEN)
    unseen += [choice.segments] * (choice.segments == FLEX.name and by_rule)
    if unseen:
        what = f"selective keeps what attention by {', '.join(SEEN)} gives; that of {' and '.join(unseen)} is unseen"
        raise RecipeError("parallel.recompute", f"{what}; use block, or name others in attention and segment_attention")


def _selected(recipe: schema.Recipe, need: Need) -> Choice:
    try:
        return select(recipe.parallel.attention, recipe.parallel.segment_attention, need)
    except Unavailable as error:
        raise RecipeError(f"parallel.{error.key}", str(error)) from error


def backends_of(recipe: schema.Recipe, device: torch.device, trained: bool = True) -> Backends:
    """What `attention_of` chose, for a network's constructor."""
    return attention_of(recipe, device, trained).backends


def check_attention(recipe: schema.Recipe, device: torch.device) -> None:
    """Refuse, before anything is trained, what no rank can compute, and ranks that would compute in different ways, in
    attention or between: their gradients would differ by rounding, unseen.

    Called by all ranks. Raises RecipeError on all of them.
    """
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, _in_a_word(recipe, device))
    for rank, found in enumerate(everyone):
        if found != everyone[0]:
            what = f"the nodes are not alike: rank 0 has {everyone[0]}, rank {rank} has {found}"
            what = f"{what}; name what all have, here, in segment_attention and kernels"
            raise RecipeError("parallel.attention", what)
    attention_of(recipe, device)
    fusing_of(recipe, device)


def _in_a_word(recipe: schema.Recipe, device: torch.device) -> str:
    try:
        choice, kernels = attention_of(recipe, device), fusing_of(recipe, device)
    except RecipeError as error:
        return str(error)  # told to the others first
    attention = f"attention {choice.dense}, segment_attention {choice.segments}, caches {choice.behind}"
    return f"{attention} and kernels {kernels.name}"


def uncertified(recipe: schema.Recipe, device: torch.device) -> list[str]:
    """Warnings of a run on GPUs that goes on without certificates it would rather have. On CPUs none are expected."""
    if device.type == "cpu":
        return []
    fusing, choice = fusing_of(recipe, device), attention_of(recipe, device)
    kernels = lacking_kernels(recipe, device) if recipe.parallel.kernels != "reference" else ""
    attention = lacking_attention(recipe, device, choice)
    parts = dict(choice.refused).get(JOINED, "")
    lines = [f"warning: results of attention by {choice.dense} {attention}; {MAKE}"] if attention else []
    lines += [f"warning: attention by whole calls alone: the kernels that join parts {parts}; {MAKE}"] if parts else []
    return lines + ([f"warning: plain torch instead of fused kernels: these {fusing.reason}"] if kernels else [])
