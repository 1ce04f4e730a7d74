"""What is written down while a stage runs: progress, metrics, phase times, alarms."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mirai_dist.cycle.stages import Stage
from mirai_dist.observe.alarms import Change
from mirai_dist.observe.console import Bar, Console
from mirai_dist.observe.ledger import Ledger
from mirai_dist.observe.sinks import Sinks

SHOWN = ("loss/flow", "loss/consistency", "loss/ode", "loss/dmd", "loss/critic", "cosine/foresight")


class Watch:
    """Console and sinks of one stage."""

    def __init__(self, console: Console, sinks: Sinks) -> None:
        self.console, self.sinks = console, sinks
        self._bar: Bar | None = None
        self._shown: dict[str, float] = {}

    @contextmanager
    def stage(self, stage: Stage, title: str) -> Iterator[None]:
        """Show progress of a stage; its ledger tells the bar which phase runs."""
        self.sinks.truncate_to(stage.cycle, stage.position)
        with self.console.stage(title, stage.stage.cycles, stage.cycle) as bar:
            self._bar = bar
            stage.ledger = Ledger(on_phase=bar.phase)
            yield

    def record(self, stage: Stage) -> list[Change]:
        """Average the position's metrics over ranks and write them; at the end of a cycle also its phase times, and
        the alarms that rose or cleared, which are returned."""
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
        if stage.position == len(stage.positions) - 1:
            seconds = stage.ledger.close_cycle()
            record |= {"seconds": sum(seconds.values()), **{f"seconds/{name}": s for name, s in seconds.items()}}
            assert self._bar is not None
            self._bar.update(stage.cycle + 1, values=self._shown)
        self.sinks.record(record)
        for change in changes:
            self._tell(change, about)
        return changes

    def _tell(self, change: Change, about: dict[str, Any]) -> None:
        """Say that an alarm rose or cleared, and write a record of it beside those of metrics."""
        (self.console.warn if change.raised else self.console.say)(change.sentence)
        said = {"alarm": change.name, "sentence": change.sentence, f"alarm/{change.name}": float(change.raised)}
        self.sinks.record({**about, **said})
        self.sinks.text("alarms", change.sentence, change.cycle)
