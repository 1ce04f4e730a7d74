"""Keeps what `mirai plan` predicts for the recipes of a folder, as Markdown and JSON, to be held against measurements.

    python benchmarks/record_plans.py recipes/wan 2026-11-26 plan-wan

Recipes are planned on the nodes and GPUs that their names end with (...-8x8), on each of the GPUs below.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from mirai_dist.config import load
from mirai_dist.plan.estimate import Cluster, Plan, variants_of
from mirai_dist.plan.gpus import GIB, GPUS
from mirai_dist.plan.verdict import judged
from mirai_launch.verbs.plan import as_dict

REPORTS = Path(__file__).with_name("reports")
DEVICES = ("h100-80gb", "h200-141gb", "a100-80gb", "a100-40gb")
HEADER = ("recipe", "GPU", "peak GiB a rank", "of", "verdict", "PFLOP a cycle and rank", "s a cycle", "GPU-hours")


def main() -> None:
    """Write reports/<date>-<name>.md and .json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of recipes")
    parser.add_argument("date", help="the day, as files are named")
    parser.add_argument("name", help="what is planned, as files are named")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    plans = []
    for path in sorted(options.folder.glob("*.yaml")):
        resolved = load(path)
        nodes, gpus = map(int, path.stem.rpartition("-")[2].split("x"))
        for device in DEVICES:
            found = judged(resolved.recipe, Cluster(nodes, gpus, GPUS[device]), variants_of(resolved))
            plans.append((path, found))
    stem = REPORTS / f"{options.date}-{options.name}"
    command = f"python benchmarks/record_plans.py {options.folder} {options.date} {options.name}"
    rows = [_row(path, found) for path, found in plans]
    lines = [
        f"# What `mirai plan` predicts for {options.folder}, {options.date}",
        "",
        "Predictions of a model, not measurements: nothing here ran on a GPU. Kept to be held against the first run.",
        "",
        f"    {command}",
        "",
        f"Commit {commit.stdout.strip()}. Nodes and GPUs as the recipe's name says. Phases are in the JSON.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (HEADER, tuple("---" for _ in HEADER), *rows)),
        "",
        "Assumed:",
        "",
        *dict.fromkeys(f"- {line}" for _, found in plans for line in found.assumptions),
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    kept = [_kept(found) for _, found in plans]
    data = {"command": command, "commit": commit.stdout.strip(), "plans": kept}
    stem.with_suffix(".json").write_text(json.dumps(data, separators=(",", ":")) + "\n")


def _kept(found: Plan) -> dict[str, Any]:
    """Everything for the first device; of the others what differs."""
    whole = as_dict(found)
    first = found.cluster.gpu is GPUS[DEVICES[0]]
    return whole if first else {key: value for key, value in whole.items() if key not in ("stages", "assumptions")}


def _row(path: Path, found: Plan) -> tuple[str, ...]:
    assert found.cluster.gpu is not None and found.cluster.limit is not None
    slowest = max(found.stages, key=lambda stage: stage.seconds_a_cycle or 0)
    flops = sum(each.total for each in slowest.flops.values())
    return (
        path.stem,
        found.cluster.gpu.name,
        f"{found.peak / GIB:.1f}",
        f"{found.cluster.limit / GIB:.1f}",
        "fits" if found.fits else f"no: {found.change}",
        f"{flops / 1e15:.2f}",
        f"{found.seconds_a_cycle:.1f}",
        f"{found.gpu_hours:.1f}",
    )


if __name__ == "__main__":
    main()
