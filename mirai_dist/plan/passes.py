"""Which network calls the updates of a stage make, as data: cycle/phases.py told as counts.

Everything else here is derived from these passes: FLOPs (flops.py), gathers and reductions (traffic.py), saved
activations (memory.py), seconds (time.py). A pass is one call of one network by one rank, for one micro-batch.

Exit steps are drawn uniformly, so passes of a rollout have expected counts: with n denoising steps a segment makes
(n - 1) / 2 passes without gradient on average, its exit pass, and, but for the last one, a context pass. What a
segment attends to is followed frame by frame, windows and sinks included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mirai_dist.config.rules import accumulation
from mirai_dist.config.schema import Recipe, Stage
from mirai_dist.method.arithmetic import PRESETS, captured_blocks, kept_frames, supervised_segments
from mirai_dist.plan.shapes import TEXT_DIM, frame_tokens, network_of, text_encoder

Calls = tuple[tuple[int, int], ...]  # (queries, keys) of each attention call


@dataclass(frozen=True)
class Pass:
    """One call of a network.

    phase: as the run's ledger names it. batch: samples. tokens: of one sample's sequence. attention: its
    self-attention calls. blocks: executed ones. times: different timesteps that are embedded. halves: 2 for a doubled
    sequence [clean | noisy]. text: prompts are projected to keys and values in this pass (else they are cached).
    head: the pass ends in a velocity (else it exits early). gradient: it is differentiated. first: it is a segment of
    a rollout and `past` tokens of its keys come from the cache. copies: of the past, made for its segment where sinks
    have moved: one that backward reads, and perhaps one for passes without gradient. answers: of the predictor, how
    many of its sequences each one is compared for. count: calls expected in a micro-batch.
    """

    phase: str
    role: str
    batch: int
    tokens: int
    attention: Calls
    blocks: int
    times: int = 1
    halves: int = 1
    text: bool = True
    head: bool = True
    gradient: bool = False
    past: int = 0
    copies: int = 0
    answers: tuple[int, ...] = ()
    count: float = 1.0


@dataclass(frozen=True)
class Update:
    """One optimizer update: the passes of each micro-batch in order, then backward.

    times: updates a cycle. trained: roles that the optimizer steps. refreshed: frozen roles whose weights it replaces.
    """

    name: str
    times: int
    micro_batches: int
    passes: tuple[Pass, ...]
    trained: tuple[str, ...]
    refreshed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Roles:
    """Networks a stage holds: trained ones, frozen ones, and those with a moving average."""

    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    averaged: tuple[str, ...]


def roles(recipe: Recipe, stage: Stage) -> Roles:
    """Networks of a stage, by role, as cycle/stages.py builds them; "text" is a UMT5 held by the job."""
    text = ("text",) if holds_text_encoder(recipe) else ()
    if stage.kind == "dmd":
        trained = ("generator", "critic") + (("predictor",) if recipe.foresight.weight > 0 else ())
        frozen: tuple[str, ...] = ("teacher",)
    else:
        trained = ("teacher",) if stage.kind == "bidirectional" else ("generator",)
        frozen = ("ar_teacher", "target") if stage.kind == "consistency" else ()
        if stage.foresight.weight > 0:
            trained, frozen = (*trained, "predictor"), ("encoder", *frozen)
    averaged = trained[:1] if stage.ema.decay > 0 and stage.ema.start_update <= stage.cycles else ()
    return Roles(trained, frozen + text, averaged)


def updates(recipe: Recipe, stage: Stage, ranks: int, foresight: bool = True) -> tuple[Update, ...]:
    """The updates of one cycle. foresight: whether the cycle trains with it (recipe.foresight.start_cycle).

    RecipeError where the batch cannot be split over the ranks.
    """
    micro_batches = accumulation(stage.batch, ranks)
    if stage.kind == "dmd":
        foresight = foresight and recipe.foresight.weight > 0
        return tuple(_dmd(recipe, stage.batch.micro_size, micro_batches, foresight))
    batch = stage.batch.micro_size
    passes = (*_text(recipe, batch), *_KINDS[stage.kind](recipe, batch))
    if stage.foresight.weight > 0:
        passes += tuple(_foresight_on_truth(recipe, stage))
    trained = roles(recipe, stage).trained
    refreshed = ("target",) if stage.kind == "consistency" else ()
    return (Update(stage.kind, 1, micro_batches, passes, trained, refreshed),)


def holds_text_encoder(recipe: Recipe) -> bool:
    """Whether the job holds a UMT5 whose shape is known."""
    return recipe.text.encoder == "umt5" and recipe.text.dim == TEXT_DIM


def _text(recipe: Recipe, batch: int) -> tuple[Pass, ...]:
    """Prompts are encoded one at a time; counted as if each had `text.length` tokens, which is the most."""
    if not holds_text_encoder(recipe):
        return ()
    length = recipe.text.length
    return (Pass("text", "text", 1, length, ((length, length),), text_encoder().blocks, count=batch),)


# --- teachers and the few-step start -------------------------------------------------------------------------------


def _bidirectional(recipe: Recipe, batch: int) -> list[Pass]:
    return [_whole(recipe, "forward", "teacher", batch, gradient=True)]


def _diffusion_forcing(recipe: Recipe, batch: int) -> list[Pass]:
    frames = recipe.video.latent_frames
    causal = replace(_whole(recipe, "forward", "generator", batch, gradient=True), times=frames)
    return [replace(causal, attention=segment_causal(recipe))]


def _teacher_forced(recipe: Recipe, batch: int, role: str = "generator", gradient: bool = True) -> Pass:
    """The doubled sequence: clean segments see clean ones up to themselves, noisy ones the clean before and
    themselves; either way segment i attends to i + 1 segments."""
    whole = _whole(recipe, "forward", role, batch, gradient)
    doubled = segment_causal(recipe) * 2
    return replace(whole, tokens=2 * whole.tokens, attention=doubled, times=recipe.video.latent_frames, halves=2)


def _teacher_forcing(recipe: Recipe, batch: int) -> list[Pass]:
    return [_teacher_forced(recipe, batch)]


def _consistency(recipe: Recipe, batch: int) -> list[Pass]:
    return [
        _teacher_forced(recipe, 2 * batch, "ar_teacher", gradient=False),  # with the prompt and without
        _teacher_forced(recipe, batch, "target", gradient=False),
        _teacher_forced(recipe, batch),
    ]


_KINDS: dict[str, Callable[[Recipe, int], list[Pass]]] = {
    "bidirectional": _bidirectional,
    "diffusion_forcing": _diffusion_forcing,
    "teacher_forcing": _teacher_forcing,
    "consistency": _consistency,
    "ode": _teacher_forcing,  # the state of a trajectory given the ground truth
}


def _foresight_on_truth(recipe: Recipe, stage: Stage) -> list[Pass]:
    """Foresight of a few-step start: the encoder on the ground truth, and the predictor on the student's states."""
    settings, batch = stage.foresight, stage.batch.micro_size
    pooled = recipe.video.frames_per_segment if settings.fusion == "frames" else 1
    predictor = predictor_pass(recipe, batch)
    tokens = predictor.tokens // pooled
    answering = replace(predictor, tokens=tokens, attention=((tokens, tokens),))
    if settings.fusion != "offsets":
        segments = recipe.video.latent_frames // recipe.video.frames_per_segment
        answering = replace(answering, answers=tuple(batch * max(0, segments - k) for k in recipe.foresight.offsets))
    return [_encoder(recipe, batch, "encoder", settings.encoder_attention), answering]


