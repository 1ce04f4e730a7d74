"""Making a certificate: every subject of a recipe, judged on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from mirai_dist.certify.compare import judged
from mirai_dist.certify.shapes import shapes_of
from mirai_dist.certify.subjects import subjects
from mirai_dist.config.schema import Recipe


def certified(recipes: Iterable[Recipe], device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """Rows of one subject after another, for all shapes of these recipes (stages and arms of one)."""
    done: set[tuple[str, str, str]] = set()
    for shapes in map(shapes_of, recipes):
        for subject in subjects(shapes, device):
            key = subject.op, subject.shape, shapes.dtype
            if key in done:
                continue
            done.add(key)
            began = time.perf_counter()
            found = judged(subject, getattr(torch, shapes.dtype), device)
            seconds = round(time.perf_counter() - began, 2)
            yield [row | {"dtype": shapes.dtype, "seconds": seconds} for row in found]
