"""The loop of every stage: position after position, cycle after cycle, from wherever its state is.

step        the update at this position (phases.py)
record      its losses, averaged over ranks; with them goes what signals and operators ask (desk.py)
advance     to the next position, or the next cycle
show        a grid of samples, when due
save        when due, when somebody asked to save or to stop, or when an alarm is to stop the run
"""

from __future__ import annotations

from dataclasses import dataclass

from mirai_dist.cycle.desk import Desk
from mirai_dist.cycle.gallery import Gallery
from mirai_dist.cycle.saver import Saver
from mirai_dist.cycle.stages import Stage
from mirai_dist.cycle.watch import Watch
from mirai_dist.observe.alarms import Change


class Stopped(RuntimeError):
    """A signal, a STOP file or an operator asked for the run to end; its state is saved and it can go on.

    The batch script requeues it, unless an operator asked: then RUN/HOLD is there.
    """

    exit_code = 10


class Alarmed(RuntimeError):
    """An alarm rose in a run that was told to stop at one; its state is saved. Not requeued: a person decides."""

    exit_code = 20


@dataclass(frozen=True)
class Loop:
    """What a stage's cycles need around them: checkpoints, observation, sample grids, and ears for requests."""

    saver: Saver
    watch: Watch
    gallery: Gallery
    desk: Desk

    def run(self, stage: Stage, title: str) -> None:
        """Run the remaining cycles of a stage. Raises, after saving, Stopped when somebody asked for it, Alarmed when
        an alarm rose and `alarms.on_alarm` is stop."""
        with self.watch.stage(stage, title):
            while stage.cycle < stage.stage.cycles:
                stage.step()
                asked, changes = self.watch.record(stage)
                stage.advance()
                self._heed(stage, changes)
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

    def _heed(self, stage: Stage, changes: list[Change]) -> None:
        risen = [change.sentence for change in changes if change.raised]
        if risen and stage.recipe.alarms.on_alarm == "stop":
            self.saver.save(stage)
            raise Alarmed(
                f"{stage.name}: {'; '.join(risen)}; saved before cycle {stage.cycle} (alarms.on_alarm stop): the same "
                "command goes on past it"
            )
