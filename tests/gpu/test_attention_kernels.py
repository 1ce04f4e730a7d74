"""Our attention operators on a real card, at the lengths of 480p video: no less exact than torch's own kernels.

    python -m pytest -m gpu tests/gpu/test_attention_kernels.py -s       one GPU, Hopper; 10 GB
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor

from mirai_dist.attention import sdpa
from mirai_dist.attention.patterns import BySegment, Pattern, by_dense
from mirai_dist.certify.compare import OWN_ERROR, ROUNDING
from mirai_dist.cycle import comparing
from mirai_dist.method.foresight import PRESETS
from mirai_dist.method.replay import ReplayStep
from mirai_dist.models.predictor import Predictor
from mirai_dist.models.wan import token_ops
from tests.kernel_cases import assert_same_bits, drawn, relative, with_gradients

pytest.importorskip("triton", reason="no triton")

from mirai_kernels.chunk_attention import reference
from mirai_kernels.chunk_attention.launch import TRITON, Cached
from mirai_kernels.chunk_attention.op import chunk_attention
from mirai_kernels.segment_prefix_attention.op import segment_prefix_attention
from mirai_kernels.segment_prefix_attention.reference import masked_attention, teacher_forced_mask

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
FRAME = 1560  # tokens at 480p
HEADS, WIDTH = 2, 128
BY = [TRITON, "cudnn", "flash"]
CHUNK = 3 * FRAME
RUNS = {  # of a cache of seven chunks
    "no past": (),
    "one run": (0, 2 * CHUNK),
    "sink and ring": (0, FRAME, 2 * FRAME, 4 * FRAME, 9 * FRAME, 12 * FRAME),
}


@pytest.fixture(scope="module", params=list(RUNS))
def runs(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return RUNS[request.param]


def segment(dtype: torch.dtype) -> list[Tensor]:
    return [drawn(n, 1, CHUNK, HEADS, WIDTH, dtype=dtype, device=DEVICE) for n in range(3)]


def store(runs: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """[2, 1, capacity, H, D], NaN outside the runs, and what is inside."""
    seen = [i for first, end in zip(runs[::2], runs[1::2], strict=True) for i in range(first, end)]
    full = drawn(7, 2, 1, 7 * CHUNK, HEADS, WIDTH, dtype=dtype, device=DEVICE)
    poisoned = torch.full_like(full, float("nan"))
    poisoned[:, :, seen] = full[:, :, seen]
    return poisoned, seen


def fused(cached: Cached | None, by: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [chunk_attention(q, (k, v), cached, by)[0]]


def joined(attend: Pattern, held: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [attend(q, torch.cat((held[0].to(k.dtype), k), 1), torch.cat((held[1].to(v.dtype), v), 1))]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.chunk_attention(q, (k, v))[0]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [relative(mine, other) for mine, other in zip(found, expected, strict=True)]


def assert_no_less_exact(what: str, ours: list[float], theirs: list[float], least: float = 0.0) -> None:
    """Within 1.2 times torch's own error, or `least`."""
    print(what, [f"{each:.1e}" for each in ours], "torch", [f"{each:.1e}" for each in theirs])
    assert all(mine <= max(least, OWN_ERROR * other) for mine, other in zip(ours, theirs, strict=True))


@contextmanager
def no_wait_for_the_device() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("by", BY)
def test_a_chunk_and_its_past(by: str, runs: tuple[int, ...]) -> None:
    """Against cuDNN's own forward and backward over all keys, which ours must not fall behind. In bfloat16, which
    recipes compute in: every dtype more is compiled for a quarter of a minute."""
    leaves, (poisoned, seen) = segment(torch.bfloat16), store(runs, torch.bfloat16)
    held = poisoned[:, :, seen]
    expected = with_gradients(partial(joined, exact, held), leaves, torch.float64)
    theirs = errors(with_gradients(partial(joined, sdpa.CUDNN, held), leaves), expected)
    function = partial(fused, Cached(poisoned[0], poisoned[1], runs), by)
    found = with_gradients(function, leaves)
    assert_no_less_exact(f"{by} {runs}", errors(found, expected), theirs)
    if by == TRITON:
        assert_same_bits(found, with_gradients(function, leaves))


