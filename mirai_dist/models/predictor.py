"""The foresight predictor: a few plain transformer blocks and a linear map to the encoder's width.

It reads one segment's generator state at a time (nothing crosses segments, so it cannot copy the future), has
no positions, no text and no timestep, and is discarded after training (Video-Mirai section 3.3, appendix B).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mirai_dist.attention.patterns import TORCH, Backends, Pattern
from mirai_dist.models.wan.model import Attention
from mirai_dist.models.wan.token_ops import layer_norm


class PredictorBlock(nn.Module):
    """Pre-norm self-attention and feed-forward; `gated` adds six learned vectors that start at zero.

    The released predictor conditions an AdaLN on zeros, so only its biases act: six vectors a block in the
    order scale, shift, gate for attention, then for the feed-forward.
    """

    def __init__(self, dim: int, heads: int, gated: bool, dense: Pattern) -> None:
        super().__init__()
        self.dense = dense
        self.attn = Attention(dim, heads)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Parameter(torch.zeros(6, dim)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        if self.modulation is None:
            x = x + self._attend(layer_norm(x))
            return x + self.ffn(layer_norm(x))
        scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = self.modulation.unbind()
        x = x + gate_a * self._attend(layer_norm(x) * (1 + scale_a) + shift_a)
        return x + gate_f * self.ffn(layer_norm(x) * (1 + scale_f) + shift_f)

    def _attend(self, x: Tensor) -> Tensor:
        return self.attn.output(self.dense(self.attn.queries(x), *self.attn.keys_values(x)))


class Predictor(nn.Module):
    """Generator state [B, S, dim] of a segment -> encoder feature space [B, S, target_dim]."""

    def __init__(
        self, dim: int, target_dim: int, heads: int, blocks: int, gated: bool, backends: Backends = TORCH
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PredictorBlock(dim, heads, gated, backends.dense) for _ in range(blocks))
        self.projection = nn.Linear(dim, target_dim, bias=False)

    def forward(self, state: Tensor) -> Tensor:
        return self.projection(self.hidden(state))

    def hidden(self, state: Tensor) -> Tensor:
        """What is projected, [B, S, dim]: for a head that never holds the projection of all tokens."""
        x = state.to(self.projection.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return x


def initialise(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Fill one parameter in place: Xavier-uniform weights, zero biases and gates, PyTorch's default projection."""
    if name.endswith(("bias", "modulation")):
        parameter.zero_()
    elif parameter.ndim == 1:
        parameter.fill_(1.0)
    else:
        fan_out, fan_in = parameter.shape
        bound = fan_in**-0.5 if name == "projection.weight" else (6.0 / (fan_in + fan_out)) ** 0.5
        parameter.uniform_(-bound, bound, generator=generator)
