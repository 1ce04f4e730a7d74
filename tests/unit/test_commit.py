from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirai_dist.state.commit import (
    MANIFEST,
    CheckpointError,
    Commit,
    complete,
    directory_name,
    flushed,
    latest,
    manifest_of,
    retain,
    verify,
)

WRITING_CALLS = ("makedirs", "open", "write", "fsync", "rename", "unlink", "rmdir")


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests ask when files are flushed, not whether the disk obeys: a real fsync costs milliseconds."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """The process died here; not an Exception, so that nothing in the code under test tidies up."""


def save(root: Path, cycle: int, position: int = 0) -> Path:
    final = root / directory_name(cycle, position)
    commit = Commit(final)
    commit.write("state.json", json.dumps({"cycle": cycle}).encode())
    (commit.directory / "tensors").mkdir()
    (commit.directory / "tensors" / "0.bin").write_bytes(bytes([cycle]) * 500)
    (commit.directory / "tensors" / "1.bin").write_bytes(bytes([cycle + 1]) * 300)
    known = flushed(commit.directory, ["tensors/0.bin"])
    commit.seal({"cycle": cycle, "position": position, "recipe": "abc"}, known)
    return final


def die_at(monkeypatch: pytest.MonkeyPatch, call: int, half_write: bool) -> list[str]:
    """From writing call number `call` on, this process is dead; returns the calls it still made."""
    made: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if len(made) >= call:
                if half_write and name == "write" and len(made) == call:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Killed(name)
            made.append(name)
            return real(*arguments, **named)

        return wrapped

    for name in WRITING_CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return made


@pytest.mark.parametrize("half_write", [False, True])
@pytest.mark.parametrize("replaces", [False, True], ids=["next", "same-point"])
def test_a_writer_killed_at_any_call_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, half_write: bool, replaces: bool
) -> None:
    survived = set()
    for call in range(1000):
        root = tmp_path / str(call)
        old = save(root, 1)
        with pytest.MonkeyPatch.context() as patch:
            made = die_at(patch, call, half_write)
            try:
                new = save(root, 1 if replaces else 2)
                retain(root, keep=1, verified=new)
                finished = True
            except Killed:
                finished = False
        found = latest(root)
        assert found is not None, f"nothing left after dying at call {call} ({made[-3:]})"
        verify(found)
        survived.add(manifest_of(found)["passport"]["cycle"])
        assert old in complete(root) or manifest_of(found)["passport"]["cycle"] == 2 or replaces
        # The next life of the run: it saves and tidies up without stumbling over what was left.
        retain(root, keep=1, verified=save(root, 3))
        assert sorted(path.name for path in root.iterdir()) == [directory_name(3, 0)]
        if finished:
            break
    assert finished and call > 15
    assert survived == ({1} if replaces else {1, 2})


def test_a_first_writer_killed_before_the_rename_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    """Not even with its manifest written: what comes before the rename may not be on the disk yet."""
    for call in range(1000):
        root = tmp_path / str(call)
        with pytest.MonkeyPatch.context() as patch:
            made = die_at(patch, call, half_write=True)
            with pytest.raises(Killed):
                save(root, 1)
        if "rename" in made:
            break
        if list(root.glob("*")):
            with pytest.raises(CheckpointError, match="none is complete"):
                latest(root)
        else:
            assert latest(root) is None
    assert call > 10 and len(complete(tmp_path / str(call))) == 1


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut only flushed bytes exist: each file and directory is flushed after its last write."""
    opened: dict[int, str] = {}
    order: list[str] = []
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename")}

    def open_(path: Any, *arguments: Any, **named: Any) -> int:
        descriptor = real["open"](path, *arguments, **named)
        opened[descriptor] = str(path)
        return descriptor

    def rename(source: Any, target: Any) -> None:
        inside = {str(path) for path in Path(source).rglob("*")} | {str(source)}
        assert inside <= set(order), f"renamed before flushing {inside - set(order)}"
        assert order[-1] == str(source) and order[-2] == str(Path(source) / MANIFEST)
        order.append("renamed")
        real["rename"](source, target)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(opened[fd]), real["fsync"](fd)))
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 1)
    assert str(tmp_path) in order[order.index("renamed"):]


