"""The files a recipe names, looked for before a job is started, where they can be seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mirai_dist.config.error import RecipeError
from mirai_dist.config.schema import Recipe


def named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, path) of every file and folder that the recipe names."""
    if recipe.data.prompts:
        yield "data.prompts", recipe.data.prompts
    if recipe.data.latents:
        yield "data.latents", recipe.data.latents
    if recipe.data.ode_pairs:
        yield "data.ode_pairs", recipe.data.ode_pairs
    if recipe.text.path:
        yield "text.path", recipe.text.path
    if recipe.vae.path:
        yield "vae.path", recipe.vae.path
    for name, weights in recipe.weights.items():
        yield f"weights.{name}.path", weights.path


def check(recipe: Recipe, origins: Mapping[str, str]) -> None:
    """RecipeError, at the line of its key, when a file is not there; the others that are missing are named too."""
    missing = [(key, path) for key, path in named(recipe) if not Path(path).exists()]
    if not missing:
        return
    (key, path), *others = missing
    place = Path(path) if Path(path).is_absolute() else Path.cwd() / path
    what = f"{key}: {path} does not exist (looked for {place}); relative paths start where the command runs"
    also = f"; missing too: {', '.join(f'{each} ({name})' for each, name in others)}" if others else ""
    raise RecipeError(origins.get(key, "recipe"), f"{what}; set it with {key}=PATH{also}")
