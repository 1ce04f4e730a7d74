"""Spare nodes on a real cluster: a delayed one is named and left out, and the run starts on the others."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from mirai_dist.runtime.rendezvous import candidates
from tests.slowed import held_back
from tests.slurm.cluster import TestCluster
from tests.slurm.conftest import Submit


def joined(cluster: TestCluster, node: str, words: str, port: int, seconds: float = 90) -> int:
    """The process on a node whose command line holds `words`, once the node is connected to this port of another."""
    init = (cluster.folder / "nodes" / node / "pid").read_text().strip()
    space = Path(f"/proc/{init}/ns/pid").readlink()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        tables = [Path(f"/proc/{init}/net/{name}").read_text() for name in ("tcp", "tcp6")]
        connected = any(f":{port:04X} 01 " in table for table in tables)
        for folder in Path("/proc").glob("[0-9]*") if connected else ():
            try:
                here = (folder / "ns/pid").readlink() == space
                if here and words in (folder / "cmdline").read_bytes().decode(errors="replace"):
                    return int(folder.name)
            except OSError:  # it has ended meanwhile, or is none of ours
                continue
        time.sleep(0.05)
    raise AssertionError(f"no process on {node} runs {words} and has joined the others")


@pytest.mark.timeout(600)
def test_a_delayed_node_is_named_and_left_out(submit: Submit) -> None:
    first, slow, third = submit.slurm.names
    run = submit("--spare", "1", "stages.teacher.cycles=2", launch="torchrun", preflight="auto")
    (port, *_) = candidates({"SLURM_JOB_ID": run.job})
    with held_back(joined(submit.slurm, slow, "mirai_dist.runtime.preflight", port)):
        chosen = run.run_dir / f"slurm/hosts-{run.job}.txt"
        run.wait(lambda job: chosen.exists() or job.ended, 200, "the choice")
    job = run.ended()
    assert (job.state, job.restarts, len(job.nodes)) == ("COMPLETED", 0, 3), run.log()
    assert chosen.read_text() == f"{first},{third}\n"
    found = json.loads(chosen.with_suffix(".json").read_text())
    assert list(found["left_out"]) == [slow], found
    assert f"pre-flight: {slow} left out: {found['left_out'][slow]}" in run.log()
    why = found["left_out"][slow]
    if spare := re.search(r"^spare; .*; worst measure ([\d.]+) of the median$", why):
        # The nodes share two cores: where others are slow too, it is not unfit, but by far the worst.
        assert float(spare[1]) <= 0.5, why
    else:  # slow at arithmetic, or so slow that it does not even come to an end
        assert why.startswith(("matrix products: ", "looking at itself: "))
    passed = json.loads((run.run_dir / "preflight.json").read_text())
    assert passed["hosts"] == [first, third] and passed["verdict"] in ("pass", "warn")
    assert "on-slurm: 2 ranks" in run.log() and (run.run_dir / "stages/teacher/DONE").exists()
