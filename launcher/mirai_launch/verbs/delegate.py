"""Verbs that need torch: checked here, then this process becomes the one that runs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mirai_dist.commands.arguments import VERBS, Verb
from mirai_launch import local


def command(verb: Verb, nproc: int | None, arguments: Sequence[str]) -> local.Launch:
    """What to exec: one process, or torchrun where several were asked for and none are started yet."""
    ours = ["-m", verb.module, *_without_nproc(arguments)]
    if not verb.ranks or local.started_ranks(os.environ) is not None or (nproc or 1) == 1:
        return local.Launch([sys.executable, *ours], dict(os.environ), 1)
    return local.torchrun(ours, nproc or 1, os.environ)


def _without_nproc(arguments: Sequence[str]) -> list[str]:
    """The arguments without --nproc, which is ours: torchrun's parser takes it for an abbreviation of its own."""
    rest, words = [], iter(arguments)
    for word in words:
        if word == "--nproc":
            next(words, None)
        elif not word.startswith("--nproc="):
            rest.append(word)
    return rest


def run(name: str, parsed: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Exec the command of a verb with the arguments as they were written."""
    launch = command(VERBS[name], getattr(parsed, "nproc", None), arguments)
    os.execve(launch.argv[0], launch.argv, launch.env)
