"""`mirai bench kernels --certify RECIPE`: whether kernels and attention are exact where this recipe needs them.

On this machine, at the shapes of the recipe, forward and gradients. The run reads what is written here.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mirai_dist.certify import certificate
from mirai_dist.certify.certify import certified
from mirai_dist.certify.compare import FAILED, NOT_CERTIFIED, PASSED
from mirai_dist.commands.entry import main
from mirai_dist.config import load
from mirai_dist.config.source import shown_path
from mirai_dist.cycle.account import commit_of_code
from mirai_dist.observe.console import Console


def run(options: argparse.Namespace) -> int:
    """Write the certificate, anew after each comparison. Exit code 1 where something failed; what cannot run here is
    said to be not certified."""
    resolved = load(options.certify, options.overrides)
    console = Console(0, socket.gethostname(), Path(os.devnull))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen = [*resolved.variants(), *map(resolved.of_arm, resolved.recipe.study.arms)]
    folder = options.out or Path(resolved.recipe.parallel.certificate_folder)
    path = certificate.path_of(folder, resolved.recipe.name, device.type)
    rows: list[dict[str, Any]] = []
    made = _described(resolved.recipe.name, device) | {"rows": rows}
    for found in certified([each.recipe for each in seen], device):
        rows += found
        certificate.write(path, made)
        for row in found:
            _tell(row, console)
    for (op, variant, reason), shapes in _missing(rows).items():
        console.say(f"{NOT_CERTIFIED}: {op} by {variant}, {shapes} shapes: {reason}")
    counts = Counter(row["state"] for row in rows)
    if device.type == "cpu":
        console.warn("this is a certificate of a CPU: kernels need a CUDA device, and are not certified by it")
    told = ", ".join(f"{counts[state]} {state}" for state in (PASSED, FAILED, NOT_CERTIFIED))
    console.say(f"{shown_path(path)}: {told}")
    return 1 if counts[FAILED] else 0


def _described(name: str, device: torch.device) -> dict[str, Any]:
    """Everything of a certificate but its rows."""
    return {
        "format": certificate.FORMAT,
        "recipe": name,
        "command": f"mirai bench {shlex.join(sys.argv[1:])}",
        "commit": commit_of_code(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "setting": certificate.setting(device.type),
    }


def _missing(rows: list[dict[str, Any]]) -> Counter[tuple[str, str, str]]:
    """How many shapes were not compared, by operator, variant and reason."""
    return Counter((row["op"], row["variant"], row["reason"]) for row in rows if "error" not in row)


def _tell(row: dict[str, Any], console: Console) -> None:
    """What was compared, as soon as it is."""
    if "error" in row:
        error = "" if row["error"] is None else f": {row['error']:.1e} from exact, may be {row['bound']:.1e}"
        reason = f": {row['reason']}" if row["reason"] else error
        console.say(f"{row['state']}: {row['op']} by {row['variant']}, {row['dtype']} {row['shape']}{reason}")


if __name__ == "__main__":
    main("bench", run)
