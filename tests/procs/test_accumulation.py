"""How a global batch is split over ranks, micro-batches and accumulation is nobody's business but the clock's.

Every split trains two cycles, once, in a module-wide fixture; the tests compare them. In float64, where rounding cannot
decide the sign of a gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.procs import tiny
from tests.procs.conftest import run_threads
from tests.procs.tiny import TIMEOUT

POSITIONS = {"teacher": 2, "distil": 6}


class Split(NamedTuple):
    """A global batch of four as ranks x micro size x accumulation, and how gradients are reduced."""

    ranks: int
    micro: int
    accumulation: int
    every: bool = False
    unit: str = "network"


SPLITS = [
    Split(1, 4, 1), Split(1, 1, 4), Split(2, 2, 1), Split(2, 1, 2),
    Split(1, 1, 4, every=True), Split(2, 1, 2, every=True, unit="block"),
]


@pytest.fixture(scope="module")
def trained() -> dict[Split, dict[str, dict[str, Any]]]:
    """Every number at the end, by split and stage."""
    recipes = {split: tiny.in_dtype(tiny.recipe(
        f"parallel.sync_every_micro_batch={str(split.every).lower()}", f"parallel.unit={split.unit}",
        *(f"stages.{name}.batch.micro_size={split.micro}" for name in POSITIONS)), "float64") for split in SPLITS}

    def body(rank: int, splits: list[Split]) -> dict[Split, dict[str, dict[str, Any]]]:
        found: dict[Split, dict[str, dict[str, Any]]] = {}
        for split in splits:
            found[split] = {}
            for name, count in POSITIONS.items():
                stage = tiny.stage_of(recipes[split], name)
                assert stage.layout.micro_batches == split.accumulation
                tiny.train(stage, count)
                found[split][name] = tiny.everything(stage)
        return found

    merged: dict[Split, dict[str, dict[str, Any]]] = {}
    with tiny.lively("float64"):
        for ranks in (1, 2):
            own = [split for split in SPLITS if split.ranks == ranks]
            for one in run_threads(ranks, lambda rank, own=own: body(rank, own), timeout=TIMEOUT):
                for split, stages in one.items():
                    for name, values in stages.items():
                        merged.setdefault(split, {}).setdefault(name, {}).update(values)
    return merged


@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
@pytest.mark.parametrize("stage", POSITIONS)
def test_any_split_trains_the_same(trained, split: Split, stage: str) -> None:
    assert not tiny.unequal_run(trained[SPLITS[0]][stage], trained[split][stage])


def test_training_moved_every_network(trained) -> None:
    """Equality above would also hold if nothing was trained."""
    with tiny.lively("float64"):
        recipe = tiny.in_dtype(tiny.recipe(), "float64")
        fresh = run_threads(1, lambda rank: tiny.weights(tiny.stage_of(recipe, "distil")), timeout=TIMEOUT)[0]
    moved = tiny.unequal(fresh, {key: trained[SPLITS[0]]["distil"][key] for key in fresh}, 1e-5)
    assert {key.partition(".")[0] for key in moved} == {"generator", "critic", "predictor"}
    assert len(moved) > 0.9 * len([key for key in fresh if not key.startswith("teacher.")])
