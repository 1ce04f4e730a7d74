"""Wan2.1's DiT with official parameter names, for bidirectional and causal use.

One forward serves the teacher, the critic, the foresight encoder (early exit), the teacher-forced AR teacher
and the cached causal generator; what differs is what a token may see. Order of operations follows Wan2.1
(blocks: self-attention, cross-attention, feed-forward; six modulation vectors a block and frame).

Precision: activations have the dtype of the (gathered) parameters; RMSNorm, rotary positions and the timestep
sinusoid are computed in at least float32. Inputs are cast here, explicitly, because FSDP casts them in forward
but not on recomputation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mirai_dist.attention.patterns import TORCH, Backends, Pattern
from mirai_dist.models.wan.keys import PATCH, WanShape
from mirai_dist.models.wan.kv_cache import Held, KeysValues
from mirai_dist.models.wan.token_ops import EPS, PLAIN, Placement, TokenOps


class History(NamedTuple):
    """What a causal pass reads beside its own segment.

    held: where rotated keys and values of earlier segments lie, a block, and the room for its own, if it is to write
    them there; None at the first segment of a pass that writes nothing.
    text_keys_values: cross-attention keys and values of an earlier pass; None computes them from the text.
    first_frame: absolute latent frame at which this segment starts.
    """

    held: tuple[Held, ...] | None = None
    text_keys_values: KeysValues | None = None
    first_frame: int = 0


class Clean(NamedTuple):
    """The clean half of the doubled sequence of teacher forcing.

    latents: [B, F, C, H, W]. timesteps: [B] or [B, F], what they were noised to; None if they were not.
    """

    latents: Tensor
    timesteps: Tensor | None = None


@dataclass(frozen=True)
class Capture:
    """Read the residual stream after this many blocks (0: never); `stop` ends the forward there."""

    after: int = 0
    stop: bool = False


class WanOutput(NamedTuple):
    """velocity [B, F, C, H, W] (None after an early exit); hidden [B, tokens, dim] if captured; the rest if a
    history was given, for the caller to keep: this segment's own keys and values, unless it has written them into
    room that it was given, and the text's."""

    velocity: Tensor | None
    hidden: Tensor | None
    keys_values: KeysValues | None
    text_keys_values: KeysValues | None


