"""The recipes of this repository that can be run: neither the parts they extend nor cluster files."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name not in ("base", "clusters"))
