"""The published LMDB layout of clean latents and ODE pairs (Self-Forcing, Causal-Forcing), read and written.

    latents_{i}_data   row i: float16, little-endian, in C order       latents_shape   "rows S F C H W" in decimals
    prompts_{i}_data   its caption in UTF-8                            prompts_shape   "rows"

An environment is a folder with data.mdb; a folder of such folders is read as one, in the order of their names. S is 1
for clean latents, and a row without S (four dimensions) is taken as one with S = 1. With S = 5 or 6 a row is an ODE
pair of 48 Euler steps, states before steps 0, 12, 24 and 36, the final sample, and with S = 6 the ground truth; the
clean latents of any row are its last entry. Timesteps are not in the files: they are those of the published tables,
shift 5 for S = 6 (Causal-Forcing), 8 for S = 5 (Self-Forcing).

Only the first number of prompts_shape means anything: one of the published writers copies the others from latents.
Nothing here has a digest: a flipped byte inside a row is found only where it makes a value non-finite.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mirai_dist.config.error import FileError
from mirai_dist.data.arrays import bytes_of
from mirai_dist.state.commit import flush

if TYPE_CHECKING:
    import lmdb

DATA = "data.mdb"
_STEPS, _STORED_STEPS = 48, (0, 12, 24, 36)
_SHIFTS = {6: 5.0, 5: 8.0}  # by the states of a row
_TRANSACTION = 1 << 28  # bytes a write transaction holds in memory
_SMALLEST = 8192  # two meta pages


def published_timesteps(states: int) -> tuple[float, ...]:
    """Of the states before the final sample of a row of `states`; empty for a number that nobody published."""
    shift = _SHIFTS.get(states)
    if shift is None:
        return ()
    times = (1 - step / _STEPS for step in _STORED_STEPS)
    return tuple(1000 * shift * time / (1 + (shift - 1) * time) for time in times)


@dataclass(frozen=True)
class LmdbShapes:
    """What the two shape keys of an environment say, as they stand there."""

    latents: str
    prompts: str


class LmdbClips:
    """Rows of the published layout: `Clips`, and `OdePairs` if a row has several states.

    Files are opened when they are first used, once a process: an object may be handed to forked workers. Raises
    FileError when the folder holds no such files, when their shapes make no sense or differ, and when the package
    lmdb is missing; reading raises it for a row that is missing or has another size.
    """

    def __init__(self, path: Path | str) -> None:
        import_lmdb()
        self.path = Path(path)
        self._files = [_File.at(folder) for folder in _folders(self.path)]
        self.row_shape = self._files[0].row_shape
        for file in self._files[1:]:
            if file.row_shape != self.row_shape:
                what = f"has rows {list(file.row_shape)}, those of {self._files[0].path} are {list(self.row_shape)}"
                raise FileError(file.path, f"{what}; keep different data in different folders")
        self._ends = list(accumulate(file.count for file in self._files))

    @property
    def size(self) -> int:
        return self._ends[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row_shape[-4:]

    @property
    def entry_shape(self) -> tuple[int, ...]:
        """[S, F, C, H, W], S = 1 where the files do not say it."""
        return (1, *self.row_shape)[-5:]

    @property
    def timesteps(self) -> tuple[float, ...]:
        states = self.entry_shape[0]
        times = published_timesteps(states)
        if not times:
            what = f"rows of {states} states are not published data, and the files do not say at which timesteps"
            raise FileError(self.path, f"{what}; convert them: mirai data convert {self.path} --to mirai --timesteps")
        return times

    @property
    def truth(self) -> bool:
        return self.entry_shape[0] == len(self.timesteps) + 2

    @property
    def shapes(self) -> list[LmdbShapes]:
        """Shape keys of each environment, in order."""
        return [file.shapes for file in self._files]

    def captions(self, numbers: Sequence[int]) -> list[str]:
        return [self._place(number)[0].caption(self._place(number)[1]) for number in map(int, numbers)]

    def latents(self, numbers: Sequence[int]) -> Tensor:
        return self.rows(numbers)[:, -1]

    def states(self, numbers: Sequence[int]) -> Tensor:
        if self.entry_shape[0] == 1:
            raise FileError(self.path, "holds clean latents, no trajectories; make some: mirai data make ode")
        return self.rows(numbers)

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """[B, S, F, C, H, W] float16 as stored."""
        out = torch.empty((len(numbers), *self.entry_shape), dtype=torch.float16)
        for row, number in zip(out, numbers, strict=True):
            file, index = self._place(int(number))
            file.read(index, row)
        return out

    def source_digest(self) -> str:
        """sha256 of shapes and captions in order: what the data is of, not every value of it."""
        digest = hashlib.sha256(repr((self.row_shape, [file.count for file in self._files])).encode())
        for number in range(self.size):
            digest.update(b"%d\n" % len(caption := self.captions([number])[0].encode()) + caption)
        return digest.hexdigest()

    def verify(self) -> Iterator[FileError]:
        """Read everything: one error for each file of other contents than its shape says, and each unusable row."""
        for file in self._files:
            yield from file.verify(self.entry_shape)

    def _place(self, number: int) -> tuple[_File, int]:
        if not 0 <= number < self.size:
            raise IndexError(f"{self.path} has rows 0 to {self.size - 1}, not {number}")
        index = bisect_right(self._ends, number)
        return self._files[index], number - (self._ends[index - 1] if index else 0)


class _File:
    """One environment. Objects of the same file are one object: a process may open an environment only once."""

    _opened: WeakValueDictionary[str, _File] = WeakValueDictionary()
    _opening = threading.RLock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._environment: lmdb.Environment | None = None
        self._process = -1
        self.shapes = LmdbShapes(self._shape_text("latents"), self._shape_text("prompts"))
        latents = self._sizes("latents", self.shapes.latents)
        self.count, self.row_shape = latents[0], latents[1:]
        if len(self.row_shape) not in (4, 5):
            what = f"latents_shape is {self.shapes.latents!r}; need rows, S, F, C, H, W or rows, F, C, H, W"
            if not self.row_shape:
                what += " (the published writer leaves them out when its last file held nothing but known prompts)"
            raise FileError(path, what)
        if self._sizes("prompts", self.shapes.prompts)[0] != self.count:
            raise FileError(path, f"latents_shape says {self.count} rows, prompts_shape {self.shapes.prompts!r}")

    @classmethod
    def at(cls, path: Path) -> _File:
        key = str(path.resolve())
        with cls._opening:
            file = cls._opened.get(key) or cls(path)
            cls._opened[key] = file
        return file

    def read(self, row: int, out: Tensor) -> None:
        """Copy a row to `out` [S, F, C, H, W] float16."""
        target = bytes_of(out)
        with self._value(f"latents_{row}_data") as found:
            if len(found) != len(target):
                what = f"latents_{row}_data has {len(found)} bytes, latents_shape says {len(target)}"
                raise FileError(self.path / DATA, f"{what}; make the file again")
            target[:] = found

    def caption(self, row: int) -> str:
        with self._value(f"prompts_{row}_data") as found:
            try:
                return bytes(found).decode()
            except UnicodeDecodeError as error:
                raise FileError(self.path / DATA, f"prompts_{row}_data is not UTF-8; make the file again") from error

    def verify(self, shape: tuple[int, ...]) -> Iterator[FileError]:
        row = torch.empty(shape, dtype=torch.float16)
        if (entries := self._open().stat()["entries"]) != 2 * self.count + 2:
            what = f"holds {entries} keys, {self.count} rows need {2 * self.count + 2}"
            yield FileError(self.path / DATA, f"{what}; make the file again")
        for number in range(self.count):
            try:
                self.caption(number)
                self.read(number, row)
            except FileError as error:
                yield error
                continue
            if not row.isfinite().all():
                yield FileError(self.path / DATA, f"latents_{number}_data holds non-finite values; make it again")

    def _shape_text(self, name: str) -> str:
        with self._value(f"{name}_shape") as found:
            return bytes(found[:200]).decode("ascii", "replace")

    def _sizes(self, name: str, text: str) -> tuple[int, ...]:
        words = text.split()
        if not words or not all(word.isdecimal() and 0 < int(word) < 1 << 40 for word in words):
            raise FileError(self.path / DATA, f"{name}_shape is {text[:60]!r}; need positive whole numbers")
        return tuple(int(word) for word in words)

    @contextmanager
    def _value(self, key: str) -> Iterator[memoryview]:
        import lmdb

        try:
            with self._open().begin(buffers=True) as transaction:
                found: Any = transaction.get(key.encode())
                if found is None:
                    what = f"has no key {key}: it is not of the published layout, or its writer did not finish"
                    raise FileError(self.path / DATA, what)
                yield memoryview(found)
        except lmdb.Error as error:
            raise FileError(self.path / DATA, f"is damaged: {error}; make the file again") from error

    def _open(self) -> lmdb.Environment:
        with self._opening:
            if self._environment is None or self._process != os.getpid():
                if self._environment is not None:
                    self._environment.close()  # the parent's, of which this process has a copy
                self._environment = _environment(self.path)
                self._process = os.getpid()
            return self._environment


def holds_lmdb(path: Path) -> bool:
    """Whether the folder is an environment, or holds folders that are."""
    return (path / DATA).exists() or (path.is_dir() and any((folder / DATA).exists() for folder in path.iterdir()))


def _folders(path: Path) -> list[Path]:
    """The environments at `path`: itself, or the folders in it."""
    if not path.is_dir():
        what = "is a file; name the folder that holds data.mdb" if path.exists() else "no such folder"
        raise FileError(path, what)
    if (path / DATA).exists():
        return [path]
    inside = sorted(folder for folder in path.iterdir() if (folder / DATA).is_file())
    if not inside:
        raise FileError(path, f"holds no {DATA}, nor does a folder in it: not LMDB files")
    return inside


def _environment(path: Path) -> lmdb.Environment:
    """Read-only, without lock file and readahead. FileError for what is no LMDB file, or not a whole one: LMDB itself
    would end the process with a signal when it touches a page that is not there."""
    import lmdb

    file = path / DATA
    try:
        size = file.stat().st_size
        if size < _SMALLEST:
            raise FileError(file, f"has {size} bytes: it is cut short; copy it again")
        environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=1)
    except (OSError, lmdb.Error) as error:
        raise FileError(file, f"is not an LMDB file: {str(error).rpartition(': ')[2]}; copy it again") from error
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < needed:
        environment.close()
        raise FileError(file, f"has {size} bytes, its pages need {needed}: it is cut short; copy it again")
    return environment


def import_lmdb() -> None:
    """FileError if the optional package is missing."""
    try:
        import lmdb  # noqa: F401
    except ImportError as error:
        raise FileError("lmdb", f"LMDB files need the package lmdb ({error}): install mirai-dist[wan]") from error


@dataclass(frozen=True)
class LmdbContents:
    """What an environment is to hold: the two shape keys, and bytes of a row and of all captions, for its size."""

    shapes: LmdbShapes
    rows: int
    row_bytes: int
    caption_bytes: int


def write_lmdb(out: Path, contents: LmdbContents, rows: Iterable[tuple[str, Tensor]]) -> None:
    """Write a new environment from (caption, row in float16) one after the other, whole or not at all.

    FileError when `out` exists or cannot be written. Memory: one transaction, at least a row.
    """
    import_lmdb()
    import lmdb

    if sys.byteorder != "little":
        raise FileError(out, "the published layout is little-endian, this machine is not")
    if out.exists():
        raise FileError(out, "is there already; name a new folder with --out")
    beside = out.with_name(f".{out.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with lmdb.open(str(beside), map_size=_map_size(contents), readahead=False, meminit=False) as environment:
            _put_rows(environment, contents.shapes, rows)
            environment.sync(True)
        (beside / "lock.mdb").unlink(missing_ok=True)
        os.rename(beside, out)
        flush(out.parent)
    except (OSError, lmdb.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(out, f"cannot be written: {reason}; free space or name another folder") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _put_rows(environment: lmdb.Environment, shapes: LmdbShapes, rows: Iterable[tuple[str, Tensor]]) -> None:
    numbered = iter(enumerate(rows))
    more = True
    while more:
        with environment.begin(write=True) as transaction:
            more = _put_some(transaction, numbered)
            if not more:
                transaction.put(b"latents_shape", shapes.latents.encode())
                transaction.put(b"prompts_shape", shapes.prompts.encode())


def _put_some(transaction: lmdb.Transaction, numbered: Iterator[tuple[int, tuple[str, Tensor]]]) -> bool:
    """Put rows until the transaction is large; whether that was the reason to end."""
    held = 0
    for index, (caption, row) in numbered:
        if row.dtype != torch.float16:
            raise ValueError(f"row {index} is {row.dtype}; the layout holds float16")
        data = bytes_of(row.cpu())
        transaction.put(f"latents_{index}_data".encode(), data)
        transaction.put(f"prompts_{index}_data".encode(), caption.encode())
        held += len(data)
        if held >= _TRANSACTION:
            return True
    return False


def _map_size(contents: LmdbContents) -> int:
    """Room for all pages: the size is fixed before the first row."""
    page = max(4096, os.sysconf("SC_PAGE_SIZE"))
    a_row = (-(-(contents.row_bytes + 64) // page) + 3) * page
    return (contents.rows + 16) * a_row + 4 * contents.caption_bytes + (1 << 24)
