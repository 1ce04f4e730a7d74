"""What the types of the schema cannot say: ranges, and keys that must fit one another.

Each rule is a small function with an id; it yields the keys concerned and one sentence with the way out. The
id ends the message, so a rule that stops somebody can be found here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

from mirai_dist.config import schema
from mirai_dist.config.error import RecipeError
from mirai_dist.config.kinds import PRODUCES, refusal
from mirai_dist.config.schema import Batch, Network, Optimizer, Recipe, Stage
from mirai_dist.config.steps import REPORT
from mirai_dist.config.worlds import impossible


class Problem(NamedTuple):
    """Keys concerned (dotted, the one to change first) and what is wrong with them."""

    keys: tuple[str, ...]
    what: str


Rule = Callable[[Recipe], Iterator[Problem]]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    """Register a rule under its id."""

    def register(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return register


def check(recipe: Recipe, origins: Mapping[str, str], shown: str = "recipe") -> None:
    """Raise RecipeError for the first rule the recipe breaks, at the line of the key to change."""
    for name, function in RULES.items():
        for problem in function(recipe):
            raise RecipeError(_place(problem.keys, origins, shown), f"{problem.what} [{name}]")
    for key, origin in origins.items():
        kind = _ONLY_WITH.get(key.split(".")[0])
        read = any(stage.kind == kind for stage in recipe.stages.values())
        if key in _OF_ALL_FORESIGHT:
            read |= any(stage.foresight.weight for stage in recipe.stages.values())
        if origin == "command line" and kind and not read:
            raise RecipeError(origin, f"{key} has no effect: no stage is of kind {kind}; remove it [no-effect]")


# Sections that only a stage of one kind reads. Recipes may carry them along (they extend common bases), but
# somebody who types such a key expects it to do something.
_ONLY_WITH = {
    "dmd": "dmd",
    "foresight": "dmd",
    "study": "dmd",
    "alarms": "dmd",
    "consistency": "consistency",
    "ode": "ode",
}
# What the foresight of a few-step start reads too.
_OF_ALL_FORESIGHT = {f"foresight.{name}" for name in ("preset", "offsets", "depth", "predictor_blocks")}


def _place(keys: tuple[str, ...], origins: Mapping[str, str], shown: str) -> str:
    """Where the fault was most likely made: an override, else a written line, else a default."""
    places = [origins[key] for key in keys if key in origins]
    written = [place for place in places if place != "default"]
    overridden = [place for place in written if not re.search(r":\d+$", place)]
    return next(iter(overridden + written), f"{shown} (default value)" if places else shown)


# --- ranges --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Legal numbers: from `low` to `high`, `open_` ends excluded."""

    low: float = 0.0
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"{'more than' if self.open_low else 'at least'} {self.low:g}"
        if self.high == float("inf"):
            return low
        return f"{low} and {'less than' if self.open_high else 'at most'} {self.high:g}"


_COUNT = Range(low=1)
_NOT_NEGATIVE = Range()
_POSITIVE = Range(open_low=True)
_DECAY = Range(high=1, open_high=True)
_FRACTION = Range(high=1, open_low=True)
_TIMESTEP = Range(high=1000)

