"""Shapes of every parameter of a recipe's networks, without torch: what is counted, sharded, gathered and saved.

A network is equal blocks and a rest. With d the width, f the feed-forward width, t the text width, c the channels:

    Wan block     8 d^2 + 2 d f + 20 d + f           q, k, v, o twice with biases and two norms; norm3; the
                                                    feed-forward; a modulation of 6 d
    Wan rest      4 c d + d + t d + d^2 + 2 d + ...  patches, text, time, its projection to 6 d, head and its modulation
    predictor     12 d^2 + 11 d a block              (gated: 6 d more), and a bias-free map to the encoder's width

The tests hold these counts against the modules themselves, to the unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mirai_dist.config.schema import Network, Recipe, Stage
from mirai_dist.method.arithmetic import PRESETS, outputs_of_predictor
from mirai_dist.plan.shards import ShardPlan

PATCH = 4  # latent values of a channel that a token holds: 1 frame, 2 rows, 2 columns
BYTES = {"bfloat16": 2, "float32": 4}
Shape = tuple[int, ...]
TEXT_DIM = 4096  # of UMT5-XXL, the only text encoder whose shape is known beforehand
TEXT_BUCKETS = 32  # relative positions of its attention


@dataclass(frozen=True)
class Parameters:
    """Parameter shapes of one network: of a block, how many blocks, of the rest."""

    block: tuple[Shape, ...]
    blocks: int
    rest: tuple[Shape, ...]

    @property
    def count(self) -> int:
        """Parameters, unsharded."""
        return self.blocks * numel(self.block) + numel(self.rest)

    def units(self, plan: ShardPlan) -> tuple[tuple[Shape, ...], ...]:
        """Parameter shapes of each of the plan's units, in its order: the blocks alone, and the root with what is
        left."""
        nested = len(plan.units) - 1
        return (self.block,) * nested + (self.block * (self.blocks - nested) + self.rest,)

    def sharded(self, shards: int) -> int:
        """Parameters of the rank that holds most. FSDP2 cuts each parameter along its first axis, rounding up."""
        return self.blocks * padded(self.block, shards) // shards + padded(self.rest, shards) // shards


def numel(shapes: tuple[Shape, ...]) -> int:
    return sum(prod(shape) for shape in shapes)


def padded(shapes: tuple[Shape, ...], shards: int) -> int:
    """Values that a gather of these parameters moves: the first axis of each is filled up to a multiple of shards."""
    return sum(-(-shape[0] // shards) * shards * prod(shape[1:]) for shape in shapes)


def linear(inside: int, outside: int) -> tuple[Shape, ...]:
    """Weight and bias."""
    return (outside, inside), (outside,)


def wan(network: Network, recipe: Recipe) -> Parameters:
    """A Wan DiT of the recipe."""
    dim, values = network.dim, PATCH * recipe.video.channels
    attention = (*linear(dim, dim) * 4, (dim,), (dim,))
    block = ((1, 6, dim), *attention, (dim,), (dim,), *attention)
    block += (*linear(dim, network.ffn_dim), *linear(network.ffn_dim, dim))
    rest = ((dim, recipe.video.channels, 1, 2, 2), (dim,), *linear(recipe.text.dim, dim), *linear(dim, dim))
    rest += (*linear(network.freq_dim, dim), *linear(dim, dim), *linear(dim, 6 * dim))
    return Parameters(block, network.blocks, (*rest, (1, 2, dim), *linear(dim, values)))


def predictor(recipe: Recipe, answers: int = 1) -> Parameters:
    """The foresight predictor, which gives so many answers of the encoder's width for each token."""
    dim, gated = recipe.generator.dim, PRESETS[recipe.foresight.preset].gated_predictor
    block = (*linear(dim, dim) * 4, (dim,), (dim,), *linear(dim, 4 * dim), *linear(4 * dim, dim))
    block += ((6, dim),) if gated else ()
    return Parameters(block, recipe.foresight.predictor_blocks, ((answers * recipe.teacher.dim, dim),))


def text_encoder() -> Parameters:
    """UMT5-XXL's encoder: 5,680,910,336 parameters."""
    dim, ffn, heads, layers = TEXT_DIM, 10240, 64, 24
    block = ((dim, dim),) * 4 + ((TEXT_BUCKETS, heads), (ffn, dim), (ffn, dim), (dim, ffn), (dim,), (dim,))
    return Parameters(block, layers, ((256384, dim), (dim,)))


def of_role(role: str, recipe: Recipe, stage: Stage | None = None) -> Parameters:
    """Parameters of a role's network, as this stage has it."""
    if role == "predictor":
        return predictor(recipe, answers_of(recipe, stage) if stage else 1)
    return text_encoder() if role == "text" else wan(network_of(role, recipe), recipe)


def answers_of(recipe: Recipe, stage: Stage) -> int:
    """Answers of the predictor for each token: several where a few-step start has a loss an offset."""
    if stage.kind == "dmd":
        return 1
    return outputs_of_predictor(stage.foresight.fusion, recipe.foresight.offsets)


def network_of(role: str, recipe: Recipe) -> Network:
    """The section of the recipe that a Wan role has its shape from; AR teacher and target have the generator's."""
    return {"teacher": recipe.teacher, "encoder": recipe.teacher, "critic": recipe.critic}.get(role, recipe.generator)


def frame_tokens(recipe: Recipe) -> int:
    """Tokens of one latent frame."""
    return (recipe.video.latent_height // 2) * (recipe.video.latent_width // 2)
