"""Chunk attention against its float64 reference, in Triton's interpreter; and torch's libraries in its place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mirai_kernels.chunk_attention import reference
from mirai_kernels.chunk_attention.launch import TRITON, Cached
from mirai_kernels.chunk_attention.op import chunk_attention
from mirai_kernels.dense_attention.library import LIBRARIES
from mirai_kernels.launch import Launch
from tests.kernel_cases import BOUNDS, assert_close, assert_same_bits, drawn, relative, with_gradients

OPERATOR = torch.ops.mirai.chunk_attention.default


@dataclass(frozen=True)
class Case:
    batch: int
    queries: int
    own: int
    heads: int
    width: int
    capacity: int = 0
    runs: tuple[int, ...] = ()

    def segment(self, dtype: torch.dtype) -> list[Tensor]:
        tokens = self.queries, self.own, self.own
        return [drawn(n, self.batch, each, self.heads, self.width, dtype=dtype) for n, each in enumerate(tokens)]

    def store(self, dtype: torch.dtype) -> Tensor:
        """[2, B, capacity, H, D] of which only the runs may be read: NaN elsewhere."""
        full = drawn(7, 2, self.batch, self.capacity, self.heads, self.width, dtype=dtype)
        poisoned = torch.full_like(full, float("nan"))
        poisoned[:, :, self.seen()] = full[:, :, self.seen()]
        return poisoned

    def cached(self, store: Tensor) -> Cached | None:
        return Cached(store[0], store[1], self.runs) if self.runs else None

    def seen(self) -> list[int]:
        return [i for first, end in zip(self.runs[::2], self.runs[1::2], strict=True) for i in range(first, end)]


EMPTY = Case(2, 37, 37, 2, 128)
SINK_AND_RING = Case(2, 45, 39, 3, 20, capacity=170, runs=(0, 21, 60, 61, 71, 170))
SEVERAL_TILES = Case(1, 150, 131, 1, 128, capacity=140, runs=(3, 140))
CASES = [EMPTY, SINK_AND_RING, SEVERAL_TILES]


def exact(store: Tensor, *leaves: Tensor) -> list[Tensor]:
    q, *own = leaves
    return [reference.chunk_attention(q, (own[0], own[1]), (store[0].double(), store[1].double()))[0]]


def ours(cached: Cached | None, by: str, *leaves: Tensor) -> list[Tensor]:
    q, k, v = leaves
    return [chunk_attention(q, (k, v), cached, by)[0]]


def check(case: Case, dtype: torch.dtype, by: str) -> None:
    store, leaves = case.store(dtype), case.segment(dtype)
    expected = with_gradients(partial(exact, store[:, :, case.seen()]), leaves, torch.float64)
    found = with_gradients(partial(ours, case.cached(store), by), leaves)
    assert_close(found, expected, BOUNDS[dtype])
    if by == TRITON:
        assert_same_bits(found, with_gradients(partial(ours, case.cached(store), by), leaves))


@pytest.mark.parametrize("by", [TRITON, "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_exact_and_repeat(case: Case, dtype: torch.dtype, by: str) -> None:
    check(case, dtype, by)


@pytest.mark.parametrize("by", [TRITON, "cpu"])
def test_bfloat16_is_rounded_where_it_is_stored(by: str) -> None:
    check(SINK_AND_RING, torch.bfloat16, by)


def test_a_library_gives_what_one_call_of_it_gives() -> None:
    """Outputs of parts by themselves would come rounded, and their sum once more: 1.22 times the error."""
    case = Case(1, 160, 40, 2, 64, capacity=140, runs=(0, 20, 30, 60, 80, 140))
    store, (q, k, v) = case.store(torch.float16), case.segment(torch.float16)
    held = store[:, :, case.seen()]
    whole = LIBRARIES["cpu"].forward(q, torch.cat((held[0], k), 1), torch.cat((held[1], v), 1)).out
    (found,) = ours(case.cached(store), "cpu", q, k, v)
    assert torch.equal(found, whole)


@pytest.mark.parametrize("by", [TRITON, "cpu"])
def test_the_log_sum_exp_is_over_all_keys(by: str) -> None:
    case = SINK_AND_RING
    store, (q, k, v) = case.store(torch.float32), case.segment(torch.float32)
    held = store[:, :, case.seen()].double()
    _, expected = reference.chunk_attention(q.double(), (k.double(), v.double()), (held[0], held[1]))
    _, found = chunk_attention(q, (k, v), case.cached(store), by)
    assert found.dtype == torch.float32 and relative(found, expected) <= 1e-6
    assert not chunk_attention(q.requires_grad_(), (k, v), case.cached(store), by)[1].requires_grad


def test_a_ring_that_has_wrapped_around_shows_its_window_without_moving() -> None:
    """Two tokens a frame, a sink of one frame and a ring of four; frames 0 .. 6 written, the last two of them seen."""
    case = Case(1, 5, 4, 2, 16, capacity=10, runs=(0, 2, 2, 4, 8, 10))
    written = drawn(3, 7, 2, 1, 2, 2, 16)  # frames of [keys or values, B, tokens, H, D]
    store = torch.full((2, 1, 10, 2, 16), float("nan"))
    for frame in range(7):
        slot = 2 * (1 + (frame - 1) % 4 if frame else 0)
        store[:, :, slot : slot + 2] = written[frame]
    # Frame 5 was written over frame 1, and frame 6 over frame 2; frame 4 stands last.
    before = (0, 2, 2, 6)
    in_time = torch.cat([written[0], written[5], written[6]], dim=2)
    leaves = case.segment(torch.float32)
    expected = with_gradients(partial(exact, in_time), leaves, torch.float64)
    assert_close(with_gradients(partial(ours, Cached(store[0], store[1], before), TRITON), leaves), expected, 1e-6)
    in_time = torch.cat([written[0], written[4], written[5]], dim=2)
    expected = with_gradients(partial(exact, in_time), leaves, torch.float64)
    assert_close(with_gradients(partial(ours, case.cached(store), TRITON), leaves), expected, 1e-6)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    case = SINK_AND_RING
    store, leaves = case.store(torch.float32), case.segment(torch.float32)
    leaves[0] *= 200
    expected = with_gradients(partial(exact, store[:, :, case.seen()]), leaves, torch.float64)
    found = with_gradients(partial(ours, case.cached(store), TRITON), leaves)
    assert_close(found, expected, 1e-4)  # a score of 1000 is known to 6e-5


def test_keys_that_all_point_away_leave_the_padding_of_a_tile_without_weight() -> None:
    """With scores near -200 the padding's zeros would weigh more than any number holds."""
    case = SINK_AND_RING
    store, leaves = case.store(torch.float32), case.segment(torch.float32)
    leaves[0][..., 0] -= 30
    for keys in (store[0], leaves[1]):
        keys[..., 0] += 30
    expected = with_gradients(partial(exact, store[:, :, case.seen()]), leaves, torch.float64)
    found = with_gradients(partial(ours, case.cached(store), TRITON), leaves)
    assert_close(found, expected, 1e-4)


