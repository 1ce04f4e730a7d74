"""The loop of every stage: position after position, cycle after cycle, from wherever its state is.

step        the update at this position (phases.py)
record      its losses, averaged over ranks; with them goes what signals and operators ask (desk.py)
advance     to the next position, or the next cycle
show        a grid of samples, when due
save        when due, or when somebody asked to save or to stop
"""

from __future__ import annotations

from dataclasses import dataclass

from mirai_dist.cycle.desk import Desk
from mirai_dist.cycle.gallery import Gallery
from mirai_dist.cycle.saver import Saver
from mirai_dist.cycle.stages import Stage
from mirai_dist.cycle.watch import Watch


class Stopped(RuntimeError):
    """A signal, a STOP file or an operator asked for the run to end; its state is saved and it can go on.

    The batch script requeues it, unless an operator asked: then RUN/HOLD is there.
    """

    exit_code = 10


@dataclass(frozen=True)
class Loop:
    """What a stage's cycles need around them: checkpoints, observation, sample grids, and ears for requests."""

    saver: Saver
    watch: Watch
    gallery: Gallery
    desk: Desk

    def run(self, stage: Stage, title: str) -> None:
        """Run the remaining cycles of a stage. Raises Stopped, after saving, when somebody asked for it."""
        with self.watch.stage(stage, title):
            while stage.cycle < stage.stage.cycles:
                stage.step()
                asked = self.watch.record(stage)
                stage.advance()
                cycle_ended = stage.position == 0
                if cycle_ended and not asked.stop:
                    self.gallery.cycle_ended(stage)
                if asked.stop or asked.save or (cycle_ended and self.saver.due(stage)):
                    self.saver.save(stage)
                self.desk.done(asked, stage)
                if asked.stop:
                    raise Stopped(
                        f"stopped by {asked.stop} in {title} before cycle {stage.cycle} "
                        f"position {stage.position}; run the same command to go on"
                    )
            self.desk.profiling.finish()
