"""Each rule refuses what it is for, and names the key; the valid recipe breaks none of them."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path

import pytest

from mirai_dist.config import RecipeError, load, schema
from mirai_dist.config.keys import children
from mirai_dist.config.rules import RANGES, RULES, accumulation, check_layout
from mirai_dist.config.schema import Batch

SMALL = Path(__file__).parent / "data" / "small.yaml"

ENCODED = ("stages.few_step.foresight.weight=0.2", "stages.few_step.teacher=teacher")
# rule, overrides that break it (and nothing else first), what the message must hold
BROKEN = [
    ("range", ["video.channels=0"], "video.channels is 0; it must be at least 1"),
    ("range", ["foresight.depth=0"], "foresight.depth is 0; it must be more than 0 and at most 1"),
    ("range", ["foresight.depth=1.5"], "foresight.depth is 1.5"),
    ("range", ["foresight.weight=-1"], "foresight.weight is -1"),
    ("range", ["stages.distil.ema.decay=1"], "stages.distil.ema.decay is 1; it must be at least 0 and less than 1"),
    ("range", ["text.length=0"], "text.length is 0"),
    ("range", ["text.dim=0"], "text.dim is 0"),
    ("range", ["rollout.exit_groups=0"], "rollout.exit_groups is 0"),
    ("range", ["dmd.critic_optimizer.lr=0"], "dmd.critic_optimizer.lr is 0; it must be more than 0"),
    ("range", ["dmd.max_timestep=1001"], "dmd.max_timestep is 1001"),
    ("range", ["seed=-1"], "seed is -1"),
    ("run-name", ["name=a/b"], "name 'a/b'"),
    ("segments-divide-frames", ["video.latent_frames=13"], "use 12 or 15"),
    ("segments-divide-frames", ["video.frames_per_segment=5"], "video.latent_frames 12"),
    ("even-latents", ["video.latent_height=5"], "video.latent_height is 5; patches are 2x2, so use 4 or 6"),
    ("even-latents", ["video.latent_width=1"], "so use 2 ["),
    ("heads-divide-dim", ["teacher.heads=3"], "teacher.dim 128 is not divisible by teacher.heads 3"),
    ("head-dim-rope", ["teacher.heads=32"], "heads of width 4"),
    ("head-dim-rope", ["teacher.dim=36"], "heads of width 9"),
    ("even-freq-dim", ["teacher.freq_dim=7"], "teacher.freq_dim is 7"),
    ("prefix-kernels", ["parallel.segment_attention=prefix", "parallel.kernels=reference"], "fused kernels join"),
    ("world-room", ["world.speed=40"], "has no free start in"),
    ("radius-jitter", ["world.radius_jitter=4.5"], "world.radius_jitter 4.5"),
    ("sources", ["stages.ar_teacher.parent=few_step"], "one of: teacher"),
    ("sources", ["stages.distil.teacher=techer"], "'techer', which is no earlier stage and no entry of weights"),
    ("sources", ["weights.teacher={path: x}"], "stages.teacher and weights.teacher have one name"),
    ("dmd-roles", ["stages.ar_teacher.teacher=teacher"], "stages.ar_teacher.teacher has no effect"),
    ("dmd-roles", ["stages.few_step.critic=teacher"], "stages.few_step.critic has no effect"),
    ("dmd-roles", ["stages.distil.teacher="], "stages.distil.teacher is missing"),
    ("dmd-roles", ["stages.distil.parent="], "stages.distil.parent is missing"),
    ("few-step-foresight", ["stages.few_step.teacher=teacher"], "and stages.few_step.foresight.weight is 0; remove it"),
    ("few-step-foresight", ["stages.few_step.foresight.weight=0.2"], "stages.few_step.teacher is missing"),
    ("few-step-foresight", ["stages.ar_teacher.foresight.weight=0.2"], "no effect in a stage of kind teacher_forcing"),
    ("few-step-foresight", ["stages.distil.foresight.fusion=none"], "foresight of dmd is the section foresight"),
    ("gate-parent", ["stages.teacher.gate.clips=4"], "stage teacher starts from random weights"),
    ("gate-parent", ["stages.ar_teacher.gate.clips=4"], "rolls out a causal network, and 'teacher' is bidirectional"),
    ("gate-clips",
     ["stages.distil.gate.clips=4", "video.latent_frames=3", "foresight.offsets=[0]", "study.arms={a: []}"],
     "clips of 3 latent frames are too short: it takes two segments (6 frames) and 3 frames; set it to 0"),
    ("gate-bounds", ["stages.distil.gate.motion=[1]"], "stages.distil.gate.motion is [1.0]; write [low, high]"),
    ("gate-bounds", ["stages.distil.gate.motion=[2,1]"], "with 0 <= low < high, or [] for the default"),
    ("gate-bounds", ["stages.distil.gate.saturation=[0,1e999]"], "is [0.0, inf]; write [low, high]"),
    ("stage-name", ["stages.report=${stages.teacher}"], "stages.report has the name of a run's last step"),
    ("range", ["stages.distil.gate.failing=1.5"], "it must be at least 0 and at most 1"),
    ("trajectories", ["stages.few_step.trajectories=4"], "has no effect in a stage of kind consistency"),
    ("trajectories", ["stages.few_step.kind=ode"], "and neither is set"),
    (
        "trajectory-grid",
        ["stages.few_step.kind=ode", "stages.few_step.trajectories=4", "ode.points=47"],
        "use a multiple of 2",
    ),
    ("context-noise", ["stages.few_step.context_noise=50"], "has no effect in a stage of kind consistency"),
    ("context-noise", ["stages.ar_teacher={kind: diffusion_forcing, context_noise: 50}"], "kind diffusion_forcing"),
    ("source-kind", ["stages.distil.teacher=ar_teacher"], "the teacher of a dmd stage starts from diffusion"),
    ("source-kind", ["stages.distil.critic=ar_teacher"], "the critic of a dmd stage starts from diffusion"),
    ("source-kind", ["stages.distil.parent=teacher"], "'teacher' is of kind diffusion (bidirectional diffusion model)"),
    ("source-kind", ["stages.few_step.parent=teacher"], "starts from ar (causal many-step model"),
    ("source-kind", ["stages.few_step.parent="], "there is none"),
    ("source-kind", ["stages.few_step.kind=bidirectional"], "starts from diffusion"),
    ("source-kind", ["weights.w={path: x, kind: diffusion}", "stages.distil.parent=w"], "'w' is of kind diffusion"),
    ("source-shape", ["generator.blocks=2"], "generator.blocks 2, teacher.blocks 4"),
    ("source-kind", [*ENCODED, "stages.few_step.teacher=ar_teacher"], "the teacher of a consistency stage starts from"),
    ("source-shape", ["critic.ffn_dim=256"], "critic.ffn_dim 256, teacher.ffn_dim 512"),
    (
        "source-shape",
        ["critic.ffn_dim=256", "weights.w={path: x}", "stages.distil.teacher=w"],
        "write critic: ${teacher}",
    ),
    ("unused-weights", ["weights.w={path: x}"], "weights.w is used by no stage"),
    ("text-encoder", ["data.prompts=x"], "knows the procedural world's words only"),
    ("text-encoder", ["text.path=x"], "text.path has no effect"),
    ("text-encoder", ["text.encoder=umt5"], "text.path is missing"),
    ("text-encoder", ["text.encoder=store", "text.path=x"], "set data.prompts"),
    ("vae-path", ["vae.kind=wan"], "vae.path is missing"),
    ("vae-path", ["vae.path=x"], "vae.path has no effect"),
    ("clips-needed", ["data.prompts=x", "text.encoder=store", "text.path=x"], "stages.teacher of kind bidirectional"),
    ("foresight-start", ["foresight.start_cycle=10"], "not before the end of stage distil (6 cycles)"),
    (
        "study-stage",
        [
            "stages.after={kind: dmd, parent: distil, teacher: teacher, cycles: 1, batch: {global_size: 1}, "
            "optimizer: {lr: 1}}",
            "study.stage=distil",
        ],
        "stages.after.parent is 'distil', of which the study trains one network an arm and seed",
    ),
    ("study-stage", ["study.stage=few_step"], "no stage of kind dmd (one of: distil)"),
    ("stage-overrides", ["stages.few_step.overrides=[video.latent_frames=6]"], "is one for all stages"),
    ("stage-overrides", ["stages.few_step.overrides=[stages.few_step.cycles=6]"], "is one for all stages"),
    ("stage-overrides", ["stages.few_step.overrides=[dmd.guidance=1, dmd.guidance=2]"], "sets dmd.guidance twice"),
    ("batch-micro", ["stages.distil.batch.micro_size=3"], "use 6 or 9"),
    ("exit-groups", ["rollout.exit_groups=3"], "use one of 1, 2, 4, 8"),
    ("warmup", ["stages.few_step.optimizer.warmup=11"], "longer than the 10 updates"),
    ("warmup", [*ENCODED, "stages.few_step.foresight.optimizer.warmup=11"], "longer than the 10 updates"),
    ("warmup", ["dmd.critic_optimizer.warmup=31"], "longer than the 30 updates"),
    ("ema-off", ["stages.distil.ema={decay: 0, start_update: 3}"], "decay 0 turns the average off"),
    ("ema-too-late", ["stages.distil.ema={decay: 0.9, start_update: 6}"], "never reached in 6 cycles"),
    ("consistency-average", ["stages.few_step.ema.decay=0"], "stages.few_step.ema.decay is 0, and the target"),
    ("consistency-average", ["stages.few_step.ema.start_update=2"], "stages.few_step.ema.start_update is 2"),
    ("rollout-steps", ["rollout.steps=[500, 500]"], "must fall strictly"),
    ("rollout-steps", ["rollout.steps=[1001, 500]"], "1..1000"),
    ("rollout-steps", ["rollout.steps=[500, 0]"], "1..1000"),
    ("rollout-steps", ["rollout.steps=[]"], "rollout.steps []"),
    ("rollout-steps", ["rollout.first_steps=[500, 750]"], "rollout.first_steps [500, 750] must fall strictly"),
    ("total-frames", ["rollout.total_frames=9"], "at least video.latent_frames 12; use 15 or 0"),
    ("total-frames", ["rollout.total_frames=14"], "must be whole segments"),
    ("total-frames", ["rollout.total_frames=15"], "set rollout.window_frames to 12"),
    (
        "total-frames",
        ["video.frames_per_segment=12", "foresight.offsets=[0]", "rollout.total_frames=24", "rollout.window_frames=12"],
        "here it is the only one",
    ),
    ("window", ["rollout.sink_frames=3"], "rollout.sink_frames has no effect"),
    ("window", ["rollout.window_frames=7"], "use 6 or 9"),
    ("window", ["rollout.window_frames=6", "rollout.sink_frames=6"], "use at least 9"),
    ("score-timesteps", ["dmd.min_timestep=980"], "dmd.min_timestep 980"),
    ("saturation-limit", ["alarms.saturation=0.5"], "use more than 1"),
    ("range", ["alarms.window_cycles=0"], "alarms.window_cycles is 0; it must be at least 1"),
    ("offsets", ["foresight.offsets=[]"], "from 0 to 3"),
    ("offsets", ["foresight.offsets=[1, 1]"], "foresight.offsets [1, 1]"),
    ("offsets", ["foresight.offsets=[0, 4]"], "from 0 to 3"),
    ("offsets", ["foresight.offsets=[-1]"], "foresight.offsets [-1]"),
    ("offsets", ["video.frames_per_segment=12"], "from 0 to 0"),
    (
        "half-attention",
        ["parallel.attention=flash", "parallel.compute_dtype=float32"],
        "parallel.attention flash computes in bfloat16, and parallel.compute_dtype is float32",
    ),
    ("half-attention", ["parallel.attention=cudnn", "parallel.compute_dtype=float32"], "use attention auto or sdpa"),
    (
        "shuffled-targets",
        ["foresight.targets=shuffled", "stages.distil.batch={global_size: 8, micro_size: 1}"],
        "stages.distil.batch.micro_size above 1",
    ),
    (
        "shuffled-targets",
        [*ENCODED, "stages.few_step.foresight.targets=shuffled", "stages.few_step.batch={micro_size: 1}"],
        "stages.few_step.batch.micro_size above 1",
    ),
    ("study-size", ["study.seeds=[1, 1]"], "must be different"),
    ("study-size", ["study.seeds=[]"], "at least one"),
    ("study-size", ["study.seeds=[-1]"], "must not be negative"),
    ("arm-overrides", ["study.arms.x=[dmd.guidance=1, dmd.guidance=2]"], "study.arms.x sets dmd.guidance twice"),
    ("arm-overrides", ["study.arms.x=[video.fps=8]"], "study.arms.x sets video.fps, which all arms share"),
    ("arm-overrides", ["study.arms.x=[stages.teacher.cycles=8]"], "which all arms share"),
    ("arm-overrides", [*ENCODED, "study.arms.x=[stages.few_step.foresight.weight=0]"], "which all arms share"),
    ("arm-overrides", ["study.arms.x=[stages.distil.gate.clips=8]"], "which all arms share"),
    ("arm-overrides", ["study.arms.x=['study.seeds=[8]']"], "which all arms share"),
]


@pytest.mark.parametrize(("rule", "overrides", "text"), BROKEN, ids=lambda value: str(value)[:40])
def test_a_rule_refuses_and_names_the_key(rule: str, overrides: list[str], text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(SMALL, overrides)
    message = str(caught.value)
    assert message.endswith(f"[{rule}]")
    assert text in message
    assert message.startswith("command line: ")
    assert len(message.splitlines()) == 1


AR_ONLY = """
extends: {small_world}
name: ar
stages:
  ar: {{kind: teacher_forcing, cycles: 2, batch: {{global_size: 2}}, optimizer: {{lr: 1e-3}}}}
