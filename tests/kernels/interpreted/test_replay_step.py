"""The replay step with the fused cosine head and our attention, against plain torch in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from mirai_dist.attention.patterns import by_dense
from mirai_dist.method.foresight import PRESETS, foresight_loss
from mirai_dist.method.replay import ReplayStep
from mirai_dist.models.predictor import Predictor
from mirai_kernels.chunk_attention.op import chunk_attention
from mirai_kernels.cosine_head.op import cosine_head
from tests.kernel_cases import assert_close, drawn
from tests.tiny_wan import fill


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return chunk_attention(q, (k, v))[0]


def test_three_blocks_and_the_head_agree_with_plain_torch() -> None:
    states, targets = drawn(1, 2, 2, 7, 32), drawn(2, 2, 2, 7, 24)
    targets = targets / targets.norm(dim=-1, keepdim=True)
    plain = Predictor(32, 24, heads=2, blocks=3, gated=False)
    fill(plain, 1)
    fused = Predictor(32, 24, heads=2, blocks=3, gated=False, backends=by_dense(attend))
    fused.load_state_dict(plain.state_dict())
    plain.double()
    loss, cosine = foresight_loss(plain, states.double(), targets.double(), PRESETS["paper"])
    expected = torch.autograd.grad(loss, list(plain.parameters()))

    def cosine_of(states: Tensor, targets: Tensor) -> Tensor:
        return cosine_head(fused.hidden(states), fused.projection.weight, targets)

    step = ReplayStep(cosine_of, list(fused.parameters()), states, targets)
    step()
    together = [torch.cat([each.double().flatten() for each in found]) for found in (step.gradients, expected)]
    assert_close(together[:1], together[1:], 1e-6)
    assert abs(step.cosine.item() - cosine.item()) <= 1e-7  # of a mean of cosines that nearly cancel
