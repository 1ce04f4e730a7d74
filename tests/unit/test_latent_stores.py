"""Stores of latents and ODE pairs: what was put in comes out, bit for bit, or a line says which file is wrong."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mirai_dist.config.error import FileError
from mirai_dist.data.arrays import Part, file_of
from mirai_dist.data.clips import open_clips
from mirai_dist.data.latents import CLEAN, ODE, PROMPTS, STORE, Entry, LatentStore, LeftOut, Plan, StoreWriter
from mirai_dist.data.prompts import PromptFile
from mirai_dist.state.cursor import BatchLayout, Cursor, samples_of_rank

SHAPE = (2, 3, 4, 4)
PLAN = Plan(CLEAN, 7, SHAPE, "float16", 3, "s" * 64, provenance={"vae": "v"})
PAIRS = Plan(ODE, 5, (6, *SHAPE), "bfloat16", 2, "s" * 64, (1000.0, 937.5, 833.25, 625.0), True)


def entry(number: int, plan: Plan = PLAN) -> Entry:
    draws = torch.Generator().manual_seed(number)
    dtype = torch.float16 if plan.dtype == "float16" else torch.bfloat16
    return Entry(f"a caption of {number}", torch.randn(plan.shape, generator=draws).to(dtype))


def fill(path: Path, plan: Plan = PLAN, part: Part | None = None) -> LatentStore | None:
    writer = StoreWriter(path, plan, part)
    for shard in writer.missing():
        writer.write(shard, (entry(number, plan) for number in plan.numbers(shard)))
    return writer.seal()


def contents(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.iterdir() if file.is_file()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    fill(tmp_path / "s")
    return tmp_path / "s"


def expected(numbers: list[int], plan: Plan = PLAN) -> Tensor:
    return torch.stack([entry(number, plan).latents for number in numbers])


def test_what_was_put_in_comes_out(path: Path):
    store = open_clips(path)
    assert (store.size, store.shape) == (7, SHAPE)
    assert store.captions([6, 0]) == ["a caption of 6", "a caption of 0"]
    assert torch.equal(store.latents(range(7)), expected(list(range(7))))
    assert torch.equal(store.latents([4, 0, 4]), expected([4, 0, 4]))
    assert store.latents([5]).dtype == torch.float16
    assert store.latents([]).shape == (0, *SHAPE)
    assert isinstance(store, LatentStore) and not list(store.verify())


def test_ode_pairs_give_states_and_their_last_as_clean(tmp_path: Path):
    fill(tmp_path / "s", PAIRS)
    pairs = open_clips(tmp_path / "s")
    states = pairs.states([3, 1])
    assert torch.equal(states, expected([3, 1], PAIRS)) and states.dtype == torch.bfloat16
    assert torch.equal(pairs.latents([3, 1]), states[:, -1])
    assert pairs.timesteps == (1000.0, 937.5, 833.25, 625.0) and pairs.truth and pairs.shape == SHAPE


def test_clean_latents_have_no_states(path: Path):
    with pytest.raises(FileError, match="holds clean latents, no trajectories"):
        LatentStore(path).states([0])


def test_a_shard_is_a_safetensors_file(path: Path):
    tensors = load_file(file_of(path, "shard-00001"))
    assert list(tensors) == ["latents"] and torch.equal(tensors["latents"], expected([3, 4, 5]))


def test_prompts_are_a_prompt_file(path: Path):
    file = PromptFile(path / PROMPTS)
    assert file.captions(range(7)) == [f"a caption of {number}" for number in range(7)]


def test_numbers_outside_are_index_errors(path: Path):
    for number in (7, -1):
        with pytest.raises(IndexError, match=f"0 to 6, not {number}"):
            LatentStore(path).latents([number])


def test_line_breaks_stay_in_the_caption_and_out_of_the_prompt_file(tmp_path: Path):
    plan = replace(PLAN, candidates=2)
    texts = ["\ufefftwo\r\nlines ", 'quotes " and \\ and \u732b']
    writer = StoreWriter(tmp_path / "s", plan)
    writer.write(0, [Entry(text, entry(i).latents) for i, text in enumerate(texts)])
    store = writer.seal()
    assert store and [store.original_caption(i) for i in (0, 1)] == texts
    assert store.captions([0, 1]) == ["two  lines", texts[1]]


def test_candidates_that_are_left_out_have_no_number(tmp_path: Path):
    writer = StoreWriter(tmp_path / "s", PLAN)
    writer.write(0, [entry(0), LeftOut("b.mp4", "too short"), entry(2)])
    writer.write(1, [LeftOut(f"{i}.mp4", "damaged") for i in range(3)])
    writer.write(2, [entry(6)])
    store = writer.seal()
    assert store and store.size == 3
    assert torch.equal(store.latents([0, 1, 2]), expected([0, 2, 6]))
    assert store.captions([2, 1]) == ["a caption of 6", "a caption of 2"]
    assert [item.what for item in store.left_out()] == ["b.mp4", "0.mp4", "1.mp4", "2.mp4"]
    assert not list(store.verify())


def test_a_store_without_entries_is_refused(tmp_path: Path):
    writer = StoreWriter(tmp_path / "s", replace(PLAN, candidates=1))
    writer.write(0, [LeftOut("a.mp4", "damaged")])
    with pytest.raises(FileError, match="has no entry: all 1 candidates were left out"):
        writer.seal()


def test_parts_in_any_order_make_the_same_bytes(path: Path, tmp_path: Path):
    other = tmp_path / "parts"
    assert fill(other, part=Part(1, 2)) is None
    with pytest.raises(FileError, match="is not finished: 2 of 3 shards are missing"):
        LatentStore(other)
    assert fill(other, part=Part(4, 9)) is None  # more parts than shards: nothing to do
    assert fill(other, part=Part(0, 2)) is not None
    assert contents(other) == contents(path)


def test_ranks_that_are_threads_make_one_store_together(path: Path, tmp_path: Path):
    """They begin and end at the same moment: each writes plan.json, and whoever sees all shards seals."""
    for attempt in range(5):
        other, ready = tmp_path / f"{attempt}", threading.Barrier(3)

        def rank(index: int, other: Path = other, ready: threading.Barrier = ready) -> LatentStore | None:
            ready.wait()
            return fill(other, part=Part(index, 3))

        with ThreadPoolExecutor(3) as pool:
            sealed = list(pool.map(rank, range(3)))
        assert any(sealed) and contents(other) == contents(path)


@pytest.mark.parametrize("at", [0, 1, 2, 4, 6])
def test_killed_at_any_entry_the_rest_is_made_and_the_bytes_are_the_same(path: Path, tmp_path: Path, at: int):
    other = tmp_path / "killed"
    writer = StoreWriter(other, PLAN)

    def entries(shard: int):
        for number in PLAN.numbers(shard):
            if number == at:
                raise KeyboardInterrupt
            yield entry(number)

    with pytest.raises(KeyboardInterrupt):
        for shard in writer.missing():
            writer.write(shard, entries(shard))
    assert not list(other.glob(".*"))
    (other / ".shard-00002.safetensors.tmp-node7-4242").write_bytes(b"left by one that was killed")
    assert StoreWriter(other, PLAN).missing() == list(range(at // 3, 3))
    fill(other)
    assert contents(other) == contents(path)


def test_a_damaged_shard_is_made_again_and_whole_ones_are_not(path: Path, tmp_path: Path):
    whole = contents(path)
    damaged = bytearray(whole["shard-00001.safetensors"])
    damaged[-1] ^= 1
    (path / "shard-00001.safetensors").write_bytes(damaged)
    writer = StoreWriter(path, PLAN)
    assert writer.missing() == [1]
    assert "entry 2 of this file was altered" in writer.damaged[0].what
    fill(path)
    assert contents(path) == whole


@pytest.mark.parametrize(
    "change", [{"source": "t" * 64}, {"dtype": "bfloat16"}, {"shard_size": 4}, {"provenance": {"vae": "w"}}]
)
def test_a_folder_of_another_plan_is_refused(path: Path, change: dict):
    before = contents(path)
    with pytest.raises(FileError, match=f"is of a store with another {next(iter(change))}"):
        StoreWriter(path, replace(PLAN, **change))
    assert contents(path) == before


def test_what_a_writer_refuses(tmp_path: Path):
    writer = StoreWriter(tmp_path / "s", PLAN)
    good = entry(0).latents
    for wrong, message in (
        ([entry(0)], "3 candidates, 1 were given"),
        ([entry(0)] * 4, "3 candidates, 4 were given"),
        ([Entry("a", good.float())] * 3, "torch.float32, must be"),
        ([Entry("a", good[:1])] * 3, "must be \\[2, 3, 4, 4\\] float16"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(0, wrong)
    for wrong, message in (
        ([Entry("a", good / 0)] * 3, "candidate 0 came out with non-finite values"),
        ([entry(0), Entry(" \n", good), entry(2)], "candidate 1 has no caption"),
    ):
        with pytest.raises(FileError, match=message):
            writer.write(0, wrong)
    assert set(contents(tmp_path / "s")) == {"plan.json"}
    for change in ({"kind": "x"}, {"dtype": "float64"}, {"shape": (2, 3, 4)}, {"candidates": 0}):
        with pytest.raises(ValueError):
            replace(PLAN, **change)
    with pytest.raises(ValueError, match="6 states of which 3 have a timestep: must be 5"):
        replace(PAIRS, timesteps=(1000.0, 937.5, 833.25))


def test_a_disk_that_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = StoreWriter(tmp_path / "s", PLAN)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match="cannot be written: No space left on device"):
        writer.write(0, [entry(number) for number in range(3)])
    assert set(contents(tmp_path / "s")) == {"plan.json"}
    with pytest.raises(FileError, match="cannot be made"):
        StoreWriter(Path("/dev/null/s"), PLAN)


def test_a_flipped_byte_anywhere_is_found(tmp_path: Path):
    """Every byte of a shard, and of the three small files, one after the other."""
    plan = Plan(CLEAN, 2, (1, 1, 2, 2), "float16", 2, "s")
    fill(tmp_path / "s", plan)
    for file in sorted((tmp_path / "s").iterdir()):
        whole = file.read_bytes()
        for at in range(len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            if file.suffix == ".json" and (parsed(file) == parsed(file, whole) or file.name == "plan.json"):
                continue  # white space; what a finished store does not read
            faults = found(tmp_path / "s")
            assert faults and "\n" not in str(faults[0]) and file.name in str(faults[0]), (file.name, at)
        file.write_bytes(whole)
    assert not found(tmp_path / "s")


def parsed(file: Path, data: bytes | None = None) -> object:
    try:
        return json.loads(file.read_bytes() if data is None else data)
    except ValueError:
        return None


def found(store: Path) -> list[FileError]:
    try:
        return list(LatentStore(store).verify())
    except FileError as error:
        return [error]


def test_a_flipped_byte_is_named_by_entry_and_file_and_no_other_entry_suffers(path: Path):
    file = file_of(path, "shard-00001")
    data = bytearray(file.read_bytes())
    size = 2 * torch.Size(SHAPE).numel()
    data[-size - 5] ^= 16  # in the second of three
    file.write_bytes(data)
    store = LatentStore(path)
    (fault,) = store.verify()
    assert fault.where == str(file) and "entry 1 of this file was altered" in fault.what
    with pytest.raises(FileError, match="entry 1 of this file was altered"):
        store.latents([4])
    assert torch.equal(store.latents([3, 5, 0]), expected([3, 5, 0]))


def edited(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A JSON file changed, with a digest that is right again: what a careful vandal would do."""

    def apply(store: Path) -> None:
        content = json.loads((store / name).read_text())
        content.pop("sha256")
        change(content)
        content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (store / name).write_text(json.dumps(content))

    return apply