checkpoint: {{every_cycles: 1}}
"""


@pytest.fixture
def ar_only(tmp_path: Path) -> Path:
    """A recipe without a dmd stage."""
    path = tmp_path / "ar.yaml"
    path.write_text(AR_ONLY.format(small_world=SMALL.with_name("small_world.yaml")))
    return path


def test_every_rule_has_a_case() -> None:
    elsewhere = {"some-stage", "study-needs-dmd"}
    assert {name for name, _, _ in BROKEN} | elsewhere == set(RULES)


def test_a_recipe_without_stages_is_refused(ar_only: Path) -> None:
    lines = ar_only.read_text().splitlines()
    ar_only.write_text("\n".join("stages: {}" if line == "stages:" else line for line in lines if "ar:" not in line))
    with pytest.raises(RecipeError, match=r"ar\.yaml: stages is empty; .* \[some-stage\]$"):
        load(ar_only)


def test_a_study_without_a_dmd_stage_is_refused(ar_only: Path) -> None:
    load(ar_only)
    ar_only.write_text(ar_only.read_text() + "study: {arms: {x: [foresight.weight=0]}}\n")
    with pytest.raises(RecipeError, match=r"ar\.yaml:7: study\.arms\.x has no effect: .* \[study-needs-dmd\]$"):
        load(ar_only)


@pytest.mark.parametrize(
    "override", ["dmd.guidance=1", "foresight.weight=0", "consistency.points=9", "study.seeds=[2]"]
)
def test_a_typed_key_that_no_stage_reads_is_refused(ar_only: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=r"^command line: .* has no effect: no stage is of kind .* \[no-effect\]$"):
        load(ar_only, [override])


def test_a_typed_key_of_foresight_in_a_few_step_start_is_read(ar_only: Path) -> None:
    rest = "cycles: 2, batch: {global_size: 2}, optimizer: {lr: 1e-3}"
    few = f"few: {{kind: consistency, parent: ar, teacher: base, foresight: {{weight: 1}}, {rest}}}"
    text = ar_only.read_text().replace("  ar:", f"  base: {{kind: bidirectional, {rest}}}\n  ar:")
    ar_only.write_text(text.replace("checkpoint:", f"  {few}\ncheckpoint:"))
    assert load(ar_only, ["foresight.depth=1"]).recipe.foresight.depth == 1
    with pytest.raises(RecipeError, match=r"foresight.start_cycle has no effect: .* \[no-effect\]$"):
        load(ar_only, ["foresight.start_cycle=1"])


def test_a_critic_is_of_dmd_alone() -> None:
    """The encoder of a few-step start is no critic's start, whatever shapes they are."""
    load(SMALL, [*ENCODED, "critic.ffn_dim=256", "weights.w={path: x}", "stages.distil.critic=w"])


