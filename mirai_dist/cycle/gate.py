"""The gate before a stage, run: load the parent, roll out fixed prompts, measure, and go on or stop the chain.

Every rank samples and measures its share, gathers the others' numbers, and so comes to the same verdict. What was
found is kept in RUN/stages/<stage>/gate.json, the samples beside it in gate/. A gate that passed is not run again
while parent, bounds and prompts stay what they were.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mirai_dist.config import FileError, RecipeError, schema
from mirai_dist.config.gates import Interval, bounds_of, has_reference
from mirai_dist.config.jobs import Job
from mirai_dist.cycle.cycle import Stopped
from mirai_dist.cycle.encoders import clips_of
from mirai_dist.cycle.pipeline import Place, open_pairs, run_on
from mirai_dist.cycle.stages import Run
from mirai_dist.cycle.starts import Source, Started, fill, identity, source_of
from mirai_dist.cycle.studio import Studio, gathered
from mirai_dist.evaluate import gate as measures_of
from mirai_dist.evaluate import report as page
from mirai_dist.evaluate import video_files
from mirai_dist.evaluate.gate import GateMeasures, Judged
from mirai_dist.state.cursor import Cursor

RECORD, SAMPLES = "gate.json", "gate"


class GateFailed(RuntimeError):
    """A stage's start is not fit to be trained further. One line; starting again as it is will not help."""

    exit_code = 20


@dataclass(frozen=True)
class Gate:
    """The gate of one stage, whose recipe and directory are those of its first job; its draws are the recipe's own."""

    job: Job
    place: Place

    @property
    def settings(self) -> schema.Stage:
        return self.job.recipe.stages[self.job.stage]

    @property
    def directory(self) -> Path:
        return self.place.run_dir / "stages" / self.job.stage

    @property
    def title(self) -> str:
        return f"{self.job.stage} gate"

    @property
    def parent(self) -> Source:
        found = source_of(self.job.recipe, self.job.stage, self.settings.parent, self.place.run_dir)
        assert found is not None  # a rule refuses a gate without a parent
        return found

    def asked(self, parent: Source) -> dict[str, Any]:
        """What the verdict depends on, as JSON values: the gate is run again when any of it changes."""
        bounds = asdict(bounds_of(self.job.recipe, self.job.stage))
        return {"parent": identity(parent), "seed": self.job.recipe.seed, "clips": self.settings.gate.clips, **bounds}

    def passed(self, parent: Source) -> bool:
        """Whether it has passed already; one answer on all ranks."""
        record = _read(self.directory / RECORD)
        return all(gathered(bool(record and record["passed"] and record["asked"] == self.asked(parent))))


def judge(job: Job, place: Place) -> None:
    """Run the gate before a stage, unless it has passed. Called by all ranks. Raises GateFailed; FileError for a
    parent that cannot be read or is bidirectional."""
    gate = Gate(replace(job, seed=job.recipe.seed), place)
    parent = gate.parent
    if gate.passed(parent):
        place.console.say(f"{gate.title}: {parent.name} has passed already, skipped")
        return
    with place.stop.raising(Stopped(f"stopped in {gate.title}; run the same command to judge again")):
        asked, (started, judged) = gate.asked(parent), _measured(gate, parent)
    reasons = measures_of.reasons(judged, gate.settings.gate.failing)
    if place.ranks.rank == 0:
        _write(gate.directory / RECORD, {
            "stage": job.stage,
            "passed": not reasons,
            "reasons": reasons,
            "parent": started.described(),
            "asked": asked,
            "measures": [asdict(each) for each in judged],
        })  # fmt: skip
    for each in judged:
        place.console.say(f"{gate.title}: {_in_words(each)}")
    samples = gate.directory / SAMPLES
    if reasons:
        key = f"stages.{job.stage}.gate"
        raise GateFailed(
            f"{gate.title}: {parent.name} ({parent.path}) is not fit to start from: {'; '.join(reasons)}. Look at "
            f"{samples}, then train {parent.name} longer or otherwise, change {key}.MEASURE=[low,high], or drop the "
            f"gate with {key}.clips=0"
        )
    place.console.say(f"{gate.title}: {parent.name} passed, samples in {samples}")


def require(job: Job, place: Place) -> None:
    """RecipeError unless the gate before a stage has passed. Called by all ranks."""
    gate = Gate(job, place)
    parent = gate.parent
    if not gate.passed(parent):
        what = f"{parent.name} as it is has not passed the gate before {job.stage}; run --only {job.stage}.gate first"
        raise RecipeError(f"--only {job.stage}", f"{what}, or drop it: stages.{job.stage}.gate.clips=0")