def swapped(store: Path) -> None:
    first, second = file_of(store, "shard-00000"), file_of(store, "shard-00001")
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def of_another_store(store: Path) -> None:
    fill(store.parent / "other", replace(PLAN, source="t"))
    shutil.copy(file_of(store.parent / "other", "shard-00002"), store)


def with_another_entry(store: Path) -> None:
    """A whole shard of the right plan that is not the one which the store was sealed with."""
    StoreWriter(store, PLAN).write(2, [Entry("another", entry(0).latents)])


def a_folder(name: str) -> Callable[[Path], object]:
    def apply(store: Path) -> None:
        (store / name).unlink()
        (store / name).mkdir()

    return apply


S0 = "shard-00000.safetensors"
MUTATIONS: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "a file": lambda s: (shutil.rmtree(s), s.write_text("x")),
    "empty folder": lambda s: (shutil.rmtree(s), s.mkdir()),
    "no store.json": lambda s: (s / STORE).unlink(),
    "no store.json and no shard": lambda s: ((s / STORE).unlink(), (s / S0).unlink()),
    "no store.json, plan.json altered": lambda s: ((s / STORE).unlink(), (s / "plan.json").write_text("{}")),
    "no prompts.txt": lambda s: (s / PROMPTS).unlink(),
    "no shard": lambda s: (s / S0).unlink(),
    "no last shard": lambda s: file_of(s, "shard-00002").unlink(),
    "empty shard": lambda s: (s / S0).write_bytes(b""),
    "shard of zeros": lambda s: (s / S0).write_bytes(bytes(4096)),
    "shard of ones": lambda s: (s / S0).write_bytes(b"\xff" * 4096),
    "shard of text": lambda s: (s / S0).write_text("hello " * 200),
    "shard is a folder": a_folder(S0),
    "shards swapped": swapped,
    "shard of another store": of_another_store,
    "shard with another entry": with_another_entry,
    "byte more": lambda s: (s / S0).write_bytes((s / S0).read_bytes() + b"x"),
    "a safetensors file of others": lambda s: (s / S0).write_bytes(
        (n := b'{"latents":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}').__len__().to_bytes(8, "little") + n
    ),
    "head nested deep": lambda s: (s / S0).write_bytes((60000).to_bytes(8, "little") + b"[" * 60000),
    "head longer than the file": lambda s: (s / S0).write_bytes((1 << 20).to_bytes(8, "little") + b"{}"),
    "store.json empty": lambda s: (s / STORE).write_text(""),
    "store.json a list": lambda s: (s / STORE).write_text("[]"),
    "store.json a number": lambda s: (s / STORE).write_text("7"),
    "store.json not UTF-8": lambda s: (s / STORE).write_bytes(b"\xff\xfe{}"),
    "store.json nested deep": lambda s: (s / STORE).write_text("[" * 100000),
    "store.json without digest": lambda s: (s / STORE).write_text("{}"),
    "store.json is a folder": a_folder(STORE),
    "store.json of embeddings": lambda s: (s / STORE).write_text('{"encoder": "e", "version": 1}'),
    "version of the future": edited(STORE, lambda c: c["plan"].update(version=2)),
    "kind unknown": edited(STORE, lambda c: c["plan"].update(kind="pictures")),
    "dtype unknown": edited(STORE, lambda c: c["plan"].update(dtype="float8")),
    "shape of text": edited(STORE, lambda c: c["plan"].update(shape=["2", "3", "4", "4"])),
    "shape missing": edited(STORE, lambda c: c["plan"].pop("shape")),
    "shape a number": edited(STORE, lambda c: c["plan"].update(shape=4)),
    "a field too many": edited(STORE, lambda c: c["plan"].update(colour="red")),
    "another dtype": edited(STORE, lambda c: c["plan"].update(dtype="bfloat16")),
    "another source": edited(STORE, lambda c: c["plan"].update(source="t")),
    "count too large": edited(STORE, lambda c: c.update(count=8)),
    "a shard's count too large": edited(STORE, lambda c: c["shards"].__setitem__(0, [4, c["shards"][0][1]])),
    "no shards": edited(STORE, lambda c: c.update(shards=[])),
    "another shard digest": edited(STORE, lambda c: c["shards"].__setitem__(1, [3, "0" * 64])),
    "no plan": edited(STORE, lambda c: c.pop("plan")),
    "shards of text": edited(STORE, lambda c: c.update(shards="abc")),
    "prompts.txt edited": lambda s: (s / PROMPTS).write_text("another\n" * 7),
    "prompts.txt a line short": lambda s: (s / PROMPTS).write_text("another\n" * 6),
    "prompts.txt empty": lambda s: (s / PROMPTS).write_text(""),
    "prompts.txt not UTF-8": lambda s: (s / PROMPTS).write_bytes(b"\xff\n"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_stores_are_one_line(path: Path, name: str):
    MUTATIONS[name](path)
    faults = found(path)
    assert faults, "not noticed"
    for fault in faults:
        assert str(path) in str(fault) and "\n" not in str(fault) and len(str(fault)) < 500


@pytest.mark.parametrize("cut", range(24))
def test_a_shard_cut_anywhere_is_noticed_when_it_is_opened(path: Path, cut: int):
    file = file_of(path, "shard-00000")
    data = file.read_bytes()
    file.write_bytes(data[: random.Random(cut).randrange(len(data))])
    with pytest.raises(FileError) as refused:
        LatentStore(path).latents([0])
    assert str(file) in str(refused.value)


def test_opening_reads_no_shard_and_reading_all_keeps_few_mapped(tmp_path: Path):
    plan = Plan(CLEAN, 200, (1, 1, 2, 2), "float16", 1, "s")
    fill(tmp_path / "s", plan)
    for file in (tmp_path / "s").glob("shard-*"):
        file.rename(file.with_suffix(".away"))
    store = LatentStore(tmp_path / "s")
    for file in (tmp_path / "s").glob("shard-*"):
        file.rename(file.with_suffix(".safetensors"))
    assert torch.equal(store.latents(range(200)), expected(list(range(200)), plan))
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line.split()[-1] for line in lines if f"{tmp_path}/s/shard-" in line}
    assert 0 < len(mapped) <= 64


