"""From what a user names to a generator that samples: a run, a checkpoint, or published weights with a recipe."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mirai_dist.commands.source import find_checkpoint
from mirai_dist.config import FileError, RecipeError, Resolved, load, schema
from mirai_dist.config.digest import digest
from mirai_dist.config.kinds import MEANING, PRODUCES
from mirai_dist.cycle.attending import backends_of
from mirai_dist.cycle.encoders import text_of, vae_of
from mirai_dist.cycle.fusing import ops_of
from mirai_dist.cycle.roles import causal, kv_cache, rollout_settings, wan_shape
from mirai_dist.data.conditions import Encoder
from mirai_dist.models.wan import WanModel
from mirai_dist.sample import Sampler, latent_frames, window_of
from mirai_dist.state.checkpoint import describe, load_network
from mirai_dist.state.commit import MANIFEST, manifest_of
from mirai_dist.state.draws import Draws
from mirai_dist.weights.files import WeightFile, checked_kind, open_weights
from mirai_dist.weights.load import load_into

Which = Literal["raw", "ema"]


@dataclass(frozen=True)
class Wish:
    """What was asked for. None and empty: the run's, or the default."""

    source: Path
    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    which: Which = "ema"
    kind: str | None = None
    stage: str | None = None
    arm: str | None = None
    training_seed: int | None = None
    seconds: float | None = None
    window: int | None = None
    sink: int | None = None


@dataclass(frozen=True)
class Chosen:
    """What is going to be sampled; nothing is loaded yet. The recipe has the rollout's window and sinks in it.

    checkpoint: `path` is a checkpoint of ours, `cycle` its cycle; else published weights.
    """

    recipe: schema.Recipe
    path: Path
    which: Which
    kind: str
    checkpoint: bool
    cycle: int | None
    latent_frames: int

    def described(self) -> dict[str, str | int | None]:
        """For the manifest: what would make other videos, as far as it is known before the weights are read."""
        rollout = self.recipe.rollout
        return {
            "which": self.which,
            "kind": self.kind,
            "cycle": self.cycle,
            "latent_frames": self.latent_frames,
            "fps": self.recipe.video.fps,
            "window": rollout.window_frames,
            "sink": rollout.sink_frames,
            "steps": str(rollout.steps),
            "first_steps": str(rollout.first_steps),
            "shift": str(self.recipe.flow.shift),
            "recipe": digest(self.recipe),
            **({"weights_digest": self.identity()} if self.checkpoint else {}),
        }

    def identity(self) -> str:
        """Digest of a checkpoint: its manifest holds those of all its files."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Opened:
    """A sampler, and the text encoder its prompts go through."""

    sampler: Sampler
    text: Encoder
    chosen: Chosen


def opened(wish: Wish, device: torch.device | None = None) -> Opened:
    """Everything loaded, on `device` (the CPU by default). Raises as `chosen` and `sampler_of` do."""
    device = device or torch.device("cpu")
    choice = chosen(wish)
    sampler, _ = sampler_of(choice, device)
    return Opened(sampler, text_of(choice.recipe, device), choice)


def chosen(wish: Wish) -> Chosen:
    """Which weights and which recipe a wish means.

    Raises FileError, RecipeError and CheckpointError, one line each: nothing there, a stage, arm or seed that the
    run does not have, weights without a recipe, a bidirectional network, an average that is not there, a bad length
    or window.
    """
    source = wish.source
    if not source.exists():
        raise FileError(source, "does not exist; name a run directory of mirai train, a weight folder or a .pt file")
    if _is_published(source):
        return _published(wish)
    if wish.recipe is not None and (source / MANIFEST).is_file():
        resolved, path = load(wish.recipe), source  # a checkpoint that was moved away from its run
        kind = str(manifest_of(path)["passport"].get("kind", ""))
    elif wish.recipe is not None:
        what = "has a recipe of its own; leave --recipe out, and change single values with key=value"
        raise RecipeError("--recipe", f"{source} {what}")
    else:
        found = find_checkpoint(source, wish.stage, wish.arm, wish.training_seed)
        resolved, path = found.resolved, found.path
        kind = resolved.recipe.stages[found.stage].kind
    if wish.kind is not None:
        raise RecipeError("--kind", f"{path} records what it is ({PRODUCES.get(kind, kind)}); leave --kind out")
    _refuse_bidirectional(path, PRODUCES.get(kind, kind))
    about = describe(path)
    if wish.which == "ema" and "generator" not in about.averages:
        what = "holds no average of the generator (ema.decay is 0, or ema.start_update was not reached)"
        raise FileError(path, f"{what}; sample the weights as trained with --which raw")
    cycle = about.passport.get("cycle")
    return _chosen(wish, resolved, Chosen(resolved.recipe, path, wish.which, PRODUCES[kind], True, cycle, 0))


def sampler_of(choice: Chosen, device: torch.device) -> tuple[Sampler, str]:
    """The generator on `device`, in the recipe's compute dtype, ready to stream; and a digest of its weights."""
    recipe = choice.recipe
    vae = vae_of(recipe, device)
    backends = backends_of(recipe, device, trained=False)
    with torch.device("meta"):
        network = WanModel(wan_shape(recipe.generator, recipe), backends, ops_of(recipe, device))
    network = network.to(getattr(torch, recipe.parallel.compute_dtype)).to_empty(device=device)
    network.requires_grad_(False)
    if choice.checkpoint:
        load_network(choice.path, "generator", network, choice.which)
        identity = choice.identity()
    else:
        identity = load_into(network, _weights(choice.path, choice.which)).checksum
    video = recipe.video
    sampler = Sampler(
        causal(network),
        rollout_settings(recipe),
        kv_cache(recipe, 1, choice.latent_frames, device, streaming=True),
        vae,
        lambda seed: Draws(seed, device),
        (video.channels, video.latent_height, video.latent_width),
        choice.latent_frames,
        device,
    )
    return sampler, identity


