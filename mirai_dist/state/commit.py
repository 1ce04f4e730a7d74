"""Directories that either exist whole or do not exist: write beside, flush, manifest last, rename.

No torch here: whatever scans for checkpoints (a launcher, a test, a person's script) can import this file.

    root/cycle-000040-position-0/             committed: only ever appears by rename, after everything is on disk
        manifest.json                         passport, and size and sha256 of every other file
    root/cycle-000045-position-0.tmp-<writer> being written, or left by a writer that died
    root/cycle-000040-position-0.old-<writer> whole but superseded; exists only while its successor is renamed

Which checkpoint is the newest is found by scanning, never stored. One writer (rank 0 of one run) owns a root.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_NAME = re.compile(r"cycle-(\d+)-position-(\d+)(\.(?:tmp|old)-.+)?")
_DIGEST_THREADS = 8


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be read; one line for the user."""

    exit_code = 20  # running the same job again would fail the same way


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says about one file."""

    size: int
    sha256: str


def directory_name(cycle: int, position: int) -> str:
    """Name of the checkpoint taken before `position` of `cycle`."""
    return f"cycle-{cycle:06d}-position-{position}"


class Commit:
    """One two-phase commit: `directory` is where the caller writes; `seal` makes it a checkpoint.

    Raises CheckpointError when the writing place cannot be made.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self._writer = f"{os.environ.get('SLURM_JOB_ID', socket.gethostname())}-{os.getpid()}"
        self.directory = final.with_name(f"{final.name}.tmp-{self._writer}")
        try:
            if self.directory.exists():  # this very process died here before: an earlier life of the same pid
                shutil.rmtree(self.directory)
            os.makedirs(self.directory)
        except OSError as error:
            raise CheckpointError(f"checkpoint {final}: cannot create {self.directory}: {error}") from error

    def write(self, name: str, data: bytes) -> None:
        """Write and flush one file of the checkpoint."""
        _write_flushed(self.directory / name, data)

    def seal(self, passport: Mapping[str, Any], known: Mapping[str, FileRecord] | None = None) -> int:
        """Flush everything, write the manifest, rename; returns the bytes of the checkpoint.

        `known` are records of files that other writers have flushed and digested already (see `flushed`); their
        presence and size are checked here. All other files are flushed and digested here.
        Raises CheckpointError when a file of `known` is missing or has another size, OSError when the disk refuses.
        """
        records = dict(known or {})
        names = _files_below(self.directory)
        for name, record in records.items():
            size = _size(self.directory / name)
            if size != record.size:
                raise CheckpointError(f"checkpoint {self.final}: {name} has {size} bytes here, its writer wrote "
                                      f"{record.size}: is {self.final.parent} the same disk on all nodes?")
        records |= flushed(self.directory, [name for name in names if name not in records])
        files = {name: [record.size, record.sha256] for name, record in sorted(records.items())}
        manifest = {"passport": json.loads(json.dumps(passport)), "files": files}
        manifest["sha256"] = _digest_of(manifest)
        for directory in {(self.directory / name).parent for name in records} - {self.directory}:
            flush(directory)
        self.write(MANIFEST, json.dumps(manifest, indent=1).encode())
        flush(self.directory)
        self._rename()
        return sum(record.size for record in records.values())

    def _rename(self) -> None:
        """The commit itself. A rename cannot replace a directory, so an older one of this name steps aside first."""
        aside = self.final.with_name(f"{self.final.name}.old-{self._writer}")
        if self.final.exists():
            os.rename(self.final, aside)  # still found by `complete` if we die before the next line
        os.rename(self.directory, self.final)
        flush(self.final.parent)
        flush(self.final.parent.parent)  # the very first checkpoint: its root is new as well
        if aside.exists():
            shutil.rmtree(aside)

    def abandon(self) -> None:
        """Give the disk space of a failed write back; what cannot be removed now, `retain` removes later."""
        shutil.rmtree(self.directory, ignore_errors=True)


