"""Some positions of a recipe's stage, and how far such a run ends from the same run in float64.

Without momentum AdamW steps by the sign of a gradient, so a gradient that cancels turns its rounding into a whole
step, the other way. So two runs that differ by roundings alone do not end close in every weight, but as a whole; how
close, plain torch in the same dtype shows: it is the measure that the fused kernels are held to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mirai_dist.config import schema
from mirai_dist.cycle.stages import Stage
from tests.procs import tiny


class Trained(NamedTuple):
    """Metrics of each position; weights of trained roles before and after, by "role.parameter", unsharded."""

    metrics: list[dict[str, float]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


class Distance(NamedTuple):
    """How far a run is from the exact one.

    metric: largest difference of a metric at any position, over 1 + its size. role: of a trained role's weights at the
    end, over the way that they went: the largest of all roles. parameter: the same of one parameter.
    """

    metric: float
    role: float
    parameter: float

    @staticmethod
    def of(found: Trained, exact: Trained) -> Distance:
        """nan where the run holds one. AssertionError where the two do not measure and train the same."""
        assert [each.keys() for each in found.metrics] == [each.keys() for each in exact.metrics]
        assert found.after.keys() == exact.after.keys()
        metrics = [
            abs(mine[name] - value) / (1 + abs(value))
            for mine, right in zip(found.metrics, exact.metrics, strict=True)
            for name, value in right.items()
        ]
        squares = {name: _squares(found.after[name], end, exact.before[name]) for name, end in exact.after.items()}
        roles: dict[str, Tensor] = {}
        for name, each in squares.items():
            role = name.split(".")[0]
            roles[role] = roles.get(role, 0) + each
        return Distance(torch.tensor(metrics).max().item(), _furthest(roles), _furthest(squares))

    def times(self, factors: Distance) -> Distance:
        return Distance(*(mine * factor for mine, factor in zip(self, factors, strict=True)))

    def at_most(self, limits: Distance) -> bool:
        return all(mine <= limit for mine, limit in zip(self, limits, strict=True))


def _squares(found: Tensor, exact: Tensor, before: Tensor) -> Tensor:
    """[2] of a parameter: squared distance from the exact end, squared way there."""
    return torch.stack([(found.double() - exact).square().sum(), (exact - before).square().sum()])


def _furthest(squares: dict[str, Tensor]) -> float:
    off, way = torch.stack([*squares.values()]).unbind(dim=1)
    return (off / way).sqrt().max().item()


def trained(
    recipe: schema.Recipe, stage: str, positions: int, dtype: str, kernels: str, device: torch.device = tiny.CPU
) -> Trained:
    """So many positions of a stage without parents, on this rank of the present process group, in a dtype."""
    with tiny.lively(dtype if dtype == "float64" else ""):
        chosen = replace(recipe.parallel, compute_dtype=dtype, kernels=kernels, certificates="ignore")
        found = tiny.stage_of(replace(recipe, parallel=chosen), stage, device=device)
        before = _weights(found)
        metrics = tiny.train(found, positions)
        return Trained(metrics, before, _weights(found))


def _weights(stage: Stage) -> dict[str, Tensor]:
    return {name: each for name, each in tiny.weights(stage).items() if name.split(".")[0] in stage.roles}
