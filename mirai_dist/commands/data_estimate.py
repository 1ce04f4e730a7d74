"""`mirai data estimate`: arithmetic of data making: FLOPs, bytes, and hours on a GPU whose peak is known.

Where the numbers come from (a multiply-add is 2; dense bfloat16 peaks from the vendors' data sheets):

    embed     UMT5-XXL's encoder: 24 layers of 192.9 M weights that a token passes, 2 FLOPs a weight, and 4 d L for
              attention among L tokens (d 4096); 8,192 bytes a token
    latents   Wan2.1's VAE encoder, counted by torch.utils.flop_counter at 480 x 832: 2.72 TFLOP for the first frame,
              8.05 for each further four; in proportion to the area (40.7 of 163.7 TFLOP at a quarter of it)
    ode       a causal pass of Wan2.1-1.3B over 81 frames at 480 x 832 with a cache: 198 TFLOP chunk-wise, 189
              frame-wise; 48 steps with and without the prompt, and the context twice; 6 states of 2,096,640 values
"""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import dataclass

from mirai_dist.commands.data_progress import quiet_console, refuse_below_one, size_text
from mirai_dist.config.error import FileError
from mirai_dist.models.vae import GROUP, STRIDE

PEAKS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}  # dense bfloat16 FLOP/s, SXM forms
_PASS = {"chunk": 198e12, "frame": 189e12}
_STEPS, _STATES = 48, 6
_LAYERS, _WIDTH, _LAYER_WEIGHTS = 24, 4096, 4 * 4096**2 + 3 * 4096 * 10240
_FIRST_FRAME, _FOUR_FRAMES, _AREA = 2.718e12, 8.052e12, 480 * 832
_PUBLISHED = (81, 480, 832)


@dataclass(frozen=True)
class Cost:
    """Of one item."""

    flops: float
    bytes: int


def run(options: argparse.Namespace) -> int:
    """The sub-verb. FileError for numbers that make no sense."""
    refuse_below_one({"--count": options.count, "--tokens": options.tokens})
    if not 0 < options.utilisation <= 1:
        raise FileError("--utilisation", f"is {options.utilisation}; give a fraction of the peak, such as 0.4")
    cost = _cost(options)
    with closing(quiet_console()) as console:
        flops = cost.flops * options.count
        each = f"{cost.flops / 1e12:.4g} TFLOP and {size_text(cost.bytes)}"
        console.say(f"{options.item}: {options.count} items of {each}")
        console.say(f"in all {flops / 1e15:.4g} PFLOP and {size_text(cost.bytes * options.count)}")
        console.say(_hours(flops, options.gpu, options.utilisation))
    return 0


def _hours(flops: float, gpu: str, utilisation: float) -> str:
    if not gpu:
        return f"no hours without a GPU; name one: --gpu {'|'.join(PEAKS)}"
    peak = PEAKS.get(gpu.lower())
    if peak is None:
        return f"no hours: the peak of {gpu!r} is not in the table ({', '.join(PEAKS)}), and a guess would help nobody"
    hours = flops / peak / 3600
    reached = f"if {utilisation:.0%} of its {peak / 1e12:.0f} TFLOP/s is reached"
    assumed = "--utilisation is an assumption, not a measurement"
    return f"{hours / utilisation:.4g} GPU-hours on {gpu} {reached} ({assumed}); no fewer than {hours:.4g}"


def _cost(options: argparse.Namespace) -> Cost:
    frames, height, width = _shape(options.frames, options.size)
    if options.item == "embed":
        tokens = options.tokens
        layer = 2 * tokens * _LAYER_WEIGHTS + 4 * tokens * tokens * _WIDTH
        return Cost(_LAYERS * layer, 2 * _WIDTH * tokens)
    values = (1 + (frames - 1) // GROUP) * 16 * (height // STRIDE) * (width // STRIDE)
    if options.item == "latents":
        whole = _FIRST_FRAME + _FOUR_FRAMES * ((frames - 1) // GROUP)
        return Cost(whole * height * width / _AREA, 2 * values)
    if (frames, height, width) != _PUBLISHED:
        raise FileError("--size", "ode is known for 81 frames of 480x832 only: attention does not grow in proportion")
    return Cost((2 * _STEPS + 2) * _PASS[options.segments], 2 * _STATES * values)


def _shape(frames: int, size: str) -> tuple[int, int, int]:
    height, by, width = size.partition("x")
    if not (by and height.isdecimal() and width.isdecimal()) or frames < 1 or frames % GROUP != 1:
        raise FileError("--size", f"{size!r} with {frames} frames; give HEIGHTxWIDTH and 1 + {GROUP} n frames")
    return frames, int(height), int(width)
