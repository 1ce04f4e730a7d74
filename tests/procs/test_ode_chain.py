"""AR teacher -> its trajectories -> ODE-distilled few-step start -> DMD, in one recipe, on one and several ranks."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mirai_dist.commands import data_make
from mirai_dist.commands.arguments import VERBS
from mirai_dist.config import FileError, RecipeError, load
from mirai_dist.config.digest import to_yaml
from mirai_dist.config.steps import steps
from mirai_dist.cycle.chain import run_chain as run_steps
from mirai_dist.cycle.pipeline import Place
from mirai_dist.cycle.roles import teacher_forced, wan_shape
from mirai_dist.cycle.stages import OdeStage
from mirai_dist.cycle.starts import starts_of
from mirai_dist.cycle.trajectories import Making
from mirai_dist.data.latents import LatentStore
from mirai_dist.data.world import World as VideoWorld
from mirai_dist.method.flow import euler_grid
from mirai_dist.models.text import VocabularyEncoder
from mirai_dist.models.wan import WanModel
from mirai_dist.models.wan.keys import shapes_of
from mirai_dist.runtime.signals import StopRequest
from mirai_dist.state.checkpoint import describe, load_network
from mirai_dist.state.commit import latest
from mirai_dist.state.draws import Draws
from mirai_dist.weights.files import open_weights
from tests.procs import tiny
from tests.procs.conftest import run_threads
from tests.unit.test_export import export

CHAIN = (
    "stages.few_step.teacher=teacher", "stages.few_step.foresight.weight=0.5",
    "stages.few_step.kind=ode", "stages.few_step.trajectories=6", "ode.points=4", "ode.guidance=2.0",
    "ode.shard_size=2",
    *(f"stages.{name}.cycles={cycles}" for name, cycles in
      {"teacher": 2, "ar_teacher": 2, "few_step": 3, "distil": 1}.items()),
)


def run_chain(folder: Path, ranks: int, *overrides: str) -> None:
    """The pipeline of tiny.yaml with an ode stage, from nothing or from what is there, without the report."""
    resolved = load(tiny.RECIPE, [*CHAIN, *overrides])
    folder.mkdir(exist_ok=True)
    (folder / "effective.yaml").write_text("test\n")

    def body(rank: int) -> None:
        console = tiny.console(folder)
        run_steps(resolved, Place(tiny.world(), folder, console, StopRequest()), steps(resolved.recipe))
        console.close()
        dist.barrier()

    with tiny.lively():
        run_threads(ranks, body, tiny.TIMEOUT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "run"
    run_chain(folder, 2)
    return folder


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("shard-*"))}


def records(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stages" / stage / "metrics.jsonl").read_text().splitlines()]


def test_the_chain_runs_and_descends(finished: Path) -> None:
    assert [("loss/ode" in record) for record in records(finished, "few_step")] == [True] * 3
    path = latest(finished / "stages/few_step/checkpoints")
    dmd = latest(finished / "stages/distil/foresight/seed-1/checkpoints")
    assert path is not None and dmd is not None
    passports = [json.loads((each / "manifest.json").read_text())["passport"] for each in (path, dmd)]
    assert passports[0]["starts"]["parent"]["kind"] == "ar"
    assert passports[1]["starts"]["parent"]["kind"] == "ode"
    assert passports[1]["starts"]["parent"]["name"] == "few_step"


def test_the_predictor_of_the_start_is_left_behind(finished: Path, tmp_path: Path) -> None:
    path = latest(finished / "stages/few_step/checkpoints")
    assert path is not None
    found = describe(path)
    assert sorted(found.networks) == ["generator", "predictor"] and found.averages == ["generator"]
    origin = found.passport["starts"]["teacher"]
    assert (origin["name"], origin["kind"], origin["which"]) == ("teacher", "diffusion", "ema")
    recipe = load(tiny.RECIPE, CHAIN).recipe
    (finished / "recipe.yaml").write_text(to_yaml(recipe))
    export(finished, "--stage", "few_step", "--to", "wan", "--out", tmp_path / "out")
    assert open_weights(tmp_path / "out", "ema").shapes == shapes_of(wan_shape(recipe.generator, recipe))


def test_the_encoder_is_what_the_teacher_stage_left(finished: Path) -> None:
    recipe = load(tiny.RECIPE, CHAIN).recipe
    path = latest(finished / "stages/teacher/checkpoints")
    assert path is not None

    def body(rank: int) -> dict[str, torch.Tensor]:
        run = tiny.run_of(recipe, recipe.seed, "few_step", finished)
        stage = OdeStage("few_step", run, starts_of(recipe, "few_step", finished))
        assert stage.encoder is not None
        return {name: tiny.whole(tensor) for name, tensor in stage.encoder.network.named_parameters()}

    network = WanModel(wan_shape(recipe.teacher, recipe))
    load_network(path, "teacher", network, "ema")
    found = run_threads(1, body, tiny.TIMEOUT)[0]
    assert not tiny.unequal(found, {name: tensor.detach() for name, tensor in network.named_parameters()})


@pytest.mark.parametrize(("few_step", "dmd"), [(True, False), (False, True)])
def test_foresight_in_one_stage_alone(finished: Path, tmp_path: Path, few_step: bool, dmd: bool) -> None:
    """The chain above has it in both."""
    again = tmp_path / "again"
    for name in ("teacher", "ar_teacher", *(["few_step"] if few_step else ["few_step/pairs"])):
        shutil.copytree(finished / "stages" / name, again / "stages" / name)
    off = ["stages.few_step.foresight.weight=0", "stages.few_step.teacher="]
    run_chain(again, 1, *([] if few_step else off), *([] if dmd else ["foresight.weight=0"]))
    for name, on in (("few_step", few_step), ("distil/foresight/seed-1", dmd)):
        assert ["cosine/foresight" in record for record in records(again, name)][0] == on, name
        path = latest(again / "stages" / name / "checkpoints")
        assert path is not None and ("predictor" in describe(path).networks) == on
    for name in ("few_step", "distil/foresight/seed-1"):
        assert "cosine/foresight" in records(finished, name)[0]


def test_trajectories_are_the_dense_integration(finished: Path) -> None:
    """States of entry 4, against the teacher-forced network over the whole video at every step."""
    recipe = load(tiny.RECIPE, CHAIN).recipe
    store = LatentStore(finished / "stages/few_step/pairs")
    assert store.size == 6 and store.timesteps == (1000.0, pytest.approx(750.0))
    network = WanModel(wan_shape(recipe.generator, recipe))
    checkpoint = latest(finished / "stages/ar_teacher/checkpoints")
    assert checkpoint is not None
    load_network(checkpoint, "generator", network, "ema")
    network = network.double()
    states = store.states([4]).double()
    world = VideoWorld(recipe.world, recipe.video, recipe.seed)
    encoder = VocabularyEncoder(world.vocabulary(), recipe.text.dim, recipe.text.length)
    text = torch.cat([encoder.encode(store.captions([4])), encoder.negative()]).double()
    clean, x = states[:, -1], Draws(recipe.seed, tiny.CPU).normal(
        "few_step/trajectory", 0, 0, [4], states.shape[2:]).double()
    velocity = teacher_forced(network, recipe.video.frames_per_segment)
    grid = euler_grid(recipe.ode.points, recipe.flow.shift)
    kept = []
    for index, (now, following) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        if index in (0, 2):
            kept.append(x)
        at = torch.full((2, x.shape[1]), now, dtype=torch.float64)
        with torch.no_grad():
            pos, neg = velocity(x.repeat(2, 1, 1, 1, 1), at, text, clean.repeat(2, 1, 1, 1, 1)).chunk(2)
        x = x + (following - now) / 1000 * (neg + 2.0 * (pos - neg))
    dense = torch.stack([*kept, x], dim=1)
    assert (dense - states[:, :-1]).abs().max() < 4e-3 * dense.abs().max()  # stored in fp16, made from fp32


def test_killed_anywhere_and_on_any_number_of_ranks_the_shards_are_the_same(finished: Path, tmp_path: Path) -> None:
    whole = files_of(finished / "stages/few_step/pairs")
    assert len(whole) == 3
    again = tmp_path / "again"
    for name in ("teacher", "ar_teacher"):
        shutil.copytree(finished / "stages" / name, again / "stages" / name)
    pairs = again / "stages/few_step/pairs"
    shutil.copytree(finished / "stages/few_step/pairs", pairs)
    for name in ("store.json", "prompts.txt", "shard-00001.safetensors"):  # what a kill may leave undone
        (pairs / name).unlink()
    (pairs / "shard-00002.safetensors").write_bytes((pairs / "shard-00002.safetensors").read_bytes()[:-7])
    run_chain(again, 1, "stages.distil.cycles=1")
    assert files_of(pairs) == whole


def test_a_job_array_makes_what_the_run_makes(finished: Path, tmp_path: Path) -> None:
    """`mirai data make ode` in two parts, in processes without a process group."""
    again = tmp_path / "again"
    shutil.copytree(finished / "stages/ar_teacher", again / "stages/ar_teacher")
    options = argparse.ArgumentParser()
    VERBS["data"].configure(options)
    for part in ("1/2", "0/2"):
        words = ["make", "ode", str(tiny.RECIPE), *CHAIN, "--run-dir", str(again), "--part", part]
        assert data_make.run(options.parse_args(words)) == 0
    pairs = again / "stages/few_step/pairs"
    assert files_of(pairs) == files_of(finished / "stages/few_step/pairs")
    assert LatentStore(pairs).digest == LatentStore(finished / "stages/few_step/pairs").digest
    with pytest.raises(RecipeError, match="no stage 'distil' of kind ode"):
        data_make.run(options.parse_args(["make", "ode", str(tiny.RECIPE), *CHAIN, "--stage", "distil"]))


def test_trajectories_of_other_steps_are_refused(finished: Path, tmp_path: Path) -> None:
    pairs = finished / "stages/few_step/pairs"
    recipe = tiny.recipe("stages.few_step.kind=ode", "stages.few_step.trajectories=6", "rollout.steps=[1000,250]")
    made = Making(recipe, "few_step", tmp_path)
    shutil.copytree(pairs, made.folder)

    def body(rank: int) -> str:
        with pytest.raises(FileError) as caught:
            tiny.stage_of(recipe, "few_step", run_dir=tmp_path)
        return str(caught.value)

    line = run_threads(1, body, tiny.TIMEOUT)[0]
    assert "holds states at timesteps [1000.0, 750.0]" in line and "rollout.steps" in line
