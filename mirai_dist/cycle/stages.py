"""The stages of the pipeline. All run in the same loop (cycle.py): a stage has positions, and state to save.

A stage of a teacher or of the few-step start has one position a cycle, one update. The dmd stage has one position
for the generator update and one for each critic update; a checkpoint may fall between any two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from mirai_dist.config import FileError, schema
from mirai_dist.config.rules import accumulation
from mirai_dist.cycle import phases
from mirai_dist.cycle.encoders import StoredClips, WorldClips, vae_of
from mirai_dist.cycle.fusing import comparison_of
from mirai_dist.cycle.roles import Builder, Fill, Role, Training, kv_cache, rollout_settings
from mirai_dist.cycle.starts import Started, Starts, fill
from mirai_dist.data.conditions import Conditions
from mirai_dist.data.latents import LatentStore
from mirai_dist.data.lmdb_files import LmdbClips
from mirai_dist.data.world import World
from mirai_dist.method import health
from mirai_dist.method.flow import warped_steps
from mirai_dist.method.foresight import PRESETS, captured_blocks
from mirai_dist.method.replay import ReplayCache
from mirai_dist.method.rollout import kept_frames
from mirai_dist.method.stage_two_foresight import outputs_of_predictor
from mirai_dist.models.vae import Vae
from mirai_dist.models.wan import KVCache
from mirai_dist.observe.alarms import Alarms, Change, dmd_alarms
from mirai_dist.observe.ledger import Ledger
from mirai_dist.observe.metrics import Metrics
from mirai_dist.observe.waits import Waits
from mirai_dist.parallel.engine_fsdp import FsdpEngine
from mirai_dist.state.checkpoint import TrainState
from mirai_dist.state.cursor import BatchLayout, Cursor, samples_of_rank
from mirai_dist.state.draws import Draws


class Moment(NamedTuple):
    """Where in a run a draw is made: cycle and position in it."""

    cycle: int
    position: int


class Observed(NamedTuple):
    """Metrics of one position, averaged over ranks, and what the alarms made of them: equal on all ranks."""

    values: dict[str, float]
    changes: list[Change]


@dataclass(frozen=True)
class Run:
    """What all stages of a run share: recipe, ranks, engine, keyed randomness, what samples are conditioned on.

    world: the procedural world, where clips and captions come from it. clips: clean latents, for stages that need
    them. pairs: trajectories, for ode stages. waits: how long this rank's engine waited in collectives.
    """

    recipe: schema.Recipe
    ranks: int
    rank: int
    engine: FsdpEngine
    draws: Draws
    conditions: Conditions
    world: World | None = None
    clips: WorldClips | StoredClips | None = None
    pairs: LatentStore | LmdbClips | None = None
    waits: Waits = field(default_factory=Waits)

    @cached_property
    def vae(self) -> Vae:
        """The autoencoder, loaded when something first needs pixels: DMD alone never does."""
        return self.clips.vae if isinstance(self.clips, WorldClips) else vae_of(self.recipe, self.draws.device)

    @property
    def negative(self) -> Tensor:
        """Embedding [1, length, dim] of the negative prompt, on the device; made once."""
        # no cached_property: its lock is shared by ranks that are threads, and a sharded encoder makes all ranks meet
        kept = vars(self)
        if "_negative" not in kept:
            kept["_negative"] = self.conditions.negative().to(self.draws.device)
        return kept["_negative"]

    def encode(self, numbers: Sequence[int], samples: Sequence[int]) -> Tensor:
        """Prompt embeddings [len(samples), length, dim] of entries numbers[sample], on the device."""
        return self.conditions.embed([numbers[s] for s in samples]).to(self.draws.device)

    def as_image(self, latents: Tensor) -> Tensor:
        """Latents [B, 1, C, H, W] of the last picture that latents [B, F, C, H, W] decode to, as a first frame's."""
        return self.vae.encode(self.vae.decode(latents)[:, -1:])

    def clean_latents(self, numbers: Sequence[int], samples: Sequence[int]) -> Tensor:
        """Clean latents [len(samples), F, C, H, W] of entries numbers[sample], on the device."""
        assert self.clips is not None  # a rule refuses stages that need clips where there are none
        return self.clips.latents([numbers[s] for s in samples]).to(self.draws.device)