RANGES: dict[type, dict[str, Range]] = {
    schema.Video: {
        "latent_frames": _COUNT,
        "frames_per_segment": _COUNT,
        "channels": _COUNT,
        "latent_height": _COUNT,
        "latent_width": _COUNT,
        "fps": _COUNT,
    },
    schema.World: {"speed": _NOT_NEGATIVE, "radius": _POSITIVE, "radius_jitter": _NOT_NEGATIVE},
    schema.Text: {"dim": _COUNT, "length": _COUNT},
    schema.Network: {"dim": _COUNT, "ffn_dim": _COUNT, "heads": _COUNT, "blocks": _COUNT, "freq_dim": _COUNT},
    schema.Flow: {"shift": _POSITIVE},
    schema.Optimizer: {
        "lr": _POSITIVE,
        "beta1": _DECAY,
        "beta2": _DECAY,
        "weight_decay": _NOT_NEGATIVE,
        "clip_norm": _POSITIVE,
        "warmup": _NOT_NEGATIVE,
    },
    schema.Batch: {"global_size": _COUNT, "micro_size": _COUNT},
    schema.Ema: {"decay": _DECAY, "start_update": _NOT_NEGATIVE},
    schema.Rollout: {
        "total_frames": _NOT_NEGATIVE,
        "exit_groups": _COUNT,
        "context_timestep": _TIMESTEP,
        "window_frames": _NOT_NEGATIVE,
        "sink_frames": _NOT_NEGATIVE,
    },
    schema.Dmd: {
        "guidance": _NOT_NEGATIVE,
        "min_timestep": _TIMESTEP,
        "max_timestep": _TIMESTEP,
        "critic_updates": _COUNT,
    },
    schema.Foresight: {
        "weight": _NOT_NEGATIVE,
        "start_cycle": _NOT_NEGATIVE,
        "depth": _FRACTION,
        "predictor_blocks": _COUNT,
    },
    schema.StageForesight: {"weight": _NOT_NEGATIVE},
    schema.Consistency: {"points": Range(low=2), "guidance": _NOT_NEGATIVE},
    schema.Ode: {"points": _COUNT, "guidance": _NOT_NEGATIVE, "shard_size": _COUNT},
    schema.Gate: {"clips": _NOT_NEGATIVE, "failing": Range(high=1)},
    schema.Stage: {
        "cycles": _COUNT,
        "prompt_dropout": _DECAY,
        "context_noise": _TIMESTEP,
        "trajectories": _NOT_NEGATIVE,
    },
    schema.Parallel: {"replicas": _COUNT},
    schema.Checkpoint: {"every_cycles": _COUNT, "keep": _COUNT},
    schema.Alarms: {
        "warmup_cycles": _COUNT,
        "window_cycles": _COUNT,
        "saturation": _NOT_NEGATIVE,
        "mean_drift": _NOT_NEGATIVE,
        "motion": _NOT_NEGATIVE,
        "critic_lag": _NOT_NEGATIVE,
        "moved": Range(high=1),
        "score_scale": _NOT_NEGATIVE,
        "timesteps": _NOT_NEGATIVE,
    },
    schema.Evaluate: {
        "samples": _COUNT,
        "probe_clips": _COUNT,
        "probe_updates": _COUNT,
        "grid_every": _NOT_NEGATIVE,
        "teacher_steps": _COUNT,
    },
    schema.Recipe: {"seed": _NOT_NEGATIVE},
}


