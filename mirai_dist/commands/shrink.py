"""`mirai shrink`: a tiny twin of a recipe with every file it needs, to try a run before it is given a cluster."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from mirai_dist.commands import twin_files
from mirai_dist.commands.entry import main
from mirai_dist.commands.twin import RANKS, ranks_of, twin
from mirai_dist.config import FileError, RecipeError, Resolved, load
from mirai_dist.config.digest import digest, to_yaml
from mirai_dist.config.schema import Recipe
from mirai_dist.config.source import shown_path
from mirai_dist.data.latents import EMBEDDINGS, PROMPTS
from mirai_dist.data.prompts import PromptFile
from mirai_dist.observe.console import Console


def run(options: argparse.Namespace) -> int:
    """Write the twin and say how to run it."""
    resolved = load(options.recipe, options.overrides)
    ranks = ranks_of(options.recipe, options.ranks)
    out = write(resolved, ranks, options.out)
    console = Console(0, socket.gethostname(), Path(os.devnull))
    console.say(f"{shown_path(out)}: twin of {resolved.recipe.name} on {ranks} ranks, for {RANKS} ranks")
    console.say(f"next: mirai train {shown_path(out / 'recipe.yaml')} --nproc {RANKS}")
    return 0


def write(resolved: Resolved, ranks: int, out: Path) -> Path:
    """Write the twin of a recipe for `ranks` ranks into a new folder, which appears whole or not at all.

    Returns the folder. FileError when it is occupied or cannot be written, RecipeError when the recipe has no twin.
    """
    out = Path(os.path.abspath(out))
    refuse_occupied(out)
    for variant in resolved.variants():
        if variant.recipe.data.ode_pairs:
            what = "data.ode_pairs has no tiny twin; let the stage make its own trajectories (stages.X.trajectories)"
            raise RecipeError(variant.origins["data.ode_pairs"], what)
    if resolved.recipe.text.encoder == "umt5":
        what = "an encoder held by the job has no tiny twin; shrink with text.encoder=store text.path=embeddings"
        raise RecipeError(resolved.origins["text.encoder"], what)
    # What is written here names its files where they will be once the folder has its name.
    beside = out.with_name(f"{out.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    small = twin(resolved, ranks, out)
    try:
        beside.mkdir(parents=True)
        write_recipe(beside / "recipe.yaml", resolved, ranks, small)
        write_files(resolved.recipe, twin(resolved, ranks, beside))
        beside.rename(out)
    except OSError as error:
        raise FileError(out, f"cannot be written: {error}; give it another place or more space") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def refuse_occupied(out: Path) -> None:
    """FileError unless the folder is free: not there, or empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileError(out, "is there already; name a new folder, or remove this one")


def write_recipe(path: Path, resolved: Resolved, ranks: int, small: Recipe) -> None:
    """The whole recipe of the twin, checked by reading it back."""
    source, origin = shown_path(resolved.path), digest(resolved.recipe)
    comments = [
        f"# Tiny twin of {source}, written for {ranks} ranks (recipe digest {origin}).",
        "# Made by `mirai shrink`: what decides which code runs is kept, sizes are not. Its weights, texts and VAE are",
        f"# random numbers in the layouts of the published files. It runs on {RANKS} ranks.",
    ]
    path.write_text("\n".join([*comments, to_yaml(small)]), encoding="utf-8")
    again = load(path).recipe
    assert again == small, "the twin's recipe does not read back as it was written"


def write_files(published: Recipe, small: Recipe) -> None:
    """Every file that the twin's recipe names."""
    for entry in published.weights:
        twin_files.write_weights(entry, published, small)
    if small.data.prompts:
        twin_files.write_prompts(Path(small.data.prompts))
    if small.data.latents:
        twin_files.write_latents(Path(small.data.latents), small)
    if small.text.encoder == "store":
        for prompts, store in conditioned(small):
            twin_files.write_embeddings(store, PromptFile(prompts), small)
    if small.vae.kind == "wan":
        twin_files.write_vae(Path(small.vae.path), small.seed)


def conditioned(small: Recipe) -> Iterator[tuple[Path, Path]]:
    """(prompt file, store of its embeddings) of everything that the twin is conditioned on."""
    if small.data.prompts:
        yield Path(small.data.prompts), Path(small.text.path)
    if small.data.latents:
        yield Path(small.data.latents) / PROMPTS, Path(small.data.latents) / EMBEDDINGS


if __name__ == "__main__":
    main("shrink", run)
