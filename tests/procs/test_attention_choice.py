"""Networks attend with what the recipe names, on all ranks, and effective.yaml tells it; foresight goes by the
choice of kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from mirai_dist.attention import sdpa
from mirai_dist.attention.patterns import TORCH, by_dense
from mirai_dist.attention.select import Choice
from mirai_dist.config import RecipeError, load
from mirai_dist.cycle import attending, comparing, fusing
from mirai_dist.cycle.effective import effective
from mirai_dist.cycle.fusing import Fusing
from mirai_dist.cycle.roles import Role
from mirai_dist.method.arithmetic import Arithmetic
from mirai_dist.method.foresight import Comparison, plain
from mirai_dist.models.wan.token_ops import Plain
from tests.procs import tiny


def test_every_network_of_a_run_attends_with_what_the_recipe_names(threads) -> None:
    recipe = tiny.recipe("parallel.attention=sdpa-flash")

    def body(rank: int) -> None:
        stage = tiny.stage_of(recipe, "distil")
        networks = {role.name: role.network for role in vars(stage).values() if isinstance(role, Role)}
        assert networks.keys() == {"generator", "critic", "teacher", "predictor"}
        for name, network in networks.items():
            blocks: list[Any] = list(network.get_submodule("blocks").children())
            found = [block.dense if name == "predictor" else block.backends.dense for block in blocks]
            assert found == [sdpa.FLASH] * len(blocks) and blocks, name
        for name in ("generator", "critic", "teacher"):
            assert networks[name].backends == by_dense(sdpa.FLASH)

    with tiny.lively():
        threads(1)(body)
    told = effective(load(tiny.RECIPE, ("parallel.attention=sdpa-flash",)), 1, "cpu")["attention"]
    calls = "dense calls, segment by segment"
    assert told == {"dense": "sdpa-flash", "segments": calls, "behind": "dense calls", "refused": {}}


def test_foresight_and_its_replay_compute_with_what_was_chosen(threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of tokens, fusion of targets, and a head that is given the whole weight of a sharded predictor."""
    ops, micro_batches, widths = Plain(), 2, []
    recipe = tiny.recipe()

    def noted(arithmetic: Arithmetic) -> Comparison:
        exact = plain(arithmetic)

        def fuse(*given) -> Tensor:
            widths.append("targets")
            return exact.fuse(*given)

        def cosine(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            widths.append(tuple(weight.shape))
            return exact.cosine(hidden, weight, targets)

        return Comparison(arithmetic, fuse, cosine)

    monkeypatch.setattr(fusing, "fusing_of", lambda *_: Fusing(ops, "fused"))
    monkeypatch.setattr(comparing, "load", noted)

    def body(rank: int) -> None:
        stage = tiny.stage_of(recipe, "distil")
        for role in (stage.generator, stage.predictor):
            found = [module.ops for module in role.network.modules() if hasattr(module, "ops")]
            assert found and all(each is ops for each in found)
        widths.clear()
        dist.barrier()
        tiny.train(stage, 1 + recipe.dmd.critic_updates)

    with tiny.lively():
        threads(2, tiny.TIMEOUT)(body)
    calls = 2 * micro_batches
    assert widths.count("targets") == calls
    assert widths.count((recipe.teacher.dim, recipe.generator.dim)) == calls * (1 + recipe.dmd.critic_updates)
    assert len(widths) == calls * (2 + recipe.dmd.critic_updates)


def refusals(threads, recipe) -> list[str]:
    def body(rank: int) -> str:
        try:
            attending.check_attention(recipe, tiny.CPU)
        except RecipeError as error:
            return str(error)
        return ""

    return threads(3)(body)


def test_ranks_of_equal_machines_agree(threads) -> None:
    assert refusals(threads, tiny.recipe()) == [""] * 3
    (said,) = set(refusals(threads, tiny.recipe("parallel.attention=xformers")))
    assert said.startswith("parallel.attention: xformers cannot be used here (xformers: needs a CUDA device)")


def test_a_rank_that_would_compute_otherwise_stops_all(threads, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention_of(recipe, device) -> Choice:
        return Choice(TORCH, "flash-2" if dist.get_rank() == 2 else "cudnn", "dense", ())

    monkeypatch.setattr(attending, "attention_of", attention_of)
    (said,) = set(refusals(threads, tiny.recipe()))
    assert said == (
        "parallel.attention: the nodes are not alike: rank 0 has attention cudnn, segment_attention dense, caches "
        "dense and kernels reference, rank 2 has attention flash-2, segment_attention dense, caches dense and "
        "kernels reference; name what all have, here, in segment_attention and kernels"
    )


def test_a_rank_without_what_was_named_stops_all(threads, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention_of(recipe, device) -> Choice:
        if dist.get_rank() == 1:
            raise RecipeError("parallel.attention", "flash cannot be used here")
        return Choice(TORCH, "flash-2", "dense", ())

    monkeypatch.setattr(attending, "attention_of", attention_of)
    (said,) = set(refusals(threads, tiny.recipe()))
    assert "rank 1 has parallel.attention: flash cannot be used here" in said
