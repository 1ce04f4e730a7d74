"""Recipes: a closed schema, its loader, its rules and its digest. Imported by login nodes: no torch."""

from mirai_dist.config.error import FileError, RecipeError
from mirai_dist.config.load import Resolved, load

__all__ = ["FileError", "RecipeError", "Resolved", "load"]
