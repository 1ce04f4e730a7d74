"""The loop of every stage: position after position, cycle after cycle, from wherever its state is.

step        the update at this position (phases.py)
record      its losses, averaged over ranks
advance     to the next position, or the next cycle
show        a grid of samples, when due
save        when due, or when somebody asked to stop
"""

from __future__ import annotations

from dataclasses import dataclass

from mirai_dist.cycle.gallery import Gallery
from mirai_dist.cycle.saver import Saver
from mirai_dist.cycle.stages import Stage
from mirai_dist.cycle.watch import Watch
from mirai_dist.runtime.signals import StopRequest


class Stopped(RuntimeError):
    """A signal or a STOP file asked for the run to end; its state is saved and it wants to be requeued."""

    exit_code = 10


@dataclass(frozen=True)
class Loop:
    """What a stage's cycles need around them: checkpoints, observation, sample grids, and ears for signals."""

    saver: Saver
    watch: Watch
    gallery: Gallery
    stop: StopRequest

    def run(self, stage: Stage, title: str) -> None:
        """Run the remaining cycles of a stage. Raises Stopped, after saving, when a signal came."""
        with self.watch.stage(stage, title):
            while stage.cycle < stage.stage.cycles:
                stage.step()
                self.watch.record(stage)
                stage.advance()
                if self.stop.agreed():
                    self.saver.save(stage)
                    raise Stopped(
                        f"stopped by {self.stop.reason or 'a signal'} in {title} before cycle {stage.cycle} "
                        f"position {stage.position}; run the same command to go on"
                    )
                if stage.position == 0:
                    self.gallery.cycle_ended(stage)
                    if self.saver.due(stage):
                        self.saver.save(stage)
