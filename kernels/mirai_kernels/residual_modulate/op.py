"""The operator as the rest of the code sees it: torch sees one call, with its shapes and its gradient.

Saved for backward: the stored residual, the sub-layer's output and the vectors; mean and deviation are taken again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirai_kernels.launch import check_rows
from mirai_kernels.residual_modulate.reference import frames_of
from mirai_kernels.residual_modulate.triton_residual_modulate import backward_launch, forward_launch


def residual_modulate(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """(x + gate y, its LayerNorm times (1 + scale) plus shift), each [B, N, dim] in the dtype of x.

    x and y [B, N, dim]; gate, scale and shift [1 or B, 1 or frames, dim], one vector a frame of N / frames tokens.
    y may be None: the residual is then x itself. gate may be None: 1. All carry gradient; the vectors' are added up in
    a fixed order. An affine LayerNorm is this one with scale = weight - 1 and shift = bias.
    """
    _check(x, y, gate, scale, shift)
    residual, out = _residual_modulate(x, y, gate, scale, shift)
    return (x if y is None else residual), out


def residual_modulate_e4m3(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(residual, output as float8 e4m3, its rows' scales [B, N, 1] float32), for networks that are frozen.

    What is meant is float8 times scale; it carries no gradient. Raises RuntimeError where one would be lost.
    """
    given = [each for each in (x, y, gate, scale, shift) if each is not None]
    if torch.is_grad_enabled() and any(each.requires_grad for each in given):
        raise RuntimeError("residual_modulate_e4m3 has no gradient: call it without, or residual_modulate with")
    _check(x, y, gate, scale, shift)
    residual, out, row_scale = _residual_modulate_e4m3(x, y, gate, scale, shift)
    return (x if y is None else residual), out, row_scale


def _check(x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor) -> None:
    check_rows("x", x)
    if y is not None:
        check_rows("y", y)
    if gate is not None and y is None:
        raise ValueError("a gate needs a y to act on")
    frames_of(x, [each for each in (gate, scale, shift) if each is not None])


def _like(x: Tensor, there: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor like x; of no elements where it is not there."""
    return x.new_empty(x.shape if there else (0,), dtype=dtype)


@torch.library.custom_op("mirai::residual_modulate", mutates_args=())
def _residual_modulate(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """The residual has no elements without y: an operator may not return what it was given."""
    residual, out = _like(x, y is not None), _like(x)
    forward_launch((x, y, gate, scale, shift), residual if y is not None else None, out).run()
    return residual, out


@_residual_modulate.register_fake
def _(x: Tensor, y: Tensor | None, gate: Any, scale: Any, shift: Any) -> tuple[Tensor, Tensor]:
    return _like(x, y is not None), _like(x)


@torch.library.custom_op("mirai::residual_modulate_e4m3", mutates_args=())
def _residual_modulate_e4m3(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    residual, out = _like(x, y is not None), _like(x, dtype=torch.float8_e4m3fn)
    row_scale = x.new_empty(*x.shape[:2], 1, dtype=torch.float32)
    forward_launch((x, y, gate, scale, shift), residual if y is not None else None, out, row_scale).run()
    return residual, out, row_scale


@_residual_modulate_e4m3.register_fake
def _(x: Tensor, y: Tensor | None, gate: Any, scale: Any, shift: Any) -> tuple[Tensor, Tensor, Tensor]:
    row_scale = x.new_empty(*x.shape[:2], 1, dtype=torch.float32)
    return _like(x, y is not None), _like(x, dtype=torch.float8_e4m3fn), row_scale


@torch.library.custom_op("mirai::residual_modulate_backward", mutates_args=())
def _backward(
    grad_residual: Tensor | None,
    grad_out: Tensor,
    residual: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    frames: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x and y (no elements without one), and by [scale, shift, gate] of every frame: float32 [B, frames,
    2 or 3, dim]."""
    grad_x, grad_y = _like(residual), _like(residual, y is not None)
    launch, partial = backward_launch(
        (grad_residual, grad_out), (residual, y, gate, scale), frames, grad_x, grad_y if y is not None else None
    )
    launch.run()
    return grad_x, grad_y, partial.sum(dim=2)


@_backward.register_fake
def _(
    grad_residual: Any, grad_out: Any, residual: Tensor, y: Tensor | None, gate: Tensor | None, scale: Any, frames: int
) -> tuple[Tensor, Tensor, Tensor]:
    sums = residual.new_empty(residual.shape[0], frames, 2 + (gate is not None), residual.shape[2], dtype=torch.float32)
    return _like(residual), _like(residual, y is not None), sums


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # the kernel does without the residual's gradient where there is none
    x, y, gate, scale, shift = inputs
    ctx.shift = shift.shape, shift.dtype
    ctx.frames = frames_of(x, [each for each in (gate, scale, shift) if each is not None])
    ctx.save_for_backward(x if y is None else output[0], y, gate, scale)


def _gradients(ctx: Any, grad_residual: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    residual, y, gate, scale = ctx.saved_tensors
    grad_out = torch.zeros_like(residual) if grad_out is None else grad_out
    grads = None if grad_residual is None or y is None else _contiguous_rows(grad_residual), _contiguous_rows(grad_out)
    by_x, by_y, by_vectors = _backward(*grads, residual, y, gate, scale, ctx.frames)
    by_scale, by_shift, *by_gate = by_vectors.unbind(dim=2)
    shape, dtype = ctx.shift
    return (
        by_x,
        None if y is None else by_y,
        None if gate is None else by_gate[0].sum_to_size(gate.shape).to(gate.dtype),
        by_scale.sum_to_size(scale.shape).to(scale.dtype),
        by_shift.sum_to_size(shape).to(dtype),
    )


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_residual_modulate.register_autograd(_gradients, setup_context=_save)
