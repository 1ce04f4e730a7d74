"""`mirai data`: from prompts, videos and LMDB files to stores, killed, stopped and in parts, and what it says."""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mirai_dist.commands import arguments, data, data_progress
from mirai_dist.commands.entry import outcome
from mirai_dist.data.clips import open_clips
from mirai_dist.data.embeddings import EmbeddingStore
from mirai_dist.data.latents import Entry, LatentStore, Plan, StoreWriter
from mirai_dist.data.lmdb_files import LmdbClips
from mirai_dist.data.prompts import PromptFile
from mirai_dist.data.video_clips import ClipForm, read_clip
from mirai_dist.evaluate.video_files import write_mp4
from mirai_dist.models.umt5 import Umt5Encoder
from mirai_dist.models.wan_vae import WanVae
from mirai_dist.observe.console import Console
from tests import text_files, vae_files
from tests.unit.test_lmdb_files import CAPTIONS, SHAPE, array, content, rows_of, write_published

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
    monkeypatch.setattr(data_progress.time, "monotonic", lambda: next(times))
    console = Console(0, "host", tmp_path / "log", io.StringIO(), clock=lambda: 0.0)
    pace = data_progress.Pace(console, 100, "embed", "prompts")
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


def verb(*words: object) -> int:
    parser = argparse.ArgumentParser()
    arguments.data(parser)
    return outcome("data", data.run, parser.parse_args([str(word) for word in words]))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    errors = capsys.readouterr().err
    assert errors.startswith("mirai data: ") and errors.count("\n") == 1, errors
    return errors


@pytest.mark.parametrize("states", [None, 1, 5, 6])
def test_lmdb_to_a_store_and_back_is_bit_for_bit(tmp_path: Path, states: int | None):
    source = write_published(tmp_path / "l", rows_of(states))
    assert verb("convert", source, "--to", "mirai", "--out", tmp_path / "s", "--shard-size", 2) == 0
    assert verb("verify", tmp_path / "s") == 0
    assert verb("convert", tmp_path / "s", "--to", "lmdb", "--out", tmp_path / "b") == 0
    assert content(tmp_path / "b") == content(source)
    store, rows = LatentStore(tmp_path / "s"), LmdbClips(source)
    assert (store.shape, store.size, store.plan.kind) == (SHAPE, 5, "ode_pairs" if states in (5, 6) else "latents")
    assert torch.equal(bits(store.latents(range(5))), bits(rows.latents(range(5))))
    if states in (5, 6):
        assert store.timesteps == rows.timesteps and store.truth == rows.truth == (states == 6)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int16)


def test_a_store_to_lmdb_and_back_is_the_same_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan = Plan("latents", 2, SHAPE, "float16", 2, "s")
    writer = StoreWriter(tmp_path / "s", plan)
    shard = writer.write(0, [Entry(f"{number}", torch.randn(SHAPE).half()) for number in range(2)])
    writer.seal()
    assert verb("convert", tmp_path / "s", "--to", "lmdb", "--out", tmp_path / "l") == 0
    assert content(tmp_path / "l")[b"latents_shape"] == b"2 1 2 3 4 4"
    assert verb("convert", tmp_path / "l", "--to", "mirai", "--out", tmp_path / "b") == 0
    again = StoreWriter(tmp_path / "b", LatentStore(tmp_path / "b").plan)
    assert not again.missing() and LatentStore(tmp_path / "b").captions([0, 1]) == ["0", "1"]
    assert torch.equal(LatentStore(tmp_path / "b").latents([0, 1]), LatentStore(tmp_path / "s").latents([0, 1]))
    assert len(shard) == 2 and "rounded" not in capsys.readouterr().out


def test_bfloat16_below_float16s_range_is_rounded_and_said_beyond_it_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plan = Plan("latents", 1, (1, 1, 1, 3), "bfloat16", 1, "s")
    for name, values in (("exact", (1.0, -2.5, 6e4)), ("small", (1e-9, 1.0, 0.0)), ("large", (1e9, 1.0, 1.0))):
        writer = StoreWriter(tmp_path / name, plan)
        writer.write(0, [Entry("a", torch.tensor([[[values]]]).bfloat16())])
        writer.seal()
        code = verb("convert", tmp_path / name, "--to", "lmdb", "--out", tmp_path / f"{name}.lmdb")
        said = capsys.readouterr()
        assert ("1 of 3 bfloat16 values are below float16's range" in said.out) == (name == "small")
        assert code == (20 if name == "large" else 0)
    assert "entry 0 has values beyond float16" in said.err and not (tmp_path / "large.lmdb").exists()


