"""Certificates: what is compared, what fails, and what a run makes of a certificate. No GPU is needed."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mirai_dist.attention import sdpa
from mirai_dist.attention.patterns import TORCH
from mirai_dist.attention.select import Choice, Need
from mirai_dist.certify import certificate, exact, subjects
from mirai_dist.certify.compare import FAILED, NOT_CERTIFIED, PASSED, Subject, drawn, judged, results
from mirai_dist.certify.shapes import Dense, Fusion, Head, Shapes, Tokens, shapes_of
from mirai_dist.commands import bench
from mirai_dist.config import FileError, RecipeError, load, schema
from mirai_dist.cycle import attending, fusing
from mirai_dist.models.wan.token_ops import Plain
from mirai_kernels.chunk_attention.reference import chunk_attention
from tests.procs import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CALL = Dense(2, 5, 11, heads=3, head_dim=8, past=6)


def qkv() -> list[Tensor]:
    return [drawn(CPU, seed, 2, tokens, 3, 8).double() for seed, tokens in enumerate((5, 11, 11))]


def test_exact_attention_is_the_specification_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "SCORES", 22)  # two queries a block
    found = results(lambda *each: [exact.attention(*each)], qkv(), torch.float64)
    expected = results(lambda q, k, v: [chunk_attention(q, (k, v))[0]], qkv(), torch.float64)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-14)


# --- judging -------------------------------------------------------------------------------------------------


def beyond(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Reads one token that the cache holds and nobody has written."""
    return [sdpa.dense(q, *(each._base[:, : each.shape[1] + 1] if each._base is not None else each for each in (k, v)))]


def of_attention(shapes: Shapes) -> Subject:
    return next(each for each in subjects.subjects(shapes, CPU) if each.op == subjects.ATTENTION)


def test_what_a_run_can_least_do_without_is_compared_first() -> None:
    """A certificate that is cut short at the first attention lets a run take the fused kernels."""
    ops = [each.op.split(":")[0] for each in subjects.subjects(shapes_of(tiny.recipe()), CPU)]
    first = ops.index(subjects.ATTENTION)
    assert set(ops[first:]) <= {subjects.ATTENTION, subjects.SEGMENTS}
    fused = {subjects.TOKENS, subjects.CACHE, subjects.COSINE, subjects.FUSION}
    assert set(ops[:first]) == fused | {subjects.CHUNK, subjects.PREFIX}
    assert set(ops[: ops.index(subjects.CHUNK)]) == fused


def test_a_variant_is_held_against_float64_forward_and_backward() -> None:
    subject = of_attention(shapes())
    plain = subject.plain
    variants = {
        "right": plain,
        "off": lambda q, k, v: [plain(q, k, v)[0] * 1.001],
        "cut": lambda q, k, v: [plain(q, k.detach() + 0 * k, v)[0]],  # no gradient of keys
        "raises": lambda *_: {}["it"],
        "elsewhere": "needs a Mac",
    }
    rows = {row["variant"]: row for row in judged(replace(subject, variants=variants), torch.float32, CPU)}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {"right": PASSED, "off": FAILED, "cut": FAILED, "raises": FAILED, "elsewhere": NOT_CERTIFIED}
    assert rows["right"]["error"] < 1e-6 and rows["right"]["same_twice"]
    assert rows["off"]["error"] == pytest.approx(1e-3, rel=1e-2)
    assert rows["raises"]["reason"] == "fails with KeyError: 'it'"
    assert rows["elsewhere"]["reason"] == "needs a Mac"


def test_unused_tokens_of_a_cache_are_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = replace(subjects.DENSE[-1], name="reading", load=lambda: lambda q, k, v: beyond(q, k, v)[0])
    monkeypatch.setattr(subjects, "DENSE", (subjects.DENSE[-1], reading))
    rows = {row["variant"]: row for row in judged(of_attention(shapes()), torch.float32, CPU)}
    assert rows["sdpa"]["state"] == PASSED
    assert rows["reading"]["state"] == FAILED and rows["reading"]["error"] is None, rows
    assert json.loads(json.dumps(rows["reading"], allow_nan=False)) == rows["reading"]


