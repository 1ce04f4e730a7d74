"""The recipe of `make train`, at its own length with one seed: every stage learns what the next one needs.

Both ways to few steps, chunk-wise and frame-wise, through DMD. The numbers asserted are far from what a stage that
trains nothing would give (chance is 0.25 for directions, and less for colours), and below what has been measured.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mirai_dist.config import load

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "recipes/tiny/video_mirai.yaml"
ONE_SEED = "study.seeds=[11]"
SECONDS = 1500
pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 100)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("chain") / "run"
    paths = [REPOSITORY / "tests" / "guard", REPOSITORY, REPOSITORY / "launcher", REPOSITORY / "kernels"]
    own = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "mirai_launch", "train", str(RECIPE), "--nproc", "2", "--run-dir", str(run_dir)]
    process = subprocess.Popen([*command, ONE_SEED], env={**os.environ, **own}, text=True, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=SECONDS)
    finally:
        process.send_signal(signal.SIGQUIT)  # torchrun takes its ranks along; no effect where it has ended
    assert process.returncode == 0, errors
    return run_dir


@pytest.fixture(scope="module")
def report(finished: Path) -> dict[str, Any]:
    return json.loads((finished / "report.json").read_text())


def test_every_stage_is_sampled_measured_and_compared_with_its_parent(report: dict[str, Any]) -> None:
    recipe = load(RECIPE).recipe
    stages = [name.replace("_", " ") for name in recipe.stages if name != recipe.study_stage]
    titles = [*stages, *recipe.study.arms]
    assert [step["name"] for step in report["steps"]] == titles
    kinds = {step["kind"] for step in report["steps"]}
    assert kinds == {"bidirectional", "teacher_forcing", "consistency", "ode", "dmd"}
    assert {step["frames_per_segment"] for step in report["steps"]} == {0, 1, 2}
    for step in report["steps"]:
        assert (step["gain"] is None) == (step["parent"] == ""), step["name"]
    assert report["videos"]["columns"] == ["ground truth", *stages, *list(recipe.study.arms)[:2]]


def test_every_stage_paints_the_colour_and_goes_the_way_it_is_told(report: dict[str, Any]) -> None:
    measured = {row["metric"]: row["cells"] for row in report["quality"]}
    for step in report["steps"]:
        name = step["name"]
        assert measured["colour"][name]["mean"] > 0.9, name
        assert measured["direction"][name]["mean"] > 0.8, name


def test_gates_pass_and_no_alarm_rises(report: dict[str, Any], finished: Path) -> None:
    gated = [name for name, stage in load(RECIPE).recipe.stages.items() if stage.gate.clips]
    assert [gate["stage"] for gate in report["gates"]] == gated and len(gated) == 4
    assert all(gate["passed"] for gate in report["gates"])
    for alarms in report["alarms"]:
        assert not alarms["changes"], alarms
    assert len(report["alarms"]) == 3 + len(load(RECIPE).recipe.study.arms)  # dmd stages, and arms of the study