class Stage(ABC):
    """One stage: named roles, positions of a cycle, sample streams, and what a checkpoint must hold."""

    positions: tuple[str, ...] = ("update",)

    def __init__(self, name: str, run: Run, starts: Starts) -> None:
        self.name, self.run, self.recipe, self.starts = name, run, run.recipe, starts
        self.started: dict[str, Started] = {}  # by role, as the networks are built
        self.stage = run.recipe.stages[name]
        self.layout = BatchLayout(
            run.ranks, run.rank, self.stage.batch.micro_size, accumulation(self.stage.batch, run.ranks)
        )
        self.cursors: dict[str, Cursor] = {}
        self.metrics = Metrics(run.draws.device)
        self.alarms = Alarms(self.recipe.alarms)
        self.ledger = Ledger()
        self.cycle, self.position = 0, 0
        self.timesteps: list[float] = []  # drawn by the present update: an error names them

    @property
    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """Trained roles, by name: what a checkpoint holds."""

    @abstractmethod
    def step(self) -> None:
        """Run the update at the present cycle and position."""

    def fill(self, role: str) -> Fill | None:
        """First weights of the network that starts from the stage's `role` (parent, teacher, critic), or None."""
        source = getattr(self.starts, role)
        if source is None:
            return None

        def load(network: nn.Module) -> None:
            self.started[role] = fill(network, source, self.stage.kind, role)

        return load

    def purpose(self, what: str) -> str:
        """Name of a draw. It holds the stage, not the arm: arms of a study share their draws."""
        return f"{self.name}/{what}"

    def normal(self, what: str, at: Moment, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Noise [len(samples), *shape] keyed by this stage, moment and global sample."""
        return self.run.draws.normal(self.purpose(what), *at, samples, shape)

    def take(self, stream: str) -> tuple[list[list[int]], list[int]]:
        """The next global batch of a stream: (this rank's offsets a micro-batch, world entry of every offset)."""
        cursor = self._cursor(stream)
        numbers = [cursor.index(n) for n in cursor.take(self.layout.global_size)]
        return samples_of_rank(0, self.layout), numbers

    def _cursor(self, stream: str) -> Cursor:
        if stream not in self.cursors:
            self.cursors[stream] = Cursor(self.run.draws.seed, self.purpose(stream), self.run.conditions.size)
        return self.cursors[stream]

    def own_samples(self) -> list[int]:
        """Offsets in the global batch that this rank runs."""
        return [sample for micro_batch in samples_of_rank(0, self.layout) for sample in micro_batch]

    def observe(self) -> Observed:
        """Metrics of the position that was just run, and after the last one of a cycle the alarms that rose or
        cleared. Collective: one reduction over ranks."""
        values = health.combined(self.metrics.reduce())
        self.alarms.record(values)
        ended = self.position == len(self.positions) - 1
        return Observed(values, self.alarms.close_cycle(self.cycle) if ended else [])

    def advance(self) -> None:
        """Go to the next position, or to the first one of the next cycle."""
        self.position += 1
        if self.position == len(self.positions):
            self.cycle, self.position = self.cycle + 1, 0

    def state(self) -> TrainState:
        """Everything the stage is: what a checkpoint holds and a load fills."""
        roles = self.roles
        return TrainState(
            networks={name: role.network for name, role in roles.items()},
            optimizers={name: (role.network, role.optimizer) for name, role in roles.items() if role.optimizer},
            averages={name: role.average for name, role in roles.items() if role.average},
            extras={
                "cycle": self.cycle,
                "position": self.position,
                "seed": self.run.draws.seed,
                "cursors": {stream: cursor.consumed for stream, cursor in self.cursors.items()},
                "updates": {name: role.updates for name, role in roles.items()},
                "alarms": self.alarms.state(),
            },
            samples=self.saved_samples(),
        )

    def prepare_to_load(self, extras: dict[str, Any]) -> None:
        """Take over counters, so that the averages the checkpoint holds exist before tensors are loaded."""
        self.cycle, self.position = extras["cycle"], extras["position"]
        for stream, consumed in extras["cursors"].items():
            self._cursor(stream).consumed = consumed
        for name, role in self.roles.items():
            role.updates = extras["updates"][name]
            role.average_if_due()
        self.alarms.load(extras["alarms"])

    def saved_samples(self) -> dict[str, dict[int, Tensor]]:
        """Per-sample tensors a checkpoint must hold (the replay cache)."""
        return {}

    def after_load(self, samples: dict[str, dict[int, Tensor]]) -> None:
        """Take per-sample tensors back and refresh what is derived from weights; most stages have neither."""
        assert not samples, f"{self.name} keeps no per-sample tensors"


class FlowStage(Stage):
    """Flow matching of a teacher: kind bidirectional, teacher_forcing or diffusion_forcing."""

    def __init__(self, name: str, run: Run, starts: Starts) -> None:
        super().__init__(name, run, starts)
        builder = Builder(self.recipe, run.engine, run.draws)
        bidirectional = self.stage.kind == "bidirectional"
        role = "teacher" if bidirectional else "generator"
        network = self.recipe.teacher if bidirectional else self.recipe.generator
        training = Training(self.stage.optimizer, self.stage.cycles, self.stage.ema)
        self.trained = builder.wan(role, network, training, self.fill("parent"))

    @property
    def roles(self) -> dict[str, Role]:
        return {self.trained.name: self.trained}

    def step(self) -> None:
        phases.flow_update(self, Moment(self.cycle, self.position))


class FewStepStage(Stage):
    """Distillation of the AR teacher into the few-step start of the generator, with foresight or without.

    With foresight there are two roles more: the encoder, and a predictor that is trained and saved beside the generator
    and then left behind: later stages and exports take the generator alone.
    """

    def __init__(self, name: str, run: Run, starts: Starts) -> None:
        super().__init__(name, run, starts)
        recipe, settings, self.builder = self.recipe, self.stage.foresight, Builder(self.recipe, run.engine, run.draws)
        training = Training(self.stage.optimizer, self.stage.cycles, self.stage.ema)
        self.trained = self.builder.wan("generator", recipe.generator, training, self.fill("parent"))
        self.encoder: Role | None = None
        self.predictor: Role | None = None
        self.arithmetic, depth = PRESETS[recipe.foresight.preset], recipe.foresight.depth
        self.comparison = comparison_of(recipe, run.draws.device)
        self.encoder_blocks = captured_blocks(recipe.teacher.blocks, depth, self.arithmetic)
        self.generator_blocks = 0
        if settings.weight > 0:
            self.generator_blocks = captured_blocks(recipe.generator.blocks, depth, self.arithmetic)
            self.encoder = self.builder.wan("encoder", recipe.teacher, None, self.fill("teacher"))
            self.predictor = self.builder.predictor(
                self.arithmetic.gated_predictor,
                self.arithmetic.bf16_predictor,
                Training(settings.optimizer, self.stage.cycles),
                outputs_of_predictor(settings.fusion, recipe.foresight.offsets),
            )

    @property
    def roles(self) -> dict[str, Role]:
        return {"generator": self.trained} | ({"predictor": self.predictor} if self.predictor else {})


class ConsistencyStage(FewStepStage):
    """Causal consistency distillation of the AR teacher.

    The target network's weights are the student's moving average, so the checkpoint holds them once.
    """

    def __init__(self, name: str, run: Run, starts: Starts) -> None:
        super().__init__(name, run, starts)
        self.teacher = self.builder.wan("ar_teacher", self.recipe.generator, None, self.fill("parent"))
        self.target = self.builder.wan("target", self.recipe.generator, None)
        self.refresh_target()

    def step(self) -> None:
        phases.consistency_update(self, Moment(self.cycle, self.position))

    def refresh_target(self) -> None:
        """Copy the moving average into the target network, shard by shard."""
        assert self.trained.average is not None
        self.trained.average.copy_to(self.target.network)
        self.run.engine.release(self.target.network)

    def after_load(self, samples: dict[str, dict[int, Tensor]]) -> None:
        self.refresh_target()


class OdeStage(FewStepStage):
    """Causal ODE distillation of the AR teacher, from its trajectories."""

    def __init__(self, name: str, run: Run, starts: Starts) -> None:
        super().__init__(name, run, starts)
        assert run.pairs is not None
        self.pairs = run.pairs
        self._refuse_other_steps()

    def _refuse_other_steps(self) -> None:
        wanted = warped_steps(self.recipe.rollout.steps, self.recipe.flow.shift)
        found = self.pairs.timesteps
        if not self.pairs.truth or len(found) != len(wanted) or any(
            abs(one - other) > 0.5 for one, other in zip(found, wanted, strict=True)
        ):
            what = f"holds states at timesteps {[round(t, 1) for t in found]}"
            what += "" if self.pairs.truth else " and no ground truth, which is the context of causal ODE distillation"
            wish = f"rollout.steps at flow.shift are {[round(t, 1) for t in wanted]}"
            raise FileError(self.pairs.path, f"{what}; {wish}: change those, or make other trajectories")

    def step(self) -> None:
        phases.ode_update(self, Moment(self.cycle, self.position))


class DmdStage(Stage):
    """Asymmetric DMD with foresight: five roles, of which teacher and encoder are one set of weights."""

    def __init__(self, name: str, run: Run, starts: Starts) -> None:
        super().__init__(name, run, starts)
        recipe, builder = self.recipe, Builder(self.recipe, run.engine, run.draws)
        updates = self.stage.cycles
        self.positions = ("generator", *("critic",) * recipe.dmd.critic_updates)
        draws = self.layout.global_size * len(self.positions)
        self.alarms = Alarms(recipe.alarms, dmd_alarms(recipe.alarms, draws))
        self.arithmetic = PRESETS[recipe.foresight.preset]
        self.comparison = comparison_of(recipe, run.draws.device)
        self.rollout = rollout_settings(recipe)
        critic_training = Training(recipe.dmd.critic_optimizer, updates * recipe.dmd.critic_updates)
        generator_training = Training(self.stage.optimizer, updates, self.stage.ema)
        self.generator = builder.wan("generator", recipe.generator, generator_training, self.fill("parent"))
        self.critic = builder.wan("critic", recipe.critic, critic_training, self.fill("critic"))
        self.teacher = builder.wan("teacher", recipe.teacher, None, self.fill("teacher"))
        self.predictor: Role | None = None
        if recipe.foresight.weight > 0:
            with_foresight = updates - recipe.foresight.start_cycle
            training = Training(recipe.foresight.optimizer, with_foresight * (1 + recipe.dmd.critic_updates))
            self.predictor = builder.predictor(
                self.arithmetic.gated_predictor, self.arithmetic.bf16_predictor, training
            )
        depth = recipe.foresight.depth
        self.generator_blocks = (
            captured_blocks(recipe.generator.blocks, depth, self.arithmetic) if self.predictor else 0
        )
        self.encoder_blocks = captured_blocks(recipe.teacher.blocks, depth, self.arithmetic)
        self.replay = ReplayCache(run.draws.device)
        self._caches: dict[int, KVCache] = {}

    @property
    def roles(self) -> dict[str, Role]:
        trained = {"generator": self.generator, "critic": self.critic}
        return trained | ({"predictor": self.predictor} if self.predictor else {})

    def step(self) -> None:
        at = Moment(self.cycle, self.position)
        if self.position == 0:
            phases.generator_update(self, at)
            return
        phases.critic_update(self, at)
        if self.foresight_is_on and (self.position > 1 or self.arithmetic.replay_after_generator):
            phases.replay_update(self)

    @property
    def foresight_is_on(self) -> bool:
        """Whether this cycle trains with foresight: it may begin in the last part of the stage."""
        return self.predictor is not None and self.cycle >= self.recipe.foresight.start_cycle

    @property
    def total_frames(self) -> int:
        """Latent frames of a rollout, of which the last `video.latent_frames` are scored."""
        return self.recipe.rollout.total_frames or self.recipe.video.latent_frames

    def exit_steps(self, at: Moment, samples: Sequence[int]) -> tuple[int, int | None]:
        """Exit step of a micro-batch, and of the first segment where it has its own list: one draw for each of
        `exit_groups` blocks of the global batch.

        All ranks run the same micro-batch of a group, so they run the same number of passes.
        """
        group = samples[0] * self.recipe.rollout.exit_groups // self.layout.global_size
        first = len(self.rollout.first_timesteps)
        return (
            self.run.draws.integer(self.purpose("exit"), *at, group, len(self.rollout.timesteps)),
            self.run.draws.integer(self.purpose("first_exit"), *at, group, first) if first else None,
        )

    def cache(self, batch: int) -> KVCache:
        """The KV cache for this batch size; allocated once and reused by every rollout."""
        if batch not in self._caches:
            self._caches[batch] = kv_cache(self.recipe, batch, self._kept_frames(), self.run.draws.device)
        return self._caches[batch]

    def _kept_frames(self) -> int:
        """Frames of a rollout that a cache is made for: what backward reads, without copies (method/rollout.py)."""
        rollout, video = self.recipe.rollout, self.recipe.video
        length = video.frames_per_segment
        window = rollout.window_frames - length if rollout.window_frames else 0
        return kept_frames(self.total_frames, video.latent_frames, length, window, rollout.sink_frames) + length

    def saved_samples(self) -> dict[str, dict[int, Tensor]]:
        return {"replay_states": self.replay.states, "replay_targets": self.replay.targets}

    def after_load(self, samples: dict[str, dict[int, Tensor]]) -> None:
        self.replay.states = dict(samples["replay_states"])
        self.replay.targets = dict(samples["replay_targets"])


STAGES: dict[str, type[FlowStage] | type[ConsistencyStage] | type[OdeStage] | type[DmdStage]] = {
    "bidirectional": FlowStage,
    "teacher_forcing": FlowStage,
    "diffusion_forcing": FlowStage,
    "consistency": ConsistencyStage,
    "ode": OdeStage,
    "dmd": DmdStage,
}
