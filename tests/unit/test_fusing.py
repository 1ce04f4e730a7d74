"""Which of plain torch and the fused kernels a run takes, and what it says of it. No GPU is needed to decide."""

from __future__ import annotations

import sys
from dataclasses import fields, replace

import pytest
import torch

from mirai_dist.config import RecipeError, load, schema
from mirai_dist.cycle import comparing, fusing
from mirai_dist.cycle.fusing import Fusing, comparison_of, fusing_of
from mirai_dist.method.foresight import PRESETS, Comparison, plain
from mirai_dist.models.wan import token_ops
from tests.procs import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh() -> None:
    fusing._fused.cache_clear()


def recipe(kernels: str, certificates: str = "ignore") -> schema.Recipe:
    return load(tiny.RECIPE, (f"parallel.kernels={kernels}", f"parallel.certificates={certificates}")).recipe


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> token_ops.Fused:
    """The kernels as if they could be loaded; nothing here runs them."""
    refused = lambda *_: pytest.fail("ran a kernel")
    ops = token_ops.Fused(*[refused] * len(fields(token_ops.Fused)))
    monkeypatch.setattr(fusing, "load", lambda: ops)
    monkeypatch.setattr(comparing, "load", lambda arithmetic: Comparison(arithmetic, refused, refused))
    return ops


def test_cpus_compute_in_plain_torch_and_say_why(with_triton: token_ops.Fused) -> None:
    assert fusing_of(recipe("reference"), CPU) == Fusing(token_ops.PLAIN, "reference")
    chosen = fusing_of(recipe("auto"), CPU)
    assert chosen.ops is token_ops.PLAIN
    assert chosen.told() == "reference: the kernels run on GPUs"
    with pytest.raises(RecipeError, match="parallel.kernels: the fused kernels run on GPUs; use auto or reference"):
        fusing_of(recipe("fused"), CPU)


@pytest.mark.parametrize("certificates", ["ignore", "prefer", "require"])
def test_tritons_interpreter_runs_them_on_a_cpu_where_they_are_named(
    certificates: str, with_triton: token_ops.Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusing, "_interpreted", lambda: True)
    monkeypatch.setattr(fusing, "largest_error", lambda *_: 1e-7)
    monkeypatch.setattr(comparing, "largest_error", lambda *_: 1e-7)
    assert fusing_of(recipe("fused", certificates), CPU) == Fusing(with_triton, "fused")
    assert fusing_of(recipe("auto", certificates), CPU).told() == "reference: the kernels run on GPUs"
    fusing._fused.cache_clear()
    monkeypatch.setattr(fusing, "largest_error", lambda *_: 1e-3)
    with pytest.raises(RecipeError, match="parallel.kernels: the fused kernels are 1.0e-03 from exact"):
        fusing_of(recipe("fused", certificates), CPU)


def test_kernels_are_probed_while_a_network_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "_interpreted", lambda: True)
    monkeypatch.setattr(fusing, "load", lambda: token_ops.PLAIN)
    monkeypatch.setattr(comparing, "load", plain)
    with torch.device("meta"):
        assert fusing_of(recipe("fused"), CPU) == Fusing(token_ops.PLAIN, "fused")


def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("mirai_kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert fusing_of(recipe("auto"), CUDA).told() == "reference: the kernels need the package triton"
    with pytest.raises(RecipeError, match="need the package triton"):
        fusing_of(recipe("fused"), CUDA)


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_kernels_that_are_not_exact_are_not_taken(
    error: float, with_triton: token_ops.Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(fusing, "largest_error", lambda ops, dim, heads, *_: asked.append((dim, heads)) or 1e-7)
    monkeypatch.setattr(comparing, "largest_error", lambda *_: 1e-7)
    found = recipe("auto")
    found = replace(found, parallel=replace(found.parallel, compute_dtype="float32"))
    assert fusing_of(found, CUDA) == Fusing(with_triton, "fused")
    assert set(asked) == {(each.dim, each.heads) for each in (found.generator, found.critic, found.teacher)}
    fusing._fused.cache_clear()
    monkeypatch.setattr(fusing, "largest_error", lambda *_: error)
    assert fusing_of(found, CUDA).told().startswith(f"reference: the kernels are {error:.1e} from exact at ")


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_head_that_is_not_exact_is_not_taken_nor_anything_else(
    error: float, with_triton: token_ops.Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(fusing, "largest_error", lambda *_: 1e-7)
    monkeypatch.setattr(comparing, "largest_error", lambda comparison, widths, *_: asked.append(widths) or error)
    found = recipe("auto")
    found = replace(found, parallel=replace(found.parallel, compute_dtype="float32"))
    chosen = fusing_of(found, CUDA)
    assert asked == [(found.generator.dim, found.teacher.dim)]
    assert chosen.ops is token_ops.PLAIN
    assert chosen.told().startswith(f"reference: the kernels are {error:.1e} from exact in a head of ")


def test_the_same_choice_decides_what_compares(
    with_triton: token_ops.Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the release's arithmetic, which rounds at every step, is never the kernels'."""
    monkeypatch.setattr(fusing, "largest_error", lambda *_: 1e-7)
    monkeypatch.setattr(comparing, "largest_error", lambda *_: 1e-7)
    fused = comparing.load(PRESETS["paper"])
    monkeypatch.setattr(comparing, "load", lambda arithmetic: replace(fused, arithmetic=arithmetic))
    found = recipe("fused")
    assert comparison_of(found, CUDA) == fused
    released = replace(found, foresight=replace(found.foresight, preset="release"))
    for other, device in ((released, CUDA), (recipe("reference"), CUDA), (recipe("auto"), CPU)):
        chosen = comparison_of(other, device)
        assert chosen.arithmetic == PRESETS[other.foresight.preset]
        assert chosen.cosine is not fused.cosine and chosen.fuse is not fused.fuse
