"""The command `mirai train` becomes, and the run directories it refuses."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirai_dist.config import RecipeError, load, rundir
from mirai_dist.config.digest import to_yaml
from mirai_launch.__main__ import main
from mirai_launch.local import Request, prepare, visible_gpus
from mirai_launch.verbs import train

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "data" / "small.yaml"
REQUEST = Request(Path("r.yaml"), Path("runs/x"), overrides=("seed=2",))
OURS = ["-m", "mirai_dist", "--recipe", "r.yaml", "--run-dir", "runs/x", "--resume", "auto", "seed=2"]
TORCHRUN = ["-m", "mirai_dist.runtime.torchrun", "--standalone", "--nproc-per-node"]
STEP = {
    "SLURM_JOB_ID": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
}


def test_two_ranks_on_a_machine_without_gpus() -> None:
    launch = prepare(REQUEST, {"PATH": "/bin"}, gpus=0)
    assert launch.argv == [sys.executable, *TORCHRUN, "2", *OURS]
    assert launch.env == {"PATH": "/bin", "OMP_NUM_THREADS": "1"}
    assert launch.ranks == 2


def test_what_is_asked_of_the_pre_flight_reaches_the_ranks(tmp_path: Path) -> None:
    request = Request(tmp_path, tmp_path / "run", preflight="never", expected="ib,nvlink", overrides=("a=1",))
    launch = prepare(request, {"NCCL_DEBUG": "WARN", "RANK": "0", "WORLD_SIZE": "2"}, 0)
    assert launch.argv[-5:] == ["--preflight", "never", "--expect-transport", "ib,nvlink", "a=1"]
    assert launch.env["NCCL_DEBUG"] == "WARN", "what the site has set stays"
    assert launch.env["NCCL_DEBUG_FILE"] == f"{tmp_path}/run/logs/nccl-%h-%p.log"
    plain = prepare(Request(tmp_path, tmp_path), {"RANK": "0", "WORLD_SIZE": "2"}, 0)
    assert "--preflight" not in plain.argv and not [name for name in plain.env if name.startswith("NCCL")]


def test_one_rank_a_gpu_unless_told() -> None:
    assert prepare(REQUEST, {}, gpus=8).argv[1:] == [*TORCHRUN, "8", *OURS]
    request = Request(Path("r.yaml"), Path("runs/x"), nproc=3, overrides=("seed=2",))
    assert prepare(request, {}, gpus=8).ranks == 3


def test_steps_reach_every_rank() -> None:
    request = Request(Path("r.yaml"), Path("runs/x"), overrides=("seed=2",), only=("distil.gate", "distil,report"))
    ours = [*OURS[:-1], "--only=distil.gate", "--only=distil,report", "seed=2"]
    for env in ({}, STEP):
        assert prepare(request, env, gpus=0).argv[-len(ours) :] == ours


def test_threads_are_the_sites_if_it_says_so() -> None:
    assert prepare(REQUEST, {"OMP_NUM_THREADS": "7"}, gpus=0).env == {"OMP_NUM_THREADS": "7"}
    one = Request(Path("r.yaml"), Path("runs/x"), nproc=1)
    assert prepare(one, {}, gpus=0).env == {}


@pytest.mark.parametrize("env", [{"RANK": "1", "WORLD_SIZE": "4"}, STEP])
def test_a_rank_that_a_launcher_started_runs_directly(env: dict[str, str]) -> None:
    launch = prepare(REQUEST, env, gpus=0)
    assert launch.argv == [sys.executable, *OURS]
    assert (launch.env, launch.ranks) == (env, 4)
    with pytest.raises(RecipeError, match="--nproc 3, and the launcher around this process has started 4"):
        prepare(Request(Path("r.yaml"), Path("runs/x"), nproc=3), env, gpus=0)


def test_a_batch_script_is_not_a_rank() -> None:
    """It has SLURM_PROCID and SLURM_NTASKS too. On one node it may start local ranks; on two it would idle one."""
    batch = {name: value for name, value in STEP.items() if name != "SLURM_STEP_NODELIST"}
    assert prepare(REQUEST, {**batch, "SLURM_NNODES": "1"}, gpus=0).argv[1:] == [*TORCHRUN, "2", *OURS]
    with pytest.raises(RecipeError, match="2 nodes, and started here .* srun mirai train"):
        prepare(REQUEST, batch, gpus=0)


def test_a_step_of_one_task_starts_local_ranks() -> None:
    env = {**STEP, "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
    assert prepare(REQUEST, env, gpus=4).argv[1:] == [*TORCHRUN, "4", *OURS]


def test_gpus_are_counted_as_cuda_would(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == 0
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3,5, 6"}, tmp_path) == 3
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, tmp_path) == 1


def test_the_environment_must_make_sense() -> None:
    with pytest.raises(RecipeError, match="WORLD_SIZE is 'many'"):
        prepare(REQUEST, {"RANK": "0", "WORLD_SIZE": "many"}, gpus=0)


# --- the verb ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_launcher_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", *STEP):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.configure(parser)
    return parser.parse_intermixed_args([str(SMALL), *words])


def test_overrides_may_stand_anywhere(tmp_path: Path) -> None:
    launch = train.prepare(
        arguments("seed=2", "--nproc", "1", "dmd.guidance=1", "--run-dir", str(tmp_path), "flow.shift=3")
    )
    assert launch.argv[-3:] == ["seed=2", "dmd.guidance=1", "flow.shift=3"]
    assert launch.argv[launch.argv.index("--run-dir") + 1] == str(tmp_path)


def test_the_run_directory_has_the_recipes_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = train.prepare(arguments("name=mine")).argv
    assert argv[argv.index("--run-dir") + 1] == "runs/mine"
    assert not (tmp_path / "runs").exists()


def test_a_split_that_cannot_be_is_refused_before_anything_starts() -> None:
    with pytest.raises(RecipeError, match="cannot be split over 3 ranks"):
        train.prepare(arguments("--nproc", "3"))


def test_the_verb_becomes_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def execve(path: str, argv: list[str], env: dict[str, str]) -> None:
        seen.append(argv)
        assert path == argv[0] == sys.executable and env["OMP_NUM_THREADS"] == "1"
        raise SystemExit(0)

    monkeypatch.setattr(train.os, "execve", execve)
    with pytest.raises(SystemExit):
        main(["train", str(SMALL), "--run-dir", str(tmp_path)])
    assert seen[0][1:6] == [*TORCHRUN, "2"]


def test_ranks_that_a_launcher_started_check_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a thousand would say the same line; rank 0 says it (tests/procs/test_exit_codes.py)."""
    (tmp_path / "recipe.yaml").write_text(to_yaml(load(SMALL, ["seed=4"]).recipe))
    here = arguments("--run-dir", str(tmp_path))
    with pytest.raises(RecipeError, match="belongs to another recipe"):
        train.prepare(here)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert train.prepare(here).argv[1:3] == ["-m", "mirai_dist"]


