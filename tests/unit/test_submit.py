"""`mirai submit` up to the queue: what it refuses, what it puts into the run directory, and what it needs itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mirai_dist.config import RecipeError, load
from mirai_launch.__main__ import main
from mirai_launch.slurm import ledger, snapshot, submission
from mirai_launch.slurm.client import Scheduler, SchedulerError
from mirai_launch.slurm.parse import Job, show_job
from mirai_launch.slurm.submission import Wish, prepare, submit
from tests.unit.test_slurm_parse import RUNNING

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/procs/tiny.yaml"
LOCAL = ROOT / "recipes/clusters/local-test.yaml"


@dataclass(frozen=True)
class Queue(Scheduler):
    """Takes everything down; refuses from the `full`-th job on; knows the jobs in `alive`."""

    full: int = 100
    submitted: list[tuple[Path, list[str]]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    alive: list[Job] = field(default_factory=list)

    def submit(self, script: Path, options: Sequence[str] = ()) -> str:
        if len(self.submitted) + 1 >= self.full:
            raise SchedulerError("sbatch", "the queue is full")
        assert script.read_text().startswith("#!/usr/bin/env bash\n")
        self.submitted.append((script, list(options)))
        return str(40 + len(self.submitted))

    def jobs(self, ids: Iterable[str] = (), user: str = "") -> list[Job]:
        return self.alive

    def cancel(self, job: str, signal: str | None = None, batch_only: bool = False) -> None:
        self.cancelled.append(job)


def wish(tmp_path: Path, **changes) -> Wish:
    return Wish(**{"recipe": TINY, "cluster": LOCAL, "nodes": 2, "run_dir": tmp_path / "run", **changes})


def refusal(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["submit", *arguments]) == 20
    return capsys.readouterr().err


def test_one_job(tmp_path: Path) -> None:
    queue = Queue()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/HOLD").touch()
    (queued,) = submit(prepare(wish(tmp_path, overrides=("seed=5",))), queue)
    assert not (tmp_path / "run/HOLD").exists()  # whoever submits it again wants it to go on
    (script, options), run = queue.submitted[0], tmp_path / "run"
    assert (queued.job, queued.step, options) == ("41", "all", [])
    assert load(script.parent / "recipe.yaml").recipe == load(TINY, ["seed=5"]).recipe
    assert f"run_dir={run}\n" in script.read_text()
    assert (run / "logs").is_dir()  # sbatch does not make it
    (entry,) = ledger.read(run)
    assert (entry.job_id, entry.nodes, run / entry.script) == ("41", 2, script)


def test_the_snapshot_is_the_code_and_runs_by_itself(tmp_path: Path) -> None:
    place = snapshot.code(tmp_path)
    assert snapshot.code(tmp_path) == place
    assert {path.suffix for path in place.rglob("*") if path.is_file()} == {".py", ".typed"}
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(place)}
    code = "import mirai_dist as d, mirai_launch as l, mirai_kernels as k; print(d.__file__, l.__file__, k.__file__)"
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd="/", check=True)
    assert all(path.startswith(f"{place}/") for path in said.stdout.split())


def test_an_array_gives_each_element_its_directory_and_recipe(tmp_path: Path) -> None:
    array = ("rollout.steps=[1000,500],[1000]", "seed=1,2%3")
    queue = Queue()
    submit(prepare(wish(tmp_path, array=array)), queue)
    text = queue.submitted[0][0].read_text()
    assert "#SBATCH --array=0-3%3\n" in text
    names = [f"rollout.steps=-{steps}-_seed={seed}" for steps in ("1000-500", "1000") for seed in (1, 2)]
    assert [line.strip() for line in text[text.index("elements=(") :].splitlines()[1:5]] == names
    for index, name in enumerate(names):
        (recipe,) = (tmp_path / "run" / name).glob("slurm/*/recipe.yaml")
        assert load(recipe).recipe.seed == index % 2 + 1
        assert [entry.job_id for entry in ledger.read(tmp_path / "run" / name)] == [f"41_{index}"]
    assert [entry.job_id for entry in ledger.read(tmp_path / "run")] == ["41"]


GATE = "stages.distil.gate.clips=4"
STEPS = ["teacher", "ar_teacher", "few_step", "distil.gate", "distil", "report"]


def test_a_chain_is_a_job_a_step_each_after_the_one_before(tmp_path: Path) -> None:
    queue = Queue()
    queued = submit(prepare(wish(tmp_path, chain=True, overrides=(GATE,))), queue)
    assert [each.step for each in queued] == STEPS
    assert queue.submitted[0][1] == []
    assert queue.submitted[3][1] == ["--dependency=afterok:43", "--kill-on-invalid-dep=yes"]
    assert "--resume auto --only distil.gate)" in queue.submitted[3][0].read_text()
    assert [entry.after for entry in ledger.read(tmp_path / "run")] == [(), *((str(job),) for job in range(41, 46))]


def test_a_chain_that_does_not_fit_leaves_nothing_in_the_queue(tmp_path: Path) -> None:
    queue = Queue(full=3)
    with pytest.raises(SchedulerError, match="the queue is full"):
        submit(prepare(wish(tmp_path, chain=True)), queue)
    assert queue.cancelled == ["41", "42"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--array", "seed"], ["--array", "'seed' is not of the form key=value,value,..."]),
        (["--array", "sead=1,2"], ["unknown key sead", "did you mean seed?"]),
        (["--array", "seed=1,1"], ["two elements would share the run directory seed=1"]),
        (["--array", "seed=1,2%0"], ["%N is at least 1"]),
        (["--time", "1"], ["--time", "a limit of 60 s leaves nothing before the warning, 30 s ahead"]),
        (["--time", "soon"], ["--time", "'soon' is no time limit"]),
        (["--nodes", "3"], ["stages.teacher", "3 ranks"]),
        (["--cluster", "nowhere.yaml"], ["no cluster file nowhere.yaml"]),
    ],
)
def test_what_cannot_run_is_refused_before_it_waits(
    arguments: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(TINY), "--cluster", str(LOCAL), "--nodes", "2", "--run-dir", str(tmp_path / "run"), "--dry-run"]
    said = refusal(*common, *arguments, capsys=capsys)
    assert said.count("\n") == 1
    for part in parts:
        assert part in said
    assert not (tmp_path / "run").exists()


def test_a_machine_without_slurm_says_so(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    common = [str(TINY), "--cluster", str(LOCAL), "--nodes", "2", "--run-dir", str(tmp_path / "run")]
    assert "sbatch: is not on the PATH" in refusal(*common, capsys=capsys)


DRY_RUN = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "triton"):
            raise ModuleNotFoundError(f"{name} was imported")
sys.meta_path.insert(0, Absent())
from mirai_launch.__main__ import main
code = main(sys.argv[1:])
assert not {"torch", "numpy", "triton"} & set(sys.modules)
sys.exit(code)
"""


def test_a_dry_run_needs_neither_slurm_nor_torch_and_writes_nothing(tmp_path: Path) -> None:
    arguments = [str(TINY), "--cluster", str(LOCAL), "--nodes", "2", "--run-dir", str(tmp_path / "run"), "--dry-run"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "launcher"), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUN, "submit", *arguments, "--chain", GATE],
        env={"PATH": str(tmp_path), "PYTHONPATH": paths}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/usr/bin/env bash") == len(STEPS)
    commands = [line for line in done.stdout.splitlines() if line.startswith("# sbatch")]
    assert len(commands) == len(STEPS) and "--dependency=afterok:ID" in commands[1]
    assert not (tmp_path / "run").exists()


def test_a_second_job_for_a_run_that_is_queued_is_refused(tmp_path: Path) -> None:
    queue = Queue()
    submit(prepare(wish(tmp_path)), queue)
    queue.alive.extend(show_job(RUNNING))
    with pytest.raises(RecipeError, match="job 3_1 of this run is running; cancel it"):
        submission.submit(prepare(wish(tmp_path)), queue)
    assert len(queue.submitted) == 1
    assert json.loads((tmp_path / "run/slurm/jobs.jsonl").read_text())["step"] == "all"