def test_opening_many_shards_is_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    fill(tmp_path / "s", Plan(CLEAN, 300, (1, 1, 2, 2), "float16", 1, "s"))
    took = min(timed(lambda: LatentStore(tmp_path / "s")) for _ in range(3))
    assert took < 0.05, f"opening 300 shards took {took * 1e3:.0f} ms"  # 0.5 ms on two busy cores


def test_reading_costs_little_more_than_the_digest(tmp_path: Path):
    """A Wan-sized entry, 4.2 MB; a copy, and the digest of what arrived."""
    plan = Plan(CLEAN, 4, (21, 16, 60, 104), "float16", 4, "s")
    fill(tmp_path / "s", plan)
    store, data = LatentStore(tmp_path / "s"), bytes(2 * 21 * 16 * 60 * 104)
    store.latents([0])
    reading = min(timed(lambda: store.latents([1])) for _ in range(9))
    digest = min(timed(lambda: hashlib.sha256(data).digest()) for _ in range(9))
    assert reading < 2.5 * digest, f"{reading * 1e3:.1f} ms to read, {digest * 1e3:.1f} ms for the digest alone"


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def test_ranks_read_disjoint_entries_of_an_epoch_on_any_world_size(path: Path):
    store = LatentStore(path)
    read: dict[int, list[str]] = {}
    for ranks in (1, 2, 3):
        cursor = Cursor(0, "generator", store.size)
        first, read[ranks] = cursor.take(6)[0], []
        for rank in range(ranks):
            (numbers,) = samples_of_rank(first, BatchLayout(ranks, rank, 6 // ranks, 1))
            read[ranks] += store.captions([cursor.index(number) for number in numbers])
    assert read[1] == read[2] == read[3] and len(set(read[1])) == 6
