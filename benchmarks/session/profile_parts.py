"""One trace of two parts of a cycle, a chunk pass of the generator and a critic step, and where their time goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.session.measure import Case, Desk
from benchmarks.session.one_gpu import TOO_LARGE, DrawnStage, OneGpu, one_gpu, with_small_teacher
from benchmarks.session.traces import breakdown, recorded
from mirai_dist.cycle import phases
from mirai_dist.cycle.roles import causal, velocity_of
from mirai_dist.cycle.stages import Moment
from mirai_dist.method.critic import critic_loss
from mirai_dist.method.rollout import Past, RolloutInputs, rollout
from mirai_dist.plan import passes, time

TRACE = "profile.json.gz"
CHUNK, CRITIC = "chunk pass", "critic step"
LONGEST = 10  # kernels that get a row, the longest first
SHOWN = 70  # characters of a kernel's name; templates make them longer


def parts(desk: Desk) -> None:
    """Rows of both parts; the trace is OUT/profile.json.gz, for Perfetto or chrome://tracing."""
    found = one_gpu(desk)
    if found is None:
        desk.skip(Case("profile", "any", "one sample"), TOO_LARGE)
        return
    one = with_small_teacher(found)
    stage = one.stage(desk.out)
    chunk, critic = chunk_pass(stage), critic_step(stage)
    for function in (chunk, critic):
        function()
    trace = desk.out / TRACE
    recorded(trace, {"warming up": chunk, CHUNK: chunk, CRITIC: critic})
    expected = predicted(one)
    for part in (CHUNK, CRITIC):
        _write(desk, one, part, expected.get(part))


def chunk_pass(stage: DrawnStage) -> Callable[[], object]:
    """One denoising pass of the last segment, which sees all others in the cache, without gradient."""
    video, text = stage.recipe.video, stage.run.encode([0], [0])
    shape = (stage.rollout.noises, video.latent_frames, video.channels, video.latent_height, video.latent_width)
    noise = stage.normal("profile/rollout", Moment(0, 0), [0], shape).transpose(0, 1)
    network, cache = causal(stage.generator.network), stage.cache(1)
    last = noise[0, :, -video.frames_per_segment :]
    timesteps = torch.full((1,), stage.rollout.timesteps[0], device=noise.device)
    with torch.no_grad():
        rollout(network, stage.rollout, RolloutInputs(noise, text, exit_step=0), cache)
        held = cache.view(room=video.frames_per_segment)
        past = Past(held, None, video.latent_frames - video.frames_per_segment)
        past = past._replace(text_keys_values=network(last, timesteps, text, past, 0).text_keys_values)

    @torch.no_grad()
    def run() -> object:
        return network(last, timesteps, text, past, 0)

    return run


def critic_step(stage: DrawnStage) -> Callable[[], object]:
    """An update of the critic on a finished rollout: forward, recomputation, backward, optimizer."""
    video, text = stage.recipe.video, stage.run.encode([0], [0])
    shape = (video.latent_frames, video.channels, video.latent_height, video.latent_width)
    latents, noise = (stage.normal(f"profile/{what}", Moment(0, 0), [0], shape) for what in ("latents", "noise"))
    timesteps = torch.full((1,), 500.0, device=noise.device)

    def loss_of(samples: list[int]) -> Tensor:
        return critic_loss(velocity_of(stage.critic.network), latents, noise, timesteps, text)

    return lambda: phases.update(stage, "critic", [stage.critic], [[0]], loss_of)


def predicted(one: OneGpu) -> dict[str, float]:
    """Milliseconds of both parts, as the planner counts them; none for a device that it does not know."""
    recipe, machine, seconds = one.recipe, one.cluster.machine(one.recipe.parallel), one.planned().seconds
    if machine is None or seconds is None:
        return {}
    made = [each for each in passes.rollout(recipe, batch=1) if not each.text]
    chunk = replace(max(made, key=lambda each: each.past), count=1.0)
    critic = sum(seconds[phase].total for phase in ("critic", "critic backward", "critic optimizer"))
    milliseconds = 1e3 / recipe.dmd.critic_updates
    return {CHUNK: 1e3 * time.of_passes(recipe, [chunk], machine).total, CRITIC: milliseconds * critic}


def _write(desk: Desk, one: OneGpu, part: str, expected: float | None) -> None:
    """A row for the part, one for each kind of work and for gaps, and for the longest kernels."""
    trace = desk.out / TRACE
    found = breakdown(trace, part)
    about = {"trace": TRACE, "trace_mib": trace.stat().st_size / (1 << 20), "launches": found.launches}
    case = Case(part, one.by, one.size)
    desk.write(case, ms=found.wall, predicted_ms=expected, predicted_from=["mirai plan"], **about)
    longest = dict(sorted(found.names.items(), key=lambda item: -item[1])[:LONGEST])
    for by, rows in (("kind", found.kinds), ("kernel", longest)):
        for name, milliseconds in rows.items():
            if milliseconds > 0:
                row = Case(f"{part} by {by}", name[:SHOWN], one.size)
                desk.write(row, ms=milliseconds, share=milliseconds / found.wall, calls=found.calls.get(name))
