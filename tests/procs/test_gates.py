"""The gate before a stage: good starts pass, each kind of bad one stops the chain for its own reason, and what has
passed is not judged twice. And the steps of a run done one at a time.

The networks here are hardly trained, so what they sample is replaced by clips that are known to be good or bad.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mirai_dist.config import FileError, RecipeError, load
from mirai_dist.config.steps import chosen
from mirai_dist.cycle import gate
from mirai_dist.cycle.chain import run_chain
from mirai_dist.cycle.gate import GateFailed
from mirai_dist.cycle.pipeline import Place
from mirai_dist.cycle.studio import Studio
from mirai_dist.evaluate import video_files
from mirai_dist.models.wan.keys import WanShape
from mirai_dist.runtime.signals import StopRequest
from tests import wan_files
from tests.procs import tiny
from tests.procs.conftest import run_threads

CLIPS = 5  # over two ranks: one of them pads
CHAIN = (
    "video.latent_frames=6", "video.frames_per_segment=2", f"stages.distil.gate.clips={CLIPS}",
    *(f"stages.{name}.cycles=1" for name in ("teacher", "ar_teacher", "few_step", "distil")),
)
Change = Callable[[Tensor], Tensor]


def run(folder: Path, *overrides: str, only: Sequence[str] = (), sampled: Change | None = None, ranks: int = 2) -> str:
    """Steps of the chain; what rank 0 said, or the error that all ranks agreed on. `sampled`: samples of every
    network are the clean clips of the same captions, so changed."""
    resolved = load(tiny.RECIPE, [*CHAIN, *overrides])
    folder.mkdir(exist_ok=True)
    (folder / "effective.yaml").write_text("test\n")
    log = folder / "logs" / "rank-0.log"
    before = len(log.read_text()) if log.exists() else 0

    def body(rank: int) -> str:
        console = tiny.console(folder)
        error = ""
        try:
            run_chain(resolved, Place(tiny.world(), folder, console, StopRequest()), chosen(resolved.recipe, only))
        except (GateFailed, RecipeError, FileError) as refusal:
            assert refusal.exit_code == 20
            error = f"{type(refusal).__name__}: {refusal}"
        console.close()
        dist.barrier()
        return error

    def latents(studio: Studio, kind: str, role: Any, at_once: int) -> tuple[list[int], Tensor]:
        assert sampled is not None
        clips = studio.own()
        return clips, sampled(studio.run.clean_latents(studio.numbers, clips))

    with tiny.lively(), mock.patch.object(Studio, "causal_latents", latents) if sampled else nullcontext():
        errors = run_threads(ranks, body, tiny.TIMEOUT)
    assert len(set(errors)) == 1  # every rank comes to the same end
    return errors[0] or log.read_text()[before:]


def good(clips: Tensor) -> Tensor:
    return clips


def frozen(clips: Tensor) -> Tensor:
    return clips[:, :1].expand_as(clips)


def jumping(clips: Tensor) -> Tensor:
    segment = torch.arange(clips.shape[1]) // 2
    return clips + 0.45 * (segment % 2 - 0.5).view(1, -1, 1, 1, 1)


def saturated(clips: Tensor) -> Tensor:
    return 3.0 * clips


def broken(clips: Tensor) -> Tensor:
    return clips.clone().index_fill_(1, torch.tensor([2]), torch.nan)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose next step is the gate."""
    folder = tmp_path_factory.mktemp("gates") / "run"
    run(folder, only=["teacher", "ar_teacher,few_step"])
    assert not (folder / "stages/distil").exists()
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def record(folder: Path, stage: str = "distil") -> dict[str, Any]:
    return json.loads((folder / "stages" / stage / "gate.json").read_text())


def test_a_good_start_passes_once_and_the_stage_goes_on(folder: Path) -> None:
    said = run(folder, sampled=good)
    assert "distil gate: few_step passed, samples in" in said and "distil foresight seed 1: 1/1 cycles" in said
    assert said.index("few_step passed") < said.index("distil foresight seed 1: parent from")
    found = record(folder)
    assert found["passed"] and found["reasons"] == [] and found["parent"]["kind"] == "cd"
    assert [each["measure"] for each in found["measures"]] == ["boundary_jump", "motion", "saturation"]
    for each in found["measures"]:  # what was sampled is what it is compared with
        assert len(each["values"]) == CLIPS and each["reference"] == sorted(each["values"])[CLIPS // 2]
    samples = sorted((folder / "stages/distil/gate").iterdir())
    assert len(samples) == CLIPS and [video_files.read_mp4(path)[0].shape[0] for path in samples] == [21] * CLIPS
    [shown] = gate.results(folder, load(tiny.RECIPE, CHAIN).recipe)
    assert shown.passed and shown.stage == "distil" and shown.start.startswith("few_step (ema, digest ")
    assert [row.clips for row in shown.measures] == [CLIPS] * 3
    # in the middle of the stage, with nothing but the record to go by
    again = run(folder, "stages.distil.cycles=2")
    assert "distil gate: few_step has passed already, skipped" in again and "resumed at cycle 1" in again


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (frozen, "clips stand still: motion of 5 of 5 clips"),
        (jumping, "segments jump at their boundaries: boundary_jump of 5 of 5 clips"),
        (saturated, "clips are over-saturated: saturation of 5 of 5 clips"),
        (broken, "5 of 5 clips hold values that are not finite"),
    ],
)
def test_a_bad_start_stops_the_chain_for_its_own_reason(folder: Path, change: Change, reason: str) -> None:
    line = run(folder, "stages.distil.gate.motion=[0.4,9]", sampled=change)  # a jump is motion as well
    assert line.startswith("GateFailed: distil gate: few_step (") and f"is not fit to start from: {reason}" in line
    assert ";" not in line.split("start from:")[1].split(". Look at")[0]  # one reason
    assert f"Look at {folder / 'stages/distil/gate'}, then train few_step longer or otherwise, change " in line
    assert "stages.distil.gate.MEASURE=[low,high], or drop the gate with stages.distil.gate.clips=0" in line
    assert not record(folder)["passed"] and len(record(folder)["reasons"]) == 1
    assert len(list(folder.glob("stages/distil/gate/*.mp4"))) == (0 if change is broken else CLIPS)
    assert [path.name for path in (folder / "stages/distil").iterdir() if path.is_dir()] in (["gate"], [])


