"""The pre-flight on real ranks, each a node of its own by SLURM's names: a node that really is slow, hung or different
is named, and equal ones are let through."""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slowed import held_back

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds: what a loaded machine may need


def rank_main(mode: str, folder: Path, expected: str) -> int:
    """What one rank does: python THIS_FILE job|select FOLDER TRANSPORTS. It waits for FOLDER/go when all is loaded."""
    from mirai_dist.runtime import bootstrap, measures, preflight
    from mirai_dist.runtime.examination import Patience, Plan

    run_dir = folder / "run"
    world = bootstrap.start() if mode == "job" else None
    folder.joinpath(f"ready-{os.environ['SLURM_PROCID']}").touch()
    while not folder.joinpath("go").exists():
        time.sleep(0.02)
    if world is None:
        options = argparse.Namespace(select=2, run_dir=run_dir, out=run_dir / "nodes.txt", patience=20.0)
        return preflight.select(options, os.environ)
    if os.environ.get("TEST_FREEZE"):
        measures.all_reduce = lambda device: os.kill(os.getpid(), signal.SIGSTOP)
    if ahead := float(os.environ.get("TEST_CLOCK", "0")):
        measures.clock_marks = functools.partial(measures.clock_marks, now=lambda: time.time() + ahead)
    seconds = float(os.environ.get("TEST_PATIENCE", "30"))
    patience = Patience(arriving=seconds, alone=100, together=seconds)
    found = preflight.run(world, Plan(run_dir, os.environ, preflight.transports(expected), patience))
    (folder / f"found-{world.rank}.json").write_text(json.dumps(found))
    return 0


class Nodes:
    """Processes that take themselves for one rank each on n1, n2, ..."""

    def __init__(self, folder: Path, count: int, mode: str, expected: str = "") -> None:
        self.folder, self.count, self.mode, self.expected = folder, count, mode, expected
        self.ranks: list[subprocess.Popen[str]] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def start(self, extra: Mapping[int, Mapping[str, str]]) -> None:
        """Start them; extra: variables of single ranks."""
        for rank in range(self.count):
            env = self._environment(rank) | dict(extra.get(rank, {}))
            command = [sys.executable, __file__, self.mode, str(self.folder), self.expected]
            pipe = subprocess.PIPE
            self.ranks.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
        deadline = time.monotonic() + PATIENCE
        while len(list(self.folder.glob("ready-*"))) < self.count:
            dead = [rank for rank in self.ranks if rank.poll() is not None]
            assert not dead, dead[0].communicate()
            assert time.monotonic() < deadline, "the ranks did not get ready"
            time.sleep(0.05)

    def _environment(self, rank: int) -> dict[str, str]:
        theirs = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM", "TORCHELASTIC_", "GROUP_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        hosts = ",".join(f"n{i + 1}" for i in range(self.count))
        paths = os.pathsep.join(filter(None, [kept.get("PYTHONPATH"), str(REPOSITORY)]))
        return kept | {
            "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": hosts, "SLURM_STEP_NUM_NODES": str(self.count),
            "SLURM_STEP_TASKS_PER_NODE": f"1(x{self.count})", "SLURM_NTASKS": str(self.count),
            "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0",
            "SLURMD_NODENAME": f"n{rank + 1}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port),
        }  # fmt: skip

    def ended(self) -> list[tuple[int, str, str]]:
        """Let them go on, and wait: (exit code, standard output, standard error) of each that is not stopped."""
        (self.folder / "go").touch()
        return [(each.returncode, *texts) for each in self.ranks if (texts := each.communicate(timeout=150))]

    def end(self) -> None:
        for each in self.ranks:
            each.kill()  # also ends a stopped one
            each.wait()


@contextmanager
def nodes(
    folder: Path, count: int, mode: str = "job", expected: str = "", **extra: Mapping[str, str]
) -> Iterator[Nodes]:
    """Nodes that are loaded and wait; extra: n2={...} for the variables of one node."""
    made = Nodes(folder, count, mode, expected)
    try:
        made.start({int(name[1:]) - 1: variables for name, variables in extra.items()})
        yield made
    finally:
        made.end()


def record(folder: Path) -> dict:
    return json.loads((folder / "run" / "preflight.json").read_text())


def test_equal_nodes_pass_and_the_record_holds_what_was_measured(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, expected="gloo") as two:
        ended = two.ended()
    assert [code for code, *_ in ended] == [0, 0], ended
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1], "all ranks return one record"
    assert found[0]["verdict"] in ("pass", "warn") and found[0]["suspects"] == {}, found[0]["line"]
    assert found[0]["hosts"] == ["n1", "n2"] and found[0]["seconds"] < 120
    for row in found[0]["ranks"]:
        assert set(row["measured"]) == {"matrix products", "writing checkpoints", "all-reduce", "link to other hosts"}
        assert all(value > 0 for value in row["measured"].values())
        # One machine, one clock: the interval must hold 0.
        assert abs(row["clock"]["ahead_of_first"]) <= row["clock"]["uncertainty"] + 1e-6
        assert row["transport"]["to_other_hosts"] == ["gloo"]
    assert not list((tmp_path / "run").glob(".mirai-write-*"))


