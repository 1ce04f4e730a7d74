"""Which shapes a recipe's networks compute with, from the passes that the planner counts. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mirai_dist.config.schema import Recipe
from mirai_dist.plan import passes
from mirai_dist.plan.passes import Pass
from mirai_dist.plan.shapes import frame_tokens, network_of


@dataclass(frozen=True, order=True)
class Dense:
    """A call of dense attention; `past` of the keys come from a cache, which is longer than what is seen of it. sink:
    the first so many of them, which a window keeps: they lie apart from the others."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    past: int = 0
    sink: int = 0

    def __str__(self) -> str:
        past = f", {self.past} of them cached" if self.past else ""
        past += f" and {self.sink} of those in a sink" if self.sink else ""
        return f"{self.batch} x {self.queries} queries, {self.keys} keys{past}, {self.heads} heads of {self.head_dim}"


@dataclass(frozen=True, order=True)
class BySegment:
    """Attention over whole segments: of `tokens` tokens a copy, two copies if doubled (teacher forcing)."""

    batch: int
    tokens: int
    segment: int
    heads: int
    head_dim: int
    doubled: bool

    def __str__(self) -> str:
        copies = "2 x " if self.doubled else ""
        return f"{self.batch} x {copies}{self.tokens} tokens by {self.segment}, {self.heads} heads of {self.head_dim}"


@dataclass(frozen=True, order=True)
class Tokens:
    """Tokens between attention and products. grid: frames, rows, columns. vectors: scales and shifts, one or one a
    frame of every copy. first_frame: the latest frame that such a pass starts at."""

    batch: int
    dim: int
    heads: int
    grid: tuple[int, int, int]
    copies: int
    vectors: int
    first_frame: int = 0

    @property
    def count(self) -> int:
        frames, rows, columns = self.grid
        return self.copies * frames * rows * columns

    def __str__(self) -> str:
        size = " x ".join(map(str, (self.batch, self.count, self.dim)))
        return f"{size}, {self.heads} heads, {self.vectors} vectors, from frame {self.first_frame}"


@dataclass(frozen=True, order=True)
class Head:
    """The predictor's last product and its cosine."""

    tokens: int
    dim: int
    target_dim: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.dim} to {self.target_dim}"


@dataclass(frozen=True, order=True)
class Fusion:
    """Targets of the foresight loss from the encoder's features [batch, segments * segment_tokens, dim]."""

    batch: int
    segments: int
    segment_tokens: int
    dim: int
    offsets: tuple[int, ...]

    def __str__(self) -> str:
        size = f"{self.batch} x {self.segments} segments of {self.segment_tokens} x {self.dim}"
        return f"{size}, offsets {', '.join(map(str, self.offsets))}"


Shape = Dense | BySegment | Tokens | Head | Fusion


@dataclass(frozen=True)
class Shapes:
    """Everything that a recipe computes with besides matrix products, in its compute dtype."""

    dtype: str
    dense: tuple[Dense, ...]
    segments: tuple[BySegment, ...]
    tokens: tuple[Tokens, ...]
    heads: tuple[Head, ...]
    fusions: tuple[Fusion, ...]


def shapes_of(recipe: Recipe) -> Shapes:
    """The distinct shapes of all stages of the recipe, micro-batches as they are."""
    made = [*passes_of(recipe)]
    wan = [each for each in made if each.role != "predictor"]
    latest: dict[Tokens, int] = {}
    for found, first in (_tokens(recipe, each) for each in made):
        latest[found] = max(first, latest.get(found, 0))
    placed = (replace(found, first_frame=first) for found, first in latest.items())
    heads = {
        Head(sequences * each.tokens, recipe.generator.dim, recipe.teacher.dim)
        for each in made
        for sequences in each.answers
        if sequences
    }
    segments, offsets = recipe.video.latent_frames // recipe.video.frames_per_segment, tuple(recipe.foresight.offsets)
    fusions = {
        Fusion(each.batch, segments, each.tokens // segments, recipe.teacher.dim, offsets)
        for each in made
        if each.phase == "encoder"
    }
    return Shapes(
        recipe.parallel.compute_dtype,
        tuple(sorted({call for each in made for call in _dense(recipe, each)})),
        tuple(sorted({call for each in wan for call in _segments(recipe, each)})),
        tuple(sorted(placed)),
        tuple(sorted(heads)),
        tuple(sorted(fusions)),
    )


def passes_of(recipe: Recipe) -> Iterator[Pass]:
    """Passes of all stages, as one rank would make them; those of the text encoder are not ours."""
    for stage in recipe.stages.values():
        if stage.trajectories:
            yield from passes.trajectory(recipe)
        for update in passes.updates(recipe, stage, ranks=1):
            yield from (each for each in update.passes if each.role != "text")


def _width(recipe: Recipe, role: str) -> tuple[int, int]:
    """Heads and their width."""
    network = recipe.generator if role == "predictor" else network_of(role, recipe)
    return network.heads, network.dim // network.heads


def _dense(recipe: Recipe, each: Pass) -> Iterator[Dense]:
    width = _width(recipe, each.role)
    past, sink = _past(each), recipe.rollout.sink_frames * frame_tokens(recipe)
    for queries, keys in each.attention:
        yield Dense(each.batch, queries, keys, *width, past, sink if sink < past else 0)
    if each.role != "predictor":
        yield Dense(each.batch, each.tokens, recipe.text.length, *width)


def _past(each: Pass) -> int:
    """Tokens that a pass has behind it; of a predictor the field says something else."""
    return 0 if each.role == "predictor" else each.past


def _segments(recipe: Recipe, each: Pass) -> Iterator[BySegment]:
    if len(each.attention) > 1:
        segment = each.attention[0][0]
        yield BySegment(each.batch, each.tokens // each.halves, segment, *_width(recipe, each.role), each.halves == 2)


def _tokens(recipe: Recipe, each: Pass) -> tuple[Tokens, int]:
    """What a pass computes with, at frame 0, and the frame it starts at."""
    frame = frame_tokens(recipe)
    grid = (each.tokens // each.halves // frame, recipe.video.latent_height // 2, recipe.video.latent_width // 2)
    network = network_of(each.role, recipe)
    vectors = each.times * each.halves if each.times > 1 else 1
    return Tokens(each.batch, network.dim, network.heads, grid, each.halves, vectors), _past(each) // frame
