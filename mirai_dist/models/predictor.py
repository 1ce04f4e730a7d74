"""The foresight predictor: a few plain transformer blocks and a linear map to the encoder's width.

It reads one segment's generator state at a time (nothing crosses segments, so it cannot copy the future), has
no positions, no text and no timestep, and is discarded after training (Video-Mirai section 3.3, appendix B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mirai_dist.attention.patterns import TORCH, Backends, Pattern
from mirai_dist.models.wan.model import Attention
from mirai_dist.models.wan.token_ops import PLAIN, TokenOps


class PredictorBlock(nn.Module):
    """Pre-norm self-attention and feed-forward; `gated` adds six learned vectors that start at zero.

    The released predictor conditions an AdaLN on zeros, so only its biases act: six vectors a block in the
    order scale, shift, gate for attention, then for the feed-forward.
    """

    def __init__(self, dim: int, heads: int, gated: bool, dense: Pattern, ops: TokenOps = PLAIN) -> None:
        super().__init__()
        self.dense, self.ops = dense, ops
        self.attn = Attention(dim, heads)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Parameter(torch.zeros(6, dim)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """Sequences x [N, S, dim] -> the same shape."""
        vectors = (None,) * 6 if self.modulation is None else self.modulation[:, None, None].unbind()
        scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = vectors
        attended = self._attend(self.ops.modulated(x, scale_a, shift_a))
        x, normed = self.ops.added_modulated(x, attended, scale_f, shift_f, gate_a)
        return self.ops.added(x, self.ffn(normed), gate_f)

    def _attend(self, x: Tensor) -> Tensor:
        return self.attn.output(self.dense(self.ops.queries(self.attn, x), *self.ops.keys_values(self.attn, x)))


class Predictor(nn.Module):
    """Generator states of segments, and what the encoder saw of them -> how alike the predictions are to it.

    Its width is that of the encoder's features, or several times that where it gives several answers for each token.
    `backends`, `ops`: what computes its attention, and all between.
    """

    def __init__(
        self,
        dim: int,
        target_dim: int,
        heads: int,
        blocks: int,
        gated: bool,
        backends: Backends = TORCH,
        ops: TokenOps = PLAIN,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PredictorBlock(dim, heads, gated, backends.dense, ops) for _ in range(blocks))
        self.projection = nn.Linear(dim, target_dim, bias=False)

    def forward(
        self, states: Tensor, targets: Sequence[Tensor], cosine: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Mean cosine, a scalar, of what is predicted from states [B, I, S, dim] and the targets of each answer,
        [B, I or fewer, S, D]: over tokens, samples and (segment, answer) pairs.

        cosine: mean cosine of hidden states [..., dim] times a weight [D, dim] and targets [..., D]. It is called here,
        and not on what this returns, because the weight of a sharded network is whole in its forward alone.
        """
        hidden = self.hidden(states)
        pairs = [each.shape[1] for each in targets]
        answers = zip(pairs, self.projection.weight.chunk(len(targets)), targets, strict=True)
        parts = [
            count / sum(pairs) * cosine(hidden[:, :count], weight, target) for count, weight, target in answers if count
        ]
        return torch.stack(parts).sum()

    def hidden(self, states: Tensor) -> Tensor:
        """What is projected, [..., S, dim] as states are: every S tokens are a sequence of their own."""
        x = states.flatten(0, -3).to(self.projection.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return x.unflatten(0, states.shape[:-2])


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