def trajectory(recipe: Recipe) -> list[Pass]:
    """Passes of the AR teacher for one trajectory of an ode stage: prompt and negative prompt as a batch of two,
    `ode.points` Euler steps a segment, and a context pass for each segment but the last."""
    tokens = recipe.video.frames_per_segment * frame_tokens(recipe)
    found = []
    segments = recipe.video.latent_frames // recipe.video.frames_per_segment
    for index in range(segments):
        steps = recipe.ode.points + (index + 1 < segments)
        whole = _segment(recipe, 2, tokens, index * tokens, "trajectories")
        if index == 0:
            found.append(replace(whole, text=True))
            steps -= 1
        found.append(replace(whole, count=steps))
    return found


# --- distribution matching -----------------------------------------------------------------------------------------


def _dmd(recipe: Recipe, batch: int, micro_batches: int, foresight: bool) -> Iterator[Update]:
    rolled, critics = rollout(recipe, batch, gradient=True), recipe.dmd.critic_updates
    text = _text(recipe, batch)
    scores = [
        _whole(recipe, "scores", "critic", batch),
        _whole(recipe, "scores", "teacher", 2 * batch),  # with the prompt and without
    ]
    extra: list[Pass] = []
    if foresight:
        extra = [_encoder(recipe, batch, "teacher", recipe.foresight.encoder_attention), predictor_pass(recipe, batch)]
    trained = ("generator", *(("predictor",) if foresight else ()))
    yield Update("generator", 1, micro_batches, (*text, *rolled, *scores, *extra), trained)
    critic = _whole(recipe, "critic", "critic", batch, gradient=True)
    yield Update("critic", critics, micro_batches, (*text, *rollout(recipe, batch), critic), ("critic",))
    replays = critics if PRESETS[recipe.foresight.preset].replay_after_generator else critics - 1
    if foresight and replays:
        again = replace(predictor_pass(recipe, batch), phase="replay", past=0)
        yield Update("replay", replays, micro_batches, (again,), ("predictor",))


def _encoder(recipe: Recipe, batch: int, role: str, attention: str) -> Pass:
    """The foresight encoder on a whole clip, with early exit."""
    blocks = captured_blocks(recipe.teacher.blocks, recipe.foresight.depth, PRESETS[recipe.foresight.preset])
    encoder = replace(_whole(recipe, "encoder", role, batch), blocks=blocks, head=False)
    return replace(encoder, attention=segment_causal(recipe)) if attention == "causal" else encoder