def test_the_command_is_one_that_torchrun_understands(tmp_path: Path) -> None:
    """The real launcher on the real argument list, with a stand-in for what a rank runs."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(f'out{os.environ[\"RANK\"]}').write_text(' '.join([os.environ['WORLD_SIZE'], *sys.argv[1:]]))\n"
    )
    launch = train.prepare(arguments("--run-dir", str(tmp_path / "run"), "seed=2"))
    argv = ["stand_in" if word == "mirai_dist" else word for word in launch.argv]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    subprocess.run(argv, env={**launch.env, "PYTHONPATH": path}, cwd=tmp_path, check=True, timeout=120)
    expected = f"2 --recipe {SMALL} --run-dir {tmp_path / 'run'} --resume auto seed=2"
    assert [(tmp_path / f"out{rank}").read_text() for rank in (0, 1)] == [expected, expected]


# --- run directories -----------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of the small recipe."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.yaml").write_text(to_yaml(load(SMALL).recipe))
    return path


def test_its_own_or_a_new_directory_is_fine(run_dir: Path, tmp_path: Path) -> None:
    rundir.check(run_dir, load(SMALL).recipe, "auto")
    rundir.check(tmp_path / "new", load(SMALL).recipe, "never")
    rundir.check(run_dir, load(SMALL, ["study.seeds=[1, 2, 3]"]).recipe, "auto")


def test_another_recipes_directory_is_refused_with_what_differs(run_dir: Path) -> None:
    other = load(SMALL, ["foresight.weight=0", "seed=4", "checkpoint.keep=5"]).recipe
    with pytest.raises(RecipeError) as caught:
        rundir.check(run_dir, other, "auto")
    assert str(caught.value).startswith(
        f"{run_dir}: belongs to another recipe: seed: 3 -> 4, foresight.weight: 0.2 -> 0.0;"
    )
    many = load(SMALL, ["seed=4", "dmd.guidance=1", "flow.shift=1", "world.speed=2", "video.fps=1"])
    with pytest.raises(RecipeError, match="and 1 more;"):
        rundir.check(run_dir, many.recipe, "auto")


@pytest.mark.parametrize("where", ["stages/teacher", "stages/distil/foresight/seed-1"])
def test_never_refuses_a_directory_with_checkpoints(run_dir: Path, where: str) -> None:
    recipe = load(SMALL).recipe
    rundir.check(run_dir, recipe, "never")
    (run_dir / where / "checkpoints/cycle-000005-position-0").mkdir(parents=True)
    with pytest.raises(RecipeError, match="holds 1 checkpoints .* and --resume is never; use --resume auto"):
        rundir.check(run_dir, recipe, "never")
    rundir.check(run_dir, recipe, "auto")


def test_a_directory_that_is_none_or_holds_a_broken_recipe(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="is a file"):
        rundir.check(tmp_path / "file", load(SMALL).recipe, "auto")
    (run_dir / "recipe.yaml").write_text("nmae: x\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml is not valid for this version \(.*unknown key nmae"):
        rundir.check(run_dir, load(SMALL).recipe, "auto")