@pytest.mark.parametrize(("name", "state"), [("fused", FAILED), ("some library", PASSED)])
def test_our_own_kernels_give_the_same_bits_twice(name: str, state: str) -> None:
    calls = []

    def function(x: Tensor) -> list[Tensor]:
        calls.append(x)
        return [x * (1 + 1e-7 * len(calls))]

    same = lambda x: [x * 1.0]
    subject = Subject("op", "shape", lambda device: [drawn(device, 0, 4)], same, same, {name: function})
    (row,) = judged(subject, torch.float32, CPU)
    assert (row["state"], row["same_twice"]) == (state, False)


def test_a_cpu_is_not_asked_for_a_whole_video() -> None:
    huge = replace(shapes(), dense=(replace(CALL, queries=10**6, keys=10**6),))
    rows = judged(of_attention(huge), torch.float32, CPU)
    assert {row["state"] for row in rows} == {NOT_CERTIFIED}


def test_what_does_not_fit_in_float64_is_not_certified() -> None:
    def exact(*_: Tensor) -> list[Tensor]:
        raise torch.OutOfMemoryError

    subject = of_attention(shapes())
    rows = judged(replace(subject, exact=exact), torch.float32, CPU)
    assert len(rows) == len(subject.variants)
    assert {row["state"] for row in rows} == {NOT_CERTIFIED}


class Shiftless(Plain):
    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return super().modulated(x, scale, 0 * shift)


def shapes() -> subjects.Shapes:
    tokens = (Tokens(2, 24, 3, (2, 2, 3), copies=2, vectors=4, first_frame=5),)
    return subjects.Shapes("float32", (CALL,), (), tokens, (), ())


