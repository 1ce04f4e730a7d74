"""RMSNorm, rotary positions and cache writes against the float64 reference, in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mirai_kernels.launch import Launch
from mirai_kernels.qk_norm_rope_cache import reference, triton_norm_rope
from mirai_kernels.qk_norm_rope_cache.op import norm_rope, qk_norm_rope, qk_norm_rope_cache
from mirai_kernels.qk_norm_rope_cache.reference import Placement
from tests.kernel_cases import BOUNDS, assert_close, assert_same_bits, drawn, relative, with_gradients

CASES = [  # batch, heads, head_dim, placement
    (2, 3, 20, Placement((2, 1, 3), 7)),
    (1, 5, 128, Placement((1, 2, 3), 1020)),
]


def inputs(case: tuple[int, int, int, Placement], dtype: torch.dtype) -> tuple[list[Tensor], int, Placement]:
    """q, k (slices of one projection), and their weights."""
    batch, heads, head_dim, placement = case
    frames, rows, columns = placement.grid
    both = drawn(1, batch, frames * rows * columns, 2 * heads * head_dim, dtype=dtype)
    weights = [1 + 0.2 * drawn(seed, heads * head_dim, dtype=dtype) for seed in (2, 3)]
    return [*both.chunk(2, dim=-1), *weights], heads, placement


def exact_pair(heads: int, placement: Placement, rotate_keys: bool, *leaves: Tensor) -> list[Tensor]:
    q, k, q_weight, k_weight = leaves
    key_placement = placement if rotate_keys else None
    return [reference.norm_rope(q, q_weight, heads, placement), reference.norm_rope(k, k_weight, heads, key_placement)]


def fused_pair(heads: int, placement: Placement, rotate_keys: bool, *leaves: Tensor) -> tuple[Tensor, Tensor]:
    q, k, *weights = leaves
    return qk_norm_rope(q, k, (weights[0], weights[1]), heads, placement, rotate_keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rotate_keys", [True, False])
def test_outputs_and_gradients_are_exact_and_repeat(
    case: tuple[int, int, int, Placement], dtype: torch.dtype, rotate_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_norm_rope, "WALKERS", 5)  # several tokens each, and some one more
    leaves, heads, placement = inputs(case, dtype)
    exact = with_gradients(partial(exact_pair, heads, placement, rotate_keys), leaves, torch.float64)
    fused = partial(fused_pair, heads, placement, rotate_keys)
    found = with_gradients(fused, leaves)
    assert_close(found, exact, BOUNDS[dtype])
    assert_same_bits(found, with_gradients(fused, leaves))


def test_a_weight_or_a_placement_may_be_missing() -> None:
    (q, _, weight, _), heads, placement = inputs(CASES[0], torch.float32)
    for chosen, place in ((weight, None), (None, placement)):
        leaves = [q] if chosen is None else [q, chosen]
        exact = with_gradients(lambda x, w=None: [reference.norm_rope(x, w, heads, place)], leaves, torch.float64)  # noqa: B023
        found = with_gradients(lambda x, w=None: [norm_rope(x, w, heads, place)], leaves)  # noqa: B023
        assert_close(found, exact, BOUNDS[torch.float32])


@pytest.mark.parametrize(("first", "cached"), [(0, 6), (6, 18)], ids=["empty cache", "between sink and ring"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_and_values_go_into_their_slot_and_nowhere_else(first: int, cached: int, dtype: torch.dtype) -> None:
    (q, k, *weights), heads, placement = inputs(CASES[0], dtype)
    v = drawn(4, *k.shape, dtype=dtype)
    store = torch.full((2, 2, cached, heads, q.shape[-1] // heads), float("nan"), dtype=dtype)
    slots = store[0, :, first : first + 6], store[1, :, first : first + 6]
    out = qk_norm_rope_cache((q, k, v), (weights[0], weights[1]), slots, placement)
    exact = exact_pair(heads, placement, True, *(each.double() for each in (q, k, *weights)))
    assert_close([out, slots[0]], exact, BOUNDS[dtype])
    assert torch.equal(slots[1].flatten(2), v)
    others = torch.cat((store[:, :, :first], store[:, :, first + 6 :]), dim=2)
    assert others.isnan().all()


def test_a_window_relative_read_equals_an_absolute_write() -> None:
    """Keys cached at no position and turned when read stand where a pass at that frame would have written them."""
    (q, k, *weights), heads, placement = inputs(CASES[0], torch.float32)
    _, raw = qk_norm_rope(q, k, (weights[0], weights[1]), heads, placement, rotate_keys=False)
    _, written = qk_norm_rope(q, k, (weights[0], weights[1]), heads, placement)
    assert relative(norm_rope(raw.flatten(2), None, heads, placement), written) <= BOUNDS[torch.float32]


def test_selective_checkpointing_sees_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, _, weight, _), heads, placement = inputs(CASES[0], torch.float32)
    ran: list[str] = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (ran.append(self.kernel.__name__), run(self))[1])
    keep = partial(
        create_selective_checkpoint_contexts,
        lambda _, operator, *__, **___: (
            CheckpointPolicy.MUST_SAVE if "norm_rope" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE
        ),
    )
    out = checkpoint(
        lambda x: norm_rope(x, weight, heads, placement).sin(), q.requires_grad_(), use_reentrant=False, context_fn=keep
    )
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert ran == ["norm_rope_forward", "norm_rope_backward"]


def test_registrations_hold() -> None:
    (q, k, *weights), heads, placement = inputs(CASES[0], torch.float32)
    cos, sin = reference.angles(q.shape[-1] // heads, q.device, torch.float32)
    leaves = [each.clone().requires_grad_() for each in (q, k, *weights)]
    position = [*placement.grid[1:], placement.first_frame]
    arguments = (leaves[0], leaves[1], leaves[2:], cos, sin, heads, position, True)
    torch.library.opcheck(
        torch.ops.mirai.qk_norm_rope.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_mistakes_are_named() -> None:
    (q, k, *weights), heads, placement = inputs(CASES[0], torch.float32)
    pair = (weights[0], weights[1])
    with pytest.raises(ValueError, match="a grid of 2 x 1 x 4 holds 8 tokens, not 6"):
        qk_norm_rope(q, k, pair, heads, Placement((2, 1, 4)))
    with pytest.raises(ValueError, match="frames 1023 to 1024 .* pass position 1024"):
        qk_norm_rope(q, k, pair, heads, Placement(placement.grid, 1023))
    with pytest.raises(ValueError, match="q must be contiguous in its last dimension"):
        qk_norm_rope(q.transpose(1, 2).contiguous().transpose(1, 2), k, pair, heads, placement)
    slots = k.unflatten(-1, (heads, -1)), k.unflatten(-1, (heads, -1))
    with pytest.raises(RuntimeError, match="writes constants"):
        qk_norm_rope_cache((q.requires_grad_(), k, k), pair, slots, placement)
    with pytest.raises(ValueError, match="the key slot .* is no run of whole tokens"), torch.no_grad():
        qk_norm_rope_cache((q, k, k), pair, (slots[0][:, :4], slots[1]), placement)