def test_a_rule_broken_by_two_files_points_at_the_written_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: {SMALL}\nrollout:\n  sink_frames: 3\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml:3: rollout\.sink_frames"):
        load(path)


def test_every_number_of_the_schema_has_a_range() -> None:
    """A number without one would accept anything; a range without a field would guard nothing."""
    for section in vars(schema).values():
        if not isinstance(section, type) or not is_dataclass(section):
            continue
        numbers = {name for name, kind in children(section).items() if kind in (int, float)}
        assert numbers == set(RANGES.get(section, {})), section.__name__


def test_legal_windows_and_shapes_pass() -> None:
    assert load(SMALL, ["rollout.window_frames=6", "rollout.sink_frames=3"]).recipe.rollout.sink_frames == 3
    assert load(SMALL, ["teacher.blocks=6"]).recipe.generator.blocks == 6
    # Other weights, other shape: allowed where nothing is inherited.
    load(SMALL, ["stages.ar_teacher.parent=", "generator.blocks=2"])


@pytest.mark.parametrize(
    ("global_size", "micro_size", "ranks", "expected"), [(8, 2, 2, 2), (8, 8, 1, 1), (64, 1, 64, 1), (12, 2, 3, 2)]
)
def test_accumulation(global_size: int, micro_size: int, ranks: int, expected: int) -> None:
    assert accumulation(Batch(global_size=global_size, micro_size=micro_size), ranks) == expected