class RmsNorm(nn.Module):
    """RMSNorm over the full width, all heads together, computed in at least float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return functional.rms_norm(wide, (x.shape[-1],), eps=EPS).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Projections shared by self- and cross-attention; state-dict names q, k, v, o, norm_q, norm_k."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RmsNorm(dim)
        self.norm_k = RmsNorm(dim)

    def output(self, attended: Tensor) -> Tensor:
        return self.o(attended.flatten(-2))


class BlockInputs(NamedTuple):
    """What every block of one pass shares."""

    modulation: Tensor  # [B, frames or 1, 6, dim]
    places: Any  # of the tokens, as `TokenOps.place` gives them
    pattern: Pattern
    text: Tensor  # [B, text positions, dim], embedded
    returns_own: bool = True  # whether anybody wants the keys and values of these tokens


class WanBlock(nn.Module):
    """One transformer block. It writes nothing but into room that a pass without gradient is given, so it may be
    recomputed."""

    def __init__(self, shape: WanShape, backends: Backends, ops: TokenOps = PLAIN) -> None:
        super().__init__()
        self.backends, self.ops = backends, ops
        self.modulation = nn.Parameter(torch.randn(1, 6, shape.dim) / shape.dim**0.5)
        self.self_attn = Attention(shape.dim, shape.heads)
        self.norm3 = nn.LayerNorm(shape.dim, eps=EPS)
        self.cross_attn = Attention(shape.dim, shape.heads)
        self.ffn = nn.Sequential(
            nn.Linear(shape.dim, shape.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(shape.ffn_dim, shape.dim)
        )

    def forward(
        self,
        x: Tensor,
        inputs: BlockInputs,
        held: Held | None = None,
        text_keys_values: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor]]:
        """x [B, N, dim] -> (x, own (keys, values), text (keys, values)). With `held` its tokens see that beside their
        own; own is None where they were written there, or nobody wants them."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation + inputs.modulation).unbind(dim=2)
        # what a step needs alone is local to it: nothing else is alive in the feed-forward, where most is
        attended, own = self._attend(self.ops.modulated(x, scale_a, shift_a), inputs, held)
        x, normed = self.ops.added_normed(x, attended, gate_a, self.norm3)
        del attended
        if text_keys_values is None:
            text_keys_values = self.ops.keys_values(self.cross_attn, inputs.text)
        x, normed = self.ops.added_modulated(x, self._attend_text(normed, text_keys_values), scale_f, shift_f)
        return self.ops.added(x, self.ffn(normed), gate_f), own, text_keys_values

    def _attend(
        self, x: Tensor, inputs: BlockInputs, held: Held | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Self-attention's output [B, N, dim], and keys and values as `forward` returns them."""
        layer, places = self.self_attn, inputs.places
        if held is not None and held.room:
            queries = self.ops.queries_into(layer, x, places, held.slots())
            return layer.output(self.backends.behind(queries, None, held)), None
        queries, keys, values = self.ops.placed(layer, x, places)
        own = keys, values
        attended = inputs.pattern(queries, *own) if held is None else self.backends.behind(queries, own, held)
        return layer.output(attended), own if inputs.returns_own else None

    def _attend_text(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-attention's output [B, N, dim]."""
        return self.cross_attn.output(self.backends.dense(self.ops.queries(self.cross_attn, x), *keys_values))


class Head(nn.Module):
    """Final modulated projection to patch values; state-dict names modulation and head."""

    def __init__(self, shape: WanShape, ops: TokenOps = PLAIN) -> None:
        super().__init__()
        self.ops = ops
        self.modulation = nn.Parameter(torch.randn(1, 2, shape.dim) / shape.dim**0.5)
        self.head = nn.Linear(shape.dim, math.prod(PATCH) * shape.channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time.unsqueeze(2)).unbind(dim=2)
        return self.head(self.ops.modulated(x, scale, shift))


def timestep_sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoid [..., width] of timesteps in 0..1000 units: all cosines, then all sines, in float64."""
    half = width // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.to(torch.float64).unsqueeze(-1) * frequency
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class WanModel(nn.Module):
    """The DiT. Predicts velocity v = noise - x0. `backends`, `ops`: what computes its attention, and all between."""

    def __init__(self, shape: WanShape, backends: Backends = TORCH, ops: TokenOps = PLAIN) -> None:
        super().__init__()
        self.shape, self.backends, self.ops = shape, backends, ops
        dim = shape.dim
        self.patch_embedding = nn.Conv3d(shape.channels, dim, kernel_size=PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(
            nn.Linear(shape.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(shape.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(shape, backends, ops) for _ in range(shape.blocks))
        self.head = Head(shape, ops)

    def forward(
        self,
        latent: Tensor,
        timesteps: Tensor,
        text: Tensor,
        *,
        clean: Clean | None = None,
        segment_frames: int = 0,
        history: History | None = None,
        capture: Capture = Capture(),
    ) -> WanOutput:
        """Velocity of a latent video.

        latent: [B, F, C, H, W]. timesteps: [B], or [B, F] for causal use; units 0..1000, may be fractional.
        text: [B, length, text_dim], zeros past the prompt; every position is attended (Wan has no text mask).
        clean: for teacher forcing: the sequence becomes [clean at t=0, or at its own timesteps | latent].
        segment_frames: 0 is bidirectional; else tokens see their own segment and earlier ones (diffusion forcing,
        where timesteps differ between segments).
        history: cached causal use; the sequence is one segment that sees itself and all of the history.
        """
        tokens, grid = self._embed_patches(latent)
        dtype = tokens.dtype
        first_frame = history.first_frame if history else 0
        placement = Placement(grid, first_frame, copies=1 if clean is None else 2)
        segment_tokens = segment_frames * grid[1] * grid[2]
        segments = self.backends.segments
        pattern = segments.causal(segment_tokens) if segment_frames else self.backends.dense
        noisy_time = time = self._embed_time(timesteps, dtype)
        if clean is not None:
            tokens = torch.cat((self._embed_patches(clean.latents)[0], tokens), dim=1)
            pattern = segments.teacher_forced(segment_tokens)
            noisy_time = time.expand(-1, grid[0], -1)
            levels = torch.zeros_like(timesteps) if clean.timesteps is None else clean.timesteps
            clean_time = self._embed_time(levels, dtype).expand_as(noisy_time)
            time = torch.cat((clean_time, noisy_time), dim=1)
        text_cached = history is not None and history.text_keys_values is not None
        inputs = BlockInputs(
            self.time_projection(time).unflatten(-1, (6, -1)),
            self.ops.place(placement, self.shape.dim // self.shape.heads, tokens),
            pattern,
            text.to(dtype) if text_cached else self.text_embedding(text.to(dtype)),
            returns_own=history is not None,
        )
        tokens, hidden, own, text_kv = self._run_blocks(tokens, inputs, history, capture)
        if clean is not None:
            tokens = tokens.chunk(2, dim=1)[1]
            hidden = None if hidden is None else hidden.chunk(2, dim=1)[1]
        velocity = None if capture.stop else self._unpatchify(self.head(tokens, noisy_time), grid)
        return WanOutput(velocity, hidden, own, text_kv)

    def _run_blocks(
        self, x: Tensor, inputs: BlockInputs, history: History | None, capture: Capture
    ) -> tuple[Tensor, Tensor | None, KeysValues | None, KeysValues | None]:
        hidden = None
        own, text = [], []
        for index, block in enumerate(self.blocks):
            held = history.held[index] if history and history.held else None
            cached_text = history.text_keys_values[index] if history and history.text_keys_values else None
            x, keys_values, text_keys_values = block(x, inputs, held, cached_text)
            if history is not None:
                text.append(text_keys_values)
                if keys_values is not None:
                    own.append(keys_values)
            if index + 1 == capture.after:
                hidden = x
                if capture.stop:
                    break
        if history is None:
            return x, hidden, None, None
        return x, hidden, tuple(own) or None, tuple(text)

    def _embed_patches(self, latent: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Tokens [B, N, dim], frame-major, and their grid; the strided convolution as one matrix product."""
        weight = self.patch_embedding.weight
        rows, columns = latent.shape[-2] // PATCH[1], latent.shape[-1] // PATCH[2]
        patches = latent.to(weight.dtype).unflatten(-1, (columns, PATCH[2])).unflatten(-3, (rows, PATCH[1]))
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # [B, F*h*w, C*p*q]
        tokens = functional.linear(patches, weight.flatten(1), self.patch_embedding.bias)
        return tokens, (latent.shape[1], rows, columns)

    def _embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, 1 or F, dim] of timesteps [B] or [B, F]."""
        timesteps = timesteps if timesteps.ndim == 2 else timesteps.unsqueeze(1)
        return self.time_embedding(timestep_sinusoid(timesteps, self.shape.freq_dim).to(dtype))

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, N, p*q*channels] (channel fastest) -> [B, F, C, H, W]."""
        frames, rows, columns = grid
        x = patches.unflatten(-1, (PATCH[1], PATCH[2], self.shape.channels)).unflatten(1, (frames, rows, columns))
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def initialise(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Fill one parameter [full shape] in place by its official name.

    Linear weights Xavier-uniform and biases zero as in Wan2.1; the embeddings of text and time keep PyTorch's
    uniform default, since Wan's std 0.02 delays text conditioning at small widths; the head starts at zero.
    """
    leaf = name.rsplit(".", 1)[-1]
    if name == "head.head.weight" or leaf == "bias":
        parameter.zero_()
    elif leaf == "modulation":
        parameter.normal_(generator=generator).div_(parameter.shape[-1] ** 0.5)
    elif parameter.ndim == 1:  # norm weights
        parameter.fill_(1.0)
    elif name.startswith(("text_embedding", "time_embedding")):
        bound = parameter.shape[1] ** -0.5
        parameter.uniform_(-bound, bound, generator=generator)
    else:
        fan_out, fan_in = parameter.shape[0], parameter[0].numel()
        bound = (6.0 / (fan_in + fan_out)) ** 0.5
        parameter.uniform_(-bound, bound, generator=generator)
