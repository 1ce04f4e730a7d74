"""What a recipe's networks attend with on this machine (mirai_dist/attention/select.py)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mirai_dist.attention.patterns import Backends
from mirai_dist.attention.select import Choice, Need, Unavailable, select
from mirai_dist.config import RecipeError, schema
from mirai_dist.cycle.fusing import fusing_of


def attention_of(recipe: schema.Recipe, device: torch.device, trained: bool = True) -> Choice:
    """The choice for all networks of a recipe; `trained` False: nothing needs a gradient.

    Raises RecipeError where what parallel.attention or parallel.segment_attention names cannot be used here.
    """
    networks = (recipe.teacher, recipe.generator, recipe.critic)
    head_dims = tuple(sorted({network.dim // network.heads for network in networks}))
    need = Need(device.type, getattr(torch, recipe.parallel.compute_dtype), head_dims, trained)
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
    return f"attention {choice.dense}, segment_attention {choice.segments} and kernels {kernels.name}"
