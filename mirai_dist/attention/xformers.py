"""Dense attention by xformers, which chooses among kernels of its own."""

from __future__ import annotations

from importlib import import_module

from mirai_dist.attention.patterns import Pattern


def load() -> Pattern:
    """xformers' memory_efficient_attention. Raises ImportError where the package is missing or does not fit torch."""
    return import_module("xformers.ops").memory_efficient_attention
