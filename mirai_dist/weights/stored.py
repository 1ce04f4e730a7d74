"""Tensors in files, of which any range can be read without the rest; safetensors are read here, by exact bytes.

`pread` into a buffer instead of a memory map: what is read is what is counted, a file that shrinks under us is an
error instead of a killed process, and large sequential reads are what shared file systems are fast at.
"""

from __future__ import annotations

import json
import math
import os
import struct
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mirai_dist.config import FileError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {"F4": 4, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16,
         "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64, "F64": 64, "F32": 32, "F16": 16, "BF16": 16}
_LARGEST_HEADER = 100_000_000  # the format's own limit


class Stored(Protocol):
    """A tensor in a file. `dtype` is None when weights cannot have it; `dtype_name` is the file's word for it."""

    @property
    def file(self) -> Path: ...
    @property
    def key(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype | None: ...
    @property
    def dtype_name(self) -> str: ...

    def elements(self, start: int, stop: int) -> Tensor:
        """A copy of elements [start, stop) of the flattened tensor; nothing else is read."""
        ...


@dataclass(frozen=True)
class StoredBytes:
    """A tensor of a safetensors file. offset: of its first byte in the file."""

    source: SafetensorsFile
    key: str
    shape: tuple[int, ...]
    dtype_name: str
    offset: int

    @property
    def file(self) -> Path:
        return self.source.path

    @property
    def dtype(self) -> torch.dtype | None:
        return DTYPES.get(self.dtype_name)

    def elements(self, start: int, stop: int) -> Tensor:
        assert self.dtype is not None
        values = torch.empty(stop - start, dtype=self.dtype)
        buffer = values.view(torch.uint8).numpy().data
        self.source.read(self.offset + start * self.dtype.itemsize, buffer, self.key)
        return values


class SafetensorsFile:
    """An open safetensors file. Raises FileError when header, tensors and size of the file do not fit together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        self.header, data_start = self._header()
        self.tensors = self._tensors(data_start)

    def read(self, offset: int, buffer: memoryview, key: str) -> None:
        """Fill `buffer` from the file. Raises FileError when the file ends before."""
        while buffer:
            count = os.preadv(self._descriptor, [buffer], offset)
            if count == 0:
                raise FileError(self.path, f"{key}: the file became shorter while it was read; copy it again")
            offset, buffer = offset + count, buffer[count:]

    def _header(self) -> tuple[bytes, int]:
        head = os.pread(self._descriptor, 512, 0)
        other = foreign_format(head)
        if other:
            raise FileError(self.path, f"is {other}, not safetensors")
        length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, self.size - 8):
            raise FileError(self.path, f"is no safetensors file, or a truncated one ({self.size} bytes); copy it again")
        header = bytearray(length)
        self.read(8, memoryview(header), "header")
        return bytes(header), 8 + length

    def _tensors(self, data_start: int) -> dict[str, StoredBytes]:
        entries = _parsed(self.path, self.header)
        entries.pop("__metadata__", None)
        if not entries:
            raise FileError(self.path, "holds no tensors")
        tensors, ranges = {}, []
        for key, entry in entries.items():
            shape, dtype_name, (start, stop) = _entry(self.path, key, entry)
            if dtype_name not in _BITS or stop - start != math.prod(shape) * _BITS[dtype_name] // 8:
                raise FileError(self.path, f"{key}: {stop - start} bytes are no {dtype_name} {list(shape)}; the header "
                                           "is corrupt, copy the file again")
            tensors[key] = StoredBytes(self, key, shape, dtype_name, data_start + start)
            ranges.append((start, stop, key))
        self._check_ranges(data_start, sorted(ranges))
        return tensors

    def _check_ranges(self, data_start: int, ranges: list[tuple[int, int, str]]) -> None:
        """Tensors must lie one after the other and end where the file does."""
        end = 0
        for start, stop, key in ranges:
            if start != end:
                raise FileError(self.path, f"{key}: its bytes overlap others or leave a gap; the header is corrupt, "
                                           "copy the file again")
            end = stop
        if data_start + end != self.size:
            what = "truncated" if data_start + end > self.size else "too long"
            raise FileError(self.path, f"is {what}: {self.size} bytes, its header says {data_start + end}; "
                                       "copy or download it again")


def _parsed(path: Path, header: bytes) -> dict[str, Any]:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        entries = json.loads(header.decode(), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"has a corrupt safetensors header ({error}); copy the file again") from error
    if not isinstance(entries, dict):
        raise FileError(path, "has a corrupt safetensors header (no object); copy the file again")
    return entries


def _entry(path: Path, key: str, entry: Any) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    """Shape, dtype and data range of one header entry."""
    well_formed = (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and all(isinstance(entry.get(name), list) for name in ("shape", "data_offsets"))
        and all(type(number) is int and number >= 0 for name in ("shape", "data_offsets") for number in entry[name])
        and len(entry["data_offsets"]) == 2
    )
    if not well_formed:
        raise FileError(path, f"{key}: its header entry is corrupt; copy the file again")
    start, stop = entry["data_offsets"]
    return tuple(entry["shape"]), entry["dtype"], (start, stop)


_MAGIC = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP or AVI file",
    b"GGUF": "a GGUF file (quantised weights)",
    b"version https://git-lfs": "a git-lfs pointer (the weights themselves were not downloaded: git lfs pull)",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"SQLite": "an SQLite data base",
    b"PK\x03\x04": "a zip archive (a .pt file?)",
    b"PK\x05\x06": "an empty zip archive",
}


def foreign_format(head: bytes) -> str:
    """What a file that begins with `head` is, if that is certainly not safetensors; else empty."""
    if not head:
        return "an empty file"
    for magic, meaning in _MAGIC.items():
        if head.startswith(magic):
            return meaning
    if head[4:8] == b"ftyp":
        return "a video"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle (an old .pt file?)"
    if head[8:9] != b"{" and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "a text file"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileError when the file is missing or holds none."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileError(path, "is missing; copy the whole folder") from None
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"is no valid JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise FileError(path, "holds no JSON object; copy it again")
    return content


def total_bytes(tensors: Mapping[str, Stored]) -> int:
    """Bytes of the data of all tensors."""
    return sum(math.prod(each.shape) * (each.dtype.itemsize if each.dtype else 0) for each in tensors.values())
