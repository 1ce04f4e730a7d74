"""When and where a stage's checkpoints are written, found and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mirai_dist.config import schema
from mirai_dist.cycle.stages import Stage
from mirai_dist.observe.console import Console
from mirai_dist.operate.events import Events
from mirai_dist.state import checkpoint, commit


@dataclass(frozen=True)
class Saver:
    """Committed checkpoints of one stage under `root`. title: of the stage (or arm and seed of one), for `events`."""

    root: Path
    settings: schema.Checkpoint
    digest: str
    rank: int
    console: Console
    events: Events = Events()
    title: str = ""

    def due(self, stage: Stage) -> bool:
        """Whether the cycle that just ended is one to save after."""
        return stage.cycle % self.settings.every_cycles == 0 or stage.cycle == stage.stage.cycles

    def save(self, stage: Stage) -> None:
        """Commit the whole state; older checkpoints beyond `checkpoint.keep` go once it is verified."""
        with stage.ledger.phase("checkpoint"):
            path = self.root / commit.directory_name(stage.cycle, stage.position)
            passport = {
                "recipe": self.digest,
                "stage": stage.name,
                "kind": stage.stage.kind,
                "cycle": stage.cycle,
                "position": stage.position,
                "roles": list(stage.roles),
                "starts": {role: started.described() for role, started in stage.started.items()},
            }
            checkpoint.save(path, stage.state(), passport)
            if self.rank == 0:
                commit.retain(self.root, self.settings.keep, verified=path)
        self._tell("saved", stage, path)

    def resume(self, stage: Stage) -> bool:
        """Load the newest complete checkpoint; False when nothing was ever saved.

        Raises CheckpointError when there are only torn ones, or it belongs to another kind of stage.
        """
        path = checkpoint.newest(self.root)
        if path is None:
            return False
        described = checkpoint.describe(path)
        if described.passport["kind"] != stage.stage.kind:
            raise commit.CheckpointError(
                f"{path} holds a stage of kind {described.passport['kind']}, "
                f"{stage.name} is of kind {stage.stage.kind}: use another run directory"
            )
        stage.prepare_to_load(described.extras)
        state = stage.state()
        mine = set(stage.own_samples())
        # a cache that was empty when it was saved (an arm without foresight) left nothing in the file
        wanted = {cache: [s for s in described.samples.get(cache, []) if s in mine] for cache in state.samples}
        checkpoint.load(path, state, wanted, stage.run.draws.device)
        stage.after_load(state.samples)
        self.console.say(f"{stage.name}: resumed at cycle {stage.cycle} position {stage.position} from {path.name}")
        self._tell("resumed", stage, path)
        return True

    def _tell(self, event: str, stage: Stage, path: Path) -> None:
        checkpoint = self.events.relative(path)
        self.events.write(
            event, stage=self.title, cycle=stage.cycle, position=stage.position, checkpoint=checkpoint
        )
