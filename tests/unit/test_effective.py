"""effective.yaml: what a run says it uses, from its recipe. That it tells the truth is tested in tests/procs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from mirai_dist.config import load
from mirai_dist.config.error import RecipeError
from mirai_dist.config.source import dump
from mirai_dist.cycle.effective import effective

RECIPE = Path(__file__).parents[1] / "procs" / "tiny.yaml"


def used(*overrides: str, ranks: int = 2) -> dict:
    return effective(load(RECIPE, overrides), ranks, "cpu")


def test_it_survives_the_file() -> None:
    """Tuples and torch types would not."""
    assert yaml.safe_load(dump(used())) == used()


def test_mesh_and_accumulation_follow_the_ranks() -> None:
    hybrid = used("parallel.replicas=2", ranks=4)
    assert hybrid["ranks"] == 4 and hybrid["mesh"] == {"replicas": 2, "ranks per shard": 2}
    assert hybrid["accumulation"] == dict.fromkeys(("teacher", "ar_teacher", "few_step", "distil"), 1)
    assert used(ranks=1)["accumulation"]["distil"] == 4
    with pytest.raises(RecipeError, match="global_size 4 cannot be split over 3 ranks"):
        used(ranks=3)


def test_a_stage_of_its_own_says_what_is_different_in_it() -> None:
    found = used("video.latent_frames=4", "stages.ar_teacher.overrides=[video.frames_per_segment=2]")
    assert found["segments"] == 4 and found["in stage ar_teacher"] == {"segments": 2}
    assert not [key for key in used() if key.startswith("in stage")]


def test_timesteps_are_the_warped_ones() -> None:
    """Shift s maps t to s t / (1 + (s - 1) t): 500 is 750 at shift 3."""
    assert used()["denoising timesteps"] == [1000.0, pytest.approx(750.0)]
    assert used("flow.shift=1")["denoising timesteps"] == [1000.0, 500.0]


def test_networks_are_told_by_their_plans() -> None:
    networks = used("parallel.unit=block", "parallel.compute_dtype=bfloat16", "parallel.recompute=block",
                    "parallel.reshard_after_forward=true")["networks"]
    trained = {"storage": "float32", "compute": "bfloat16", "reduce": "float32", "units": 3,
               "reshard after forward": True, "recomputed blocks": 2, "attention is kept": False}
    assert networks["generator"] == networks["critic"] == trained
    assert networks["teacher and foresight encoder"] == trained | {"storage": "bfloat16", "recomputed blocks": 0}
    assert networks["predictor"] == trained | {"units": 1, "reshard after forward": False, "recomputed blocks": 0}
    release = used("foresight.preset=release")["networks"]["predictor"]
    assert (release["storage"], release["compute"]) == ("bfloat16", "float32")


def test_alarms_say_what_they_watch_or_why_they_cannot() -> None:
    """The stage has nine cycles."""
    assert used()["alarms"] == {
        "distil": "no alarm can rise in 9 cycles: alarms.warmup_cycles and alarms.window_cycles are 15"}
    short = ("alarms.warmup_cycles=3", "alarms.window_cycles=6")
    limits = ("saturation", "mean_drift", "motion", "critic_lag", "score_scale", "timesteps")
    moved = (*short, "alarms.on_alarm=stop", *(f"alarms.{name}=0" for name in limits))
    assert used(*moved)["alarms"]["distil"] == "stop, after 9 cycles: generator_frozen, critic_frozen, predictor_frozen"
    assert used(*moved, "alarms.moved=0")["alarms"]["distil"] == "every alarm is turned off"
    assert "no alarm can rise" in used("alarms.warmup_cycles=4", "alarms.window_cycles=6")["alarms"]["distil"]


def test_foresight_blocks_follow_preset_and_depth() -> None:
    def blocks(*overrides: str) -> tuple[int, int]:
        found = used(*overrides)["foresight"]
        return found["generator blocks"], found["encoder blocks"]

    assert blocks() == (1, 1)
    assert blocks("foresight.preset=release") == (2, 2)
    assert blocks("teacher.blocks=4") == (1, 2)


def test_stages_with_foresight_are_named() -> None:
    few_step = ("stages.few_step.teacher=teacher", "stages.few_step.foresight.weight=0.5")
    assert used()["foresight"]["weights"] == {"distil": 0.2}
    assert used(*few_step)["foresight"]["weights"] == {"few_step": 0.5, "distil": 0.2}
    assert used(*few_step, "foresight.weight=0")["foresight"]["weights"] == {"few_step": 0.5}


def test_attention_is_told_with_who_was_refused() -> None:
    refused = {"flash-2, xformers": "needs a CUDA device"}
    calls = {"dense": "sdpa", "segments": "dense calls, segment by segment", "behind": "dense calls"}
    assert used()["attention"] == {**calls, "refused": refused}
    with pytest.raises(RecipeError, match=r"^parallel.attention: sdpa-efficient cannot be used here"):
        used("parallel.attention=sdpa-efficient")


def test_versions_are_those_that_run() -> None:
    assert used()["torch"] == torch.__version__ and used()["device"] == "cpu"
    assert used()["segments"] == 3


def test_gates_are_said_with_the_bounds_in_use() -> None:
    """Those of the stage's own recipe: with a prompt file and no clips they are absolute."""
    gate = "stages.distil.gate={clips: 4, motion: [0.1, 3]}"
    video = ("video.latent_frames=4", "video.frames_per_segment=2")
    held = "4 clips of few_step: boundary_jump 0 to 2, motion 0.1 to 3, saturation 0.5 to 1.6 times that of clean clips"
    assert used(gate, *video)["gates"] == {"distil": f"{held}; 25% may be outside"}
    own = ("text.encoder=umt5", "text.path=x", "stages.distil.overrides=[data.prompts=x]")
    held = "4 clips of few_step: boundary_jump 0 to 3, motion 0.1 to 3, saturation 0.4 to 1.6"
    assert used(gate, *video, *own)["gates"] == {"distil": f"{held}; 25% may be outside"}
    assert used()["gates"] == {}
