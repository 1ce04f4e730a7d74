"""`mirai export`: trained weights for other programs."""

from __future__ import annotations

import argparse
import math
import os
import socket
import time
from pathlib import Path

from mirai_dist.commands.entry import main
from mirai_dist.commands.source import Found, find_checkpoint
from mirai_dist.config.source import shown_path
from mirai_dist.observe.console import SECONDS_BETWEEN_LINES, Console
from mirai_dist.weights.export import ExportReport, ExportRequest, export


def run(options: argparse.Namespace) -> int:
    """Export one network and say what came out and what to do with it."""
    console = Console(0, socket.gethostname(), Path(os.devnull))
    found = find_checkpoint(options.source, options.stage, options.arm, options.seed)
    request = ExportRequest(
        found.path, found.recipe, found.stage, found.arm, found.seed, options.to, options.which, options.out
    )
    report = export(request, Progress(shown_path(options.out), console))
    for line in described(found, request, report):
        console.say(line)
    return 0


class Progress:
    """Says what is being done: the first thing, then something every few seconds."""

    def __init__(self, title: str, console: Console) -> None:
        self._title, self._console, self._said = title, console, -math.inf

    def __call__(self, doing: str) -> None:
        if time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._console.say(f"{self._title}: {doing}")


def described(found: Found, request: ExportRequest, report: ExportReport) -> list[str]:
    """What was written, from where, and the next command."""
    out = shown_path(request.out)
    training = f"stage {found.stage}" + (f", arm {found.arm}, seed {found.seed}" if found.arm else "")
    weights = "moving average" if request.which == "ema" else "raw weights"
    return [
        f"{out}: {report.role}, {weights}, layout {request.layout}, {report.parameters:,} parameters, "
        f"{report.bytes:,} bytes",
        f"from {training}, cycle {report.origin['cycle']} ({shown_path(found.path)}), kind {report.origin['kind']}",
        f"next: {_next(found, request, out)}",
    ]


def _next(found: Found, request: ExportRequest, out: str) -> str:
    if request.layout == "diffusers":
        return f'WanTransformer3DModel.from_pretrained("{out}")'
    if request.layout == "self-forcing":
        average = " --use_ema" if request.which == "ema" else ""
        return f"python inference.py --checkpoint_path {out}{average} (of Self-Forcing or Causal-Forcing)"
    if found.recipe.stages[found.stage].kind == "bidirectional":
        return f"start a stage from it: weights.NAME.path={out} and stages.STAGE.teacher=NAME in a recipe"
    which = "" if request.which == "ema" else " --which raw"
    return f"mirai sample {out}{which} --recipe {shown_path(found.run_dir / 'recipe.yaml')} --prompts FILE --out DIR"


if __name__ == "__main__":
    main("export", run)