def test_a_node_held_back_is_named_with_its_measure_and_the_median(tmp_path: Path) -> None:
    with nodes(tmp_path, 3) as three, held_back(three.ranks[1].pid):
        ended = three.ended()
    assert [code for code, *_ in ended] == [30, 30, 30], ended
    found = record(tmp_path)
    assert list(found["suspects"]) == ["n2"] and found["suspects"]["n2"].startswith("matrix products: "), found["line"]
    slow = found["ranks"][1]["measured"]["matrix products"]
    assert f"{slow * 1e-12:.3g} TFLOP/s on rank 1, median of the others" in found["line"]
    told = [error for _, _, error in ended if "SuspectNode" in error]
    assert len(told) == 1 and told[0].count("\n") == 1 and "n2: matrix products" in told[0], "one line, from rank 0"
    failure = json.loads((tmp_path / "run/logs/failure-rank-0.json").read_text())
    assert failure["exit_code"] == 30 and failure["suspects"] == ["n2"]


@pytest.mark.slow
def test_a_hung_node_is_named_instead_of_waited_for(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, n1={"TEST_PATIENCE": "10"}) as three:
        three.ranks[2].send_signal(signal.SIGSTOP)
        (tmp_path / "go").touch()
        assert three.ranks[0].wait(timeout=100) == 30
    assert list(record(tmp_path)["suspects"]) == ["n3"]


@pytest.mark.slow
def test_a_node_that_freezes_in_the_middle_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    short = {"TEST_PATIENCE": "15"}
    with nodes(tmp_path, 3, n1=short, n2=short, n3=short | {"TEST_FREEZE": "1"}) as three:
        (tmp_path / "go").touch()
        assert [three.ranks[rank].wait(timeout=150) for rank in (0, 1)] == [30, 30]
    found = record(tmp_path)
    assert list(found["suspects"]) == ["n3"] and found["suspects"]["n3"].startswith("talking to the others: ")


@pytest.mark.slow
def test_a_different_version_and_path_are_named_by_host(tmp_path: Path) -> None:
    other = tmp_path / "site"
    (other / "triton-9.9.dist-info").mkdir(parents=True)
    (other / "triton-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 9.9\n")
    (other / "libnccl.so.2").touch()
    path = os.pathsep.join(filter(None, [str(other), os.environ.get("PYTHONPATH"), str(REPOSITORY)]))
    with nodes(tmp_path, 3, n2={"PYTHONPATH": path, "LD_LIBRARY_PATH": str(other)}) as three:
        ended = three.ended()
    assert [code for code, *_ in ended] == [30, 30, 30], ended
    found = record(tmp_path)
    assert list(found["suspects"]) == ["n2"] and found["suspects"]["n2"].startswith("triton: 9.9, elsewhere ")
    rows = {row["check"]: row for row in found["findings"]}
    assert rows["NCCL library"]["hosts"] == ["n2"] and rows["NCCL library"]["level"] == "warn"


@pytest.mark.slow
def test_a_clock_that_is_off_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, n1={"TEST_CLOCK": "7.5"}) as three:
        ended = three.ended()
    assert [code for code, *_ in ended] == [0, 0, 0], ended
    found = json.loads((tmp_path / "found-2.json").read_text())
    (row,) = [row for row in found["findings"] if row["check"] == "clock" and "median clock" in row["value"]]
    assert row["hosts"] == ["n1"] and row["level"] == "warn" and row["value"].startswith("+7.5"), found


@pytest.mark.slow
def test_a_transport_that_is_not_used_stops_the_run(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, expected="ib") as two:
        ended = two.ended()
    assert [code for code, *_ in ended] == [20, 20], ended
    assert "gloo to other hosts, expected ib" in ended[0][2]


@pytest.mark.slow
def test_the_best_nodes_are_chosen_and_the_others_listed_with_reasons(tmp_path: Path) -> None:
    with nodes(tmp_path, 4, mode="select") as four, held_back(four.ranks[0].pid):
        ended = four.ended()
    assert [code for code, *_ in ended] == [0, 0, 0, 0], ended
    chosen = (tmp_path / "run/nodes.txt").read_text().strip().split(",")
    found = json.loads((tmp_path / "run/nodes.json").read_text())
    assert len(chosen) == 2 and "n1" not in chosen and chosen == found["chosen"] == sorted(chosen)
    assert found["left_out"]["n1"].startswith("matrix products: ")
    spare = next(name for name in ("n2", "n3", "n4") if name not in chosen)
    assert found["left_out"][spare].startswith("spare; ")
    assert f"n1 left out: {found['left_out']['n1']}" in ended[0][1]


@pytest.mark.slow
def test_a_node_that_never_comes_is_left_out(tmp_path: Path) -> None:
    with nodes(tmp_path, 3, mode="select") as three:
        three.ranks[1].send_signal(signal.SIGSTOP)
        (tmp_path / "go").touch()
        output, errors = three.ranks[0].communicate(timeout=120)
    assert three.ranks[0].returncode == 0, errors
    assert (tmp_path / "run/nodes.txt").read_text() == "n1,n3\n"
    assert "n2 left out: joining the others" in output


@pytest.mark.slow
def test_too_few_fit_nodes_are_refused(tmp_path: Path) -> None:
    with nodes(tmp_path, 2, mode="select") as two, held_back(two.ranks[1].pid):
        ended = two.ended()
    assert ended[0][0] == 30 and "n2: matrix products" in ended[0][2], ended
    assert not (tmp_path / "run/nodes.txt").exists()


if __name__ == "__main__":
    from mirai_dist.runtime.guard import guarded

    place = Path(sys.argv[2])
    code = guarded(lambda: rank_main(sys.argv[1], place, sys.argv[3]), place / "run")
    sys.stdout.flush()
    os._exit(code)
else:
    pytestmark = pytest.mark.timeout(240)