@pytest.mark.parametrize(("global_size", "ranks", "near"), [(8, 3, "6 or 12"), (4, 5, "10"), (100, 3, "96 or 102")])
def test_an_impossible_split_names_the_nearest_sizes(global_size: int, ranks: int, near: str) -> None:
    with pytest.raises(RecipeError, match=f"use a global size of {near},") as caught:
        accumulation(Batch(global_size=global_size, micro_size=2), ranks)
    for size in near.split(" or "):
        assert accumulation(Batch(global_size=int(size), micro_size=2), ranks) >= 1
    assert len(str(caught.value).splitlines()) == 1


def test_layout() -> None:
    recipe = load(SMALL).recipe
    assert check_layout(recipe, 2) == {"teacher": 1, "ar_teacher": 1, "few_step": 1, "distil": 2}
    with pytest.raises(RecipeError, match=r"^stages\.teacher: batch\.global_size 8 cannot be split over 4 ranks"):
        check_layout(recipe, 4)
    with pytest.raises(RecipeError, match="0 ranks"):
        check_layout(recipe, 0)


def test_exit_groups_divide_what_a_rank_accumulates() -> None:
    recipe = load(SMALL, ["rollout.exit_groups=2"]).recipe
    assert check_layout(recipe, 2)["distil"] == 2
    recipe = load(SMALL, ["rollout.exit_groups=4"]).recipe
    with pytest.raises(RecipeError, match=r"rollout\.exit_groups 4 does not divide the 2 micro-batches .* 16$"):
        check_layout(recipe, 2)


def test_replicas_divide_the_ranks() -> None:
    recipe = load(SMALL, ["parallel.replicas=2"]).recipe
    check_layout(recipe, 2)
    with pytest.raises(RecipeError, match="1 ranks cannot form 2 equal replicas"):
        check_layout(recipe, 1)
