"""`mirai data`: what a run reads, prepared and checked. Each sub-verb is a module of its own, imported on use."""

from __future__ import annotations

import argparse
from importlib import import_module

from mirai_dist.commands.entry import main


def run(options: argparse.Namespace) -> int:
    """The verb. Raises FileError for arguments, files and stores that cannot be used."""
    return import_module(f"mirai_dist.commands.data_{options.what}").run(options)


if __name__ == "__main__":
    main("data", run)
