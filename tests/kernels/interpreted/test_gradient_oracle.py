"""The gradient oracle (tests/procs/test_gradient_oracle.py) passes with the fused kernels too.

They compute in float32 whatever the networks do, so they are held to what plain torch makes of the same update in
float32, against the same reference in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from tests.procs import tiny
from tests.procs.test_gradient_oracle import (
    CONTEXT,
    CYCLES,
    DETACHED,
    LEAKY,
    WINDOW,
    Case,
    Gradients,
    KeptGradients,
    expected,
    gradients_of,
    worst,
)

TIMEOUT = 300.0  # seconds; ten where nothing else runs
PARAMETER = 1e-5  # relative error of a parameter's gradient, as for plain torch there; the worst come to 4e-6
OWN_ERROR = 1.2  # the whole gradient may be this much less exact than plain torch's, and a rounding: both are 3e-7 off
ROUNDING = torch.finfo(torch.float32).eps

CASES = {  # of so many ranks, and which exit steps: the first and the last, the last
    1: (Case("network", False, "none", (DETACHED, CONTEXT, WINDOW)), CYCLES),
    2: (Case("block", True, "block", (LEAKY,)), CYCLES[1:]),
}


class Errors(NamedTuple):
    """Relative to the reference: of the parameter that is furthest from it (and its name), and of all as one."""

    worst: tuple[float, str]
    whole: float

    @staticmethod
    def of(found: Gradients, exact: Gradients) -> Errors:
        off = sum((found[name].double() - gradient).square().sum().item() for name, gradient in exact.items())
        size = sum(gradient.square().sum().item() for gradient in exact.values())
        return Errors(worst(found, exact), (off / size) ** 0.5)


@pytest.mark.parametrize("ranks", CASES)
def test_gradient_of_fused_networks_is_the_reference(threads, ranks: int) -> None:
    """A rank runs one sample."""
    case, cycles = CASES[ranks]
    rollout = (*case.rollout, f"stages.distil.batch.global_size={ranks}")
    references = [expected(rollout, cycle) for cycle in cycles]

    def body(rank: int) -> list[list[Errors]]:
        found = []
        for kernels in ("reference", "fused"):
            recipe = case._replace(rollout=(*rollout, f"parallel.kernels={kernels}")).recipe("float32")
            stage = tiny.stage_of(recipe, "distil", KeptGradients)
            found.append([Errors.of(gradients_of(stage, c), r) for c, r in zip(cycles, references, strict=True)])
        return found

    with tiny.lively():
        for of_rank in threads(ranks, timeout=TIMEOUT)(body):
            for plain, fused in zip(*of_rank, strict=True):
                assert fused.worst[0] < PARAMETER, (plain, fused)
                assert fused.whole <= OWN_ERROR * plain.whole + ROUNDING, (plain, fused)