@pytest.mark.parametrize("name", [MANIFEST, "state.json", "tensors/0.bin", "tensors/1.bin"])
@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert latest(tmp_path) == second
    file = second / name
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert complete(tmp_path) == [first] and latest(tmp_path) == first


@pytest.mark.parametrize("name", [MANIFEST, "state.json", "tensors/0.bin"])
def test_an_altered_byte_is_found(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    verify(path)
    data = bytearray((path / name).read_bytes())
    place = data.index(b'"abc"') + 1 if name == MANIFEST else len(data) // 2
    data[place] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} was altered") as raised:
        verify(path)
    assert "\n" not in str(raised.value) and raised.value.exit_code == 20


def test_verification_is_shared_out_over_ranks(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "tensors" / "1.bin").write_bytes(b"x" * 300)
    found = []
    for part in range(3):
        try:
            verify(path, part, 3)
        except CheckpointError as error:
            found.append(str(error))
    assert len(found) == 1 and "tensors/1.bin" in found[0]


def test_newest_is_by_cycle_then_position(tmp_path: Path) -> None:
    for cycle, position in [(10, 0), (9, 5), (10, 3), (2, 7)]:
        save(tmp_path, cycle, position)
    names = [directory_name(2, 7), directory_name(9, 5), directory_name(10, 0), directory_name(10, 3)]
    assert [path.name for path in complete(tmp_path)] == names


def test_nothing_saved_is_a_fresh_start_but_torn_ones_are_not(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert latest(root) is None
    root.mkdir()
    assert latest(root) is None
    save(root, 1)
    (root / directory_name(1, 0) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="state.json") as raised:
        latest(root)
    assert "\n" not in str(raised.value) and "delete" in str(raised.value)


def test_retention_keeps_the_newest_and_clears_what_died(tmp_path: Path) -> None:
    paths = [save(tmp_path, cycle) for cycle in range(1, 6)]
    (paths[1] / "state.json").unlink()
    dead, writing = tmp_path / f"{paths[3].name}.tmp-77", tmp_path / f"{directory_name(9, 0)}.tmp-78"
    other = tmp_path / "notes"
    for directory in (dead, writing, other):
        directory.mkdir()
    assert set(retain(tmp_path, keep=2)) == {paths[0], paths[1], paths[2], dead}
    assert set(tmp_path.iterdir()) == {paths[3], paths[4], writing, other}


def test_retention_deletes_nothing_when_the_newest_is_damaged(tmp_path: Path) -> None:
    paths = [save(tmp_path, cycle) for cycle in range(1, 4)]
    (paths[-1] / "tensors" / "0.bin").write_bytes(b"y" * 500)
    with pytest.raises(CheckpointError, match=r"0\.bin"):
        retain(tmp_path, keep=1)
    assert set(tmp_path.iterdir()) == set(paths)
    shutil.rmtree(paths[-1])
    (paths[1] / "state.json").unlink()
    assert retain(tmp_path, keep=1) == []
    assert latest(tmp_path) == paths[0]
    with pytest.raises(ValueError, match="keep"):
        retain(tmp_path, keep=0)


def test_a_writer_whose_files_are_not_here_is_found_out(tmp_path: Path) -> None:
    commit = Commit(tmp_path / directory_name(1, 0))
    commit.write("tensors.bin", b"12345")
    known = flushed(commit.directory, ["tensors.bin"])
    (commit.directory / "tensors.bin").unlink()
    with pytest.raises(CheckpointError, match=r"tensors\.bin has -1 bytes"):
        commit.seal({"cycle": 1}, known)
    commit.abandon()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(tmp_path, 1)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2)
    assert latest(tmp_path) == first
