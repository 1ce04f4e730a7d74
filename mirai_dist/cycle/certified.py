"""What a recipe's certificate lets a run use on this machine (mirai_dist/certify/certificate.py).

parallel.certificates   fused kernels without one             attention without one
ignore                  taken; the probe at the start decides  taken; the probe decides
prefer                  not taken by auto, refused by name     taken, with a warning; what failed is not
require                 refused                                refused

Fused kernels are the token operators, the one that writes a cache among them, and those that join attention's parts.
On a CPU they run in Triton's interpreter alone, for checks, which no certificate is of: there the probe decides.
"""

from __future__ import annotations

import torch

from mirai_dist.attention import split
from mirai_dist.attention.select import PREFIX, SPLIT, Choice
from mirai_dist.certify import certificate
from mirai_dist.certify.shapes import shapes_of
from mirai_dist.certify.subjects import ATTENTION, CACHE, CHUNK, COSINE, FUSION, SEGMENTS, TOKENS
from mirai_dist.certify.subjects import PREFIX as OVER_PREFIXES
from mirai_dist.config import RecipeError, schema

MAKE = "make one on such a machine with `mirai bench kernels --certify RECIPE`"


def failed_backends(recipe: schema.Recipe, device: torch.device) -> frozenset[str]:
    """Backends of attention that were compared here and failed: none of them may serve."""
    if recipe.parallel.certificates == "ignore":
        return frozenset()
    dense, segments = (certificate.failed(recipe, device.type, op) for op in (ATTENTION, SEGMENTS))
    return dense | segments


def lacking_kernels(recipe: schema.Recipe, device: torch.device) -> str:
    """Why the fused kernels may not be taken; empty: they may."""
    if recipe.parallel.certificates == "ignore" or device.type == "cpu":
        return ""
    shapes = shapes_of(recipe)
    asked = (
        (TOKENS, "fused", shapes.tokens),
        (CACHE, "triton", [each for each in shapes.tokens if each.copies == 1]),
        (COSINE, "fused", shapes.heads),
        (FUSION, "fused", shapes.fusions),
    )
    reasons = (certificate.lacking(recipe, device.type, *each) for each in asked)
    return next(filter(None, reasons), "")


def lacking_parts(recipe: schema.Recipe, device: torch.device, choice: Choice) -> str:
    """Why the kernels that join attention's parts may not serve as chosen; empty: they may, or do not."""
    if recipe.parallel.certificates == "ignore" or device.type == "cpu":
        return ""
    by, shapes, reason = split.LIBRARIES.get((device.type, choice.dense), ""), shapes_of(recipe), ""
    if choice.behind == SPLIT:
        behind = [each for each in shapes.dense if each.past]
        reason = certificate.lacking(recipe, device.type, CHUNK, by, behind)
    if not reason and choice.segments == PREFIX:
        reason = certificate.lacking(recipe, device.type, OVER_PREFIXES, by, shapes.segments)
    return reason


def lacking_attention(recipe: schema.Recipe, device: torch.device, choice: Choice) -> str:
    """What of the chosen attention is not certified; empty: nothing, or certificates are ignored."""
    if recipe.parallel.certificates == "ignore":
        return ""
    shapes = shapes_of(recipe)
    reason = certificate.lacking(recipe, device.type, ATTENTION, choice.dense, shapes.dense)
    if not reason and choice.segments == "flex":
        reason = certificate.lacking(recipe, device.type, SEGMENTS, choice.segments, shapes.segments)
    return reason


def require_attention(recipe: schema.Recipe, device: torch.device, choice: Choice) -> None:
    """RecipeError where the recipe requires a certificate that the choice has not."""
    if recipe.parallel.certificates == "require":
        reason = lacking_attention(recipe, device, choice)
        if reason:
            what = f"require, and attention by {choice.dense}: results {reason}; {MAKE}"
            raise RecipeError("parallel.certificates", what)
