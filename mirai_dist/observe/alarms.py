"""Alarms on the measures of a dmd stage: a run that is dying says so while its losses still look well.

Each alarm watches one metric. Its mean over the last cycles is compared with limits that the recipe gives; it rises
once, and clears when that mean has stayed inside for as many cycles. So one odd cycle raises nothing, and a metric
that hovers at its limit does not chatter. What an alarm has seen is in `state`, for the checkpoint: a resumed run
says what the uninterrupted one would have said, and nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mirai_dist.config import schema


@dataclass(frozen=True)
class Alarm:
    """One alarm: it rises when the mean of `metric` leaves [low, high].

    what, look: the rest of its sentence: what that means, and where to look. draws: independent draws behind one
    cycle's value, for a metric in standard deviations of one draw: then the limits are standard deviations of the
    mean, which shrink as draws gather. 0: the limits are those of the metric itself. to_start: the mean is taken
    relative to the metric's mean over the warm-up cycles.
    """

    name: str
    metric: str
    low: float
    high: float
    what: str
    look: str
    draws: int = 0
    to_start: bool = False

    def reading(self, seen: Seen) -> float:
        """The number that is compared with the limits; nan when a value of the window is not finite."""
        mean = _mean(seen.window)
        if self.to_start:
            start = _mean(seen.start)
            return mean / start if start else math.nan
        return mean * math.sqrt(self.draws * len(seen.window)) if self.draws else mean

    @property
    def unit(self) -> str:
        """What follows the reading in a sentence."""
        return " standard deviations" if self.draws else " of its value at the start" if self.to_start else ""

    def rises_at(self, reading: float) -> bool:
        return not self.low <= reading <= self.high  # nan is outside


def _mean(values: Sequence[float | None]) -> float:
    """nan when a value was not finite (None)."""
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if finite and len(finite) == len(values) else math.nan


@dataclass
class Seen:
    """What one alarm has seen: values of the warm-up cycles, the last values after them (None: not finite), whether it
    is up, and for how many cycles it has been inside its limits."""

    start: list[float | None] = field(default_factory=list)
    window: list[float | None] = field(default_factory=list)
    raised: bool = False
    calm: int = 0


@dataclass(frozen=True)
class Change:
    """An alarm that rose or cleared, and the sentence that says so."""

    name: str
    cycle: int
    raised: bool
    sentence: str


class Alarms:
    """The alarms of one stage, fed with the metrics of each position, which are equal on all ranks.

    limits: its warm-up and window. alarms: `dmd_alarms`, or none for stages of other kinds.
    """

    def __init__(self, limits: schema.Alarms, alarms: Sequence[Alarm] = ()) -> None:
        self._limits, self._alarms = limits, tuple(alarms)
        self._seen = {alarm.name: Seen() for alarm in self._alarms}
        self._metrics = {alarm.metric for alarm in self._alarms}
        self._cycle: dict[str, list[float | None]] = {}

    @property
    def raised(self) -> list[str]:
        """Names of the alarms that are up."""
        return [name for name, seen in self._seen.items() if seen.raised]

    def record(self, values: Mapping[str, float]) -> None:
        """Take the metrics of one position of a cycle; a cycle counts the mean over its positions."""
        for name in self._metrics & values.keys():
            value = values[name]
            self._cycle.setdefault(name, []).append(value if math.isfinite(value) else None)

    def close_cycle(self, cycle: int) -> list[Change]:
        """The cycle's positions are done: which alarms rose or cleared. A metric that was not recorded leaves its
        alarm as it is (foresight that has not begun)."""
        recorded, self._cycle = self._cycle, {}
        changes = []
        for alarm in self._alarms:
            if alarm.metric in recorded:
                mean = _mean(recorded[alarm.metric])
                changes += self._step(alarm, cycle, mean if math.isfinite(mean) else None)
        return changes

    def _step(self, alarm: Alarm, cycle: int, value: float | None) -> list[Change]:
        seen, limits = self._seen[alarm.name], self._limits
        if len(seen.start) < limits.warmup_cycles:
            seen.start.append(value)
            return []
        seen.window = [*seen.window, value][-limits.window_cycles :]
        if len(seen.window) < limits.window_cycles:
            return []
        reading = alarm.reading(seen)
        outside = alarm.rises_at(reading)
        seen.calm = 0 if outside else seen.calm + 1
        if outside and not seen.raised:
            seen.raised = True
            return [Change(alarm.name, cycle, True, self._sentence(alarm, cycle, reading))]
        if seen.raised and seen.calm >= limits.window_cycles:
            seen.raised = False
            sentence = f"alarm {alarm.name} cleared at cycle {cycle}: {alarm.metric} is {reading:.3g}{alarm.unit} again"
            return [Change(alarm.name, cycle, False, sentence)]
        return []

    def _sentence(self, alarm: Alarm, cycle: int, reading: float) -> str:
        limit = f"at least {alarm.low:.3g}" if reading < alarm.low else f"at most {alarm.high:.3g}"
        window = self._limits.window_cycles
        span = "the last cycle" if window == 1 else f"the last {window} cycles"
        return (
            f"alarm {alarm.name} at cycle {cycle}: {alarm.metric} is {reading:.3g}{alarm.unit} over {span}, and should "
            f"be {limit}: {alarm.what}; look at {alarm.look}"
        )

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint, at any position of a cycle."""
        return {
            "alarms": {name: asdict(seen) for name, seen in self._seen.items()},
            "cycle": {name: list(values) for name, values in sorted(self._cycle.items())},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a state. Alarms that it does not know (a recipe turned them on since) start anew."""
        known = state["alarms"]
        self._seen = {alarm.name: Seen(**known.get(alarm.name, {})) for alarm in self._alarms}
        self._cycle = {name: list(values) for name, values in state["cycle"].items() if name in self._metrics}


def dmd_alarms(limits: schema.Alarms, draws: int) -> list[Alarm]:
    """The alarms of a dmd stage whose limits are not 0; causes before what they cause, as they are said in a cycle.

    draws: score timesteps drawn in a cycle, over all ranks: the global batch times one generator and all critic
    updates.
    """
    every = [*_updates(limits), *_timesteps(limits, draws), *_scores(limits), *_samples(limits)]
    return [alarm for limit, alarm in every if limit > 0]


def silence(limits: schema.Alarms, cycles: int) -> str:
    """Why the alarms of a dmd stage of so many cycles cannot say anything; empty where they can."""
    if not dmd_alarms(limits, draws=1):
        return "every alarm is turned off"
    needed = limits.warmup_cycles + limits.window_cycles
    if cycles >= needed:
        return ""
    return f"no alarm can rise in {cycles} cycles: alarms.warmup_cycles and alarms.window_cycles are {needed}"


_Limited = list[tuple[float, Alarm]]


def _samples(limits: schema.Alarms) -> _Limited:
    spread, shift, motion = limits.saturation, limits.mean_drift, limits.motion
    return [
        (
            spread,
            Alarm(
                "saturation",
                "latents/all/std",
                1.0 / spread if spread else 0.0,
                spread,
                "the spread of the generator's latents drifts (up: over-saturated, down: washed out)",
                "the sample grid, latents/channel-*/std, drift/std, dmd.guidance and the generator's learning rate",
                to_start=True,
            ),
        ),
        (
            shift,
            Alarm(
                "mean_drift",
                "drift/mean",
                0.0,
                shift,
                "the channels' means of the generator's latents drift away from the teacher's (a colour cast)",
                "the sample grid, latents/channel-*/mean and the generator's learning rate",
            ),
        ),
        (
            motion,
            Alarm(
                "motion_collapse",
                "motion/relative",
                motion,
                math.inf,
                "the generator's clips stand still where the teacher's move",
                "the sample grid, motion/latents, and whether the few-step start already moved too little",
            ),
        ),
    ]


def _scores(limits: schema.Alarms) -> _Limited:
    return [
        (
            limits.critic_lag,
            Alarm(
                "critic_lag",
                "critic_error/to_gaussian",
                0.0,
                limits.critic_lag,
                "the critic knows less of the generator's samples than their mean and variance: it cannot keep up",
                "critic_error/*, dmd.critic_updates, dmd.critic_optimizer.lr and the generator's learning rate",
            ),
        ),
        (
            limits.score_scale,
            Alarm(
                "score_scale",
                "score/guided_std",
                0.0,
                limits.score_scale,
                "guidance spreads the teacher's estimate far beyond the unguided one, and pulls the generator there",
                "dmd.guidance (CFG weight = guidance + 1), score/gap and the teacher's x0 in the sample grid",
            ),
        ),
    ]


def _updates(limits: schema.Alarms) -> _Limited:
    optimizers = {
        "generator": "the generator's learning rate",
        "critic": "dmd.critic_optimizer.lr",
        "predictor": "foresight.optimizer.lr and foresight.preset (bfloat16 masters round small updates away)",
    }
    return [
        (
            limits.moved,
            Alarm(
                f"{role}_frozen",
                f"moved/{role}",
                limits.moved,
                1.0,
                f"updates leave the {role}'s weights as they are",
                f"{optimizer}, lr/{role} and grad_norm/{role}",
            ),
        )
        for role, optimizer in optimizers.items()
    ]


def _timesteps(limits: schema.Alarms, draws: int) -> _Limited:
    z = limits.timesteps
    return [
        (
            z,
            Alarm(
                "score_timesteps",
                "timesteps/deviation",
                -z,
                z,
                "the timesteps that scores are compared at do not follow the shifted schedule",
                "flow.shift, dmd.min_timestep and dmd.max_timestep in effective.yaml",
                draws,
            ),
        ),
        (
            z,
            Alarm(
                "rollout_timesteps",
                "timesteps/step_list_error",
                0.0,
                0.5,
                "the rollout does not denoise at the recipe's steps, warped by its shift",
                "rollout.steps and flow.shift in effective.yaml",
            ),
        ),
    ]
