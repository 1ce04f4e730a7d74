"""Verbs that need torch: what `mirai VERB` becomes."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from mirai_dist.commands.arguments import VERBS
from mirai_launch.__main__ import OWN, main
from mirai_launch.verbs import delegate


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NODELIST", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def executed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """The command line that `mirai *arguments` would become."""
    seen: list[list[str]] = []

    def execve(path: str, argv: list[str], env: dict[str, str]) -> None:
        assert path == sys.executable == argv[0]
        seen.append(argv[1:])
        raise SystemExit(0)

    monkeypatch.setattr("os.execve", execve)
    with pytest.raises(SystemExit):
        main(list(arguments))
    return seen[0]


def test_every_verb_has_a_module_and_a_help_line() -> None:
    assert not set(OWN) & set(VERBS)
    for name, verb in VERBS.items():
        assert verb.help, name
        assert importlib.util.find_spec(verb.module) is not None, name


def test_one_process_gets_the_arguments_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["RUN", "--to", "wan", "--out", "folder", "--which", "raw"]
    assert executed(monkeypatch, "export", *arguments) == ["-m", "mirai_dist.commands.export", *arguments]


@pytest.mark.parametrize("nproc", [["--nproc", "3"], ["--nproc=3"]])
def test_several_processes_go_through_torchrun_without_nproc(monkeypatch: pytest.MonkeyPatch, nproc: list[str]) -> None:
    """torchrun would take --nproc, even behind the script, for an ambiguous abbreviation of its own options."""
    argv = executed(monkeypatch, "sample", "RUN", "--prompts", "p", *nproc, "--out", "o", "text.path=x")
    assert argv == ["-m", "mirai_dist.runtime.torchrun", "--standalone", "--nproc-per-node", "3",
                    "-m", "mirai_dist.commands.sample", "RUN", "--prompts", "p", "--out", "o", "text.path=x"]


def test_ranks_that_are_started_already_start_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    launch = delegate.command(VERBS["sample"], 2, ["RUN", "--nproc", "2"])
    assert launch.argv[1:] == ["-m", "mirai_dist.commands.sample", "RUN"]


def test_a_wrong_argument_is_refused_before_torch_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["export", "RUN", "--to", "gguf", "--out", "x"])
    assert left.value.code == 2
    assert "invalid choice: 'gguf'" in capsys.readouterr().err