def test_a_gate_is_run_again_after_it_failed_and_when_what_it_judged_has_changed(folder: Path) -> None:
    judged = ["distil.gate"]
    assert "GateFailed" in run(folder, only=judged, sampled=frozen)
    assert "few_step passed" in run(folder, only=judged, sampled=good)
    assert "has passed already" in run(folder, only=judged, sampled=frozen)
    assert "GateFailed" in run(folder, "stages.distil.gate.saturation=[0,0.1]", only=judged, sampled=good)
    assert "few_step passed" in run(folder, only=judged, sampled=good)
    shutil.rmtree(folder / "stages/few_step")
    run(folder, "stages.few_step.optimizer.lr=1e-5", only=["few_step"])
    assert "GateFailed" in run(folder, only=judged, sampled=frozen)


def test_steps_that_miss_what_they_need_are_refused(trained: Path, folder: Path) -> None:
    line = run(folder, only=["distil"])
    assert line.startswith("RecipeError: --only distil: few_step as it is has not passed the gate before distil; run")
    line = run(folder, only=["report"])
    assert line == f"RecipeError: --only report: stage distil is not finished in {folder}; run --only distil first"
    (folder / "stages/few_step/DONE").unlink()
    for step in ("distil", "distil.gate"):
        line = run(folder, only=[step])
        assert line.startswith(f"RecipeError: --only {step}: starts from few_step, which has no finished checkpoint in")
        assert line.endswith("run --only few_step first")
    assert "few_step: already done" not in run(folder, "stages.distil.gate.failing=1", only=["few_step,distil.gate"])
    assert record(folder)["passed"]
    said = run(folder, "stages.distil.gate.failing=1", only=["distil"])
    assert "distil foresight seed 1: 1/1 cycles" in said and "gate: " not in said
    assert "gate" not in run(folder, "stages.distil.gate.clips=4")  # nothing is left to be trained behind it


@pytest.mark.parametrize(("stage", "kind"), [("distil", "cd"), ("few_step", "ar")])
def test_what_is_measured_does_not_depend_on_the_ranks(folder: Path, tmp_path: Path, stage: str, kind: str) -> None:
    """Real samples of a few-step start and of an AR teacher, two at a time on one rank and one at a time on two."""
    clips = (f"stages.{stage}.gate={{clips: 3, failing: 1}}", "evaluate.teacher_steps=2")
    found = []
    for ranks in (1, 2):
        copy = Path(shutil.copytree(folder, tmp_path / f"{ranks}"))
        micro = f"stages.{stage}.batch.micro_size={3 - ranks}"
        assert " passed, samples in" in run(copy, *clips, micro, only=[f"{stage}.gate"], ranks=ranks)
        found.append(record(copy, stage))
    assert found[0]["parent"]["kind"] == kind
    for one, other in zip(found[0]["measures"], found[1]["measures"], strict=True):
        assert one["values"] == pytest.approx(other["values"], rel=1e-3)
        assert one["reference"] == pytest.approx(other["reference"], rel=1e-6)


def test_published_weights_are_judged_too(tmp_path: Path) -> None:
    """Nothing else of the chain needs to be there."""
    recipe = load(tiny.RECIPE, CHAIN).recipe
    network = recipe.generator
    sizes = WanShape(network.dim, network.ffn_dim, network.heads, network.blocks, recipe.text.dim,
                     recipe.video.channels, network.freq_dim)
    tensors = wan_files.tiny_tensors(sizes=sizes)
    path = wan_files.pt(tmp_path / "start.pt", tensors, "causal-forcing")
    start = ("stages.distil.parent=start", f"weights.start={{path: {path}, kind: ode}}", "stages.distil.gate.failing=1")
    folder = tmp_path / "run"
    assert "distil gate: start passed" in run(folder, *start, only=["distil.gate"])
    assert record(folder)["parent"]["kind"] == "ode"
    assert "start has passed already, skipped" in run(folder, *start, only=["distil.gate"])
    wan_files.pt(path, wan_files.tiny_tensors(seed=1, sizes=sizes), "causal-forcing")
    assert "distil gate: start passed" in run(folder, *start, only=["distil.gate"])
    # an official folder holds a bidirectional network, which the recipe does not say and a gate cannot judge
    official = wan_files.official(tmp_path / "official", tensors, sizes=sizes)
    line = run(folder, f"weights.base={{path: {official}}}", "stages.ar_teacher.parent=base",
               "stages.ar_teacher.gate.clips=2", only=["ar_teacher.gate"])
    assert line == f"FileError: {official}: is bidirectional, and ar_teacher gate rolls out causal networks; drop it"
