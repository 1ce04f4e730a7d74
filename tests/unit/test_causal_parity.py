"""Causal sampling from a folder in the official layout equals a plain loop over a plain network.

The network here reads the safetensors by their official names and is written as Wan2.1 describes itself (spec of the
blocks: RMSNorm over all heads, complex rotary pairs 44/42/42, six modulation vectors a frame), in float64, with one
mask instead of a cache; the loop recomputes all earlier segments, clean, at every step. Nothing of mirai_dist is used
but what is tested.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from mirai_dist.cycle.roles import causal
from mirai_dist.method.rollout import RolloutInputs, RolloutSettings, rollout
from mirai_dist.models.wan import KVCache, WanModel
from mirai_dist.models.wan.keys import WanShape
from mirai_dist.models.wan.kv_cache import CacheShape
from mirai_dist.weights.files import open_weights
from mirai_dist.weights.load import load_into
from tests import wan_files

SIZES = WanShape(dim=40, ffn_dim=48, heads=2, blocks=3, text_dim=10, channels=4, freq_dim=16)
ROWS, COLUMNS, FRAMES = 2, 3, 6
STEPS = (1000.0, 937.5, 625.0)
Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def rms(w: Weights, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def rotations(frames: int) -> Tensor:
    """[tokens, pairs] complex factors of all tokens, frame-major: time pairs first, then row, then column."""
    width = SIZES.dim // SIZES.heads
    side = 2 * (width // 6)

    def axis(positions: Tensor, channels: int) -> Tensor:
        frequency = 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        return torch.polar(torch.ones(()).double(), positions.double()[:, None] * frequency)

    f, h, w = torch.meshgrid(torch.arange(frames), torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    parts = ((f, width - 2 * side), (h, side), (w, side))
    return torch.cat([axis(place.flatten(), channels) for place, channels in parts], dim=1)


def attention(w: Weights, name: str, x: Tensor, source: Tensor, mask: Tensor | None, turn: Tensor | None) -> Tensor:
    def heads(value: Tensor) -> Tensor:
        return value.unflatten(-1, (SIZES.heads, -1)).transpose(0, 1)

    q, k = heads(rms(w, f"{name}.norm_q", linear(w, f"{name}.q", x))), heads(
        rms(w, f"{name}.norm_k", linear(w, f"{name}.k", source)))
    if turn is not None:
        q, k = (torch.view_as_real(torch.view_as_complex(each.unflatten(-1, (-1, 2))) * turn).flatten(-2)
                for each in (q, k))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    mixed = scores.softmax(-1) @ heads(linear(w, f"{name}.v", source))
    return linear(w, f"{name}.o", mixed.transpose(0, 1).flatten(1))


def velocity(w: Weights, latents: Tensor, timesteps: Tensor, text: Tensor, segment: int) -> Tensor:
    """[F, C, H, W] at one timestep a frame -> velocity; a token sees its own segment and earlier ones."""
    frames, each = latents.shape[0], ROWS * COLUMNS
    patches = latents.reshape(frames, SIZES.channels, ROWS, 2, COLUMNS, 2).permute(0, 2, 4, 1, 3, 5)
    x = patches.reshape(frames * each, -1) @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"]
    half = SIZES.freq_dim // 2
    angle = timesteps[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    time = torch.cat([angle.cos(), angle.sin()], 1)
    time = linear(w, "time_embedding.2", functional.silu(linear(w, "time_embedding.0", time)))
    modulation = linear(w, "time_projection.1", functional.silu(time)).unflatten(1, (6, -1))  # [F, 6, dim]
    prompt = functional.gelu(linear(w, "text_embedding.0", text), approximate="tanh")
    prompt = linear(w, "text_embedding.2", prompt)
    place = torch.arange(frames).repeat_interleave(each) // segment
    mask, turn = place[:, None] >= place[None, :], rotations(frames)

    def framed(vectors: Tensor) -> Tensor:
        return vectors.repeat_interleave(each, 0)

    for i in range(SIZES.blocks):
        b = f"blocks.{i}"
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = map(framed, (w[f"{b}.modulation"] + modulation).unbind(1))
        h = normed(x) * (1 + scale_a) + shift_a
        x = x + gate_a * attention(w, f"{b}.self_attn", h, h, mask, turn)
        h = normed(x) * w[f"{b}.norm3.weight"] + w[f"{b}.norm3.bias"]
        x = x + attention(w, f"{b}.cross_attn", h, prompt, None, None)
        h = normed(x) * (1 + scale_f) + shift_f
        x = x + gate_f * linear(w, f"{b}.ffn.2", functional.gelu(linear(w, f"{b}.ffn.0", h), approximate="tanh"))
    shift, scale = map(framed, (w["head.modulation"] + time[:, None]).unbind(1))
    out = linear(w, "head.head", normed(x) * (1 + scale) + shift)
    return out.reshape(frames, ROWS, COLUMNS, 2, 2, SIZES.channels).permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


def plain_sampling(w: Weights, noise: Tensor, text: Tensor, segment: int) -> Tensor:
    """[F, C, H, W] from noise [steps, F, C, H, W]: segment by segment, each step over everything so far."""
    finished = noise.new_zeros(0, *noise.shape[2:])
    for first in range(0, FRAMES, segment):
        own = noise[:, first : first + segment]
        x = own[0]
        for step, t in enumerate(STEPS):
            timesteps = torch.tensor([0.0] * first + [t] * segment, dtype=torch.float64)
            v = velocity(w, torch.cat([finished, x]), timesteps, text, segment)[first:]
            clean = x - t / 1000 * v
            if step + 1 < len(STEPS):
                sigma = STEPS[step + 1] / 1000
                x = (1 - sigma) * clean + sigma * own[step + 1]
        finished = torch.cat([finished, clean])
    return finished


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_files.official(tmp_path_factory.mktemp("wan"), wan_files.tiny_tensors(7, sizes=SIZES), sizes=SIZES)


@pytest.mark.parametrize("segment", [1, 3])
def test_sampling_is_the_plain_loop(folder: Path, segment: int) -> None:
    network = WanModel(SIZES).double()
    load_into(network, open_weights(folder))
    draws = torch.Generator().manual_seed(segment)
    shape = (len(STEPS) + 1, 1, FRAMES, SIZES.channels, 2 * ROWS, 2 * COLUMNS)
    noise = torch.randn(shape, generator=draws, dtype=torch.float64)
    text = torch.randn(1, 5, SIZES.text_dim, generator=draws, dtype=torch.float64)
    width = SIZES.dim // SIZES.heads
    shape_of_cache = CacheShape(SIZES.blocks, 1, FRAMES - segment, segment, ROWS * COLUMNS, SIZES.heads, width)
    cache = KVCache(shape_of_cache, torch.device("cpu"), torch.float64)
    settings = RolloutSettings(STEPS, segment)
    with torch.no_grad():
        ours, _ = rollout(causal(network), settings, RolloutInputs(noise, text, len(STEPS) - 1), cache)
    plain = {name: tensor.double() for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    reference = plain_sampling(plain, noise[:-1, 0], text[0], segment)
    assert (ours[0] - reference).abs().max() < 1e-10 * reference.abs().max()
