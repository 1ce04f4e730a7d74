"""Patterns against the kernels' references: dense calls over segments equal attention under an explicit mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirai_dist.attention import sdpa
from mirai_dist.attention.patterns import Pattern, SegmentCausal, TeacherForced
from mirai_dist.method.foresight import PRESETS, plain
from mirai_kernels.chunk_attention.reference import chunk_attention
from mirai_kernels.cosine_head.reference import cosine_head
from mirai_kernels.segment_prefix_attention.reference import (
    masked_attention,
    segment_causal_mask,
    teacher_forced_mask,
)

HEADS, WIDTH = 2, 4


def normal(seed: int, *shape: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draws, dtype=torch.float64).requires_grad_()


def qkv(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(normal(seed, 2, tokens, HEADS, WIDTH) for seed in range(3))  # type: ignore[return-value]


def with_gradients(attention: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output, and gradients of a random linear functional of it by every input."""
    output = attention(*inputs)
    return output, *torch.autograd.grad((output * normal(7, *output.shape)).sum(), inputs)


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for mine, expected in zip(one, other, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)


# --- the masks, by hand --------------------------------------------------------------------------------------


def drawn(mask: Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


def test_segment_causal_mask_by_hand() -> None:
    assert drawn(segment_causal_mask(6, 2)) == ["xx....", "xx....", "xxxx..", "xxxx..", "xxxxxx", "xxxxxx"]


def test_teacher_forced_mask_by_hand() -> None:
    assert drawn(teacher_forced_mask(6, 2)) == [
        "xx..........",  # clean: clean segments up to the own one
        "xx..........",
        "xxxx........",
        "xxxx........",
        "xxxxxx......",
        "xxxxxx......",
        "......xx....",  # noisy: clean segments before the own one, and the own noisy one
        "......xx....",
        "xx......xx..",
        "xx......xx..",
        "xxxx......xx",
        "xxxx......xx",
    ]


def test_masked_attention_by_hand() -> None:
    q, k, v = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in ([1, 2], [3, 5], [7, 11]))
    attended = masked_attention(q, k, v, torch.tensor([[True, False], [True, True]])).flatten().tolist()
    low, high = torch.tensor([6.0, 10.0], dtype=torch.float64).exp().tolist()  # q k, head width 1
    assert attended == pytest.approx([7, (7 * low + 11 * high) / (low + high)], abs=1e-12)


# --- the patterns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [1, 2, 3, 6])
def test_segment_causal(segment: int) -> None:
    inputs, mask = qkv(6), segment_causal_mask(6, segment)
    expected = with_gradients(lambda q, k, v: masked_attention(q, k, v, mask), inputs)
    assert_same(with_gradients(SegmentCausal(segment), inputs), expected)


@pytest.mark.parametrize("segment", [1, 2, 3, 6])
def test_teacher_forced(segment: int) -> None:
    inputs, mask = qkv(12), teacher_forced_mask(6, segment)
    expected = with_gradients(lambda q, k, v: masked_attention(q, k, v, mask), inputs)
    assert_same(with_gradients(TeacherForced(segment), inputs), expected)


@pytest.mark.parametrize("past", [0, 1, 5])
def test_full_over_cached_and_own_keys(past: int) -> None:
    q, k, v = qkv(3)
    cached = normal(4, 2, past, HEADS, WIDTH), normal(5, 2, past, HEADS, WIDTH)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa.dense(q, torch.cat((cached[0], k), 1), torch.cat((cached[1], v), 1))

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunk_attention(q, (k, v), cached)[0]

    assert_same(with_gradients(ours, (q, k, v)), with_gradients(reference, (q, k, v)))


@pytest.mark.parametrize("pattern", [sdpa.dense, SegmentCausal(2), TeacherForced(2)])
def test_patterns_keep_dtype_and_layout(pattern: Pattern) -> None:
    q, k, v = (each.bfloat16() for each in qkv(8))
    attended = pattern(q, k, v)
    assert attended.shape == q.shape and attended.dtype == torch.bfloat16