def predictor_pass(recipe: Recipe, batch: int) -> Pass:
    """The predictor on a micro-batch: supervised segments are its batch, so nothing crosses them. `past` says that
    its input has gradient: it comes from the generator, and not from the replay cache."""
    video = recipe.video
    tokens = video.frames_per_segment * frame_tokens(recipe)
    supervised = supervised_segments(video.latent_frames // video.frames_per_segment, recipe.foresight.offsets)
    return Pass(
        "predictor",
        "predictor",
        batch * len(supervised),
        tokens,
        ((tokens, tokens),),
        recipe.foresight.predictor_blocks,
        text=False,
        gradient=True,
        past=1,
        answers=(batch * len(supervised),),
    )


def rollout(recipe: Recipe, batch: int, gradient: bool = False) -> list[Pass]:
    """Passes of a rollout in expectation over its exit steps; equal ones are counted together."""
    steps, first_steps = len(recipe.rollout.steps), len(recipe.rollout.first_steps)
    counts: dict[Pass, float] = {}
    for exit_step in range(steps):
        for first_exit in range(first_steps) if first_steps else [exit_step]:
            for each in _rollout(recipe, batch, (first_exit, exit_step), gradient):
                counts[each] = counts.get(each, 0.0) + 1 / steps / (first_steps or 1)
    return [replace(each, count=count) for each, count in counts.items()]


def _rollout(recipe: Recipe, batch: int, exits: tuple[int, int], gradient: bool) -> Iterator[Pass]:
    """Passes of one rollout: exits are the exit steps of the first segment and of the others."""
    length = recipe.video.frames_per_segment
    total, tokens = rollout_frames(recipe), length * frame_tokens(recipe)
    text_is_cached = False
    for first in range(0, total, length):
        seen = visible_frames(recipe, first, rollout_cache_frames(recipe)) * frame_tokens(recipe)
        with_gradient = gradient and first >= total - recipe.video.latent_frames
        copies = _copies(recipe, first) if with_gradient else 0
        one = replace(_segment(recipe, batch, tokens, seen, "rollout"), copies=copies)
        for _ in range(exits[0] if first == 0 else exits[1]):
            yield replace(one, text=not text_is_cached)
            text_is_cached = True
        # Where it is differentiated, an exit pass projects the text itself: that has gradient too.
        yield replace(one, text=with_gradient or not text_is_cached, gradient=with_gradient)
        if first + length < total:
            yield replace(one, text=not text_is_cached)
            text_is_cached = True


def _copies(recipe: Recipe, first: int) -> int:
    """Copies of what the segment with a graph at frame `first` sees (models/wan/kv_cache.py): sinks are not turned
    where they lie if a segment with a graph has seen them there. Leaky rollouts read keys of their own."""
    settings = recipe.rollout
    window = settings.window_frames - recipe.video.frames_per_segment
    if not settings.sink_frames or settings.kv_grad == "leaky" or first <= window:
        return 0
    return 2 if rollout_frames(recipe) - recipe.video.latent_frames <= window else 1


def rollout_frames(recipe: Recipe) -> int:
    """Latent frames of a training rollout."""
    return recipe.rollout.total_frames or recipe.video.latent_frames


def rollout_cache_frames(recipe: Recipe) -> int:
    """Past frames that the KV cache of training rollouts holds: all but the last segment, or what backward reads."""
    video, settings = recipe.video, recipe.rollout
    length = video.frames_per_segment
    window = settings.window_frames - length if settings.window_frames else 0
    return kept_frames(rollout_frames(recipe), video.latent_frames, length, window, settings.sink_frames)


def visible_frames(recipe: Recipe, written: int, held: int) -> int:
    """Past frames that the segment after `written` frames sees, of a cache of `held` frames: window and sinks."""
    settings = recipe.rollout
    sink = settings.sink_frames
    window = settings.window_frames - recipe.video.frames_per_segment if settings.window_frames else 0
    ring = max(0, held - sink)
    shown = min(ring, window - sink if window else ring)
    return min(sink, written) + written - max(written - shown, min(sink, written))


def _segment(recipe: Recipe, batch: int, tokens: int, past: int, phase: str) -> Pass:
    blocks = recipe.generator.blocks
    role = "generator" if phase == "rollout" else "ar_teacher"
    return Pass(phase, role, batch, tokens, ((tokens, past + tokens),), blocks, text=False, past=past)


def _whole(recipe: Recipe, phase: str, role: str, batch: int, gradient: bool = False) -> Pass:
    """A network on the whole clip, every token seeing every other."""
    tokens = recipe.video.latent_frames * frame_tokens(recipe)
    return Pass(phase, role, batch, tokens, ((tokens, tokens),), network_of(role, recipe).blocks, gradient=gradient)


def segment_causal(recipe: Recipe) -> Calls:
    """Segments that see themselves and all earlier ones."""
    tokens: int = recipe.video.frames_per_segment * frame_tokens(recipe)
    ends: Sequence[int] = range(tokens, recipe.video.latent_frames * frame_tokens(recipe) + 1, tokens)
    return tuple((tokens, end) for end in ends)