def test_convert_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_published(tmp_path / "l", rows_of(6))
    words = ("convert", source, "--to", "mirai", "--shard-size", 2, "--out")
    read, whole = [], LmdbClips.rows

    def stopped(self: LmdbClips, numbers):
        read.extend(numbers)
        if len(read) == 4:
            raise KeyboardInterrupt
        return whole(self, numbers)

    monkeypatch.setattr(LmdbClips, "rows", stopped)
    assert verb(*words, tmp_path / "s") == 10
    assert verb(*words, tmp_path / "s") == 0
    assert read == [0, 1, 2, 3, 2, 3, 4]
    assert verb(*words, tmp_path / "whole") == 0
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_again_and_again_the_store_comes_out_the_same(tmp_path: Path):
    """SIGKILL at a moment of chance after each new shard; the same command goes on until it ends by itself."""
    rows = [array(row, (1, 21, 16, 30, 52)) for row in range(40)]
    source = write_published(tmp_path / "l", rows, [f"caption {row}" for row in range(40)])
    words = ["convert", str(source), "--to", "mirai", "--shard-size", "4", "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command, killed, draws = [sys.executable, "-m", "mirai_dist.commands.data", *words], 0, random.Random(0)
    while True:
        before = len(list((tmp_path / "s").glob("shard-*")))
        child = subprocess.Popen([*command, str(tmp_path / "s")], env=environment, stdout=subprocess.DEVNULL)
        while child.poll() is None and len(list((tmp_path / "s").glob("shard-*"))) < before + 2:
            time.sleep(0.001)
        time.sleep(draws.random() * 0.03)
        child.kill()
        if child.wait() == 0:
            break
        killed += 1
    assert killed > 1, "ended before it could be killed"
    assert verb(*words, tmp_path / "whole") == 0
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_rows_of_other_states_need_their_timesteps(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_published(tmp_path / "l", rows_of(4))
    words = ("convert", source, "--to", "mirai", "--out", tmp_path / "s")
    assert verb(*words) == 20 and "convert them" in error_of(capsys)
    for wrong in ("1000,0", "500,900", "x", "1000,1000", "2000", "1000"):
        assert verb(*words, "--timesteps", wrong) == 20 and "--timesteps" in error_of(capsys)
    assert verb(*words, "--timesteps", "1000,833.25") == 0
    store = LatentStore(tmp_path / "s")
    assert store.timesteps == (1000.0, 833.25) and store.truth


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompts_1_data": b" "}, "row 1 has an empty caption"),
        ({"latents_1_data": b"\x00\x7e" + bytes(190)}, "row 1 holds non-finite values"),
        ({"latents_1_data": None}, "has no key latents_1_data"),
    ],
)
def test_rows_that_cannot_be_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, bytes | None], message: str
):
    source = write_published(tmp_path / "l", rows_of(1), keys=keys)
    assert verb("convert", source, "--to", "mirai", "--out", tmp_path / "s") == 20
    assert message in error_of(capsys)


def test_wrong_conversions_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_published(tmp_path / "l", rows_of(1))
    assert verb("convert", source, "--to", "mirai", "--out", tmp_path / "s") == 0
    capsys.readouterr()
    for words, message in (
        ((source, "--to", "lmdb"), "is of the LMDB layout already"),
        ((tmp_path / "s", "--to", "mirai"), "is a store already"),
        ((tmp_path / "none", "--to", "lmdb"), "no such folder"),
        ((source, "--to", "mirai", "--shard-size", 0), "--shard-size: is 0"),
    ):
        assert verb("convert", *words, "--out", tmp_path / "x") == 20
        assert message in error_of(capsys)
    assert verb("convert", tmp_path / "s", "--to", "lmdb", "--out", source) == 20
    assert "is there already" in error_of(capsys)


