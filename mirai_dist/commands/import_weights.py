"""`mirai import`: published weights of any form into one folder, official layout, with kind and checksums recorded."""

from __future__ import annotations

import argparse
import math
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mirai_dist.commands.entry import main
from mirai_dist.config.kinds import MEANING
from mirai_dist.config.source import shown_path
from mirai_dist.observe.console import SECONDS_BETWEEN_LINES, Console
from mirai_dist.weights.checksums import checksum
from mirai_dist.weights.files import WeightFile, checked_kind, open_weights
from mirai_dist.weights.folders import refuse_occupied, wan_config, write_folder
from mirai_dist.weights.pt import verify_pt

_ORIGIN = ("run", "recipe", "parent", "stage", "arm", "seed", "cycle", "step")  # what an export of ours says of itself


def run(options: argparse.Namespace) -> int:
    """Convert one file or folder and say what came out."""
    console = Console(0, socket.gethostname(), Path(os.devnull))
    refuse_occupied(options.out)
    file = open_weights(options.source, options.which, whole=True)
    # The kind of a folder without mirai.json is an assumption, which the command line may correct.
    declared = options.kind or ""
    kind = declared if declared and file.assumed else checked_kind(file, declared)
    what = f"layout {file.layout}, {len(file.shapes)} tensors, {_gigabytes(file.bytes)}"
    console.say(f"{shown_path(options.source)}: {what}")
    if file.layout == "pt":
        verify_pt(file.path)
    reader = Reader(file, console, time.monotonic())
    write_folder(options.out, list(file.shapes), reader.tensor, wan_config(file.sizes), manifest_of(file, kind))
    parameters = sum(math.prod(shape) for shape in file.shapes.values())
    console.say(
        f"{shown_path(options.out)}: {len(file.shapes)} tensors, {parameters:,} parameters, {file.bytes:,} bytes, "
        f"kind {kind} ({MEANING[kind]}), {'moving average' if file.which == 'ema' else 'raw weights'}"
    )
    return 0


@dataclass
class Reader:
    """Reads tensors one by one, checks them and says how far it is."""

    file: WeightFile
    console: Console
    said: float  # when, monotonic seconds

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, finite and with the recorded checksum. Raises FileError if it is not."""
        values = self.file.read(name)
        self.file.refuse_not_finite(name, values)
        if self.file.checksums:
            self.file.refuse_altered(name, checksum(values))
        if time.monotonic() - self.said >= SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            read, whole = self.file.bytes_read, self.file.bytes
            self.console.say(f"{shown_path(self.file.path)}: {_gigabytes(read)} of {_gigabytes(whole)}")
        return values


def manifest_of(file: WeightFile, kind: str) -> dict[str, Any]:
    """What mirai.json says beside checksums. Of the source the last part of its path: the rest is of one machine."""
    kept = {key: file.manifest[key] for key in _ORIGIN if key in file.manifest}
    source = {"name": file.path.resolve().name, "layout": file.layout}
    return {**kept, "kind": kind, "which": file.which, "source": source}


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    main("import", run)
