"""What of the method is plain counting, without torch: which blocks are read, which segments have targets, how many
frames a cache keeps. The run computes with it, and the planner counts with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Arithmetic:
    """What the paper and the authors' release compute differently (spec 7.3).

    extra_blocks: the release reads the output of block *index* L, one block later than the paper's L blocks.
    constant: 1 - cos in the paper, -cos in the release (same gradient).
    wide_fusion: fuse and compare in float32; the release works in the features' own dtype.
    gated_predictor: six learned vectors a predictor block, starting at zero, as the release's AdaLN amounts to.
    bf16_predictor: the release stores predictor masters in bfloat16, where most updates round away.
    replay_after_generator: whether the critic update next to the generator update replays too (paper: all).
    """

    extra_blocks: int
    constant: float
    wide_fusion: bool
    gated_predictor: bool
    bf16_predictor: bool
    replay_after_generator: bool


PRESETS = {
    "paper": Arithmetic(0, 1.0, True, False, False, True),
    "release": Arithmetic(1, 0.0, False, True, True, False),
}


def captured_blocks(blocks: int, depth: float, arithmetic: Arithmetic) -> int:
    """Blocks executed before the residual stream is read: 15 of 30 and 20 of 40 at depth 0.5 (release: +1).

    At least one and at most all.
    """
    return min(blocks, max(1, round(blocks * depth) + arithmetic.extra_blocks))


def supervised_segments(segments: int, offsets: Sequence[int]) -> list[int]:
    """Segments that have at least one valid target."""
    return [i for i in range(segments) if any(i + k < segments for k in offsets)]


def kept_frames(total: int, trained: int, per_segment: int, window: int, sink: int = 0) -> int:
    """Latent frames a cache must hold for rollouts of `total` frames with gradient on the last `trained` ones.

    window: past frames a segment sees, 0 for all; sink: how many of them are the video's first. Segments with a graph
    see the last trained - per_segment + window frames, so a ring of those loses nothing that backward reads; they are
    read where they lie, in one piece or two. Where the window is the sinks alone there is no ring.
    """
    every, seen = total - per_segment, trained - per_segment + window
    return every if not window or window == sink else min(seen, every)


def outputs_of_predictor(fusion: str, offsets: Sequence[int]) -> int:
    """How many answers [.., D] the predictor gives for each token: its width is this many times the encoder's."""
    return 1 if fusion == "offsets" else len(offsets)
