"""`mirai check`: origins of all values, `--explain`, `--ranks`, and one line for whatever is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mirai_dist.config import load
from mirai_dist.config.source import dump
from mirai_launch.__main__ import VERBS, main
from mirai_launch.verbs import check

ROOT = Path(__file__).parents[2]
SMALL = "tests/unit/data/small.yaml"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_value_is_printed_with_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SMALL, "dmd.guidance=4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split() for line in out if "guidance:" in line][0] == ["guidance:", "4.0", "command", "line"]
    assert next(line for line in out if line.startswith("name:")).split() == ["name:", "small", f"{SMALL}:4"]
    assert next(line for line in out if line.startswith("  fps:")).split() == ["fps:", "16", "default"]
    assert any(line.strip() == "- foresight.weight=0" or "[foresight.weight=0]" in line for line in out)
    with_origin = [line for line in out if line.endswith(("default", "command line")) or ".yaml:" in line]
    assert len(with_origin) == len(load(SMALL).origins)
    edges = {len(line) for line in out if line.endswith("default")}
    assert len(edges) == 1  # aligned at the right


def test_without_its_origins_the_output_is_the_recipe(tmp_path: Path) -> None:
    resolved = load(SMALL)
    path = tmp_path / "printed.yaml"
    path.write_text("\n".join(left for left, _ in check.lines(resolved)))
    assert load(path).recipe == resolved.recipe


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SMALL, "--explain", "foresight.preset", "foresight.preset=release"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["value"] == "release" and facts["origin"] == "command line" and facts["default"] == "paper"
    assert facts["choices"] == "paper, release" and facts["type"] == "text" and "paper:" in facts["help"]
    assert main(["check", SMALL, "--explain", "stages.distil.batch.global_size"]) == 0
    out = capsys.readouterr().out
    assert "none: the recipe must set it" in out and "mirai_dist/config/rules.py" in out


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("foresight.wieght", "did you mean foresight.weight?"),
        ("foresight", "name one key, such as foresight.weight"),
        ("stages.distill.cycles", "it has stages.teacher.cycles"),
    ],
)
def test_explaining_what_is_no_key(capsys: pytest.CaptureFixture[str], key: str, text: str) -> None:
    assert main(["check", SMALL, "--explain", key]) == 20
    err = capsys.readouterr().err
    assert text in err and len(err.splitlines()) == 1


def test_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SMALL, "--ranks", "2"]) == 0
    assert "distil: batch 8 = 2 ranks x 2 x 2 accumulated" in capsys.readouterr().out
    assert main(["check", SMALL, "--ranks", "3"]) == 20
    assert "cannot be split over 3 ranks" in capsys.readouterr().err


def test_readers_are_the_files_that_access_the_key() -> None:
    key = check.keys.lookup(("rollout", "exit_groups"), "test")
    assert "mirai_dist/config/rules.py" in check.readers(key)
    assert all("schema.py" not in name for name, _ in check.sources())
    assert {"mirai_dist/config/load.py", "mirai_launch/local.py"} <= {name for name, _ in check.sources()}


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "which verb? one of: "),
        (["chek"], 2, "unknown verb 'chek'; did you mean check?"),
        (["zzz"], 2, "unknown verb 'zzz'; verbs: "),
        (["--nothing"], 2, "unrecognized arguments"),
        (["check"], 2, "RECIPE"),
        (["check", SMALL, "--nothing"], 2, "unrecognized arguments: --nothing"),
        (["check", SMALL, "--ranks", "x"], 2, "invalid int value"),
        (["check", "nowhere.yaml"], 20, "no recipe file nowhere.yaml"),
        (["check", SMALL, "seed"], 20, "'seed' is not of the form"),
        (["train", "nowhere.yaml"], 20, "no recipe file nowhere.yaml"),
        (["train", SMALL, "--nproc", "0"], 2, "'0' is not a number of ranks"),
    ],
)
def test_what_is_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str
) -> None:
    try:
        got = main(arguments)
    except SystemExit as stop:
        got = stop.code
    err = capsys.readouterr().err
    assert got == code
    assert text in err and len(err.splitlines()) == 1 and "Traceback" not in err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert VERBS[verb][1] in " ".join(capsys.readouterr().out.split())


def test_brackets_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SMALL, "seed=-1"]) == 20
    assert capsys.readouterr().err.endswith(" [range]\n")


def test_help_is_quick_and_no_verb_imports_torch() -> None:
    """The best of a few tries: other processes share the machine."""
    code = "import sys; from mirai_launch.__main__ import main\ntry: main({})\nexcept SystemExit: pass\n"
    code += "heavy = {{'torch', 'omegaconf', 'rich'}} & set(sys.modules); sys.exit(str(heavy) if heavy - {} else 0)"
    paths = [str(ROOT), str(ROOT / "launcher"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        command = [sys.executable, "-c", code.format(["--help"], set())]
        assert subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.3
    command = [sys.executable, "-c", code.format(["check", SMALL], {"omegaconf", "rich"})]
    assert subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0


def test_dumped_lines_are_single() -> None:
    assert dump(["a: b", "x" * 300], flow=True).count("\n") == 0
