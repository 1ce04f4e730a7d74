"""The fused head and the fusion of targets against the float64 reference, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mirai_kernels.cosine_head import op, reference
from tests.kernel_cases import BOUNDS, assert_close, assert_same_bits, drawn, relative, with_gradients

# A result passes the rounding of the projection and of its gradient, and that of the output.
THREE_ROUNDINGS = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


def inputs(tokens: int, dim: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [2, tokens, dim], weight, and targets that are neither parallel nor at right angles to the projections."""
    hidden, weight = drawn(1, 2, tokens, dim, dtype=dtype), drawn(2, width, dim, dtype=dtype)
    target = drawn(3, 2, tokens, width) + (hidden.float() @ weight.float().T) / dim**0.5
    return hidden, weight, target.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "dim", "width"), [(5, 12, 20), (9, 33, 130)])
def test_cosine_and_gradients_are_exact_and_repeat(
    tokens: int, dim: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "CHUNK", 7)  # the last chunk is smaller
    hidden, weight, target = inputs(tokens, dim, width, dtype)
    exact = with_gradients(
        lambda h, w: [reference.cosine_head(h, w, target.double())], (hidden, weight), torch.float64
    )
    found = with_gradients(lambda h, w: [op.cosine_head(h, w, target)], (hidden, weight))
    assert found[0].dtype == torch.float32
    assert_close(found, exact, THREE_ROUNDINGS[dtype])
    assert_same_bits(found, with_gradients(lambda h, w: [op.cosine_head(h, w, target)], (hidden, weight)))


def test_without_gradient_it_is_the_same_number() -> None:
    hidden, weight, target = inputs(5, 12, 20, torch.float32)
    with_gradient = op.cosine_head(hidden.clone().requires_grad_(), weight, target)
    with torch.no_grad():
        assert torch.equal(op.cosine_head(hidden, weight, target), with_gradient.detach())


def test_rows_of_hardly_any_length_are_divided_by_the_smallest() -> None:
    hidden, weight, target = inputs(4, 12, 20, torch.float32)
    hidden[0, 1] = 0
    hidden[1, 0] *= 3e-10
    assert 0.1 * reference.SMALLEST_NORM < (weight @ hidden[1, 0]).norm() < 0.9 * reference.SMALLEST_NORM
    target[1, 2] = 0
    leaves = (hidden, weight)
    exact = with_gradients(lambda h, w: [reference.cosine_head(h, w, target.double())], leaves, torch.float64)
    found = with_gradients(lambda h, w: [op.cosine_head(h, w, target)], leaves)
    assert_close(found, exact, BOUNDS[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offsets", [(0, 1), (1,), (2, 0, 5)])
def test_targets_are_fused(offsets: tuple[int, ...], dtype: torch.dtype) -> None:
    features = drawn(1, 2, 4 * 2, 2 * 21, dtype=dtype)[..., :21]
    exact = reference.fuse_targets(features.double(), 4, offsets)
    found = op.fuse_targets(features, 4, offsets)
    assert found.dtype == dtype and found.shape == exact.shape
    assert_close([found], [exact], BOUNDS[dtype])
    assert relative(found.double().norm(dim=-1), torch.ones(found.shape[:-1])) <= BOUNDS[dtype]


def test_segments_past_the_last_are_not_read() -> None:
    features = drawn(1, 1, 3 * 2, 20)
    features = torch.cat((features, torch.full((1, 2, 20), float("nan"))), dim=1)[:, :6]
    assert not op.fuse_targets(features, 3, (0, 1)).isnan().any()


def test_registrations_hold() -> None:
    hidden, weight, target = inputs(5, 12, 20, torch.float32)
    leaves = hidden.flatten(0, 1).requires_grad_(), weight.requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.mirai.cosine_head.default, (*leaves, target.flatten(0, 1), True), test_utils=checks)
    torch.library.opcheck(torch.ops.mirai.fuse_targets.default, (target, 5, [0, 1]), test_utils=checks)


def test_mistakes_are_named() -> None:
    hidden, weight, target = inputs(5, 12, 20, torch.float32)
    with pytest.raises(ValueError, match=r"\(20, 12\) does not map"):
        op.cosine_head(hidden, weight, target[:, :4])
    with pytest.raises(ValueError, match="4 segments do not divide 5 tokens"):
        op.fuse_targets(target, 4, (0, 1))
    with pytest.raises(ValueError, match="offsets are segments ahead"):
        op.fuse_targets(target, 5, (-1, 0))