# --- memory --------------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """Notes the number of elements of everything any operation makes, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [each.numel() for each in tree_leaves(result) if isinstance(each, Tensor)]
        return result


def largest_tensor(pattern: Pattern, tokens: int) -> int:
    q, k, v = (torch.randn(1, tokens, 1, 8, requires_grad=True) for _ in range(3))
    with Sizes() as sizes:
        pattern(q, k, v).sum().backward()
    return max(sizes.made)


@pytest.mark.parametrize("pattern_of", [lambda _: sdpa.dense, SegmentCausal, TeacherForced])
@pytest.mark.parametrize("segments", [4, 8])
def test_no_tensor_grows_with_the_square_of_the_sequence(pattern_of: Callable[[int], Pattern], segments: int) -> None:
    """No mask and no scores: the largest thing is a tensor of tokens."""
    for tokens in (512, 1024):
        assert largest_tensor(pattern_of(tokens // segments), tokens) <= 2 * tokens * 8  # q, k, v have tokens * 8


def test_a_mask_would_be_noticed() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, segment_causal_mask(q.shape[1], 128))

    assert largest_tensor(masked, 512) >= 512**2


# --- the references themselves -------------------------------------------------------------------------------


def test_chunk_attention_reference_needs_no_order_and_gives_its_normaliser() -> None:
    q, k, v = qkv(3)
    cached = normal(4, 2, 5, HEADS, WIDTH), normal(5, 2, 5, HEADS, WIDTH)
    attended, normaliser = chunk_attention(q, (k, v), cached)
    order = torch.tensor([3, 0, 4, 2, 1])
    again, _ = chunk_attention(q, (k, v), (cached[0][:, order], cached[1][:, order]))
    torch.testing.assert_close(attended, again, rtol=0, atol=1e-14)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, torch.cat((cached[0], k), 1)) / WIDTH**0.5
    torch.testing.assert_close(normaliser, scores.exp().sum(-1).log(), rtol=0, atol=1e-13)
    alone, _ = chunk_attention(q, (k, v))
    assert (alone - attended).abs().max() > 1e-2


def test_chunk_attention_reference_treats_the_cache_as_constant() -> None:
    q, k, v = qkv(3)
    cached = normal(4, 2, 5, HEADS, WIDTH), normal(5, 2, 5, HEADS, WIDTH)
    attended, _ = chunk_attention(q, (k, v), cached)
    found = torch.autograd.grad(attended.sum() + attended.square().sum(), (q, k, v, *cached), allow_unused=True)
    assert all(gradient is not None and gradient.any() for gradient in found[:3])
    assert found[3:] == (None, None)


def test_cosine_head_reference_is_the_foresight_objective() -> None:
    state, weight, target = normal(1, 3, 5, 6), normal(2, 9, 6), normal(3, 3, 5, 9)
    similarity = cosine_head(state, weight, target)
    cosine = plain(PRESETS["paper"]).cosine(state, weight, target)
    torch.testing.assert_close(similarity, cosine, rtol=0, atol=1e-14)
    ours = torch.autograd.grad(similarity, (state, weight), retain_graph=True)
    theirs = torch.autograd.grad(cosine, (state, weight))
    assert_same(ours, theirs)
    assert torch.autograd.grad(similarity, target, allow_unused=True) == (None,)


def test_cosine_head_reference_by_hand() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    weight = torch.tensor([[3.0, 1.0], [4.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([[3.0, 4.0], [0.0, 5.0], [1.0, 1.0]], dtype=torch.float64)
    # projected: (3, 4), (2, 0), (0, 0); cosines 1, 0, 0
    assert cosine_head(hidden, weight, target).item() == pytest.approx(1 / 3, abs=1e-15)
    assert cosine_head(hidden.bfloat16(), weight.bfloat16(), target.bfloat16()).dtype == torch.float32