def test_float32_is_not_rounded_to_fewer_bits(runs: tuple[int, ...]) -> None:
    leaves, (poisoned, seen) = segment(torch.float32), store(runs, torch.float32)
    expected = with_gradients(partial(joined, exact, poisoned[:, :, seen]), leaves, torch.float64)
    found = with_gradients(partial(fused, Cached(poisoned[0], poisoned[1], runs), TRITON), leaves)
    assert max(errors(found, expected)) <= 1e-5


@pytest.mark.parametrize("by", BY)
def test_nothing_waits_for_the_device(by: str) -> None:
    leaves, runs = [each.requires_grad_() for each in segment(torch.bfloat16)], RUNS["sink and ring"]
    poisoned, _ = store(runs, torch.bfloat16)
    cached = Cached(poisoned[0], poisoned[1], runs)
    for calls in (nullcontext(), no_wait_for_the_device()):  # the first time it compiles
        with calls:
            torch.autograd.grad(fused(cached, by, *leaves)[0].sum(), leaves)


@pytest.mark.parametrize("by", BY)
def test_teacher_forcing_of_two_segments(by: str) -> None:
    """Against attention by cuDNN, segment by segment with copied keys. What noisy segments see comes as two parts that
    a library rounds, and their sum is rounded again: 1.22 times the error of one call, about one rounding."""
    leaves = [drawn(n, 1, 4 * CHUNK, 1, WIDTH, dtype=torch.bfloat16, device=DEVICE) for n in range(3)]
    mask = teacher_forced_mask(2 * CHUNK, CHUNK, torch.device(DEVICE))
    expected = with_gradients(lambda q, k, v: [masked_attention(q, k, v, mask)], leaves, torch.float64)
    plain = BySegment(sdpa.CUDNN).teacher_forced(CHUNK)
    theirs = errors(with_gradients(lambda q, k, v: [plain(q, k, v)], leaves), expected)
    function = lambda q, k, v: [segment_prefix_attention(q, k, v, CHUNK, True, by)]
    found = with_gradients(function, leaves)
    least = 0.0 if by == TRITON else ROUNDING[torch.bfloat16]
    assert_no_less_exact(by, errors(found, expected), theirs, least)
    if by == TRITON:
        assert_same_bits(found, with_gradients(function, leaves))


def replay_step(attend: Pattern) -> tuple[ReplayStep, list[tuple[Tensor, Tensor]]]:
    """Of a predictor whose tokens and head are the fused kernels."""
    torch.manual_seed(0)
    comparison, backends = comparing.load(PRESETS["paper"]), by_dense(attend)
    network = Predictor(256, 320, heads=2, blocks=3, gated=False, backends=backends, ops=token_ops.load())
    network.to(DEVICE, torch.bfloat16)
    pairs = [
        tuple(drawn(seed, 1, 6, FRAME, wide, dtype=torch.bfloat16, device=DEVICE) for wide in (256, 320))
        for seed in range(3)
    ]

    def cosine_of(states: Tensor, targets: Tensor) -> Tensor:
        return network(states, [targets], comparison.cosine)

    return ReplayStep(cosine_of, list(network.parameters()), *pairs[0]), pairs  # type: ignore[arg-type,return-value]


def test_the_replay_step_is_captured_as_a_cuda_graph() -> None:
    step, pairs = replay_step(lambda q, k, v: chunk_attention(q, (k, v))[0])
    expected = []
    for pair in pairs:
        step.load(*pair)
        step()
        expected.append([step.cosine.clone(), *(each.clone() for each in step.gradients)])
    graph = step.captured()
    for pair, plain in zip(pairs, expected, strict=True):
        step.load(*pair)
        graph.replay()
        assert max(errors([step.cosine, *step.gradients], plain)) <= 1e-3
