"""The frame of every command: its arguments, and one line instead of a traceback for what input can cause."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from mirai_dist.commands import arguments
from mirai_dist.runtime.guard import FAILED, REQUEUE, environment_rank, exit_code

Command = Callable[[argparse.Namespace], int]


def main(verb: str, run: Command) -> NoReturn:
    """Parse the verb's arguments, run it and end the process with its exit code."""
    parser = argparse.ArgumentParser(prog=f"mirai {verb}", allow_abbrev=False)
    arguments.VERBS[verb].configure(parser)
    nested = verb == "data"  # argparse cannot intermix below a second verb
    end(outcome(verb, run, parser.parse_args() if nested else parser.parse_intermixed_args()))


def outcome(verb: str, run: Command, options: argparse.Namespace) -> int:
    """Exit code of a command. An error whose class carries an exit code explains itself in one line on stderr."""
    try:
        return run(options)
    except KeyboardInterrupt:
        sys.stderr.write(f"mirai {verb}: stopped; the same command goes on from here\n")
        return REQUEUE
    except Exception as error:  # noqa: BLE001  whatever it is, the process ends with one line and its code
        if not isinstance(getattr(type(error), "exit_code", None), int):
            traceback.print_exception(error, file=sys.stderr)
        who = f"mirai {verb}" + (f" (rank {environment_rank()})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "")
        sys.stderr.write(f"{who}: {' '.join(str(error).split()) or type(error).__name__}\n")
        return exit_code(error) or FAILED


def end(code: int) -> NoReturn:
    """Leave without the interpreter's shutdown, which may hang or abort in threads of libraries."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