SHIFTED = {"modulated", "added and modulated", "gated and modulated"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ops", "wrong"), [(Plain(), set()), (Shiftless(), SHIFTED)])
def test_each_token_operator_is_compared(
    ops: Plain, wrong: set[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "load", lambda: ops)
    monkeypatch.setattr(subjects, "_unloaded", lambda device: "")
    found = subjects._over_tokens(shapes().tokens[0], CPU)
    rows = [row for subject in found for row in judged(subject, getattr(torch, dtype), CPU)]
    assert len(rows) == 7
    assert {row["op"].split(": ")[1] for row in rows if row["state"] == FAILED} == wrong, rows


def test_shapes_are_those_of_the_recipe() -> None:
    found = shapes_of(load("recipes/wan/causal-forcing-chunkwise-mirai-8x8.yaml").recipe)
    chunk = 3 * 30 * 52
    assert found.dtype == "bfloat16"
    assert {(each.queries, each.keys) for each in found.dense if each.past} == {
        (chunk, chunk * segments) for segments in range(2, 8)
    }
    assert Dense(2, 7 * chunk, 7 * chunk, heads=40, head_dim=128) in found.dense
    assert {each.count for each in found.tokens} == {chunk, 7 * chunk}
    assert max(each.first_frame for each in found.tokens) == 18
    predictor = Tokens(7, 1536, 12, (3, 30, 52), copies=1, vectors=1)  # a segment is a sequence
    assert predictor in found.tokens
    assert found.heads == (Head(7 * chunk, 1536, 5120),)
    assert found.fusions == (Fusion(1, 7, chunk, 5120, (0, 1)),)


def test_an_answer_an_offset_is_a_head_each() -> None:
    own = ["foresight.weight=0.5", "foresight.fusion=frames", "teacher=teacher", "batch.micro_size=2"]
    settings = [f"stages.few_step.{each}" for each in own]
    clip = ["video.latent_frames=6", "video.frames_per_segment=2", "foresight.offsets=[0,2]", "foresight.weight=0"]
    found = shapes_of(load(tiny.RECIPE, (*settings, *clip)).recipe)
    samples, places = 2, 2
    assert {each.tokens for each in found.heads} == {3 * samples * places, 1 * samples * places}


def test_a_window_reads_its_sink_apart_from_its_ring() -> None:
    slid = ("rollout.window_frames=12", "rollout.sink_frames=3")
    found = shapes_of(load("recipes/wan/causal-forcing-chunkwise-mirai-8x8.yaml", slid).recipe)
    chunk = 3 * 30 * 52
    seen = {(each.past // chunk, each.sink // chunk) for each in found.dense if each.past}
    assert seen == {(1, 0), (2, 1), (3, 1)}  # the second segment sees the sink alone
    assert "14040 of them cached and 4680 of those in a sink" in str(max(found.dense, key=lambda each: each.past))


# --- certificates ----------------------------------------------------------------------------------------------


def recipe(folder: Path, *overrides: str) -> schema.Recipe:
    return load(tiny.RECIPE, (f"parallel.certificate_folder={folder}", *overrides)).recipe


def test_a_cpu_certifies_what_runs_on_it_and_a_run_can_require_it(tmp_path: Path) -> None:
    required = "parallel.certificates=require"
    with pytest.raises(RecipeError, match=r"have no certificate \(.*cpu.json is not there\); make one"):
        attending.attention_of(recipe(tmp_path, required), CPU)
    assert bench.run(argparse.Namespace(certify=tiny.RECIPE, overrides=[], out=tmp_path)) == 0
    (path,) = tmp_path.glob("*.json")
    made = json.loads(path.read_text())
    assert {"recipe", "command", "commit", "date", "setting", "rows"} <= made.keys()
    assert {"device", "torch", "triton", "source"} <= made["setting"].keys()
    passed = {(row["op"], row["variant"]) for row in made["rows"] if row["state"] == PASSED}
    assert passed == {("attention", "sdpa"), ("attention", "sdpa-flash")}
    fused = {(row["state"], row["reason"]) for row in made["rows"] if row["variant"] in ("fused", "triton")}
    assert fused == {(NOT_CERTIFIED, "needs a CUDA device")}
    assert attending.attention_of(recipe(tmp_path, required), CPU).dense == "sdpa"
    with pytest.raises(RecipeError, match="are not certified for 1 x "):
        attending.attention_of(recipe(tmp_path, required, "video.latent_frames=60", "world.level=bounce"), CPU)


def certified(folder: Path, found: schema.Recipe, monkeypatch: pytest.MonkeyPatch, **changed: str) -> None:
    """A certificate of a CUDA device for the fused kernels, and this process as if it had that device."""
    here = {"device": "H100", "torch": "2", "triton": "3"}
    monkeypatch.setattr(certificate, "setting", lambda device: here)
    row = {"variant": "fused", "dtype": found.parallel.compute_dtype, "state": PASSED, "reason": ""}
    row |= {key: value for key, value in changed.items() if key in row}
    shapes = shapes_of(found)
    ops = {"token operator: placed": shapes.tokens, "cosine head": shapes.heads, "target fusion": shapes.fusions}
    ops = {op: each for op, each in ops.items() if op != changed.get("without")}
    rows = [row | {"op": op, "shape": str(shape)} for op, each in ops.items() for shape in each]
    written = {"op": "cache write", "variant": "triton", "state": PASSED, "reason": ""}
    rows += [row | written | {"shape": str(shape)} for shape in shapes.tokens if shape.copies == 1]
    made = {"format": 1, "setting": here | {"triton": changed.get("triton", "3")}, "rows": rows}
    certificate.write(certificate.path_of(folder, found.name, "cuda"), made)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> fusing.Fusing:
    taken = fusing.Fusing(Plain(), "fused")
    monkeypatch.setattr(fusing, "_fused", lambda *_: taken)
    return taken


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"triton": "2"}, "have none for this machine: .* is for triton 2, here is 3"),
        ({"state": FAILED, "reason": "is off"}, "are failed in .*: token operator: placed by fused of .* is off"),
        ({"dtype": "float16"}, "are not certified for "),
        ({"without": "cosine head"}, r"are not certified for \d+ x 24 to 28 "),
        ({"without": "target fusion"}, r"are not certified for 1 x \d+ segments of "),
    ],
)
def test_fused_kernels_are_taken_with_a_certificate_alone(
    changed: dict[str, str],
    reason: str,
    tmp_path: Path,
    on_a_gpu: fusing.Fusing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = recipe(tmp_path)
    certified(tmp_path, found, monkeypatch, **changed)
    if not reason:
        assert fusing.fusing_of(found, CUDA) is on_a_gpu
        return
    chosen = fusing.fusing_of(found, CUDA)
    assert chosen.name == "reference"
    assert re.match(f"reference: the kernels {reason}", chosen.told()), chosen.told()
    for override in ("parallel.kernels=fused", "parallel.certificates=require"):
        with pytest.raises(RecipeError, match=reason):
            fusing.fusing_of(recipe(tmp_path, override), CUDA)
    assert fusing.fusing_of(recipe(tmp_path, "parallel.certificates=ignore"), CUDA) is on_a_gpu


def test_a_backend_that_failed_does_not_serve(tmp_path: Path) -> None:
    found = recipe(tmp_path)
    row = {"op": "attention", "variant": "sdpa-flash", "state": FAILED, "shape": "", "dtype": "float32"}
    made = {"format": 1, "setting": certificate.setting("cpu"), "rows": [row]}
    certificate.write(certificate.path_of(tmp_path, found.name, "cpu"), made)
    assert attending.attention_of(found, CPU).dense == "sdpa"
    with pytest.raises(RecipeError, match="sdpa-flash: failed at the recipe's shapes, as its certificate says"):
        attending.attention_of(recipe(tmp_path, "parallel.attention=sdpa-flash"), CPU)
    ignored = recipe(tmp_path, "parallel.attention=sdpa-flash", "parallel.certificates=ignore")
    assert attending.attention_of(ignored, CPU).dense == "sdpa-flash"


@pytest.mark.parametrize("lacks", ["", "chunk attention", "segment prefix attention"])
def test_parts_of_attention_are_joined_with_a_certificate_alone(
    lacks: str, tmp_path: Path, on_a_gpu: fusing.Fusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recipe(tmp_path)
    certified(tmp_path, found, monkeypatch)
    path = certificate.path_of(tmp_path, found.name, "cuda")
    made, shapes = json.loads(path.read_text()), shapes_of(found)
    compared = {"chunk attention": [each for each in shapes.dense if each.past],
                "segment prefix attention": shapes.segments}  # fmt: skip
    for op, each in compared.items():
        row = {"op": op, "variant": "cudnn", "dtype": found.parallel.compute_dtype, "state": PASSED, "reason": ""}
        made["rows"] += [row | {"shape": str(shape)} for shape in each if op != lacks]
    certificate.write(path, made)
    joined = Choice(TORCH, "cudnn", "prefix", (), "split")

    def select(dense: str, segments: str, need: Need) -> Choice:
        return Choice(TORCH, "cudnn", "dense", ()) if need.no_kernels else joined

    monkeypatch.setattr(attending, "select", select)
    choice = attending.attention_of(found, CUDA)
    if not lacks:
        assert choice is joined
        return
    assert choice.behind == choice.segments == "dense"
    ((who, reason),) = choice.refused
    assert who == "kernels that join parts" and reason.startswith("are not certified for ")
    warned = [line for line in attending.uncertified(found, CUDA) if "whole calls alone" in line]
    assert len(warned) == 1 and "join parts are not certified for " in warned[0] and "make one" in warned[0]
    ignored = attending.attention_of(recipe(tmp_path, "parallel.certificates=ignore"), CUDA)
    assert ignored is joined
    with pytest.raises(RecipeError, match="parallel.certificates: require, and .* are not certified for "):
        attending.attention_of(recipe(tmp_path, "parallel.certificates=require"), CUDA)
    sampling = attending.attention_of(recipe(tmp_path, "parallel.certificates=require"), CUDA, trained=False)
    assert sampling.behind == sampling.segments == "dense"


def test_selective_recomputation_wants_attention_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = load(tiny.RECIPE, ("parallel.recompute=selective",)).recipe
    assert attending.attention_of(asked, CPU).dense == "sdpa"
    for choice, unseen in (
        (Choice(TORCH, "flash-3", "dense", ()), "that of flash-3 is unseen"),
        (Choice(TORCH, "xformers", "flex", ()), "that of xformers and flex is unseen"),
    ):
        monkeypatch.setattr(attending, "select", lambda *_, choice=choice: choice)
        with pytest.raises(RecipeError, match=f"parallel.recompute: selective keeps .* {unseen}; use block"):
            attending.attention_of(asked, CPU)
        assert attending.attention_of(asked, CPU, trained=False) is choice


def test_a_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    path = certificate.path_of(tmp_path, recipe(tmp_path).name, "cpu")
    path.write_text("{}")
    with pytest.raises(FileError, match="is no certificate of format 1"):
        attending.attention_of(recipe(tmp_path), CPU)


def test_a_result_of_nan_is_far_from_exact() -> None:
    from mirai_dist.certify.compare import largest

    assert math.isinf(largest([torch.tensor([float("nan")])], [torch.ones(1)]))