def test_verify_names_what_is_damaged_in_every_kind_of_store(
    prompts: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert embed(prompts, encoder, tmp_path / "e") == 0
    source = write_published(tmp_path / "l", rows_of(6))
    assert verb("convert", source, "--to", "mirai", "--out", tmp_path / "s", "--shard-size", 2) == 0
    stores = (tmp_path / "e", tmp_path / "l", tmp_path / "s")
    assert verb("verify", *stores) == 0
    said = capsys.readouterr().out
    assert said.count(", whole\n") == 3 and "embeddings of 10 prompts" in said and "ode_pairs, 5 entries" in said
    for store in (tmp_path / "e", tmp_path / "s"):
        for name in ("shard-00000.safetensors", "shard-00002.safetensors"):
            whole = (store / name).read_bytes()
            (store / name).write_bytes(whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
        assert verb("verify", store) == 20
        said, errors = capsys.readouterr()
        assert ", 2 damaged\n" in said and f"{store}/shard-00002.safetensors: entry" in said
        assert f"{store}/shard-00000.safetensors: entry" in errors and "(2 faults in all)" in errors
    assert verb("verify", tmp_path / "none") == 20 and "no such folder" in error_of(capsys)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vae_files.write_diffusers(tmp_path_factory.mktemp("vae"), vae_files.network(**vae_files.SMALLEST))


def film(path: Path, frames: int = 12, fps: int = 16, size: tuple[int, int] = (32, 48), caption: str = "c") -> Path:
    """A video whose frame n is a gradient shifted by n."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = torch.arange(size[1])[None, :, None] * 3
    picture = torch.stack([(row + 20 * n).expand(*size, 3) % 200 + 20 for n in range(frames)]).to(torch.uint8)
    write_mp4(path, picture, fps, scale=1)
    if caption:
        path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Five that can be used and five that cannot, in the order of their names."""
    folder = tmp_path / "videos"
    film(folder / "a.mp4", caption="the first\n")
    (folder / "b.mp4").write_text("no video")
    film(folder / "c.mp4", size=(64, 40))
    film(folder / "d.mp4", frames=5)
    film(folder / "deep" / "e.mp4", fps=24, frames=14)
    film(folder / "f.mp4", caption="")
    film(folder / "g.mp4")
    whole = (folder / "g.mp4").read_bytes()
    (folder / "g.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "h.mp4").write_bytes(b"")
    (folder / "h.txt").write_text("empty")
    (folder / "b.txt").write_text("not a video")
    film(folder / "i.mp4")
    film(folder / "j.MP4.mp4")
    (folder / "notes.pdf").write_text("not looked at")
    return folder


def encode(videos: Path, vae: Path, out: Path, *more: object) -> int:
    words = ("latents", videos, "--vae", vae, "--out", out, "--frames", 9, "--size", "32x48", "--shard-size", 3)
    return verb(*words, *more)


def test_videos_are_encoded_and_the_bad_ones_listed(
    videos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert encode(videos, vae, tmp_path / "s") == 0
    said = capsys.readouterr().out
    for line in (
        "left out: b.mp4: cannot be read as a video",
        "left out: d.mp4: is too short: 5 of 9 frames at 16 fps",
        "left out: f.mp4: has no caption",
        "left out: g.mp4: was cut short: 0 of its 12 frames can be decoded",
        "left out: h.mp4: cannot be read as a video",
        "left out 5 of 10 videos: b.mp4",
        "is complete: 5 clips of [3, 16, 4, 6] float16",
    ):
        assert line in said, (line, said)
    store = LatentStore(tmp_path / "s")
    assert store.captions(range(5)) == ["the first", "c", "c", "c", "c"]
    network = WanVae.load(vae, "cpu")
    form = ClipForm(9, 16, 32, 48)
    names = ("a.mp4", "c.mp4", "deep/e.mp4", "i.mp4", "j.MP4.mp4")
    for number, name in enumerate(names):
        expected = network.encode(read_clip(videos / name, form)[None]).half()
        assert torch.equal(store.latents([number]), expected), name
    assert store.plan.statistics["mean"][0] == pytest.approx(-0.7571)
    assert verb("verify", tmp_path / "s") == 0


def test_encoding_goes_on_and_parts_make_the_same_bytes(
    videos: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert encode(videos, vae, tmp_path / "whole") == 0
    assert encode(videos, vae, tmp_path / "s", "--part", "1/2") == 0
    assert "shards are left to the other parts" in capsys.readouterr().out
    calls, encoding = [], WanVae.encode

    def stopped(self: WanVae, pixels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encoding(self, pixels)

    monkeypatch.setattr(WanVae, "encode", stopped)
    assert encode(videos, vae, tmp_path / "s", "--part", "0/2") == 10
    assert encode(videos, vae, tmp_path / "s", "--part", "0/2") == 0
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    done = len(calls)
    assert encode(videos, vae, tmp_path / "s") == 0
    assert len(calls) == done, "what is there is not made again"
    assert "wrote 0 shards; 4 were there already" in capsys.readouterr().out


def test_captions_of_a_file_are_taken_by_line(videos: Path, vae: Path, tmp_path: Path, capsys):
    lines = tmp_path / "captions.txt"
    lines.write_text("".join(f"caption {n}\n" for n in range(10)))
    assert encode(videos, vae, tmp_path / "s", "--captions", lines) == 0
    assert LatentStore(tmp_path / "s").captions(range(6)) == [f"caption {n}" for n in (0, 2, 4, 5, 8, 9)][:6]
    lines.write_text("one\n")
    capsys.readouterr()
    assert encode(videos, vae, tmp_path / "t", "--captions", lines) == 20
    assert "holds 1 captions" in error_of(capsys)


def test_another_vae_is_refused(videos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert encode(videos, vae, tmp_path / "s") == 0
    other = vae_files.write_diffusers(tmp_path / "vae", vae_files.network(1, **vae_files.SMALLEST))
    capsys.readouterr()
    assert encode(videos, other, tmp_path / "s") == 20
    assert "is of a store with another provenance" in error_of(capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--frames", 80), "--frames: is 80"),
        (("--size", "480"), "--size: is '480'"),
        (("--size", "480x830"), "--size: is '480x830'"),
        (("--fps", 0), "--fps: is 0"),
        (("--part", "3/3"), "--part: is '3/3'"),
        (("--vae", "/nowhere"), "/nowhere: no such file"),
        (("--out", "/dev/null/s"), "/dev/null/s: "),
        (("--captions", "/nowhere"), "/nowhere: no such prompt file"),
    ],
)
def test_wrong_arguments_of_latents_are_one_line(
    videos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple, message: str
):
    assert encode(videos, vae, tmp_path / "s", *more) == 20
    assert message in error_of(capsys)


def test_a_folder_without_videos_or_with_bad_captions_is_one_line(vae: Path, tmp_path: Path, capsys):
    assert encode(tmp_path / "none", vae, tmp_path / "s") == 20 and "not a folder of videos" in error_of(capsys)
    (tmp_path / "v").mkdir()
    assert encode(tmp_path / "v", vae, tmp_path / "s") == 20 and "holds no videos" in error_of(capsys)
    (tmp_path / "v" / "a.mp4").write_text("x")
    (tmp_path / "v" / "a.txt").write_bytes(b"\xff")
    assert encode(tmp_path / "v", vae, tmp_path / "s") == 20 and "a.txt: cannot be read" in error_of(capsys)
    (tmp_path / "v" / "a.txt").write_text("caption")
    assert encode(tmp_path / "v", vae, tmp_path / "s") == 20 and "has no entry: all 1" in error_of(capsys)


@pytest.mark.parametrize(
    ("fps", "shown"), [(16, [0, 1, 2, 3]), (32, [0, 2, 4, 6]), (8, [0, 0, 1, 1]), (24, [0, 1, 3, 4])]
)
def test_frames_are_those_shown_at_the_new_rate(tmp_path: Path, fps: int, shown: list[int]):
    path = film(tmp_path / "a.mp4", frames=12, fps=fps)
    own = read_clip(path, ClipForm(12, fps, 32, 48))
    clip = read_clip(path, ClipForm(4, 16, 32, 48))
    assert torch.equal(clip, own[shown])


def test_the_centre_is_kept_and_a_video_that_just_fits_is_not_too_short(tmp_path: Path):
    path = film(tmp_path / "a.mp4", frames=9, size=(32, 96))
    whole = read_clip(path, ClipForm(9, 16, 32, 96))
    assert torch.equal(read_clip(path, ClipForm(9, 16, 32, 48)), whole[..., 24:72])
    assert read_clip(path, ClipForm(9, 16, 16, 16)).shape == (9, 3, 16, 16)


def test_estimates(capsys: pytest.CaptureFixture[str]):
    assert verb("estimate", "ode", "--count", 6000, "--gpu", "h100") == 0
    said = capsys.readouterr().out
    # spec of the published data: 6 states of 25.2 MB, 19 PFLOP a video
    assert "6000 items of 1.94e+04 TFLOP and 25.2 MB" in said and "151.0 GB" in said
    assert "81.75 GPU-hours on h100 if 40% of its 989 TFLOP/s is reached" in said and "an assumption" in said
    assert verb("estimate", "latents", "--count", 2, "--gpu", "RTX 9999") == 0
    said = capsys.readouterr().out
    assert "163.8 TFLOP and 4.2 MB" in said and "no hours: the peak of 'RTX 9999'" in said
    assert verb("estimate", "embed", "--count", 1) == 0
    said = capsys.readouterr().out
    assert "4.845 TFLOP and 4.2 MB" in said and "no hours without a GPU" in said
    for wrong in (("--count", 0), ("--count", 1, "--utilisation", 40), ("--count", 1, "--size", "8")):
        assert verb("estimate", "ode", *wrong) == 20
        assert wrong[-2] in error_of(capsys)


def test_the_same_names_as_the_published_captions(tmp_path: Path):
    """A converted store answers as its source does, whichever opens it."""
    source = write_published(tmp_path / "l", rows_of(6))
    assert verb("convert", source, "--to", "mirai", "--out", tmp_path / "s") == 0
    for path in (source, tmp_path / "s"):
        clips = open_clips(path)
        assert clips.size == 5 and [text.split() for text in clips.captions(range(5))] == [c.split() for c in CAPTIONS]
