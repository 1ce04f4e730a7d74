"""How the tests of kernels draw tensors and compare results, in the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Relative error of a result against float64. One rounding to float16 costs 2.8e-4 on average; the interpreter cuts
# bfloat16 off instead of rounding it.
BOUNDS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    draws = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=draws, device=device).to(dtype)


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact; nan where either holds a nan."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def with_gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Outputs of the function, and gradients by every input of a random linear functional of the outputs."""
    leaves = [each.detach().to(dtype or each.dtype).requires_grad_() for each in inputs]
    outputs = function(*leaves)
    towards = [
        drawn(100 + index, *each.shape, device=each.device.type).to(each.dtype) for index, each in enumerate(outputs)
    ]
    return [each.detach() for each in outputs] + list(torch.autograd.grad(outputs, leaves, towards))


def assert_close(found: Sequence[Tensor], exact: Sequence[Tensor], bound: float) -> None:
    errors = [relative(mine, other) for mine, other in zip(found, exact, strict=True)]
    assert all(error <= bound for error in errors), f"relative errors {[f'{each:.1e}' for each in errors]} of {bound}"


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
