"""One comparison: what computes it, twice, against float64, and against plain torch in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Sequence[Tensor]]

PASSED, FAILED, NOT_CERTIFIED = "passed", "failed", "not certified"
# A result may be this much less exact than plain torch's own in the same dtype, or as inexact as one rounding of it.
OWN_ERROR = 1.2
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}
OURS = ("fused", "triton")  # variants that must give the same bits twice; of libraries it is only recorded
CPU_LIMIT = 2e10  # multiply-adds of float64 that a CPU is asked for


@dataclass(frozen=True)
class Subject:
    """What is computed: `op` at `shape`. All functions take `inputs` (float32, on a device) and give outputs;
    `exact` does in float64.

    variants: who computes it, by name, or the reason why that one cannot on this device. gradient: by every input.
    work: multiply-adds of one forward.
    """

    op: str
    shape: str
    inputs: Callable[[torch.device], list[Tensor]]
    exact: Function
    plain: Function
    variants: Mapping[str, Function | str]
    gradient: bool = True
    work: float = 0.0


def judged(subject: Subject, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """A row for each variant: its largest error, what it is held to, and whether two runs gave the same bits."""
    given = subject.variants.items()
    runnable = {name: each for name, each in given if not isinstance(each, str)}
    rows = [_row(subject, name, NOT_CERTIFIED, each) for name, each in given if isinstance(each, str)]
    if runnable and device.type == "cpu" and subject.work > CPU_LIMIT:
        reason = "in float64 it is too much for a CPU"
        return rows + [_row(subject, name, NOT_CERTIFIED, reason) for name in runnable]
    if not runnable:
        return rows
    try:
        return rows + _compared(subject, runnable, dtype, device)
    except torch.OutOfMemoryError:
        reason = "in float64 it does not fit into this device's memory"
        return rows + [_row(subject, name, NOT_CERTIFIED, reason) for name in runnable]


def _compared(
    subject: Subject, runnable: Mapping[str, Function], dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    rows = []
    inputs = [each.to(dtype) for each in subject.inputs(device)]
    exact = results(subject.exact, [each.double() for each in inputs], dtype, subject.gradient)
    plain = largest(results(subject.plain, inputs, dtype, subject.gradient), exact)
    bound = max(ROUNDING[dtype], OWN_ERROR * plain)
    for name, function in runnable.items():
        measured = _measured(function, inputs, subject.gradient, exact, bound)
        if name in OURS and measured["same_twice"] is False and not measured["reason"]:
            measured["reason"] = "gives other bits the second time"
        state = FAILED if measured["reason"] else PASSED
        measured |= {"plain_error": plain, "bound": bound}
        rows.append(_row(subject, name, state, measured.pop("reason")) | measured)
    return rows


def _row(subject: Subject, variant: str, state: str, reason: str) -> dict[str, Any]:
    return {"op": subject.op, "variant": variant, "shape": subject.shape, "state": state, "reason": reason}


def _measured(
    function: Function, inputs: list[Tensor], gradient: bool, exact: list[Tensor], bound: float
) -> dict[str, Any]:
    """Error and determinism of one variant, and why it fails (empty: it does not)."""
    try:
        found, again = (results(function, inputs, inputs[0].dtype, gradient) for _ in range(2))
    except Exception as error:  # noqa: BLE001  packages fail in ways of their own; whatever it was is the reason
        line = (str(error).strip() or "no message").splitlines()[0]
        return {"error": None, "same_twice": None, "reason": f"fails with {type(error).__name__}: {line}"}
    error = largest(found, exact)
    same = all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    reason = "" if error <= bound else f"is {error:.1e} from exact, and may be {bound:.1e}"
    return {"error": error if math.isfinite(error) else None, "same_twice": same, "reason": reason}


def results(function: Function, inputs: Sequence[Tensor], dtype: torch.dtype, gradient: bool = True) -> list[Tensor]:
    """Outputs and, if asked for, the gradients by every input of a fixed functional of them, the same in float64 as
    in `dtype`."""
    with torch.set_grad_enabled(gradient):
        leaves = [each.detach().requires_grad_(gradient) for each in inputs]
        outputs = function(*leaves)
        if not gradient:
            return list(outputs)
        draws = [drawn(each.device, 100 + index, *each.shape) for index, each in enumerate(outputs)]
        towards = [draw.to(dtype).to(each) for draw, each in zip(draws, outputs, strict=True)]
        return [*(each.detach() for each in outputs), *torch.autograd.grad(outputs, leaves, towards)]


def largest(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of a tensor, by norms; infinite where one holds a NaN."""
    errors = []
    for mine, other in zip(found, exact, strict=True):
        scale = other.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
        errors.append(((mine.double() - other.double()).norm() / scale).item())
    return max(error if math.isfinite(error) else math.inf for error in errors)


def drawn(device: torch.device, seed: int, *shape: int) -> Tensor:
    """Normal numbers, the same whenever they are drawn on this device."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
