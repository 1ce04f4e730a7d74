"""Prompt files: UTF-8 text, one prompt a line.

A byte order mark, CRLF line ends, a missing or present last line end, and blank lines at the very end are taken as
they come: none of them moves a number. An entry's number counts from 0, a line's from 1; entry n is line n + 1.
Trailing white space is not part of a prompt.

The file is memory-mapped. Opening checks every byte once and notes where lines begin; a prompt is decoded when it is
asked for.
"""

from __future__ import annotations

import codecs
import hashlib
import mmap
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mirai_dist.config.error import FileError

# UMT5 spends two to four bytes a token on real prompts: no line beyond this fits the 512 tokens that Wan reads.
LONG_LINE = 4096
_SHOWN = 5  # line numbers written out; the others are counted
_CHUNK = 1 << 22
_WIDE_MARKS = {  # that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# White space characters in UTF-8, as the numbers that three bytes make, zeros where a character has fewer.
_SPACES = {n: [int.from_bytes(c.encode().ljust(3, b"\0"), "big") for c in map(chr, range(0x3001))
               if c.isspace() and len(c.encode()) == n] for n in (1, 2, 3)}


@dataclass(frozen=True)
class Lines:
    """Some lines of a file: how many, and the numbers (from 1) of the first few."""

    count: int = 0
    first: tuple[int, ...] = ()

    @classmethod
    def of(cls, numbers: Sequence[int] | np.ndarray) -> Lines:
        return cls(len(numbers), tuple(int(number) for number in numbers[:_SHOWN]))

    def __str__(self) -> str:
        """line 3; lines 3, 9; lines 3, 9, 12, 40, 41 and 17 more."""
        shown = ", ".join(str(number) for number in self.first)
        rest = self.count - len(self.first)
        return f"line{'s' if self.count > 1 else ''} {shown}" + (f" and {rest} more" if rest else "")


@dataclass(frozen=True)
class PromptReport:
    """What a person should know about a prompt file that can be used."""

    prompts: int
    bytes: int
    long: Lines  # more than LONG_LINE bytes: will be cut by any encoder
    repeated: Lines  # say what an earlier line says
    trailing_blanks: int  # lines without text after the last prompt; no entries


class PromptFile:
    """Prompts by entry number, of a file.

    Raises FileError, one line, when there is no such file, when it cannot be read or is not text in UTF-8, and when
    it has no prompts or a line without one between two others: the line numbers are named.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._data = _mapped(self.path)
        _refuse_other_formats(self.path, self._data)
        begins, ends = _line_bounds(self._data)
        blank = _blank_lines(self._data, begins, ends)
        filled = np.setdiff1d(np.arange(len(begins)), blank, assume_unique=True)
        if not len(filled):
            raise FileError(self.path, "holds no prompts, only blank lines; write one prompt a line")
        count = int(filled[-1]) + 1
        self._trailing_blanks = len(begins) - count
        self._begins, self._ends = begins[:count], ends[:count]
        self._refuse_faults(blank[blank < count] + 1)

    @property
    def size(self) -> int:
        """Number of prompts."""
        return len(self._begins)

    def captions(self, numbers: Sequence[int]) -> list[str]:
        """Prompt of each entry. IndexError for a number outside 0 ... size - 1."""
        return [self._text(int(number)) for number in numbers]

    @cached_property
    def digest(self) -> str:
        """sha256 of the file's bytes, in hexadecimal."""
        return hashlib.sha256(self._data).hexdigest()

    @cached_property
    def originals(self) -> np.ndarray:
        """[size] int64: for each entry the first entry with the same text; its own number where it is that one."""
        seen: dict[bytes, int] = {}
        bounds = zip(self._begins.tolist(), self._ends.tolist(), strict=True)
        return np.array([seen.setdefault(self._data[b:e].rstrip(), i) for i, (b, e) in enumerate(bounds)], np.int64)

    def report(self) -> PromptReport:
        """Over-long and repeated lines. Reads the whole file once."""
        long = np.flatnonzero(self._ends - self._begins > LONG_LINE) + 1
        repeated = np.flatnonzero(self.originals != np.arange(self.size)) + 1
        return PromptReport(self.size, len(self._data), Lines.of(long), Lines.of(repeated), self._trailing_blanks)

    def _text(self, number: int) -> str:
        if not 0 <= number < self.size:
            raise IndexError(f"{self.path} has prompts 0 to {self.size - 1}, not {number}")
        return self._data[self._begins[number] : self._ends[number]].decode().rstrip()

    def _refuse_faults(self, blank: np.ndarray) -> None:
        """One error for everything a person has to repair, so that one edit repairs it."""
        faults = []
        foreign = _lines_not_utf8(self._data, self._begins, self._ends)
        if foreign.count:
            faults.append(f"{foreign} {_are(foreign)} not UTF-8; save the file as UTF-8")
        returns = _lines_with_bare_return(self._data, self._begins)
        if returns.count:
            faults.append(f"{returns} {_have(returns)} a carriage return inside; end lines with LF or CRLF")
        if len(blank):
            empty = Lines.of(blank)
            faults.append(f"{empty} {_are(empty)} empty; remove {'it' if empty.count == 1 else 'them'}")
        if faults:
            raise FileError(self.path, ", and ".join(faults))


def _are(lines: Lines) -> str:
    return "is" if lines.count == 1 else "are"


def _have(lines: Lines) -> str:
    return "has" if lines.count == 1 else "have"


def _mapped(path: Path) -> mmap.mmap:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise FileError(path, "is a folder; name a prompt file, one prompt a line")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise FileError(path, "is not a regular file; copy the prompts into one")
        if not status.st_size:
            raise FileError(path, "is empty; write one prompt a line")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise FileError(path, "no such prompt file") from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise FileError(repr(str(path)), f"is not a file name: {error}") from error


def _refuse_other_formats(path: Path, data: mmap.mmap) -> None:
    for mark, name in _WIDE_MARKS.items():
        if data[: len(mark)] == mark:
            raise FileError(path, f"is {name}; convert it: iconv -f {name} -t UTF-8")
    nul = data.find(b"\0")
    if nul >= 0:
        line = data[:nul].count(b"\n") + 1
        raise FileError(path, f"is not text: line {line} holds a NUL byte; give a UTF-8 file, one prompt a line")


def _line_bounds(data: mmap.mmap) -> tuple[np.ndarray, np.ndarray]:
    """First and past-the-last byte [lines] of each line, line ends and byte order mark left out."""
    codes = np.frombuffer(data, np.uint8)
    # In pieces that stay in the cache: a comparison of the whole file would write as many bytes again.
    pieces = range(0, len(codes), _CHUNK)
    ends = np.concatenate([np.flatnonzero(codes[at : at + _CHUNK] == 0x0A) + at for at in pieces])
    if not len(ends) or ends[-1] != len(codes) - 1:
        ends = np.append(ends, len(codes))
    begins = np.concatenate([[0], ends[:-1] + 1])
    if data[:3] == codecs.BOM_UTF8:
        begins[0] = 3
    crlf = (ends > begins) & (codes[ends - 1] == 0x0D)
    return begins, ends - crlf


def _blank_lines(data: mmap.mmap, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Indices of lines without a character that is not white space."""
    codes = np.frombuffer(data, np.uint8)
    heads = np.zeros(len(begins), np.int64)
    for place in range(3):
        heads = heads << 8 | codes[np.minimum(begins + place, len(codes) - 1)]
    spaced = np.isin(heads & 0xFF0000, _SPACES[1]) | np.isin(heads & 0xFFFF00, _SPACES[2]) | np.isin(heads, _SPACES[3])
    spaced |= begins == ends
    suspects = np.flatnonzero(spaced).tolist()
    return np.array([i for i in suspects if not data[begins[i] : ends[i]].decode(errors="replace").strip()], np.int64)


def _lines_not_utf8(data: mmap.mmap, begins: np.ndarray, ends: np.ndarray) -> Lines:
    """Numbers of the lines that do not decode; whole pieces of the file are tried first."""
    found: list[int] = []
    at = 0
    while at < len(begins):
        after = max(at + 1, int(np.searchsorted(begins, begins[at] + _CHUNK)))
        if not _decodes(data[begins[at] : ends[after - 1]]):
            found += [i + 1 for i in range(at, after) if not _decodes(data[begins[i] : ends[i]])]
        at = after
    return Lines.of(found)


def _decodes(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _lines_with_bare_return(data: mmap.mmap, begins: np.ndarray) -> Lines:
    """Numbers of the lines with a CR that ends nothing: an editor would show it as a line end, we would not."""
    numbers: list[int] = []
    at = data.find(b"\r")
    while at >= 0:
        if data[at + 1 : at + 2] != b"\n":
            number = int(np.searchsorted(begins, at, side="right"))
            if not numbers or numbers[-1] != number:
                numbers.append(number)
        at = data.find(b"\r", at + 1)
    return Lines.of(numbers)
