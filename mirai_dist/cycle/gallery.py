"""Sample grids of a stage: below its directory, and in TensorBoard."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mirai_dist.cycle.stages import DmdStage, Stage
from mirai_dist.cycle.studio import Studio
from mirai_dist.evaluate import video_files
from mirai_dist.observe.sinks import Sinks

SHOWN = 6  # videos of a grid


@dataclass(frozen=True)
class Gallery:
    """Writes grids into `directory`/samples. Its methods are called by all ranks; rank 0 writes."""

    directory: Path
    sinks: Sinks

    def cycle_ended(self, stage: Stage) -> None:
        """Generator (raw weights), teacher x0 and critic x0, a row each, every `evaluate.grid_every` cycles."""
        every = stage.recipe.evaluate.grid_every
        if not isinstance(stage, DmdStage) or not every or stage.cycle % every:
            return
        with stage.ledger.phase("samples"):
            found = Studio(stage.run, SHOWN).judged_samples(stage.generator, stage.teacher, stage.critic)
            rows = torch.cat(list(found.values()))
            self._write(stage, rows, len(rows) // len(found), "judged")

    def stage_ended(self, stage: Stage) -> None:
        """What the stage has trained: its moving average where it keeps one."""
        role = next(iter(stage.roles.values()))
        studio = Studio(stage.run, SHOWN)
        sample = studio.sampler(stage.stage.kind)
        with role.average.swapped(role.network) if role.average else nullcontext():
            pixels = sample(role)
        stage.run.engine.release(role.network)
        self._write(stage, pixels, SHOWN // 2, "samples")

    def _write(self, stage: Stage, pixels: Tensor, columns: int, name: str) -> None:
        if stage.run.rank != 0:
            return
        frames, fps = video_files.grid(pixels, columns), stage.recipe.video.fps
        file = f"cycle-{stage.cycle:06d}" + ("" if name == "samples" else f"-{name}")
        video_files.write_mp4(self.directory / "samples" / f"{file}.mp4", frames, fps)
        self.sinks.video(name, video_files.gif_bytes(frames, fps), stage.cycle)
