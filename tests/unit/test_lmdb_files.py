"""The published LMDB layout: read as it is published, converted both ways bit for bit, damaged in many ways."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from mirai_dist.commands import data_verify
from mirai_dist.config.error import FileError
from mirai_dist.data.clips import open_clips
from mirai_dist.data.lmdb_files import LmdbClips, LmdbContents, LmdbShapes, published_timesteps, write_lmdb

SHAPE = (2, 3, 4, 4)
CAPTIONS = ["a red circle", "ein gr\u00fcner Kreis\nauf zwei Zeilen ", "\u732b", "a red circle, again", "x" * 3000]


def array(row: int, shape: Sequence[int]) -> np.ndarray:
    values = np.random.default_rng(row).standard_normal(shape).astype(np.float16)
    values.flat[:3] = (-0.0, 6e-8, 65504)  # what float16 has that a careless conversion loses
    return values


def write_published(
    path: Path,
    rows: Sequence[np.ndarray],
    captions: Sequence[str] = CAPTIONS,
    keys: Mapping[str, bytes | None] | None = None,
) -> Path:
    """An environment as the published scripts lay it out; `keys` replaces or (None) leaves out single ones."""
    path.mkdir(parents=True, exist_ok=True)
    items: dict[str, bytes | None] = {}
    for index, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        items[f"latents_{index}_data"] = row.tobytes()
        items[f"prompts_{index}_data"] = caption.encode()
    items["latents_shape"] = " ".join(map(str, (len(rows), *rows[0].shape))).encode()
    items["prompts_shape"] = str(len(rows)).encode()
    items |= keys or {}
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for key, value in items.items():
            if value is not None:
                transaction.put(key.encode(), value)
    return path


def rows_of(states: int | None) -> list[np.ndarray]:
    shape = SHAPE if states is None else (states, *SHAPE)
    return [array(row, shape) for row in range(len(CAPTIONS))]


def content(path: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return {bytes(key): bytes(value) for key, value in transaction.cursor()}


@pytest.mark.parametrize("states", [None, 1, 5, 6])
def test_rows_are_read_as_published(tmp_path: Path, states: int | None):
    rows = rows_of(states)
    clips = open_clips(write_published(tmp_path / "l", rows))
    assert isinstance(clips, LmdbClips) and (clips.size, clips.shape) == (5, SHAPE)
    assert clips.captions([4, 1]) == [CAPTIONS[4], CAPTIONS[1]]
    whole = [torch.from_numpy(row.reshape(-1, *SHAPE)) for row in rows]
    assert torch.equal(clips.latents([3, 0]), torch.stack([whole[3][-1], whole[0][-1]]))
    assert clips.latents([2]).dtype == torch.float16 and clips.latents([]).shape == (0, *SHAPE)
    if states in (5, 6):
        assert torch.equal(clips.states([1, 4]), torch.stack([whole[1], whole[4]]))
    else:
        with pytest.raises(FileError, match="holds clean latents"):
            clips.states([0])
    with pytest.raises(IndexError, match="rows 0 to 4, not 5"):
        clips.captions([5])
    assert not list(clips.verify())


def test_published_timesteps():
    assert published_timesteps(6) == pytest.approx((1000, 937.5, 833.3333, 625))
    assert published_timesteps(5) == pytest.approx((1000, 960, 888.8889, 727.2727))
    assert published_timesteps(4) == ()


def test_only_six_states_have_the_ground_truth(tmp_path: Path):
    assert LmdbClips(write_published(tmp_path / "6", rows_of(6))).truth
    assert not LmdbClips(write_published(tmp_path / "5", rows_of(5))).truth
    with pytest.raises(FileError, match="rows of 4 states are not published data"):
        _ = LmdbClips(write_published(tmp_path / "4", rows_of(4))).timesteps


def test_a_folder_of_environments_is_one_data_set_in_the_order_of_names(tmp_path: Path):
    rows = rows_of(1)
    for name, own in (("shard_0", (0, 1)), ("shard_1", (2,)), ("shard_10", (3, 4))):
        captions = [CAPTIONS[row] for row in own]
        write_published(tmp_path / "l" / name, [rows[row] for row in own], captions)
    clips = LmdbClips(tmp_path / "l")
    assert clips.captions(range(5)) == CAPTIONS
    assert torch.equal(clips.latents(range(5)), torch.stack([torch.from_numpy(row[-1]) for row in rows]))
    write_published(tmp_path / "l" / "shard_2", [array(0, (2, *SHAPE))], ["x"])
    with pytest.raises(FileError, match="keep different data in different folders"):
        LmdbClips(tmp_path / "l")


def test_a_shape_of_prompts_that_copies_that_of_latents_is_understood(tmp_path: Path):
    path = write_published(tmp_path / "l", rows_of(None), keys={"prompts_shape": b"5 2 3 4 4"})
    assert LmdbClips(path).size == 5


def test_two_data_sets_of_one_file_and_threads(tmp_path: Path):
    """Generator and critic each open the file; py-lmdb admits one environment a process."""
    path = write_published(tmp_path / "l", rows_of(1))
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(LmdbClips, [path] * 4))
        read = list(pool.map(lambda clips: clips.latents(range(5)), opened * 10))
    assert all(torch.equal(values, read[0]) for values in read)


def test_a_forked_worker_reads_with_an_environment_of_its_own(tmp_path: Path):
    clips = LmdbClips(write_published(tmp_path / "l", rows_of(1)))
    expected = clips.latents([2]).numpy().tobytes()
    inherited = clips._files[0]._environment
    child = os.fork()
    if not child:
        same = False
        try:
            same = clips.latents([2]).numpy().tobytes() == expected
        finally:
            os._exit(0 if same and clips._files[0]._environment is not inherited else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert clips.latents([2]).numpy().tobytes() == expected


def test_reading_writes_nothing_and_works_in_a_folder_that_is_read_only(tmp_path: Path):
    path = write_published(tmp_path / "l", rows_of(1))
    (path / "lock.mdb").unlink()
    os.chmod(path, 0o555)
    try:
        LmdbClips(path).latents(range(5))
        assert [file.name for file in path.iterdir()] == ["data.mdb"]
    finally:
        os.chmod(path, 0o755)


def test_what_is_written_is_the_published_layout(tmp_path: Path):
    rows = rows_of(6)
    published = write_published(tmp_path / "p", rows)
    size = 2 * rows[0].size
    contents = LmdbContents(LmdbShapes("5 6 2 3 4 4", "5"), 5, size, sum(map(len, CAPTIONS)))
    pairs = zip(CAPTIONS, map(torch.from_numpy, rows), strict=True)
    write_lmdb(tmp_path / "w", contents, pairs)
    assert content(tmp_path / "w") == content(published)
    assert [file.name for file in (tmp_path / "w").iterdir()] == ["data.mdb"]
    with pytest.raises(FileError, match="is there already"):
        write_lmdb(tmp_path / "w", contents, [])


def test_many_rows_fit_and_take_several_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mirai_dist.data.lmdb_files._TRANSACTION", 10_000)
    row = torch.from_numpy(array(0, (1, *SHAPE)))
    captions = [f"{number} " + "long " * (number % 1500) for number in range(400)]
    contents = LmdbContents(LmdbShapes("400 1 2 3 4 4", "400"), 400, 192, sum(map(len, captions)))
    write_lmdb(tmp_path / "w", contents, ((caption, row) for caption in captions))
    assert LmdbClips(tmp_path / "w").captions(range(400)) == captions


def test_a_writer_that_stops_leaves_nothing(tmp_path: Path):
    def rows():
        yield "one", torch.from_numpy(array(0, (1, *SHAPE)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lmdb(tmp_path / "w", LmdbContents(LmdbShapes("2 1 2 3 4 4", "2"), 2, 192, 9), rows())
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileError, match="cannot be written"):
        write_lmdb(Path("/dev/null/w"), LmdbContents(LmdbShapes("", ""), 1, 1, 1), [])


def cut(size: int) -> Callable[[Path], object]:
    return lambda path: os.truncate(path / "data.mdb", size)


MUTATED: dict[str, dict[str, bytes | None]] = {
    "no shape": {"latents_shape": None},
    "no shape of prompts": {"prompts_shape": None},
    "rows alone": {"latents_shape": b"5"},
    "empty shape": {"latents_shape": b""},
    "words": {"latents_shape": b"five 1 2 3 4 4"},
    "negative": {"latents_shape": b"5 1 2 -3 4 4"},
    "zero": {"latents_shape": b"5 0 2 3 4 4"},
    "fractions": {"latents_shape": b"5.0 1.0 2 3 4 4"},
    "too many": {"latents_shape": b"5 1 1 2 3 4 4"},
    "too few": {"latents_shape": b"5 2 3 4"},
    "huge": {"latents_shape": b"5 1 2 3 4 99999999999999999999"},
    "not ASCII": {"latents_shape": b"\xff\xfe"},
    "python tuple": {"latents_shape": b"(5, 1, 2, 3, 4, 4)"},
    "another row size": {"latents_shape": b"5 1 2 3 4 5"},
    "more rows than there are": {"latents_shape": b"6 1 2 3 4 4", "prompts_shape": b"6"},
    "fewer rows than there are": {"latents_shape": b"4 1 2 3 4 4", "prompts_shape": b"4"},
    "other number of prompts": {"prompts_shape": b"4"},
    "a row missing": {"latents_2_data": None},
    "a prompt missing": {"prompts_2_data": None},
    "a row cut": {"latents_2_data": bytes(190)},
    "a row empty": {"latents_2_data": b""},
    "a row of float32": {"latents_2_data": bytes(384)},
    "a row with a NaN": {"latents_2_data": b"\x00\x7e" + bytes(190)},
    "a row with an infinity": {"latents_2_data": b"\x00\x7c" + bytes(190)},
    "a prompt not UTF-8": {"prompts_2_data": b"\xff"},
    "a key too many": {"noise_0_data": b"x"},
}
FILES: dict[str, Callable[[Path], object]] = {
    "empty": cut(0),
    "cut at 100": cut(100),
    "cut at a page": cut(4096),
    "cut after the meta pages": cut(8192),
    "cut at 9000": cut(9000),
    "cut at 12288": cut(12288),
    "text": lambda path: (path / "data.mdb").write_text("hello" * 5000),
    "zeros": lambda path: (path / "data.mdb").write_bytes(bytes(40960)),
    "a folder": lambda path: ((path / "data.mdb").unlink(), (path / "data.mdb").mkdir()),
    "gone": lambda path: (path / "data.mdb").unlink(),
    "a file in the folder's place": lambda path: (
        [file.unlink() for file in path.iterdir()], path.rmdir(), path.write_text("x"),
    ),
    "no folder": lambda path: ([file.unlink() for file in path.iterdir()], path.rmdir()),
    "pages of ones": lambda path: overwritten(path, 8192, b"\xff"),
    "pages of zeros": lambda path: overwritten(path, 8192, b"\0"),
}


def overwritten(path: Path, at: int, byte: bytes) -> None:
    data = (path / "data.mdb").read_bytes()
    (path / "data.mdb").write_bytes(data[:at] + byte * (len(data) - at))


def faults_of(path: Path) -> list[FileError]:
    try:
        _, faults = data_verify._opened(path)
        return list(faults)
    except FileError as error:
        return [error]


@pytest.mark.parametrize("name", MUTATED)
def test_mutated_keys_are_one_line(tmp_path: Path, name: str):
    path = write_published(tmp_path / "l", rows_of(1), keys=MUTATED[name])
    faults = faults_of(path)
    assert faults, "not noticed"
    for fault in faults:
        assert str(path) in str(fault) and "\n" not in str(fault) and len(str(fault)) < 500


@pytest.mark.parametrize("name", FILES)
def test_mutated_files_are_one_line(tmp_path: Path, name: str):
    path = write_published(tmp_path / "l", rows_of(1))
    FILES[name](path)
    faults = faults_of(path)
    gc.collect()
    assert faults, "not noticed"
    for fault in faults:
        assert str(path) in str(fault) and "\n" not in str(fault) and len(str(fault)) < 500


@pytest.mark.parametrize("size", [0, 100, 4096, 8192, 12288])
def test_a_file_that_is_cut_short_does_not_end_the_process(tmp_path: Path, size: int):
    path = write_published(tmp_path / "l", rows_of(1))
    os.truncate(path / "data.mdb", size)
    with pytest.raises(FileError, match="is cut short"):
        LmdbClips(path)


def test_pages_that_end_a_process_with_a_signal_do_not_end_verify(tmp_path: Path):
    """LMDB follows the numbers in its pages; some of these lead it out of the file."""
    rows = [array(row, (1, *SHAPE)) for row in range(60)]
    path = write_published(tmp_path / "l", rows, ["a caption of some length " * 8] * 60)
    data, killed = (path / "data.mdb").read_bytes(), 0
    for seed in range(12):
        damaged, draws = bytearray(data), random.Random(seed)
        for page in range(2, len(data) // 4096):
            damaged[4096 * page + 16 : 4096 * page + 60] = draws.randbytes(44)
        (tmp_path / f"{seed}").mkdir()
        (tmp_path / f"{seed}/data.mdb").write_bytes(damaged)
        faults = faults_of(tmp_path / f"{seed}")
        assert faults
        killed += "LMDB cannot read its own pages" in str(faults[-1])
    assert killed, "nothing was shown"


def test_rows_that_are_bad_are_all_named(tmp_path: Path):
    bad = {"latents_1_data": b"\x00\x7e" + bytes(190), "prompts_3_data": b"\xff"}
    path = write_published(tmp_path / "l", rows_of(1), keys=bad)
    said = [str(fault) for fault in faults_of(path)]
    assert len(said) == 2 and "latents_1_data holds non-finite" in said[0] and "prompts_3_data is not UTF-8" in said[1]


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_published(tmp_path / "l", rows_of(1))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(FileError, match=r"LMDB files need the package lmdb .* install mirai-dist\[wan\]"):
        open_clips(path)
