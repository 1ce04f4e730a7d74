"""Backends of attention against the kernels' float64 references, and FlexAttention's block masks against torch's own.

What needs a GPU is in tests/gpu.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mirai_dist.attention import flash, flex, sdpa
from mirai_dist.attention.patterns import BySegment, Pattern
from mirai_kernels.chunk_attention.reference import chunk_attention
from mirai_kernels.segment_prefix_attention.reference import (
    masked_attention,
    segment_causal_mask,
    teacher_forced_mask,
)
from tests.unit.test_attention_patterns import Sizes

CPU = torch.device("cpu")
ON_CPU = [pytest.param(sdpa.dense, id="sdpa"), pytest.param(sdpa.FLASH, id="sdpa-flash")]
# (segment, segments): less than a block, more, a whole one, edges in the middle of blocks, many in one block, and one
# token over, which alone sees itself in the last block
SEGMENTS = [(3, 6), (100, 6), (130, 4), (128, 4), (257, 2), (1, 300), (43, 3)]
EXACT = 1e-14  # of float64, relative to the largest


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def errors(attend: Pattern, exact: Pattern, inputs: tuple[Tensor, ...]) -> list[float]:
    """Of output and gradients by q, k and v."""
    found = []
    for function, dtype in ((attend, inputs[0].dtype), (exact, torch.float64)):
        leaves = [each.to(dtype).requires_grad_() for each in (each.detach().clone() for each in inputs)]
        output = function(*leaves)
        towards = drawn(9, *output.shape, dtype=dtype)
        found.append((output, *torch.autograd.grad(output, leaves, towards)))
    return [error(mine, other) for mine, other in zip(*found, strict=True)]


# --- dense ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", ON_CPU)
@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(1, 1, 8), (3, 17, 12), (65, 129, 20), (33, 7, 128)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, EXACT), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_dense_attention(
    dense: Pattern, queries: int, keys: int, head_dim: int, dtype: torch.dtype, bound: float
) -> None:
    shapes = (2, queries, 3, head_dim), (2, keys, 3, head_dim), (2, keys, 3, head_dim)
    inputs = tuple(drawn(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes))
    found = errors(dense, lambda q, k, v: chunk_attention(q, (k, v))[0], inputs)
    if keys == 1:  # the softmax of one score has no gradient: what there is of those is rounding
        found = [found[0], found[3]]
    assert max(found) <= bound, found


@pytest.mark.parametrize("dense", ON_CPU)
def test_rules_over_segments_by_dense_calls(dense: Pattern) -> None:
    segments, length, tokens = BySegment(dense), 5, 35
    for rule, mask, doubled in (
        (segments.causal, segment_causal_mask, 1),
        (segments.teacher_forced, teacher_forced_mask, 2),
    ):
        inputs = tuple(drawn(seed, 2, doubled * tokens, 3, 12) for seed in range(3))
        seen = mask(tokens, length)
        assert max(errors(rule(length), lambda q, k, v, m=seen: masked_attention(q, k, v, m), inputs)) <= EXACT


def test_one_kernel_is_no_other() -> None:
    """cuDNN has nothing for a CPU: the call must fail rather than be served by another kernel."""
    q = drawn(0, 1, 4, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="No viable backend"):
        sdpa.CUDNN(q, q, q)
    assert sdpa.dense(q, q, q).shape == q.shape  # the switch is back


def test_flash_attention_of_either_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions return the log-sum-exp beside the output, whoever asks or not."""
    q = drawn(0, 1, 4, 1, 8)
    for function in (sdpa.dense, lambda q, k, v: (sdpa.dense(q, k, v), None)):
        package = SimpleNamespace(flash_attn_func=function)
        monkeypatch.setattr(flash, "import_module", lambda name, package=package: {"flash_attn": package}[name])
        assert torch.equal(flash.load(2)(q, q, q), sdpa.dense(q, q, q))


# --- FlexAttention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [flex.causal, flex.teacher_forced])
@pytest.mark.parametrize(("length", "segments"), SEGMENTS)
def test_block_masks_are_those_torch_makes_of_all_tokens(rule: flex.Rule, length: int, segments: int) -> None:
    tokens = length * segments
    ours = flex.block_mask(rule, length, tokens, CPU)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(query // length, key // length, segments)

    theirs = create_block_mask(seen, None, None, tokens, tokens, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(getattr(ours, f"full_{name}"), getattr(theirs, f"full_{name}")), f"full_{name}"


@pytest.mark.parametrize(("length", "tokens"), [(2, 6), (3, 6), (1, 6), (6, 6)])
def test_rules_are_the_masks_of_the_references(length: int, tokens: int) -> None:
    clean, doubled = torch.arange(tokens) // length, torch.arange(2 * tokens) // length
    causal = flex.causal(clean[:, None], clean[None, :], tokens // length)
    assert torch.equal(causal, segment_causal_mask(tokens, length))
    forced = flex.teacher_forced(doubled[:, None], doubled[None, :], 2 * tokens // length)
    assert torch.equal(forced, teacher_forced_mask(tokens, length))


@pytest.mark.parametrize(("length", "sparsity"), [(3 * 1560, 71.0), (1560, 73.4)])
def test_a_block_mask_of_real_length_is_block_sized(length: int, sparsity: float) -> None:
    """81 frames at 480p, teacher-forced: 2 x 32,760 tokens, in segments of 36.6 blocks, or of 12.2 frame by frame."""
    tokens, started = 2 * 32_760, time.process_time()
    with Sizes() as sizes:
        mask = flex.block_mask(flex.teacher_forced, length, tokens, CPU)
    assert time.process_time() - started < 10
    blocks = -(-tokens // flex.BLOCK)
    assert max(sizes.made) <= (blocks + 1) ** 2  # torch counts one column more while it transposes; tokens^2 is 4.3e9
    assert mask.kv_indices.shape == (1, 1, blocks, blocks)
    assert mask.sparsity() == pytest.approx(sparsity, abs=0.1)  # what is exactly visible leaves 71.4 and 73.8


def test_tokens_must_be_whole_segments() -> None:
    with pytest.raises(ValueError, match="10 tokens are not whole segments of 4"):
        flex.block_mask(flex.causal, 4, 10, CPU)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("length", "segments"), [(3, 5), (50, 4), (130, 2)])
def test_flex_attention_forward(length: int, segments: int) -> None:
    attention, tokens = flex.FlexSegments(flex_attention), length * segments
    for rule, mask, doubled in (
        (attention.causal, segment_causal_mask, 1),
        (attention.teacher_forced, teacher_forced_mask, 2),
    ):
        q, k, v = (drawn(seed, 2, doubled * tokens, 3, 12) for seed in range(3))
        exact = masked_attention(q, k, v, mask(tokens, length))
        assert error(rule(length)(q, k, v), exact) <= EXACT
        assert error(rule(length)(q.float(), k.float(), v.float()), exact) <= 1e-6


@pytest.mark.slow  # compiles C++
def test_flex_attention_compiled() -> None:
    """Compiled code reads the lists of blocks, which the uncompiled form ignores."""
    q, k, v = (drawn(seed, 2, 2 * 4 * 75, 2, 32) for seed in range(3))
    found = flex.load().teacher_forced(75)(q.float(), k.float(), v.float())
    assert error(found, masked_attention(q, k, v, teacher_forced_mask(4 * 75, 75))) <= 1e-6


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_has_no_backward_on_cpu() -> None:
    """Why attention/select.py refuses it there; once torch has one, that refusal goes."""
    q = drawn(0, 1, 6, 1, 8).requires_grad_()
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex.FlexSegments(flex_attention).causal(3)(q, q, q)
