"""Attention backends on a real card: each serves or says why not, at the lengths of 480p video too.

    python -m pytest -m gpu tests/gpu/test_attention_backends.py -s        one GPU; about 20 GB of its memory
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mirai_dist.attention import flex, sdpa
from mirai_dist.attention.patterns import TORCH, Backends, BySegment, Pattern
from mirai_dist.attention.select import (
    DENSE,
    FLEX,
    Candidate,
    Need,
    first_that_serves,
    probe_dense,
    probe_segments,
    select,
)
from mirai_dist.models.wan import Clean, WanModel, WanShape
from mirai_dist.parallel.recompute import recompute
from mirai_kernels.chunk_attention.reference import chunk_attention
from mirai_kernels.segment_prefix_attention.reference import masked_attention, teacher_forced_mask

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SEGMENT = 3 * 1560  # tokens of a chunk at 480p
HEADS, HEAD_DIM = 2, 128
NEED = Need(DEVICE, torch.bfloat16, (HEAD_DIM,))
OWN_ERROR = 1.2  # a backend may be this much less exact than the plainest one of torch


def drawn(seed: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    draws = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(1, tokens, HEADS, HEAD_DIM, generator=draws, device=DEVICE, dtype=torch.float32).to(dtype)


def results(attend: Pattern, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients by q, k and v."""
    leaves = [each.detach().to(dtype).requires_grad_() for each in inputs]
    output = attend(*leaves)
    towards = drawn(9, output.shape[1], output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, towards)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((mine.double() - other).norm() / other.norm()).item() for mine, other in zip(found, exact, strict=True)]


def found_for(candidate: Candidate, need: Need) -> Pattern:
    """The backend, or a skip that says which package is missing or which card it is for."""
    found = first_that_serves([candidate], need, probe_dense)
    if found.backend is not None:
        return found.backend
    ((_, reason),) = found.refused
    if "is not installed" in reason or "is not for compute capability" in reason:
        pytest.skip(f"{candidate.name} {reason}")
    raise AssertionError(f"{candidate.name} {reason}")


# --- selection -----------------------------------------------------------------------------------------------


def test_the_choice_of_this_card() -> None:
    choice = select("auto", "auto", NEED)
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), choice.told())
    if NEED.capability == 9:  # whatever the card is called
        assert choice.dense in ("flash-3", "cudnn") and choice.segments == "dense"


@pytest.mark.parametrize("name", ["cudnn", "sdpa-flash", "sdpa-efficient", "sdpa"])
@pytest.mark.parametrize("head_dim", [20, 64, 128])
def test_torch_s_own_kernels_serve(name: str, head_dim: int) -> None:
    if name in ("cudnn", "sdpa-efficient") and head_dim == 20:
        pytest.skip(f"{name} wants widths of a head that are multiples of 8")
    assert select(name, "dense", Need(DEVICE, torch.bfloat16, (head_dim,))).dense == name


@pytest.mark.parametrize("name", ["sdpa", "sdpa-efficient"])
def test_float32_is_served(name: str) -> None:
    assert select(name, "auto", Need(DEVICE, torch.float32, (HEAD_DIM,))).dense == name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flex_attention_serves(dtype: torch.dtype, head_dim: int) -> None:
    found = first_that_serves([FLEX], Need(DEVICE, dtype, (head_dim,)), probe_segments)
    assert found.name == "flex", found.refused


# --- real lengths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidate", DENSE, ids=lambda candidate: candidate.name)
@pytest.mark.parametrize("past", [0, 3])
def test_a_chunk_and_its_past(candidate: Candidate, past: int) -> None:
    """Forward and backward of one chunk against itself and earlier ones, as exact as torch's own choice."""
    attend = found_for(candidate, NEED)
    lengths = SEGMENT, (past + 1) * SEGMENT, (past + 1) * SEGMENT
    inputs = tuple(drawn(seed, tokens) for seed, tokens in enumerate(lengths))
    exact = results(lambda q, k, v: chunk_attention(q, (k, v))[0], inputs, torch.float64)
    plain = errors(results(sdpa.dense, inputs, torch.bfloat16), exact)
    ours = errors(results(attend, inputs, torch.bfloat16), exact)
    print(candidate.name, past, [f"{each:.1e}" for each in ours], "sdpa", [f"{each:.1e}" for each in plain])
    assert all(mine <= OWN_ERROR * other for mine, other in zip(ours, plain, strict=True))


def test_flex_attention_of_two_segments_is_exact() -> None:
    """[clean | noisy] of two chunks, against a mask; one head, for the sake of the reference's memory."""
    q, k, v = (drawn(seed, 2 * 2 * SEGMENT)[:, :, :1] for seed in range(3))
    mask = teacher_forced_mask(2 * SEGMENT, SEGMENT, torch.device(DEVICE))
    with torch.no_grad():
        exact = masked_attention(q.double(), k.double(), v.double(), mask)
        plain = BySegment().teacher_forced(SEGMENT)(q, k, v)
        ours = flex.load().teacher_forced(SEGMENT)(q, k, v)
    ((mine,), (other,)) = errors([ours], [exact]), errors([plain], [exact])
    assert mine <= OWN_ERROR * other


def test_flex_attention_of_a_whole_video_equals_dense_calls_and_needs_no_scores() -> None:
    inputs = tuple(drawn(seed, 2 * 7 * SEGMENT) for seed in range(3))
    dense = results(BySegment(sdpa.dense).teacher_forced(SEGMENT), inputs, torch.bfloat16)
    whole = flex.load().teacher_forced(SEGMENT)
    results(whole, inputs, torch.bfloat16)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = results(whole, inputs, torch.bfloat16)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"peak {peak / 1e9:.2f} GB; a tensor of all scores would be {2 * HEADS * (14 * SEGMENT) ** 2 / 1e9:.1f} GB")
    assert peak < 2e9
    assert max(errors(ours, [each.double() for each in dense])) < 1e-2


# --- in a network --------------------------------------------------------------------------------------------


def gradients(backends: Backends, run: Callable[[WanModel], Tensor]) -> list[Tensor]:
    """Of the sum of a small network's output by all parameters; blocks are recomputed, as in training."""
    shape = WanShape(dim=256, ffn_dim=512, heads=2, blocks=2, text_dim=32, channels=16, freq_dim=64)
    torch.manual_seed(0)
    network = WanModel(shape, backends).to(DEVICE)
    torch.nn.init.normal_(network.head.head.weight)
    recompute(network, ["blocks.0", "blocks.1"])
    loss = run(network.bfloat16()).float().square().mean()
    return list(torch.autograd.grad(loss, tuple(network.parameters())))


def test_a_network_trains_alike_with_flex_attention_under_recomputation() -> None:
    latent, clean = (torch.randn(2, 6, 16, 10, 14, device=DEVICE) for _ in range(2))  # 35 tokens a frame
    text, time = torch.randn(2, 9, 32, device=DEVICE), torch.full((2, 6), 500.0, device=DEVICE)

    def run(network: WanModel) -> Tensor:
        output = network(latent, time, text, clean=Clean(clean), segment_frames=2).velocity
        assert output is not None
        return output

    expected = gradients(TORCH, run)
    ours = gradients(replace(TORCH, segments=flex.load()), run)
    flat, other = (torch.cat([each.double().flatten() for each in found]) for found in (ours, expected))
    assert ((flat - other).norm() / other.norm()).item() < 2e-2
