"""`mirai data embed`: from a prompt file to a store, killed, stopped and in parts, and what it says on the way."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mirai_dist.commands import arguments, data
from mirai_dist.commands.entry import outcome
from mirai_dist.data.embeddings import EmbeddingStore
from mirai_dist.data.prompts import PromptFile
from mirai_dist.models.umt5 import Umt5Encoder
from mirai_dist.observe.console import Console
from tests import text_files

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 24
TEXTS = [*text_files.CORPUS, "a red circle moving left", "sun " * 60, "wind, light", "a red circle"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_files.write_official(tmp_path_factory.mktemp("wan") / "Wan2.1-T2V-1.3B")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return tmp_path / "prompts.txt"


def options(prompts: Path, encoder: Path, out: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.data(parser)
    words = ["embed", str(prompts), "--encoder", str(encoder), "--out", str(out), "--length", str(LENGTH)]
    return parser.parse_args([*words, "--shard-size", "4", *more])


def embed(prompts: Path, encoder: Path, out: Path, *more: str) -> int:
    return outcome("data", data.run, options(prompts, encoder, out, *more))


def contents(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.iterdir() if file.is_file()}


def test_the_store_holds_what_the_encoder_gives(prompts: Path, encoder: Path, tmp_path: Path):
    assert embed(prompts, encoder, tmp_path / "s") == 0
    file = PromptFile(prompts)
    resident = Umt5Encoder.load(encoder, LENGTH, "cpu")
    store = EmbeddingStore(tmp_path / "s", LENGTH, file, resident.dim)
    store.verify()
    assert torch.equal(store.embed(range(file.size)), resident.encode(file.captions(range(file.size))))
    assert torch.equal(store.negative(), resident.negative())


def test_what_it_says(prompts: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts.write_text("\n".join([*TEXTS, "w" * 5000, ""]) + "\n", encoding="utf-8")
    out = tmp_path / "s"
    assert embed(prompts, encoder, out) == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    assert "prompts.txt: 11 prompts, 5.7 kB, 1 repeated" in said
    assert "repeated, encoded once a shard: line 7" in said
    assert "warning: longer than 4096 bytes: line 11" in said
    assert "embed 11 prompts of about" in said and "on cpu: about" in said and "free" in said
    resident = Umt5Encoder.load(encoder, 1000, "cpu")
    long = [line for line, text in enumerate([*TEXTS, "w" * 5000], 1) if len(resident.tokens(text).ids) > LENGTH]
    cut = f"warning: cut to 24 tokens: lines {', '.join(map(str, long))}\n"
    assert len(long) == 3 and cut in said
    size = sum(len(content) for name, content in contents(out).items() if name != "store.json")
    assert f"wrote {size / 1000:.1f} kB in 3 shards; 0 were there already" in said
    assert f"{out} is complete: text.encoder=store text.path={out} text.dim=16" in said
    assert "is complete" in (out / "logs/part-000.log").read_text()
    assert embed(prompts, encoder, out) == 0
    again, _ = capsys.readouterr()
    assert "wrote 0 B in 0 shards; 3 were there already" in again and cut in again


def test_a_repeated_prompt_is_encoded_once_a_shard(
    prompts: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts.write_text("one\ntwo\none\none\none\n two\ntwo\nthree\n")
    calls = count_calls(monkeypatch)
    assert embed(prompts, encoder, tmp_path / "s") == 0
    assert len(calls) == 1 + 2 + 3  # the negative prompt; one, two; one, two, three


def count_calls(monkeypatch: pytest.MonkeyPatch, stop_at: int = -1) -> list[int]:
    calls: list[int] = []
    whole = Umt5Encoder.embed

    def counted(self: Umt5Encoder, tokens):
        calls.append(len(tokens.ids))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return whole(self, tokens)

    monkeypatch.setattr(Umt5Encoder, "embed", counted)
    return calls


def test_ctrl_c_keeps_whole_shards_and_the_same_command_goes_on(
    prompts: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "s"
    with monkeypatch.context() as patch:
        count_calls(patch, stop_at=7)  # in the second shard, after the negative prompt and the first one
        assert embed(prompts, encoder, out) == 10
    assert capsys.readouterr().err == "mirai data: stopped; the same command goes on from here\n"
    assert set(contents(out)) == {"store.json", "negative.safetensors", "shard-00000.safetensors"}
    calls = count_calls(monkeypatch)
    assert embed(prompts, encoder, out) == 0
    assert len(calls) == len(TEXTS) - 4
    assert embed(prompts, encoder, tmp_path / "whole") == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_damaged_shard_is_made_again(
    prompts: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "s"
    assert embed(prompts, encoder, out) == 0
    whole = contents(out)
    for name, keep in (("shard-00001.safetensors", -1), ("negative.safetensors", 9)):
        (out / name).write_bytes(whole[name][:keep])
    flipped = whole["shard-00002.safetensors"]
    (out / "shard-00002.safetensors").write_bytes(flipped[:-1] + bytes([flipped[-1] ^ 1]))
    capsys.readouterr()
    assert embed(prompts, encoder, out) == 0
    said = capsys.readouterr().out
    assert contents(out) == whole
    for name in ("shard-00001", "negative", "shard-00002"):
        assert f"{name}.safetensors is made again: it" in said
    assert "in 2 shards; 1 were there already" in said


def test_parts_in_any_order_make_the_same_store(
    prompts: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert embed(prompts, encoder, tmp_path / "whole") == 0
    out = tmp_path / "s"
    assert embed(prompts, encoder, out, "--part", "1/2") == 0
    assert set(contents(out)) == {"store.json", "shard-00001.safetensors"}
    assert "3 files are left to the other parts" in capsys.readouterr().out
    assert embed(prompts, encoder, out, "--part", "5/7") == 0  # more parts than shards: nothing to do
    assert embed(prompts, encoder, out, "--part", "0/2") == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_what_a_killed_process_left_is_cleared_away(prompts: Path, encoder: Path, tmp_path: Path):
    out = tmp_path / "s"
    assert embed(prompts, encoder, out) == 0
    whole = contents(out)
    half = whole["shard-00001.safetensors"][:-100]
    (out / "shard-00001.safetensors").unlink()
    (out / ".shard-00001.safetensors.tmp-node7-4242").write_bytes(half)
    assert embed(prompts, encoder, out) == 0
    assert contents(out) == whole


@pytest.mark.slow
def test_parts_that_run_together_and_one_that_is_killed(encoder: Path, tmp_path: Path):
    prompts, out = tmp_path / "many.txt", tmp_path / "s"
    prompts.write_text("\n".join(f"a red circle moving {i}" for i in range(1200)), encoding="utf-8")
    words = [sys.executable, "-m", "mirai_dist.commands.data", "embed", str(prompts), "--encoder", str(encoder)]
    words += ["--out", str(out), "--length", str(LENGTH), "--shard-size", "60", "--part"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        parts = [subprocess.Popen([*words, f"{i}/2"], env=environment, stdout=log, stderr=log) for i in range(2)]
        deadline = time.monotonic() + 120
        while not (out / "shard-00001.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        parts[1].send_signal(signal.SIGKILL)
        assert parts[1].wait() == -signal.SIGKILL
        assert parts[0].wait(timeout=120) == 0, (tmp_path / "log").read_text()
    assert not (out / "shard-00019.safetensors").exists(), "killed too late to show anything"
    more = ("--shard-size", "60")
    assert embed(prompts, encoder, out, *more, "--part", "1/2") == 0
    assert embed(prompts, encoder, tmp_path / "whole", *more) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_full_disk_is_foreseen(
    prompts: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert embed(prompts, encoder, tmp_path / "s") == 0
    assert "warning: " in (said := capsys.readouterr().out) and "100 B free, about" in said and "are needed" in said


def test_progress_is_said_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    times = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(data.time, "monotonic", lambda: next(times))
    console = Console(0, "host", tmp_path / "log", io.StringIO(), clock=lambda: 0.0)
    pace = data.Pace(console, 100)
    for _ in range(4):
        pace.advance()
    said = [line.split("host:0 ")[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert said == [f"embed {done}/100 prompts  0.333 prompts/s  to go 0h 05m" for done in (2, 4)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--part", "2/2"), "--part: is '2/2'; give I/N"),
        (("--part", "x"), "--part: is 'x'; give I/N"),
        (("--part", "-1/2"), "--part: is '-1/2'"),
        (("--part", "0/0"), "--part: is '0/0'"),
        (("--length", "0"), "--length: is 0; give a positive number"),
        (("--shard-size", "-4"), "--shard-size: is -4; give a positive number"),
        (("--encoder", "/nowhere"), "/nowhere: no such folder"),
        (("--out", "/dev/null"), "/dev/null: is not a folder that can be written"),
        (("--out", "/dev/null/s"), "/dev/null/s: is not a folder that can be written"),
    ],
)
def test_wrong_arguments_are_one_line(
    prompts: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple, message: str
):
    more = tuple(f"{more[0]}={more[1]}" for _ in more[:1])
    assert embed(prompts, encoder, tmp_path / "s", *more) == 20
    errors = capsys.readouterr().err
    assert errors.startswith(f"mirai data: {message}") and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"one\n\ntwo", "line 2 is empty; remove it"),
        (b"one\n\xff\n", "line 2 is not UTF-8"),
        (b"one\0", "is not text"),
    ],
)
def test_wrong_prompts_are_one_line_and_make_nothing(
    prompts: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
):
    prompts.write_bytes(content)
    assert embed(prompts, encoder, tmp_path / "s") == 20
    said, errors = capsys.readouterr()
    assert said == "" and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_another_encoder_or_prompt_file_is_refused(
    prompts: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "s"
    assert embed(prompts, encoder, out) == 0
    before = contents(out)
    other = text_files.write_official(tmp_path / "other", seed=1)
    assert embed(prompts, other, out) == 20
    assert "belongs to something else: it was made by another encoder" in capsys.readouterr().err
    prompts.write_text("one\n")
    assert embed(prompts, encoder, out) == 20
    assert "the embeddings of another prompt file, or the file was edited" in capsys.readouterr().err
    assert contents(out) == before


def test_a_missing_package_is_one_line(
    prompts: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert embed(prompts, encoder, tmp_path / "s") == 20
    errors = capsys.readouterr().err
    assert "needs the package transformers" in errors and "mirai-dist[wan]" in errors and errors.count("\n") == 1
