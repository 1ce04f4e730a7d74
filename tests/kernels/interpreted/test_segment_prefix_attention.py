"""Segment-prefix attention against attention under a mask in float64, in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from mirai_kernels.chunk_attention.launch import DENSE, TRITON
from mirai_kernels.dense_attention.library import Attended, Gradients, Library
from mirai_kernels.segment_prefix_attention.op import segment_prefix_attention
from mirai_kernels.segment_prefix_attention.reference import masked_attention, segment_causal_mask, teacher_forced_mask
from tests.kernel_cases import BOUNDS, assert_close, assert_same_bits, drawn, with_gradients

OPERATOR = torch.ops.mirai.segment_prefix_attention.default
CASES = [(2, 3, 37, 2, 20), (1, 2, 67, 1, 128)]  # batch, segments, tokens of one, heads, width


def drawn_inputs(case: tuple[int, ...], doubled: bool, dtype: torch.dtype) -> list[Tensor]:
    batch, segments, tokens, heads, width = case
    return [drawn(n, batch, (1 + doubled) * segments * tokens, heads, width, dtype=dtype) for n in range(3)]


def exact(tokens: int, doubled: bool, *leaves: Tensor) -> list[Tensor]:
    q, k, v = leaves
    total = q.shape[1]
    mask = teacher_forced_mask(total // 2, tokens) if doubled else segment_causal_mask(total, tokens)
    return [masked_attention(q, k, v, mask)]


def ours(tokens: int, doubled: bool, by: str, *leaves: Tensor) -> list[Tensor]:
    q, k, v = leaves
    return [segment_prefix_attention(q, k, v, tokens, doubled, by)]


def check(case: tuple[int, ...], doubled: bool, dtype: torch.dtype, by: str) -> None:
    leaves = drawn_inputs(case, doubled, dtype)
    expected = with_gradients(partial(exact, case[2], doubled), leaves, torch.float64)
    fused = partial(ours, case[2], doubled, by)
    found = with_gradients(fused, leaves)
    assert_close(found, expected, BOUNDS[dtype])
    if by == TRITON:
        assert_same_bits(found, with_gradients(fused, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("doubled", [True, False])
def test_with_torch_s_library_it_is_exact(case: tuple[int, ...], doubled: bool, dtype: torch.dtype) -> None:
    check(case, doubled, dtype, "cpu")


@pytest.mark.parametrize(("case", "dtype"), zip(CASES, (torch.float32, torch.float16), strict=True), ids=str)
def test_with_our_kernels_it_is_exact_and_repeats(case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(case, True, dtype, TRITON)


@pytest.mark.parametrize("by", [TRITON, "cpu"])
def test_bfloat16_is_rounded_where_it_is_stored(by: str) -> None:
    check(CASES[1], True, torch.bfloat16, by)


def counting(pairs: list[int], inputs: list[Tensor]) -> Library:
    """The CPU's library; notes (queries x keys) of every call, and that keys and values are the inputs' own memory."""
    library = DENSE["cpu"]

    def note(q: Tensor, k: Tensor, v: Tensor) -> None:
        pairs.append(q.shape[0] * q.shape[1] * k.shape[1])
        for mine, given in zip((k, v), inputs[1:], strict=True):
            assert mine.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Attended:
        note(q, k, v)
        return library.forward(q, k, v)

    def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended) -> Gradients:
        note(q, k, v)
        return library.backward(grad_out, q, k, v, attended)

    return Library(forward, backward)


def test_seven_segments_are_eight_calls_over_exactly_the_visible_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """56 of 196 pairs of segments, forward and backward, and no key or value is copied."""
    leaves, pairs = drawn_inputs((1, 7, 3, 1, 16), True, torch.float32), []
    monkeypatch.setitem(DENSE, "cpu", counting(pairs, leaves))
    q, k, v = (each.requires_grad_() for each in leaves)
    out = segment_prefix_attention(q, k, v, 3, True, "cpu")
    assert len(pairs) == 8 and sum(pairs) == 56 * 9
    out.sum().backward()
    assert len(pairs) == 16 and sum(pairs) == 2 * 56 * 9


def test_a_poisoned_noisy_segment_stays_alone_and_the_last_clean_one_is_seen_by_no_noisy_one() -> None:
    segments, tokens = 3, 5
    inputs = drawn_inputs((1, segments, tokens, 2, 16), True, torch.float32)
    (plain,) = ours(tokens, True, "cpu", *inputs)
    for poisoned, reached in ((4, {4}), (2, {2})):  # the second noisy segment; the last clean one
        place = slice(poisoned * tokens, (poisoned + 1) * tokens)
        spoilt = [each.clone() for each in inputs]
        for each in spoilt:
            each[:, place] = float("nan")
        (found,) = ours(tokens, True, "cpu", *spoilt)
        for segment in range(2 * segments):
            rows = slice(segment * tokens, (segment + 1) * tokens)
            same = torch.equal(found[:, rows], plain[:, rows])
            assert same != (segment in reached), (poisoned, segment)


@pytest.mark.parametrize("by", [TRITON, "cpu"])
def test_the_operator_is_what_it_says_it_is(by: str) -> None:
    leaves = [each.requires_grad_() for each in drawn_inputs((1, 2, 3, 1, 16), True, torch.float32)]
    torch.library.opcheck(OPERATOR, (*leaves, 3, True, by))


def test_what_it_cannot_do_is_refused_in_one_line() -> None:
    q, k, v = drawn_inputs((1, 3, 2, 1, 16), False, torch.float32)
    for tokens, doubled in ((2, True), (4, False), (5, True)):
        with pytest.raises(ValueError, match="not the same whole"):
            segment_prefix_attention(q, k, v, tokens, doubled)
    with pytest.raises(ValueError, match="not the same whole"):
        segment_prefix_attention(q[:, :2], k, v, 2, False)
    with pytest.raises(ValueError, match="known are triton"):
        segment_prefix_attention(q, k, v, 2, False, by="sdpa")
