"""Gate, residual, LayerNorm and modulation against the float64 reference, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mirai_kernels.residual_modulate import reference, triton_residual_modulate
from mirai_kernels.residual_modulate.op import residual_modulate, residual_modulate_e4m3
from tests.kernel_cases import BOUNDS, assert_close, assert_same_bits, drawn, relative, with_gradients

Function = Callable[..., tuple[Tensor, Tensor]]
# batch, frames, tokens a frame, dim, then [batch, frames] of gate, scale and shift
CASES = {
    "a vector a frame": ((2, 3, 5, 20), (2, 3), (2, 3), (2, 3)),
    "shared by frames or samples": ((2, 2, 3, 130), (1, 2), (2, 1), (1, 1)),
}


def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    """x, y, gate, scale, shift; x and y are slices of one tensor, the vectors of another, as in a network."""
    (batch, frames, tokens, dim), *vectors = CASES[name]
    x, y = drawn(1, batch, frames * tokens, 2 * dim, dtype=dtype).chunk(2, dim=-1)
    table = drawn(2, batch, frames, 3, dim, dtype=dtype).unbind(dim=2)
    return [x, y, *(each[:b, :f] for each, (b, f) in zip(table, vectors, strict=True))]


def with_parts(function: Function, y: bool, gate: bool) -> Callable[..., Sequence[Tensor]]:
    """The function of those inputs alone that are there; it returns the residual where there is a y."""

    def call(x: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        left = list(rest)
        given = (left.pop(0) if y else None, left.pop(0) if gate else None)
        residual, out = function(x, *given, *left)
        return (residual, out) if y else (out,)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_exact_and_repeat(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_residual_modulate, "PROGRAMS", 9)  # several rows a program, and a last one with fewer
    leaves = inputs(name, dtype)
    found = with_gradients(residual_modulate, leaves)
    exact = with_gradients(reference.residual_modulate, leaves, torch.float64)
    assert_close(found, exact, BOUNDS[dtype])
    assert_same_bits(found, with_gradients(residual_modulate, leaves))


@pytest.mark.parametrize(("y", "gate"), [(False, False), (True, False)])
def test_the_sub_layer_or_its_gate_may_be_missing(y: bool, gate: bool) -> None:
    x, given_y, _, scale, shift = inputs("a vector a frame", torch.float32)
    leaves = [x, *([given_y] if y else []), scale, shift]
    exact = with_gradients(with_parts(reference.residual_modulate, y, gate), leaves, torch.float64)
    assert_close(with_gradients(with_parts(residual_modulate, y, gate), leaves), exact, BOUNDS[torch.float32])


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_may_be_used(used: int) -> None:
    x, y, gate, *rest = inputs("a vector a frame", torch.float32)

    def one(function: Function) -> Callable[..., Sequence[Tensor]]:
        return lambda *leaves: [function(*leaves, *(each.to(leaves[0].dtype) for each in rest))[used]]

    exact = with_gradients(one(reference.residual_modulate), (x, y, gate), torch.float64)
    assert_close(with_gradients(one(residual_modulate), (x, y, gate)), exact, BOUNDS[torch.float32])


def test_an_affine_layer_norm_is_a_case_of_it() -> None:
    x, y, gate, weight, bias = inputs("shared by frames or samples", torch.float32)
    weight, bias = weight[:1], bias[:1]
    residual, out = residual_modulate(x, y, gate, weight - 1, bias)
    expected = torch.nn.functional.layer_norm(residual, x.shape[-1:], weight[0, 0], bias[0, 0], eps=reference.EPS)
    assert relative(out, expected.double()) <= BOUNDS[torch.float32]


def test_bf16_is_rounded_only_where_it_is_stored() -> None:
    leaves = inputs("a vector a frame", torch.bfloat16)
    exact = reference.residual_modulate(*(each.double() for each in leaves))
    assert_close(residual_modulate(*leaves), exact, BOUNDS[torch.bfloat16])


def test_rows_scaled_to_e4m3() -> None:
    leaves = inputs("a vector a frame", torch.float32)
    residual, out, scale = residual_modulate_e4m3(*leaves)
    exact_residual, exact = reference.residual_modulate(*(each.double() for each in leaves))
    exact_out, exact_scale = reference.row_scaled(exact)
    assert_close([residual, scale], [exact_residual, exact_scale], BOUNDS[torch.float32])
    assert out.float().abs().amax(dim=-1).eq(reference.E4M3_MAX).all()
    # the interpreter cuts off where a GPU rounds: twice the error
    assert relative(out.float() * scale, exact) <= 2 * relative(exact_out.double() * exact_scale, exact)


def test_registrations_hold() -> None:
    leaves = [each.clone().requires_grad_() for each in inputs("a vector a frame", torch.float32)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.mirai.residual_modulate.default, tuple(leaves), test_utils=checks)


def test_mistakes_are_named() -> None:
    x, y, gate, scale, shift = inputs("a vector a frame", torch.float32)
    with pytest.raises(ValueError, match=r"frames dividing the tokens; got \(2, 2, 20\)"):
        residual_modulate(x, y, gate, scale[:, :2], shift)
    with pytest.raises(ValueError, match="a gate needs a y"):
        residual_modulate(x, None, gate, scale, shift)
    with pytest.raises(RuntimeError, match="has no gradient"):
        residual_modulate_e4m3(x.clone().requires_grad_(), y, gate, scale, shift)
