"""The foresight predictor: published sizes, its start, and the released AdaLN order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from mirai_dist.method.foresight import PRESETS
from mirai_dist.models.predictor import Predictor, PredictorBlock, initialise
from mirai_kernels.segment_prefix_attention.reference import masked_attention
from tests.tiny_wan import fill, generator, predicted


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize(("preset", "parameters"), [("paper", 92_849_664), ("release", 92_877_312)])
def test_published_sizes(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        predictor = Predictor(1536, 5120, heads=12, blocks=3, gated=PRESETS[preset].gated_predictor)
    assert sum(parameter.numel() for parameter in predictor.parameters()) == parameters
    assert predictor.projection.weight.shape == (5120, 1536) and predictor.projection.bias is None


def tiny(gated: bool) -> Predictor:
    predictor = Predictor(8, 6, heads=2, blocks=2, gated=gated).double()
    fill(predictor, 1)
    return predictor


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def by_hand(block: PredictorBlock, x: Tensor, modulation: Tensor) -> Tensor:
    """Pre-norm block; six vectors: scale, shift, gate of attention, then of the feed-forward (GELU by erf)."""
    scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = modulation
    attn = block.attn
    inner = standardised(x) * (1 + scale_a) + shift_a

    def heads(projection: torch.nn.Linear, norm: Tensor | None) -> Tensor:
        y = projection(inner)
        if norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
        return y.view(*y.shape[:-1], 2, 4)

    q, k, v = heads(attn.q, attn.norm_q.weight), heads(attn.k, attn.norm_k.weight), heads(attn.v, None)
    everything = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    x = x + gate_a * attn.o(masked_attention(q, k, v, everything).flatten(-2))
    inner = standardised(x) * (1 + scale_f) + shift_f
    first, _, second = block.ffn
    return x + gate_f * second(gelu(first(inner), approximate="none"))


@pytest.mark.parametrize("gated", [False, True])
def test_forward_by_hand(gated: bool) -> None:
    predictor, x = tiny(gated), normal(2, 3, 5, 8)
    plain = torch.tensor([[0.0], [0.0], [1.0], [0.0], [0.0], [1.0]], dtype=torch.float64).expand(6, 8)
    expected = x
    for block in predictor.blocks:
        assert isinstance(block, PredictorBlock)
        expected = by_hand(block, expected, plain if block.modulation is None else block.modulation)
    expected = expected @ predictor.projection.weight.T
    torch.testing.assert_close(predicted(predictor, x), expected, rtol=0, atol=1e-12)


def started(gated: bool) -> Predictor:
    predictor, draws = tiny(gated), generator(0)
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            initialise(name, parameter, draws)
    return predictor


def test_the_release_starts_as_a_linear_map_and_the_paper_does_not() -> None:
    x = normal(2, 3, 5, 8)
    release, paper = started(gated=True), started(gated=False)
    assert torch.equal(predicted(release, x), x @ release.projection.weight.T)
    assert (predicted(paper, x) - x @ paper.projection.weight.T).abs().max() > 0.1


def test_initial_values() -> None:
    values = dict(started(gated=True).named_parameters())
    assert all(not value.any() for name, value in values.items() if name.endswith(("bias", "modulation")))
    assert all((value == 1).all() for name, value in values.items() if "norm" in name)
    assert 0.8 * 8**-0.5 < values["projection.weight"].abs().max() <= 8**-0.5
    xavier = (6 / (8 + 32)) ** 0.5
    assert 0.8 * xavier < values["blocks.0.ffn.0.weight"].abs().max() <= xavier


def test_segments_are_a_batch_and_tokens_have_no_position() -> None:
    predictor, x = tiny(gated=False), normal(2, 3, 5, 8)
    torch.testing.assert_close(predicted(predictor, x)[1:2], predicted(predictor, x[1:2]), rtol=0, atol=1e-14)
    order = torch.tensor([4, 2, 0, 1, 3])
    moved = predicted(predictor, x[:, order])
    torch.testing.assert_close(predicted(predictor, x)[:, order], moved, rtol=0, atol=1e-13)


def test_states_are_cast_to_the_predictors_dtype() -> None:
    predictor = tiny(gated=True).bfloat16()
    assert predicted(predictor, normal(2, 1, 5, 8)).dtype == torch.bfloat16
