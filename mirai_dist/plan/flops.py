"""FLOPs of passes, by phase: matrix products and attention, two a multiply-add, as an operator counter sees them.

Forward of a Wan DiT on B sequences of N tokens (d width, f feed-forward width, L text positions, t text width,
T timesteps, c channels):

    a block      B (N (12 d^2 + 4 d f) + 4 d L' d)         q, k, v, o; cross q, o; feed-forward; L' = L where the
                                                           text is projected to keys and values, else 0
    attention    4 B d (sum over calls of queries x keys + N L)
    the rest     8 B N c d twice (patches, head), 2 B L' (t d + d^2), 2 B T (w d + d^2 + 6 d^2), w the sinusoid's width

Backward is twice forward for products (once where the input has no gradient: patches, text, sinusoid) and 2.5 times
for attention, whose scores are computed again. Recomputation repeats the blocks, if it is selective without their
self-attention. The tests hold all of it against an
operator count of the run's own phases. Elementwise work is no FLOPs here; time.py charges it as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mirai_dist.config.schema import Recipe
from mirai_dist.method.arithmetic import PRESETS
from mirai_dist.plan.passes import Pass, Update
from mirai_dist.plan.shapes import PATCH, TEXT_BUCKETS, network_of, text_encoder

ATTENTION_BACKWARD = 2.5  # five products for two


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one rank, dense products and attention apart: they run at different rates."""

    dense: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.dense + other.dense, self.attention + other.attention)

    def __mul__(self, factor: float) -> Flops:
        return Flops(factor * self.dense, factor * self.attention)

    @property
    def total(self) -> float:
        return self.dense + self.attention


def of_update(recipe: Recipe, update: Update) -> dict[str, Flops]:
    """FLOPs a rank by phase: of all micro-batches of one update. "recompute" and "backward" are apart here; in the
    run's ledger both are in phase backward."""
    found: dict[str, Flops] = {}
    for each in update.passes:
        times = each.count * update.micro_batches
        parts = {each.phase: forward(recipe, each)}
        if each.gradient:
            parts["backward"] = backward(recipe, each)
            if recipe.parallel.recompute != "none" and each.role != "predictor":
                parts["recompute"] = recomputed(recipe, each)
        for phase, flops in parts.items():
            found[phase] = found.get(phase, Flops()) + flops * times
    return found


def forward(recipe: Recipe, each: Pass) -> Flops:
    """One forward."""
    if each.role == "predictor":
        compared = each.tokens * sum(each.answers)
        return blocks(recipe, each) + Flops(2 * compared * recipe.generator.dim * recipe.teacher.dim)
    if each.role == "text":
        return blocks(recipe, each)
    patches, text, times, rest = _outer(recipe, each)
    return blocks(recipe, each) + Flops(patches + text + times + rest)


def backward(recipe: Recipe, each: Pass) -> Flops:
    """Backward of one forward, without recomputation."""
    whole = forward(recipe, each)
    if each.role == "predictor":
        return Flops(2 * whole.dense - _predictor_inputs(recipe, each), ATTENTION_BACKWARD * whole.attention)
    patches, text, times, _ = _outer(recipe, each)
    dim, network = network_of(each.role, recipe).dim, network_of(each.role, recipe)
    if text:
        text = 2 * each.batch * recipe.text.length * recipe.text.dim * dim
    if times:
        times = 2 * each.batch * each.times * each.halves * network.freq_dim * dim
    return Flops(2 * whole.dense - patches - text - times, ATTENTION_BACKWARD * whole.attention)


def blocks(recipe: Recipe, each: Pass) -> Flops:
    """Forward of the executed blocks alone."""
    rows, pairs = each.batch * each.tokens, sum(queries * keys for queries, keys in each.attention)
    if each.role == "predictor":
        dim = recipe.generator.dim
        return Flops(24 * rows * dim**2, 4 * each.batch * dim * pairs) * each.blocks
    if each.role == "text":
        matrices = sum(prod(shape) for shape in text_encoder().block if min(shape) > TEXT_BUCKETS)
        return Flops(2 * rows * matrices, 4 * each.batch * recipe.text.dim * pairs) * each.blocks
    network, length = network_of(each.role, recipe), recipe.text.length
    dim = network.dim
    dense = rows * (12 * dim**2 + 4 * dim * network.ffn_dim) + 4 * _text_rows(recipe, each) * dim**2
    return Flops(dense, 4 * dim * (each.batch * pairs + rows * length)) * each.blocks


def recomputed(recipe: Recipe, each: Pass) -> Flops:
    """What backward computes again of the blocks: all, or all but attention over no fewer keys than queries."""
    whole = blocks(recipe, each)
    if recipe.parallel.recompute == "block":
        return whole
    if recipe.text.length >= each.tokens:
        return Flops(whole.dense)
    texts = 4 * network_of(each.role, recipe).dim * each.batch * each.tokens * recipe.text.length * each.blocks
    return Flops(whole.dense, texts)


def _outer(recipe: Recipe, each: Pass) -> tuple[float, float, float, float]:
    """Products outside the blocks: patches, text, timesteps, head."""
    network = network_of(each.role, recipe)
    dim, values = network.dim, PATCH * recipe.video.channels
    rows, times = each.batch * each.tokens, each.batch * each.times * each.halves
    patches = 2 * rows * values * dim
    text = 2 * _text_rows(recipe, each) * (recipe.text.dim * dim + dim**2)
    embedded = 2 * times * (network.freq_dim * dim + 7 * dim**2)
    return patches, text, embedded, patches / each.halves if each.head else 0.0


def _text_rows(recipe: Recipe, each: Pass) -> int:
    return each.batch * recipe.text.length if each.text else 0


def _predictor_inputs(recipe: Recipe, each: Pass) -> float:
    """Gradient products that backward leaves out: replayed states are data. Gates stand before the first block's
    projections, so the release's predictor leaves out none."""
    if each.past or PRESETS[recipe.foresight.preset].gated_predictor:
        return 0.0
    return 6 * each.batch * each.tokens * recipe.generator.dim**2
