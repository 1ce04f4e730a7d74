"""A benchmark session: sections with deadlines of their own, and a JSON file that is whole after each of them.

    python -m benchmarks.session OUT [--budget SECONDS] [--only SECTION ...] [--rehearse]

Each section is a process: one that hangs, or breaks the device, costs its own rows. Run by benchmarks/gpu_session.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

DEADLINES = {  # seconds; a process is ended a little later. What matters most comes first: the last ones may be cut
    "ceilings": 15,
    "gates": 105,
    "certificate": 55,
    "cycle": 175,
    "profile": 30,
    "replay": 15,
    "assembled": 40,
    "attention": 45,
    "chunk_backward": 20,
    "fused": 25,
}
GRACE = 15.0  # seconds to finish the case at hand, and for the start of the process
BUDGET = 530.0  # under nine minutes


def main() -> int:
    """Run the sections. Exit code 1 where one of them did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of session.json")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds in all (default: {BUDGET:.0f})")
    parser.add_argument("--only", nargs="+", choices=tuple(DEADLINES), default=tuple(DEADLINES), help="sections")
    parser.add_argument("--rehearse", action="store_true", help="small shapes, and on a CPU too")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    session: dict[str, Any] = {"command": sys.argv, "rehearsal": options.rehearse, **described(), "sections": {}}
    ends = time.monotonic() + options.budget
    for name in options.only:
        session["sections"][name] = found = run(name, options.out, ends, options.rehearse)
        written(options.out / "session.json", session)
        line = f"{name}: {found['ended']}, {found['seconds']} s, {len(found['rows'])} rows"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return int(any(each["ended"] not in ("done", "no time left") for each in session["sections"].values()))


def run(name: str, out: Path, ends: float, rehearse: bool) -> dict[str, Any]:
    """One section in a process group of its own: how it ended, its rows, the end of what it said."""
    began = time.monotonic()
    seconds = min(DEADLINES[name], ends - began - GRACE)
    if seconds <= 0:
        return {"ended": "no time left", "seconds": 0.0, "rows": [], "said": ""}
    rows, log = out / f"{name}.jsonl", out / f"{name}.log"
    rows.write_text("")
    command = [sys.executable, "-m", "benchmarks.session.section", name, str(out), str(seconds)]
    with log.open("w") as said:
        process = subprocess.Popen(
            command + ["--rehearse"] * rehearse, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds + GRACE)
            ended = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = "killed at its deadline"
    lines = [json.loads(line) for line in rows.read_text().splitlines() if line.endswith("}")]
    tail = log.read_text()[-2000:]
    return {"ended": ended, "seconds": round(time.monotonic() - began, 1), "rows": lines, "said": tail}


def described() -> dict[str, Any]:
    """Machine, driver, versions and commit."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "flash-attn", "xformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    gpu = said(["nvidia-smi", query, "--format=csv,noheader"]) or "no NVIDIA driver"
    commit = said(["git", "describe", "--always", "--dirty"]) or "unknown: no git checkout"
    began = time.strftime("%FT%TZ", time.gmtime())
    return {"began": began, "host": platform.machine(), "gpu": gpu, "commit": commit, "versions": versions}


def said(command: list[str]) -> str:
    """What a program prints; empty where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def written(path: Path, session: dict[str, Any]) -> None:
    """Whole, or as it was."""
    beside = path.with_name("session.json.new")
    beside.write_text(json.dumps(session, indent=1) + "\n")
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
