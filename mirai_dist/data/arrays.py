"""Files of the stores (embeddings, latents, ODE pairs): whole or not there, safetensors with a label, parts of a job.

A shard is a safetensors file whose one piece of metadata, `mirai`, is a JSON object, its label. Its head is written in
one way only, so a byte of it that is not the one that was written is noticed without a digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mirai_dist.config.error import FileError
from mirai_dist.state.commit import flush

DIGEST_BYTES = 32
_KEY = "mirai"
_MAX_HEADER = 1 << 24
_SIZES = {"I64": 8, "U8": 1, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Part:
    """One process of a job array: shards index, index + of, ... are its own."""

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Part I/N as --part names it. FileError if it is not that."""
        index, slash, of = text.partition("/")
        if not (slash and index.isdecimal() and of.isdecimal() and int(index) < int(of)):
            raise FileError("--part", f"is {text!r}; give I/N with I from 0 to N - 1, such as 0/8")
        return cls(int(index), int(of))

    def shards(self, count: int) -> range:
        """Its shards of `count`."""
        return range(self.index, count, self.of)


@dataclass(frozen=True)
class Field:
    """A tensor of a shard; dtype in the words of safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]


@dataclass(frozen=True)
class Head:
    """The beginning of a shard: what its label says, its tensors in order, and where the first one begins."""

    label: dict[str, Any]
    fields: tuple[Field, ...]
    begin: int

    @property
    def end(self) -> int:
        """Bytes that the file must have."""
        return self.begin + sum(field.bytes for field in self.fields)


class InShards(ABC):
    """Entries 0 ... `entries` - 1, `shard_size` to a shard."""

    shard_size: int

    @property
    @abstractmethod
    def entries(self) -> int: ...

    @property
    def shards(self) -> int:
        return -(-self.entries // self.shard_size)

    def numbers(self, shard: int) -> range:
        """Entries of a shard."""
        return range(shard * self.shard_size, min(self.entries, (shard + 1) * self.shard_size))


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def file_of(store: Path, name: str) -> Path:
    return store / f"{name}.safetensors"


def head_bytes(label: Mapping[str, Any], fields: Sequence[Field]) -> bytes:
    """The beginning of a safetensors file; its length depends on the sizes alone, not on digests in the label."""
    header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(label, sort_keys=True)}}
    at = 0
    for field in fields:
        offsets = [at, at + field.bytes]
        header[field.name] = {"dtype": field.dtype, "shape": list(field.shape), "data_offsets": offsets}
        at += field.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_head(file: BinaryIO) -> Head | None:
    """Head of an opened shard, the file left where the tensors begin; None if it does not begin as a shard does."""
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length) if 0 < length <= _MAX_HEADER else b""
    try:
        header = json.loads(text)
        label = json.loads(header.pop("__metadata__")[_KEY])
        fields = tuple(Field(name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items())
        whole = text == head_bytes(label, fields)[8:]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError):
        return None
    return Head(label, fields, 8 + length) if whole and isinstance(label, dict) else None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path`, flushed to the disk, when the block ends; after an error nothing changed.

    It is written beside, under a hidden name. Raises the OSError of a disk that refuses.
    """
    writer = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    beside = path.with_name(f".{path.name}.tmp-{writer}")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what processes that died while they wrote `path` left of it; only the one that makes it may call this."""
    for leftover in path.parent.glob(f".{path.name}.tmp-*"):
        leftover.unlink(missing_ok=True)


def json_file(content: Mapping[str, Any]) -> bytes:
    """A JSON object as these stores write it."""
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def digest_of(content: Mapping[str, Any]) -> str:
    """sha256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def begin_store(store: Path, name: str, content: Mapping[str, Any]) -> None:
    """Make the folder, and in it the file that says what the store is, with its digest, unless there is one.

    Raises FileError when the disk refuses.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        if not (store / name).exists():
            # Parts that start together write the same bytes: whose rename comes last does not matter.
            with replacing(store / name) as file:
                file.write(json_file({**content, "sha256": digest_of(content)}))
    except OSError as error:
        raise FileError(store, f"cannot be made: {error.strerror}; name another folder with --out") from error


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy if it is contiguous."""
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
