"""`mirai doctor`: look at this machine, and say what to do about what is wrong with it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mirai_dist.node import examine, software, storage
from mirai_dist.node.finding import EXIT_CODES, Finding, exit_code, worst
from mirai_launch import console

PATIENCE = 180.0  # seconds; torch may come from a slow file system
WORDS = {"ok": "OK", "skip": "-", "warn": "warn", "fail": "FAIL", "suspect": "SUSPECT"}
STYLES = {"ok": "green", "skip": "dim", "warn": "yellow", "fail": "bold red", "suspect": "bold red"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where checkpoints would go (default: runs)")
    parser.add_argument("--json", action="store_true", help="everything as one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found. Returns 0, 20 where something must be repaired, 30 where the node itself is in doubt."""
    node = examine.examine()
    _, folder = storage.checkpoints(arguments.folder)
    same, usual, found = dict(node.same), dict(node.usual), [*software.packages(), *node.findings, folder]
    found += software.injected(os.environ)
    if software.version("torch"):
        facts = ask_torch(node.gpus)
        found += [Finding(**row) for row in facts["findings"]]
        same, usual = same | facts["same"], usual | facts["usual"]
    else:
        found.append(Finding("torch", "skip", "not installed: neither it nor the arithmetic was checked"))
    code = exit_code(found)
    if arguments.json:
        rows = [vars(each) for each in found]
        document = {"host": node.name, "exit_code": code, "findings": rows, "same": same, "usual": usual}
        console.say(json.dumps(document, indent=1))
        return code
    table(node.name, found)
    return code


def ask_torch(gpus: int, patience: float = PATIENCE) -> dict[str, Any]:
    """What torch finds, from a process of its own: importing a broken one may end the process."""
    command = [sys.executable, "-m", "mirai_dist.runtime.torch_facts", str(gpus)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience, env=dict(os.environ))
        last = (done.stderr.strip().splitlines() or ["no word on standard error"])[-1]
        problem = f"ended with {done.returncode}: {last}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        return _broken(f"did not come back within {patience:.0f} s")
    return _broken(problem) if problem else json.loads(done.stdout)


def _broken(problem: str) -> dict[str, Any]:
    advice = "install torch again; with GPUs, look at driver and CUDA version first"
    row = vars(Finding("torch", "fail", f"importing and using it {problem}", advice))
    return {"findings": [row], "same": {}, "usual": {}}


def table(host: str, found: list[Finding]) -> None:
    """One line a finding, what to do below it, and the sum of it."""
    width = max(len(each.check) for each in found)
    for each in found:
        console.say(f"{WORDS[each.level]:<7}  {each.check:<{width}}  {each.value}", STYLES[each.level])
        if each.advice:
            console.say(f"{'':<7}  {'':<{width}}  -> {each.advice}")
    bad = [each for each in found if each.level in EXIT_CODES]
    warnings = sum(each.level == "warn" for each in found)
    sums = {"suspect": "this node is suspect", "fail": "repair what FAILs before training here"}
    level = worst(found)
    end = sums.get(level, "nothing stands against training here" if level != "warn" else "look at the warnings")
    console.say(f"{host}: {len(bad)} failed, {warnings} warnings; {end}")
