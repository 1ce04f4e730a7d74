"""`mirai VERB ...`: finds the verb, imports it on use, and turns a refused recipe into one line and exit code 20."""

from __future__ import annotations

import argparse
import difflib
import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from mirai_dist.commands.arguments import VERBS as DELEGATED

# verb -> (module that holds `configure(parser)` and `run(arguments) -> int`, help)
OWN = {
    "train": ("mirai_launch.verbs.train", "check a recipe, then train it on local ranks, under torchrun or under srun"),
    "plan": ("mirai_launch.verbs.plan", "memory, FLOPs, traffic, seconds and GPU-hours of a run, before it is queued"),
    "submit": ("mirai_launch.verbs.submit", "queue a recipe on a SLURM cluster, as a batch script that you can read"),
    "doctor": ("mirai_launch.verbs.doctor", "look at this machine: software, GPUs, network, limits, storage"),
    "check": ("mirai_launch.verbs.check", "print the resolved recipe with the origin of every value"),
    "status": ("mirai_launch.verbs.status", "where a run stands: stage, pace, checkpoint, failure, next command"),
    "logs": ("mirai_launch.verbs.logs", "what a rank has said, or what the failed ranks died of"),
    "stop": ("mirai_launch.verbs.stop", "a running job saves and ends, now or after a cycle"),
    "save": ("mirai_launch.verbs.save", "a running job writes a checkpoint and goes on"),
    "profile": ("mirai_launch.verbs.profile", "a trace of one rank for a few cycles of a running job"),
    "stacks": ("mirai_launch.verbs.stacks", "where every rank stands, also when the job hangs"),
    "cancel": ("mirai_launch.verbs.cancel", "end a run's jobs, running and waiting"),
    "requeue": ("mirai_launch.verbs.requeue", "put a run that ended back into the queue"),
}
VERBS = {verb: text for verb, (_, text) in OWN.items()} | {name: verb.help for name, verb in DELEGATED.items()}
USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """Argument errors in one line; `mirai VERB --help` has the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    if argv is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to tidy up, and no traceback to show
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0].startswith("-"):
        return _top(arguments)
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"verbs: {', '.join(VERBS)}"
        _overview().error(f"unknown verb {verb!r}; {meant}")
    parser = Parser(prog=f"mirai {verb}", description=VERBS[verb], allow_abbrev=False)
    if verb in OWN:
        module = importlib.import_module(OWN[verb][0])
        module.configure(parser)
        return _run(module.run, _parsed(parser, rest))
    DELEGATED[verb].configure(parser)
    from mirai_launch.verbs import delegate

    return _run(lambda parsed: delegate.run(verb, parsed, rest), _parsed(parser, rest))


def _parsed(parser: Parser, rest: list[str]) -> argparse.Namespace:
    # Overrides may stand before, between and behind the options; argparse cannot intermix below a second verb.
    nested = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
    return parser.parse_args(rest) if nested else parser.parse_intermixed_args(rest)


def _run(run: Callable[[argparse.Namespace], int], parsed: argparse.Namespace) -> int:
    from mirai_dist.config.error import RecipeError
    from mirai_launch import console

    try:
        return run(parsed)
    except RecipeError as error:
        console.fail(str(error))
        return error.exit_code


def _overview() -> Parser:
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    parser = Parser(
        prog="mirai",
        usage="mirai VERB ...",
        description="Train causal few-step video generators with foresight.",
        epilog=f"verbs:\n{lines}\n\nmirai VERB --help says more about one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    return parser


def _top(arguments: list[str]) -> int:
    parser = _overview()
    if not arguments:
        parser.error(f"which verb? one of: {', '.join(VERBS)}")
    if parser.parse_args(arguments).version:
        from mirai_launch import __version__, console

        console.say(f"mirai {__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
