"""What is written down while a stage runs: progress, metrics, phase times, alarms, and which rank is slow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from mirai_dist.cycle.desk import Asked, Desk
from mirai_dist.cycle.stages import Stage
from mirai_dist.observe.alarms import Change
from mirai_dist.observe.console import Bar, Console
from mirai_dist.observe.ledger import Ledger
from mirai_dist.observe.sinks import Sinks
from mirai_dist.observe.slow import SlowRanks
from mirai_dist.operate.events import Events
from mirai_dist.operate.status import SLOW

SHOWN = ("loss/flow", "loss/consistency", "loss/ode", "loss/dmd", "loss/critic", "cosine/foresight")


class Recorded(NamedTuple):
    """What came with the metrics of a position, equal on all ranks: what was asked, which alarms rose or cleared."""

    asked: Asked
    changes: list[Change]


class Watch:
    """Console and sinks of one stage; desk: what is asked of the run travels with the metrics."""

    def __init__(self, console: Console, sinks: Sinks, desk: Desk, slow: SlowRanks, events: Events) -> None:
        self.console, self.sinks, self.desk, self._slow, self._events = console, sinks, desk, slow, events
        self._bar: Bar | None = None
        self._shown: dict[str, float] = {}

    @contextmanager
    def stage(self, stage: Stage, title: str) -> Iterator[None]:
        """Show progress of a stage; its ledger tells the bar which phase runs."""
        self.sinks.truncate_to(stage.cycle, stage.position)
        with self.console.stage(title, stage.stage.cycles, stage.cycle) as bar:
            self._bar = bar
            stage.ledger = Ledger(on_phase=bar.phase, waits=stage.run.waits)
            yield

    def record(self, stage: Stage) -> Recorded:
        """Average the position's metrics over ranks and write them; at the end of a cycle also its phase times, and the
        alarms that rose or cleared. The one collective of a position outside its update."""
        last = stage.position == len(stage.positions) - 1
        stage.metrics.send(self.desk.votes(stage), stage.ledger.own_seconds() if last else None)
        values, changes = stage.observe()
        about = {
            "stage": stage.name,
            "cycle": stage.cycle,
            "position": stage.position,
            "phase": stage.positions[stage.position],
            "time": time.time(),
        }
        record = {**about, **values}
        self._shown |= {name: values[name] for name in SHOWN if name in values}
        if last:
            self._name_slow_ranks(stage, about)
            seconds = stage.ledger.close_cycle()
            record |= {"seconds": sum(seconds.values()), **{f"seconds/{name}": s for name, s in seconds.items()}}
            assert self._bar is not None
            self._bar.update(stage.cycle + 1, values=self._shown)
        self.sinks.record(record)
        for change in changes:
            self._tell(change, about)
        return Recorded(self.desk.decide(stage.metrics.arrived.votes), changes)

    def _tell(self, change: Change, about: dict[str, Any]) -> None:
        """Say that an alarm rose or cleared, and write a record of it beside those of metrics."""
        (self.console.warn if change.raised else self.console.say)(change.sentence)
        said = {"alarm": change.name, "sentence": change.sentence, f"alarm/{change.name}": float(change.raised)}
        self.sinks.record({**about, **said})
        self.sinks.text("alarms", change.sentence, change.cycle)
        self._note(about, change.name, change.raised, change.sentence)

    def _note(self, about: dict[str, Any], name: str, up: bool, text: str) -> None:
        self._events.write("alarm", stage=about["stage"], cycle=about["cycle"], name=name, up=up, text=text)

    def _name_slow_ranks(self, stage: Stage, about: dict[str, Any]) -> None:
        for change in self._slow.cycle_ended(stage.metrics.arrived.rows):
            self.console.warn(f"{stage.name} cycle {stage.cycle}: {change.text}")
            self._note(about, f"{SLOW} {change.rank} in {change.phase}", change.slow, change.text)