def _is_published(source: Path) -> bool:
    """Whether this is a weight file or folder, rather than something of a run."""
    if source.is_file():
        return True
    return any(source.glob("*.safetensors")) or any((source / name).is_file() for name in ("config.json", "mirai.json"))


def _published(wish: Wish) -> Chosen:
    for option, value in (("--stage", wish.stage), ("--arm", wish.arm), ("--training-seed", wish.training_seed)):
        if value is not None:
            raise RecipeError(option, f"{wish.source} holds weights, not a run; leave {option} out")
    if wish.recipe is None:
        what = "holds weights and no recipe; say shape, text, VAE and steps with --recipe FILE"
        raise FileError(wish.source, what)
    resolved = load(wish.recipe)
    places = {Path(weights.path).resolve(): weights.kind for weights in resolved.recipe.weights.values()}
    declared = wish.kind or places.get(wish.source.resolve(), "")
    kind = checked_kind(_weights(wish.source, wish.which), declared)
    _refuse_bidirectional(wish.source, kind)
    return _chosen(wish, resolved, Chosen(resolved.recipe, wish.source, wish.which, kind, False, None, 0))


def _weights(path: Path, which: Which) -> WeightFile:
    try:
        return open_weights(path, which)
    except FileError as error:
        if which == "ema" and "raw weights" in error.what:
            raise FileError(error.where, f"{error.what} with --which raw") from None
        raise


def _refuse_bidirectional(path: Path, kind: str) -> None:
    if kind == "diffusion":
        what = f"is of kind diffusion ({MEANING[kind]}), which has no causal rollout"
        raise FileError(path, f"{what}; sample a later stage (--stage), or weights of kind ode, cd or dmd")
    if kind not in MEANING:
        raise FileError(path, f"its kind {kind!r} is none of {', '.join(MEANING)}; import it with mirai import --kind")


def _chosen(wish: Wish, resolved: Resolved, choice: Chosen) -> Chosen:
    """The choice with the command line's overrides, length and window in its recipe."""
    recipe = resolved.with_overrides(wish.overrides, "command line").recipe
    frames = latent_frames(wish.seconds, recipe.video)
    window, sink = window_of(recipe, frames, wish.window, wish.sink)
    rollout = [f"rollout.window_frames={window}", f"rollout.sink_frames={sink}"]
    recipe = resolved.with_overrides([*wish.overrides, *rollout], "--window and --sink").recipe
    return dataclasses.replace(choice, recipe=recipe, latent_frames=frames)
