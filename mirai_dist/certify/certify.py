"""Making a certificate: every subject of a recipe, judged on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mirai_dist.certify import certificate
from mirai_dist.certify.compare import judged
from mirai_dist.certify.shapes import shapes_of
from mirai_dist.certify.subjects import subjects
from mirai_dist.config.schema import Recipe

Told = Callable[[dict[str, Any]], None]


def certify(recipes: Iterable[Recipe], device: torch.device, tell: Told) -> dict[str, Any]:
    """Setting and rows for all shapes of these recipes (stages and arms of one). `tell` is given each row at once."""
    rows: list[dict[str, Any]] = []
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
            for row in found:
                rows.append(row | {"dtype": shapes.dtype, "seconds": seconds})
                tell(rows[-1])
    return {"format": certificate.FORMAT, "setting": certificate.setting(device.type), "rows": rows}