def sections(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every section of a recipe with its dotted path ("" for the recipe itself)."""
    if is_dataclass(node):
        yield path, node
    below = node.items() if isinstance(node, dict) else [(each.name, getattr(node, each.name)) for each in fields(node)]
    for name, value in below:
        if is_dataclass(value) or isinstance(value, dict):
            yield from sections(value, f"{path}.{name}" if path else name)


@rule("range")
def _ranges(recipe: Recipe) -> Iterator[Problem]:
    for path, section in sections(recipe):
        for name, legal in RANGES.get(type(section), {}).items():
            value = getattr(section, name)
            if value not in legal:
                key = f"{path}.{name}" if path else name
                yield Problem((key,), f"{key} is {value:g}; it must be {legal}")


# --- names and shapes ----------------------------------------------------------------------------------------


@rule("run-name")
def _run_name(recipe: Recipe) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.name):
        yield Problem(("name",), f"name {recipe.name!r} becomes a directory; use letters, digits, '.', '_' and '-'")


@rule("segments-divide-frames")
def _segments_divide_frames(recipe: Recipe) -> Iterator[Problem]:
    frames, length = recipe.video.latent_frames, recipe.video.frames_per_segment
    if frames % length:
        near = " or ".join(str(each) for each in _multiples_around(frames, length))
        what = f"video.latent_frames {frames} is not a whole number of segments of {length}; use {near}"
        yield Problem(("video.latent_frames", "video.frames_per_segment"), what)


@rule("even-latents")
def _even_latents(recipe: Recipe) -> Iterator[Problem]:
    for name in ("latent_height", "latent_width"):
        size = getattr(recipe.video, name)
        if size % 2:
            near = " or ".join(str(each) for each in _multiples_around(size, 2))
            what = f"video.{name} is {size}; patches are 2x2, so use {near}"
            yield Problem((f"video.{name}",), what)


@rule("heads-divide-dim")
def _heads_divide_dim(recipe: Recipe) -> Iterator[Problem]:
    for name, network in _networks(recipe):
        if network.dim % network.heads:
            what = f"{name}.dim {network.dim} is not divisible by {name}.heads {network.heads}; change one of them"
            yield Problem((f"{name}.dim", f"{name}.heads"), what)


@rule("head-dim-rope")
def _head_dim_rope(recipe: Recipe) -> Iterator[Problem]:
    for name, network in _networks(recipe):
        width = network.dim // network.heads
        if width % 2 or width < 6:
            what = (
                f"{name}: heads of width {width} (dim {network.dim} / heads {network.heads}) cannot be split into "
                "rotary pairs for time, row and column; the width must be even and at least 6"
            )
            yield Problem((f"{name}.dim", f"{name}.heads"), what)


@rule("even-freq-dim")
def _even_freq_dim(recipe: Recipe) -> Iterator[Problem]:
    for name, network in _networks(recipe):
        if network.freq_dim % 2:
            what = f"{name}.freq_dim is {network.freq_dim}; it holds sines and cosines in pairs, so make it even"
            yield Problem((f"{name}.freq_dim",), what)


@rule("radius-jitter")
def _radius_jitter(recipe: Recipe) -> Iterator[Problem]:
    if recipe.world.radius_jitter >= recipe.world.radius:
        jitter, radius = recipe.world.radius_jitter, recipe.world.radius
        what = f"world.radius_jitter {jitter:g} must be less than world.radius {radius:g}"
        yield Problem(("world.radius_jitter", "world.radius"), what)


@rule("world-room")
def _world_room(recipe: Recipe) -> Iterator[Problem]:
    used = recipe.text.encoder == "vocabulary" or not (recipe.data.prompts or recipe.data.latents)
    problem = impossible(recipe.world, recipe.video)
    if used and problem:
        yield Problem(("video.latent_height", "video.latent_width", "world.speed", "world.radius"), problem)


# --- the pipeline --------------------------------------------------------------------------------------------


@rule("some-stage")
def _some_stage(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.stages:
        yield Problem(("stages",), "stages is empty; a recipe trains at least one")


@rule("sources")
def _sources(recipe: Recipe) -> Iterator[Problem]:
    earlier = [*recipe.weights]
    for name, stage in recipe.stages.items():
        if name in recipe.weights:
            what = f"stages.{name} and weights.{name} have one name, and stages refer to both by it; rename one"
            yield Problem((f"stages.{name}", f"weights.{name}.path"), what)
        for role in _ROLES:
            other = getattr(stage, role)
            if other and other not in earlier:
                known = f"one of: {', '.join(earlier)}" if earlier else "none: this is the first stage"
                what = f"stages.{name}.{role} is {other!r}, which is no earlier stage and no entry of weights ({known})"
                yield Problem((f"stages.{name}.{role}",), what)
        earlier.append(name)


@rule("dmd-roles")
def _dmd_roles(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        kind = f"stages.{name}.kind"
        for role in ("teacher", "critic"):
            reads_it = stage.kind == "dmd" or (role == "teacher" and stage.kind in _FEW_STEP)
            if not reads_it and getattr(stage, role):
                what = f"stages.{name}.{role} has no effect in a stage of kind {stage.kind}; remove it"
                yield Problem((f"stages.{name}.{role}", kind), what)
        if stage.kind == "dmd":
            for role in ("parent", "teacher"):
                if not getattr(stage, role):
                    what = f"stages.{name}.{role} is missing: a stage of kind dmd needs it"
                    what = f"{what}; name an earlier stage or an entry of weights"
                    yield Problem((f"stages.{name}.{role}", kind), what)


@rule("few-step-foresight")
def _few_step_foresight(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        key, kind = f"stages.{name}.foresight", f"stages.{name}.kind"
        if stage.kind not in _FEW_STEP:
            if stage.foresight != schema.StageForesight():
                what = f"{key} has no effect in a stage of kind {stage.kind}; remove it"
                what += " (foresight of dmd is the section foresight)" if stage.kind == "dmd" else ""
                yield Problem((*(f"{key}.{each.name}" for each in fields(schema.StageForesight)), kind), what)
        elif stage.foresight.weight and not stage.teacher:
            what = f"stages.{name}.teacher is missing: with {key}.weight above 0 it is the foresight encoder"
            what += "; name the bidirectional one"
            yield Problem((f"{key}.weight", kind), what)
        elif stage.teacher and not stage.foresight.weight:
            what = f"stages.{name}.teacher has no effect: it is the foresight encoder, and {key}.weight is 0"
            yield Problem((f"{key}.weight", f"stages.{name}.teacher"), f"{what}; remove it or raise the weight")


@rule("context-noise")
def _context_noise(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        if stage.context_noise and stage.kind != "teacher_forcing":
            key = f"stages.{name}.context_noise"
            what = f"{key} has no effect in a stage of kind {stage.kind}: only teacher_forcing has a past apart"
            yield Problem((key, f"stages.{name}.kind"), f"{what}; remove it")


@rule("source-kind")
def _source_kind(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        key = f"stages.{name}.parent"
        if stage.kind in ("consistency", "ode") and not stage.parent:
            what = f"{key}: a {stage.kind} stage distils an AR teacher, and there is none; name one"
            yield Problem((key, f"stages.{name}.kind"), what)
        for role in _ROLES:
            source = getattr(stage, role)
            kind = _kind_of(recipe, source) if source else ""
            why = refusal(stage.kind, role, kind) if kind else ""
            if why:
                keys = (f"stages.{name}.{role}", f"stages.{name}.kind", f"weights.{source}.kind")
                yield Problem(keys, f"stages.{name}.{role} {source!r} {why}")


@rule("gate-parent")
def _gate_parent(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        keys = (f"stages.{name}.gate.clips", f"stages.{name}.parent")
        if not stage.gate.clips:
            continue
        if not stage.parent:
            what = f"{keys[0]}: stage {name} starts from random weights, which a gate cannot judge"
            yield Problem(keys, f"{what}; name a parent, or set it to 0")
        elif _kind_of(recipe, stage.parent) == "diffusion":
            what = f"{keys[0]}: a gate rolls out a causal network, and {stage.parent!r} is bidirectional"
            yield Problem(keys, f"{what}; set it to 0")


@rule("gate-clips")
def _gate_clips(recipe: Recipe) -> Iterator[Problem]:
    frames, length = recipe.video.latent_frames, recipe.video.frames_per_segment
    for name, stage in recipe.stages.items():
        if stage.gate.clips and frames < max(3, 2 * length):
            key = f"stages.{name}.gate.clips"
            what = f"{key}: a gate measures motion and segment boundaries, and clips of {frames} latent frames are too"
            what = f"{what} short: it takes two segments ({2 * length} frames) and 3 frames"
            yield Problem((key, "video.latent_frames", "video.frames_per_segment"), f"{what}; set it to 0")


@rule("gate-bounds")
def _gate_bounds(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        for measure in ("boundary_jump", "motion", "saturation"):
            pair = getattr(stage.gate, measure)
            if pair and not (len(pair) == 2 and 0 <= pair[0] < pair[1] < float("inf")):
                key = f"stages.{name}.gate.{measure}"
                yield Problem((key,), f"{key} is {pair}; write [low, high] with 0 <= low < high, or [] for the default")


@rule("stage-name")
def _stage_name(recipe: Recipe) -> Iterator[Problem]:
    if REPORT in recipe.stages:
        what = f"stages.{REPORT} has the name of a run's last step; rename the stage"
        yield Problem((f"stages.{REPORT}.kind",), what)


@rule("trajectories")
def _trajectories(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        keys = (f"stages.{name}.trajectories", f"stages.{name}.kind")
        if stage.kind != "ode" and stage.trajectories:
            yield Problem(keys, f"{keys[0]} has no effect in a stage of kind {stage.kind}; remove it")
        if stage.kind == "ode" and bool(stage.trajectories) == bool(recipe.data.ode_pairs):
            both = "both are set" if stage.trajectories else "neither is set"
            what = f"stage {name} makes {keys[0]} trajectories, or reads data.ode_pairs, and {both}; set one of the two"
            yield Problem((*keys, "data.ode_pairs"), what)


@rule("trajectory-grid")
def _trajectory_grid(recipe: Recipe) -> Iterator[Problem]:
    points, steps = recipe.ode.points, recipe.rollout.steps
    made = any(stage.trajectories for _, stage in _of_kind(recipe, "ode"))
    if made and any(points * step % 1000 for step in steps):
        what = f"rollout.steps {steps} do not lie on the grid of ode.points {points}"
        yield Problem(("ode.points", "rollout.steps"), f"{what}; use a multiple of {least_grid(steps)}")


def least_grid(steps: list[int]) -> int:
    """Fewest points of an Euler grid on which these denoising steps lie."""
    return next(points for points in range(1, 1001) if all(points * step % 1000 == 0 for step in steps))


def _kind_of(recipe: Recipe, source: str) -> str:
    """Kind of the weights a stage or an entry of weights gives; empty where only the file knows."""
    return PRODUCES[recipe.stages[source].kind] if source in recipe.stages else recipe.weights[source].kind


@rule("source-shape")
def _source_shape(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        for role, own in (("parent", _trains(stage)), ("teacher", "teacher"), ("critic", "critic")):
            source = getattr(stage, role) or (stage.teacher if role == "critic" and stage.kind == "dmd" else "")
            if source in recipe.stages:
                other = _trains(recipe.stages[source])
            elif role == "critic" and source and not stage.critic:
                other = "teacher"  # of a file: its shape is compared with the teacher's section when it is read
            else:
                continue
            differs = _shape_difference(recipe, own, other)
            if differs:
                what = f"the {own} of stage {name} starts from {source!r}, which holds the {other}, and their shapes"
                hint = "; write critic: ${teacher}, or name its own start" if role == "critic" else ""
                what = f"{what} differ ({differs}); make the two sections equal or name another {role}{hint}"
                shapes = [f"{network}.{each.name}" for network in (own, other) for each in fields(Network)]
                yield Problem((f"stages.{name}.{role}", *shapes), what)


@rule("unused-weights")
def _unused_weights(recipe: Recipe) -> Iterator[Problem]:
    used = {getattr(stage, role) for stage in recipe.stages.values() for role in _ROLES}
    for name in recipe.weights:
        if name not in used:
            yield Problem((f"weights.{name}.path",), f"weights.{name} is used by no stage; name it in one or remove it")


# --- data and frozen encoders --------------------------------------------------------------------------------


@rule("text-encoder")
def _text_encoder(recipe: Recipe) -> Iterator[Problem]:
    text = recipe.text
    for key in ("prompts", "latents", "ode_pairs"):
        if text.encoder == "vocabulary" and getattr(recipe.data, key):
            what = f"text.encoder vocabulary knows the procedural world's words only; for data.{key} use umt5 or store"
            yield Problem(("text.encoder", f"data.{key}"), what)
    if text.encoder == "vocabulary" and text.path:
        yield Problem(("text.path",), "text.path has no effect with text.encoder vocabulary; remove it")
    if text.encoder != "vocabulary" and not text.path:
        what = f"text.path is missing: text.encoder {text.encoder} reads it"
        yield Problem(("text.path", "text.encoder"), f"{what}; give the folder")
    if text.encoder == "store" and not recipe.data.prompts and _of_kind(recipe, "dmd"):
        what = "text.encoder store holds the embeddings of a prompt file; set data.prompts to that file"
        yield Problem(("text.encoder", "data.prompts"), what)


@rule("vae-path")
def _vae_path(recipe: Recipe) -> Iterator[Problem]:
    if recipe.vae.kind == "wan" and not recipe.vae.path:
        yield Problem(("vae.path", "vae.kind"), "vae.path is missing: vae.kind wan reads it; give the file or folder")
    if recipe.vae.kind == "linear" and recipe.vae.path:
        yield Problem(("vae.path",), "vae.path has no effect with vae.kind linear; remove it")


@rule("clips-needed")
def _clips_needed(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        trains_on_clips = stage.kind not in ("dmd", "ode") or stage.trajectories
        if recipe.text.encoder == "store" and not recipe.data.latents and trains_on_clips:
            what = f"stages.{name} of kind {stage.kind} needs clips, and no store holds the world's captions"
            yield Problem(("data.latents", "text.encoder", f"stages.{name}.kind"), f"{what}; set data.latents")


@rule("study-stage")
def _study_stage(recipe: Recipe) -> Iterator[Problem]:
    dmd, chosen = [name for name, _ in _of_kind(recipe, "dmd")], recipe.study_stage
    if recipe.study.stage and recipe.study.stage not in dmd:
        known = f"one of: {', '.join(dmd)}" if dmd else "there is none"
        what = f"study.stage is {recipe.study.stage!r}, which is no stage of kind dmd ({known})"
        yield Problem(("study.stage",), what)
    for name, stage in recipe.stages.items():
        for role in _ROLES:
            if chosen and getattr(stage, role) == chosen:
                key = f"stages.{name}.{role}"
                what = f"{key} is {chosen!r}, of which the study trains one network an arm and seed"
                yield Problem((key, "study.stage"), f"{what}; give the study another stage (study.stage)")


# What a stage may have of its own: how it is trained. Shapes, data of the report and the order of things are the run's.
_OF_A_STAGE = ("flow.", "rollout.", "dmd.", "foresight.", "consistency.", "ode.", "parallel.", "data.")
_OF_A_STAGE += ("alarms.", "video.frames_per_segment")


@rule("stage-overrides")
def _stage_overrides(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        key = f"stages.{name}.overrides"
        written = [text.partition("=")[0].strip() for text in stage.overrides]
        twice = {each for each in written if written.count(each) > 1}
        if twice:
            yield Problem((key,), f"{key} sets {', '.join(sorted(twice))} twice; keep one")
        for each in written:
            if not f"{each}.".startswith(_OF_A_STAGE):
                what = f"{key} sets {each}, which is one for all stages"
                legal = ", ".join(legal.removesuffix(".") for legal in _OF_A_STAGE)
                yield Problem((key,), f"{what}; a stage may have its own {legal}")


# --- batches and schedules -----------------------------------------------------------------------------------


@rule("batch-micro")
def _batch_micro(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        size, micro = stage.batch.global_size, stage.batch.micro_size
        if size % micro:
            near = " or ".join(str(each) for each in _multiples_around(size, micro))
            key = f"stages.{name}.batch"
            what = f"{key}.global_size {size} is not divisible by {key}.micro_size {micro}; use {near}"
            yield Problem((f"{key}.global_size", f"{key}.micro_size"), what)


@rule("exit-groups")
def _exit_groups(recipe: Recipe) -> Iterator[Problem]:
    groups = recipe.rollout.exit_groups
    for name, stage in _of_kind(recipe, "dmd"):
        size = stage.batch.global_size
        if size % groups:
            what = f"rollout.exit_groups {groups} does not divide stages.{name}.batch.global_size {size}"
            legal = ", ".join(str(each) for each in range(1, size + 1) if size % each == 0)
            yield Problem(("rollout.exit_groups", f"stages.{name}.batch.global_size"), f"{what}; use one of {legal}")


@rule("warmup")
def _warmup(recipe: Recipe) -> Iterator[Problem]:
    for key, optimizer, updates in _optimizers(recipe):
        if optimizer.warmup > updates:
            what = f"{key}.warmup {optimizer.warmup} is longer than the {updates} updates of this network; shorten it"
            yield Problem((f"{key}.warmup",), what)


@rule("ema-off")
def _ema_off(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        if stage.ema.decay == 0 and stage.ema.start_update:
            key = f"stages.{name}.ema.start_update"
            yield Problem((key,), f"{key} has no effect: decay 0 turns the average off; remove it")


@rule("ema-too-late")
def _ema_too_late(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        start = stage.ema.start_update
        if stage.ema.decay > 0 and start >= stage.cycles:
            key = f"stages.{name}.ema.start_update"
            what = f"{key} {start} is never reached in {stage.cycles} cycles, so there would be no average"
            yield Problem((key, f"stages.{name}.cycles"), f"{what}; use an earlier one, or ema.decay 0")


@rule("consistency-average")
def _consistency_average(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in _of_kind(recipe, "consistency"):
        key = f"stages.{name}.ema"
        needs = "the target of a consistency stage is the moving average"
        if stage.ema.decay == 0:
            yield Problem((f"{key}.decay",), f"{key}.decay is 0, and {needs}; use more than 0, such as 0.95")
        if stage.ema.start_update:
            what = f"{key}.start_update is {stage.ema.start_update}, and {needs} from the first update on; remove it"
            yield Problem((f"{key}.start_update",), what)


# --- rollout, dmd, foresight ---------------------------------------------------------------------------------


@rule("rollout-steps")
def _rollout_steps(recipe: Recipe) -> Iterator[Problem]:
    for name, steps in (("steps", recipe.rollout.steps), ("first_steps", recipe.rollout.first_steps)):
        falling = all(high > low for high, low in zip(steps, steps[1:], strict=False))
        missing = not steps and name == "steps"
        if missing or not falling or not all(1 <= step <= 1000 for step in steps):
            what = f"rollout.{name} {steps} must fall strictly and lie within 1..1000, such as [1000, 750, 500, 250]"
            yield Problem((f"rollout.{name}",), what)


@rule("total-frames")
def _total_frames(recipe: Recipe) -> Iterator[Problem]:
    total, scored = recipe.rollout.total_frames, recipe.video.latent_frames
    if not total:
        return
    keys = ("rollout.total_frames", "video.latent_frames")
    if total < scored or total % recipe.video.frames_per_segment:
        what = f"rollout.total_frames {total} must be whole segments, and at least video.latent_frames {scored}"
        yield Problem(keys, f"{what}; use {scored + recipe.video.frames_per_segment} or 0")
    window = recipe.rollout.window_frames
    if total > scored and not 0 < window <= scored:
        what = f"a rollout of {total} frames needs a window of at most {scored}, which is what the scores know"
        yield Problem(("rollout.window_frames", *keys), f"{what}; set rollout.window_frames to {scored}")
    if total > scored == recipe.video.frames_per_segment:
        what = "the first scored segment of a long rollout gets no gradient, and here it is the only one"
        yield Problem(keys, f"{what}; raise video.latent_frames")


@rule("window")
def _window(recipe: Recipe) -> Iterator[Problem]:
    window, sink = recipe.rollout.window_frames, recipe.rollout.sink_frames
    length = recipe.video.frames_per_segment
    if sink and not window:
        what = "rollout.sink_frames has no effect without rollout.window_frames; set a window or remove the sink"
        yield Problem(("rollout.sink_frames",), what)
    for name, frames in (("window_frames", window), ("sink_frames", sink)):
        if frames % length:
            near = " or ".join(str(each) for each in _multiples_around(frames, length))
            what = f"rollout.{name} {frames} is not a whole number of segments of {length} frames; use {near}"
            yield Problem((f"rollout.{name}", "video.frames_per_segment"), what)
    least = length + (sink or length)  # a window that shows no earlier frame would make segments independent
    if window and window < least:
        what = f"rollout.window_frames {window} cannot hold the present segment ({length}) and any earlier frame"
        what = f"{what} (sink {sink}); use at least {least}, or 0 for all frames"
        yield Problem(("rollout.window_frames", "rollout.sink_frames"), what)


@rule("score-timesteps")
def _score_timesteps(recipe: Recipe) -> Iterator[Problem]:
    low, high = recipe.dmd.min_timestep, recipe.dmd.max_timestep
    if low >= high:
        yield Problem(
            ("dmd.min_timestep", "dmd.max_timestep"), f"dmd.min_timestep {low:g} must be below max_timestep {high:g}"
        )


@rule("foresight-start")
def _foresight_start(recipe: Recipe) -> Iterator[Problem]:
    start = recipe.foresight.start_cycle
    for name, stage in _of_kind(recipe, "dmd"):
        if recipe.foresight.weight > 0 and start >= stage.cycles:
            what = f"foresight.start_cycle {start} is not before the end of stage {name} ({stage.cycles} cycles)"
            yield Problem(("foresight.start_cycle", f"stages.{name}.cycles"), f"{what}; use an earlier one")


@rule("offsets")
def _offsets(recipe: Recipe) -> Iterator[Problem]:
    offsets = recipe.foresight.offsets
    segments = recipe.video.latent_frames // recipe.video.frames_per_segment
    if not offsets or len(set(offsets)) < len(offsets) or not all(0 <= each < segments for each in offsets):
        what = f"foresight.offsets {offsets} must be different numbers from 0 to {segments - 1} (segments ahead)"
        yield Problem(("foresight.offsets", "video.latent_frames", "video.frames_per_segment"), what)


@rule("shuffled-targets")
def _shuffled_targets(recipe: Recipe) -> Iterator[Problem]:
    for name, stage in recipe.stages.items():
        section = "foresight" if stage.kind == "dmd" else f"stages.{name}.foresight"
        settings = recipe.foresight if stage.kind == "dmd" else stage.foresight
        # The partner is the next sample of the same micro-batch: alone in one, a sample would keep its own target.
        if settings.targets == "shuffled" and stage.batch.micro_size < 2:
            key = f"stages.{name}.batch.micro_size"
            what = f"{section}.targets shuffled takes the target from another sample run at once; raise {key} above 1"
            yield Problem((f"{section}.targets", key), what)


@rule("saturation-limit")
def _saturation_limit(recipe: Recipe) -> Iterator[Problem]:
    limit = recipe.alarms.saturation
    if 0 < limit <= 1:
        what = f"alarms.saturation {limit:g} would be up always: the spread may leave [1 / limit, limit] of its start"
        yield Problem(("alarms.saturation",), f"{what}; use more than 1, such as 1.5, or 0 to turn it off")


# --- attention -----------------------------------------------------------------------------------------------

_HALF_ONLY = ("cudnn", "flash")  # has no kernels for float32; other backends depend on the device: the run asks them


@rule("half-attention")
def _half_attention(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    if parallel.attention in _HALF_ONLY and parallel.compute_dtype != "bfloat16":
        what = f"parallel.attention {parallel.attention} computes in bfloat16, and parallel.compute_dtype is"
        what = f"{what} {parallel.compute_dtype}; use attention auto or sdpa, or compute_dtype bfloat16"
        yield Problem(("parallel.attention", "parallel.compute_dtype"), what)


# --- the study -----------------------------------------------------------------------------------------------

# Arms share their start, data and draws: nothing that earlier stages or the report read may differ between them.
_SHARED = {"name", "seed", "study", "video", "world", "text", "consistency", "ode", "evaluate"}
_SHARED |= {"teacher", "generator", "critic", "data", "vae", "weights"}


@rule("prefix-kernels")
def _prefix_kernels(recipe: Recipe) -> Iterator[Problem]:
    if recipe.parallel.segment_attention == "prefix" and recipe.parallel.kernels == "reference":
        what = "parallel.segment_attention is prefix, which fused kernels join, and parallel.kernels is reference"
        yield Problem(("parallel.segment_attention", "parallel.kernels"), f"{what}; use fused, or dense attention")


@rule("study-size")
def _study_size(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.study.arms:
        yield Problem(("study.arms",), "study.arms is empty; it needs at least one arm, such as {foresight: []}")
    if not recipe.study.seeds or len(set(recipe.study.seeds)) < len(recipe.study.seeds):
        yield Problem(("study.seeds",), f"study.seeds {recipe.study.seeds} must be different numbers, at least one")
    if any(seed < 0 for seed in recipe.study.seeds):
        yield Problem(("study.seeds",), f"study.seeds {recipe.study.seeds} must not be negative")


@rule("arm-overrides")
def _arm_overrides(recipe: Recipe) -> Iterator[Problem]:
    own = f"stages.{recipe.study_stage}."
    for name, arm in recipe.study.arms.items():
        key = f"study.arms.{name}"
        written = [text.partition("=")[0].strip() for text in arm]
        twice = {each for each in written if written.count(each) > 1}
        if twice:
            yield Problem((key,), f"{key} sets {', '.join(sorted(twice))} twice; keep one")
        for each in written:
            other_stage = each.startswith("stages.") and not each.startswith(own)
            gate = each.startswith("stages.") and each.split(".")[2:3] == ["gate"]
            if each.split(".")[0] in _SHARED or other_stage or gate:
                what = f"{key} sets {each}, which all arms share (they have one start, one data set, one report)"
                yield Problem((key,), f"{what}; write it outside the study")


@rule("study-needs-dmd")
def _study_needs_dmd(recipe: Recipe) -> Iterator[Problem]:
    if not _of_kind(recipe, "dmd"):
        for name, arm in recipe.study.arms.items():
            if arm:
                what = f"study.arms.{name} has no effect: no stage is of kind dmd; remove it"
                yield Problem((f"study.arms.{name}",), what)


# --- layout on a number of ranks -----------------------------------------------------------------------------


def accumulation(batch: Batch, ranks: int, where: str = "batch") -> int:
    """Micro-batches each rank runs an update: global_size / (ranks x micro_size).

    Raises RecipeError, with the nearest global sizes that can be split, where that is no whole number.
    """
    together = ranks * batch.micro_size
    if batch.global_size % together == 0:
        return batch.global_size // together
    near = " or ".join(str(each) for each in _multiples_around(batch.global_size, together))
    what = (
        f"batch.global_size {batch.global_size} cannot be split over {ranks} ranks x micro_size {batch.micro_size}; "
        f"use a global size of {near}, or another number of ranks"
    )
    raise RecipeError(where, what)


def check_layout(recipe: Recipe, ranks: int) -> dict[str, int]:
    """Accumulation of every stage on `ranks` ranks. RecipeError where the recipe cannot run on that many."""
    if ranks < 1:
        raise RecipeError("ranks", f"{ranks} ranks cannot train anything; use at least 1")
    if ranks % recipe.parallel.replicas:
        replicas = recipe.parallel.replicas
        raise RecipeError("parallel.replicas", f"{ranks} ranks cannot form {replicas} equal replicas; use a multiple")
    counts = {name: accumulation(stage.batch, ranks, f"stages.{name}") for name, stage in recipe.stages.items()}
    groups = recipe.rollout.exit_groups
    for name, stage in _of_kind(recipe, "dmd"):
        if counts[name] % groups:
            near = _multiples_around(stage.batch.global_size, ranks * stage.batch.micro_size * groups)
            what = (
                f"rollout.exit_groups {groups} does not divide the {counts[name]} micro-batches a rank runs at "
                f"{ranks} ranks; use another exit_groups or batch.global_size {' or '.join(map(str, near))}"
            )
            raise RecipeError(f"stages.{name}", what)
    return counts


# --- shared by the rules -------------------------------------------------------------------------------------


def _networks(recipe: Recipe) -> list[tuple[str, Network]]:
    return [("teacher", recipe.teacher), ("generator", recipe.generator), ("critic", recipe.critic)]


def _of_kind(recipe: Recipe, kind: str) -> list[tuple[str, Stage]]:
    return [(name, stage) for name, stage in recipe.stages.items() if stage.kind == kind]


_ROLES = ("parent", "teacher", "critic")
_FEW_STEP = ("consistency", "ode")  # kinds of stage that distil a few-step start


def _trains(stage: Stage) -> str:
    return "teacher" if stage.kind == "bidirectional" else "generator"


def _shape_difference(recipe: Recipe, one: str, other: str) -> str:
    first, second = getattr(recipe, one), getattr(recipe, other)
    names = [each.name for each in fields(Network) if getattr(first, each.name) != getattr(second, each.name)]
    return ", ".join(f"{one}.{name} {getattr(first, name)}, {other}.{name} {getattr(second, name)}" for name in names)


def _optimizers(recipe: Recipe) -> Iterable[tuple[str, Optimizer, int]]:
    """Every optimizer with the updates its network gets in its stage."""
    for name, stage in recipe.stages.items():
        yield f"stages.{name}.optimizer", stage.optimizer, stage.cycles
        if stage.foresight.weight:
            yield f"stages.{name}.foresight.optimizer", stage.foresight.optimizer, stage.cycles
        if stage.kind == "dmd":
            critic = stage.cycles * recipe.dmd.critic_updates
            yield "dmd.critic_optimizer", recipe.dmd.critic_optimizer, critic
            # The predictor learns with the generator and again on the replay after critic updates.
            with_foresight = max(0, stage.cycles - recipe.foresight.start_cycle)
            predictor = with_foresight * (1 + recipe.dmd.critic_updates)
            yield "foresight.optimizer", recipe.foresight.optimizer, predictor


def _multiples_around(value: int, step: int) -> list[int]:
    below = value // step * step
    return [each for each in (below, below + step) if each > 0]