def results(run_dir: Path, recipe: schema.Recipe) -> list[page.GateResult]:
    """What the gates of a run said, in the order of the stages."""
    records = (_read(run_dir / "stages" / name / RECORD) for name in recipe.stages)
    return [_result(record) for record in records if record]


def _result(record: dict[str, Any]) -> page.GateResult:
    start, rows = record["parent"], []
    for each in map(_judged, record["measures"]):
        counts = len(each.outside), len(each.values)
        rows.append(page.GateRow(each.measure, each.median, each.legal.low, each.legal.high, each.reference, *counts))
    described = f"{start['name']} ({start['which']}, digest {start['digest']})"
    return page.GateResult(record["stage"], described, record["passed"], record["asked"]["failing"], rows)


def _in_words(judged: Judged) -> str:
    against = "" if math.isnan(judged.reference) else f" ({judged.reference:.3g} in clean clips)"
    outside = f"{len(judged.outside)} of {len(judged.values)} clips outside {judged.legal}"
    return f"{judged.measure} {judged.median:.3g}, {outside}{against}"


def _read(path: Path) -> dict[str, Any] | None:
    """The record of a gate, None where it was never run."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(path: Path, record: dict[str, Any]) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(page.strict_json(record), encoding="utf-8")
    beside.replace(path)


def _judged(stored: dict[str, Any]) -> Judged:
    values, legal = tuple(map(float, stored["values"])), Interval(**stored["legal"])
    return Judged(stored["measure"], values, legal, float(stored["reference"]))


def _measured(gate: Gate, parent: Source) -> tuple[Started, list[Judged]]:
    """Sample the parent and measure; the samples are in the run directory then."""
    job, place, stage = gate.job, gate.place, gate.settings
    run = run_on(job, place, open_pairs(job, place) if stage.kind == "ode" and job.recipe.data.ode_pairs else None)
    studio = Studio(run, stage.gate.clips)
    if place.ranks.rank == 0:
        shutil.rmtree(gate.directory / SAMPLES, ignore_errors=True)  # of an earlier try
    found: list[Started] = []

    def load(network: nn.Module) -> None:
        found.append(fill(network, parent, stage.kind, "parent"))

    role = studio.builder.wan("generator", job.recipe.generator, None, load)
    [started] = found
    if started.kind == "diffusion":
        raise FileError(parent.path, f"is bidirectional, and {gate.title} rolls out causal networks; drop it")
    place.console.say(f"{gate.title}: {stage.gate.clips} clips of {started}")
    clips, latents = studio.causal_latents(started.kind, role, stage.batch.micro_size)
    _write_samples(gate, studio, clips, latents)
    reference = _reference(run, studio, clips) if has_reference(job.recipe, job.stage) else None
    measures = _of_all_ranks(clips, latents, job.recipe.video.frames_per_segment)
    return started, measures_of.judge(measures, bounds_of(job.recipe, job.stage), reference)


def _reference(run: Run, studio: Studio, clips: list[int]) -> GateMeasures:
    """Measures of clean clips of the same captions (an ode stage's trajectories hold theirs), or where captions come
    from a prompt file, of as many of the recipe's clips."""
    source, numbers = run.clips or run.pairs, studio.numbers
    if source is None:
        source = clips_of(run.recipe, run.draws.device)
        cursor = Cursor(run.recipe.seed, "gate", source.size)
        numbers = [cursor.index(n) for n in cursor.take(studio.count)]
    return _of_all_ranks(clips, source.latents([numbers[clip] for clip in clips]), run.recipe.video.frames_per_segment)


def _of_all_ranks(clips: list[int], latents: Tensor, frames_per_segment: int) -> GateMeasures:
    """Measures of everybody's clips, in their order."""
    own = [measures_of.measure(each[None], frames_per_segment) for each in latents]
    by_clip: dict[int, GateMeasures] = {}
    for part in gathered(dict(zip(clips, own, strict=True))):
        by_clip |= part
    return GateMeasures.of_clips([by_clip[clip] for clip in sorted(by_clip)])


def _write_samples(gate: Gate, studio: Studio, clips: list[int], latents: Tensor) -> None:
    """Every rank its clips, those that pad its share left out."""
    for clip, latent in zip(clips, latents, strict=True):
        if clip % studio.run.ranks == studio.run.rank and latent.isfinite().all():
            pixels = studio.run.vae.decode(latent[None])[0].cpu()
            path = gate.directory / SAMPLES / video_files.vbench_name(studio.captions[clip], clip)
            video_files.write_mp4(path, video_files.to_uint8(pixels), gate.job.recipe.video.fps)