# --- as torch sees it ----------------------------------------------------------------------------------------


def test_other_slots_may_be_written_before_backward() -> None:
    case = SINK_AND_RING
    store, leaves = case.store(torch.float32), case.segment(torch.float32)
    expected = with_gradients(partial(ours, case.cached(store), TRITON), leaves)
    q, k, v = (each.requires_grad_() for each in leaves)
    out, _ = chunk_attention(q, (k, v), case.cached(store), TRITON)
    unseen = [i for i in range(case.capacity) if i not in case.seen()]
    store[:, :, unseen] = 1e9
    towards = drawn(100, *out.shape)
    assert_same_bits(torch.autograd.grad(out, (q, k, v), towards), expected[1:])


def test_selective_recomputation_keeps_the_output_and_attends_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case, runs = EMPTY, []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: runs.append(launch.kernel.__name__) or run(launch))
    policy = {OPERATOR: CheckpointPolicy.MUST_SAVE}

    def contexts():
        return create_selective_checkpoint_contexts(
            lambda _, op, *args, **kwargs: policy.get(op, CheckpointPolicy.PREFER_RECOMPUTE)
        )

    leaves = [each.requires_grad_() for each in case.segment(torch.float32)]
    body = lambda q, k, v: chunk_attention(2 * q, (k, v))[0].square()
    out = checkpoint(body, *leaves, use_reentrant=False, context_fn=contexts)
    assert isinstance(out, Tensor)
    found = torch.autograd.grad(out.sum(), leaves)
    assert runs == ["forward", "backward_queries", "backward_own"]
    assert_same_bits(found, torch.autograd.grad(body(*leaves).sum(), leaves))


@pytest.mark.parametrize("by", [TRITON, "cpu"])
def test_the_operator_is_what_it_says_it_is(by: str) -> None:
    case = Case(1, 5, 4, 2, 16, capacity=9, runs=(1, 4, 6, 9))
    store = torch.where(case.store(torch.float32).isnan(), 0.0, case.store(torch.float32))
    leaves = [each.requires_grad_() for each in case.segment(torch.float32)]
    torch.library.opcheck(OPERATOR, (*leaves, store[0], store[1], case.runs, by))
    torch.library.opcheck(OPERATOR, (*leaves, None, None, (), by))


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_libraries_of_gpus_are_called_as_torch_declares_them(name: str) -> None:
    """On tensors without memory: what they compute is for tests on a GPU to say."""
    library = LIBRARIES[name]
    q, k, v = (torch.empty(2, tokens, 3, 64, device="meta", dtype=torch.bfloat16) for tokens in (5, 7, 7))
    attended = library.forward(q, k, v)
    assert attended.out.shape == q.shape and attended.lse.shape == (2, 3, 5)
    found = library.backward(torch.empty_like(q), q, k, v, attended)
    assert [each.shape for each in found] == [each.shape for each in (q, k, v)]


# --- what it refuses -----------------------------------------------------------------------------------------


def refused(match: str, q: Tensor, own: tuple[Tensor, Tensor], cached: Cached | None = None, by: str = TRITON) -> None:
    with pytest.raises(ValueError, match=match):
        chunk_attention(q, own, cached, by)


def test_what_kernels_cannot_do_is_refused_in_one_line() -> None:
    case = SINK_AND_RING
    store, (q, k, v) = case.store(torch.float32), case.segment(torch.float32)
    refused("known are triton, cudnn", q, (k, v), by="cuda")
    refused("all are float32", q.double(), (k.double(), v.double()))
    refused("all are float32", q, (k.half(), v.half()))
    refused("only the numbers of tokens", q[:1], (k, v))
    refused("not none", q, (k[:, :0], v[:, :0]))
    refused("at most 128", *(lambda x: (x, (x, x)))(torch.zeros(1, 2, 1, 129)))
    refused("no pairs", q, (k, v), Cached(store[0], store[1], (0, 171)))
    refused("no pairs", q, (k, v), Cached(store[0], store[1], (5, 5)))
    refused("at most 3", q, (k, v), Cached(store[0], store[1], (0, 1, 2, 3, 4, 5, 6, 7)))
    refused("no copy is made", q, (k, v), Cached(store[0].flip(1)[:, ::2], store[1].flip(1)[:, ::2], (0, 9)))
    refused("detach them", q, (k, v), Cached(store[0].requires_grad_(), store[1], case.runs))