def flushed(directory: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Flush these files to disk and read them back for their records."""
    names = list(names)
    for name in names:
        flush(directory / name)
    return _records(directory, names)


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint. Raises CheckpointError, naming the file, when it is torn or altered."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is missing or torn ({error})") from error
    if digest != _digest_of(manifest):
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} was altered after it was written")
    return manifest


def complete(root: Path) -> list[Path]:
    """Committed checkpoints under `root` whose manifest and file sizes are right, oldest first by (cycle, position)."""
    whole: dict[tuple[int, int], Path] = {}
    # Of two copies of one point the renamed one supersedes the one set aside, so it is put in last.
    for path in sorted(_checkpoints(root), key=lambda path: len(path.name), reverse=True):
        if ".tmp-" not in path.name and _problem(path) is None:
            whole[_point(path)] = path
    return [whole[point] for point in sorted(whole)]


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint; None when nothing was ever saved under `root`.

    Raises CheckpointError when there are checkpoints but none is complete: starting over in silence would throw the
    run away.
    """
    whole = complete(root)
    if whole:
        return whole[-1]
    torn = _checkpoints(root)
    if not torn:
        return None
    reason = _problem(torn[-1])
    raise CheckpointError(f"{root} holds {len(torn)} checkpoint(s) and none is complete ({torn[-1].name}: "
                          f"{reason or 'never renamed'}); bring one back, or delete {root} to start from the beginning")


def verify(path: Path, part: int = 0, parts: int = 1) -> None:
    """Check sizes and digests of every `parts`-th file of a checkpoint, from file number `part`.

    Raises CheckpointError naming the first file that is missing, truncated or altered.
    """
    problem = _problem(path)
    if problem:
        raise CheckpointError(f"checkpoint {path}: {problem}")
    files = manifest_of(path)["files"]
    names = sorted(files)[part::parts]
    for name, record in _records(path, names).items():
        if record.sha256 != files[name][1]:
            raise CheckpointError(f"checkpoint {path}: {name} was altered after it was written; "
                                  "delete this checkpoint to resume from the one before")


def retain(root: Path, keep: int, verified: Path | None = None) -> list[Path]:
    """Delete complete checkpoints beyond the newest `keep`, and what dead writers left; returns what was deleted.

    Nothing is deleted before the newest one passes `verify`; `verified` names the one this process has just sealed
    (its digests come from reading the files back), which need not be read again. The newest complete one always
    stays. Torn directories and unfinished writes go only once a complete checkpoint of that point or a later one
    exists. Raises ValueError for keep < 1 and CheckpointError when the newest one is damaged.
    """
    if keep < 1:
        raise ValueError(f"retain: keep is {keep}, must be at least 1")
    whole = complete(root)
    if not whole:
        return []
    newest = whole[-1]
    if newest != verified:
        verify(newest)
    stale = [path for path in _checkpoints(root) if path not in whole and _point(path) <= _point(newest)]
    doomed = whole[:-keep] + stale
    for path in doomed:
        # A manifest gone first leaves a torn directory, which no scan trusts, if we die half-way through.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    return doomed


def _problem(path: Path) -> str | None:
    """Why a directory is not a complete checkpoint, by its manifest and its file sizes; None when it is."""
    try:
        files = manifest_of(path)["files"]
    except CheckpointError as error:
        return str(error).removeprefix(f"checkpoint {path}: ")
    for name, (size, _) in files.items():
        actual = _size(path / name)
        if actual != size:
            return f"{name} has {actual} bytes, the manifest says {size}"
    return None


def _point(path: Path) -> tuple[int, int]:
    """(cycle, position) of a directory that `_checkpoints` found."""
    name = _NAME.fullmatch(path.name)
    assert name, path
    return int(name[1]), int(name[2])


def _checkpoints(root: Path) -> list[Path]:
    """Every directory that is, was or was becoming a checkpoint, oldest point first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)), key=_point)


def _files_below(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _size(path: Path) -> int:
    """Bytes of a file; -1 when there is none."""
    return path.stat().st_size if path.is_file() else -1


def _records(directory: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Read files back, several at once: hashing releases the interpreter lock and shared disks like company."""
    def record(name: str) -> FileRecord:
        with open(directory / name, "rb") as file:
            return FileRecord(_size(directory / name), hashlib.file_digest(file, "sha256").hexdigest())

    names = list(names)
    with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
        return dict(zip(names, pool.map(record, names), strict=True))


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_flushed(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view):]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Force a file's content, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
