"""Text embeddings of a prompt file, computed once and read by number.

    STORE/store.json                  what it belongs to: format, digest and count of the prompts, the encoder's
                                      fingerprint, dim, length, shard size, digest of the negative prompt's text; and
                                      a digest of all that
    STORE/negative.safetensors        the negative prompt, in the form of a shard of one
    STORE/shard-00000.safetensors     prompts 0 ... shard_size - 1; the next one goes on from there

A shard is a safetensors file of three tensors, in this order:

    offsets [n + 1] int64             entry i has the rows offsets[i] ... offsets[i + 1] - 1 of tokens
    digests [n, 32] uint8             sha256 of the bytes of each entry's rows
    tokens  [total, dim] bfloat16     rows of all entries without padding

and one piece of metadata, `mirai`, a JSON object: the digest of store.json, the name of the shard, the longest
entry, the entries that were cut to the length, and the sha256 of all this with offsets and digests. So a shard says
whose it is, a few bytes tell whether it is whole, and every read is checked by reading no more than what was asked
for: a flipped byte is found when it is first used, or by `verify`.

Shards are written beside (a hidden name), flushed and renamed, so a file of that name is whole. Processes that make
different shards need not know of one another; each checks that store.json says what it would have written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mirai_dist.config.error import FileError
from mirai_dist.data.arrays import (
    DIGEST_BYTES,
    Field,
    Head,
    InShards,
    begin_store,
    bytes_of,
    digest_of,
    file_of,
    head_bytes,
    read_head,
    replacing,
    shard_name,
    sweep,
)
from mirai_dist.data.prompts import PromptFile

STORE = "store.json"
NEGATIVE = "negative"
_FORMAT = 1
_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Identity(InShards):
    """What a store belongs to; the content of store.json."""

    prompts: str  # sha256 of the prompt file
    count: int
    encoder: str  # its fingerprint
    dim: int
    length: int
    shard_size: int
    negative: str  # sha256 of the negative prompt's text
    version: int = _FORMAT

    @property
    def digest(self) -> str:
        return digest_of(asdict(self))

    @property
    def entries(self) -> int:
        return self.count


@dataclass(frozen=True)
class Contents:
    """What is known of a shard before its embeddings are: tokens of each entry, and which entries of it were cut."""

    name: str
    tokens: Sequence[int]
    cut: Sequence[int] = ()


@dataclass(frozen=True)
class Shard:
    """A shard file whose head is right; nothing of the embeddings has been read."""

    path: Path
    offsets: tuple[int, ...]
    digests: bytes
    cut: tuple[int, ...]  # entries of this shard, from 0
    longest: int
    bytes: int


def establish(store: Path, identity: Identity) -> None:
    """Make the folder and its store.json, or check that the one there says the same.

    Raises FileError, naming what differs, when it belongs to something else, and when it cannot be written.
    """
    begin_store(store, STORE, asdict(identity))
    found = identity_of(store)
    different = [name for name, value in asdict(identity).items() if value != getattr(found, name)]
    if different:
        name = different[0]
        was, now = getattr(found, name), getattr(identity, name)
        what = _DIFFERENCE.get(name, f"has {name} {was}, asked for {now}").format(was=was, now=now)
        what = f"belongs to something else: {what}; name another folder with --out, or delete this one"
        raise FileError(store / STORE, what)


_DIFFERENCE = {
    "prompts": "it holds the embeddings of another prompt file, or the file was edited since",
    "encoder": "it was made by another encoder (weights, dtype or tokenizer differ)",
    "negative": "it was made with another negative prompt",
    "shard_size": "its shards hold {was} prompts, asked for {now} (--shard-size)",
    "length": "its prompts are cut at {was} tokens, asked for {now} (--length)",
}


def identity_of(store: Path) -> Identity:
    """Content of a store's store.json. FileError when there is none or it was damaged."""
    path = store / STORE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "no such folder" if not store.exists() else f"holds no {STORE}: not a store of embeddings"
        raise FileError(store, f"{what}; make one: mirai data embed PROMPTS --encoder FOLDER --out {store}") from None
    except NotADirectoryError:
        raise FileError(store, "is a file; name the folder of the embeddings") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(path, f"cannot be read ({error}); embed the prompts again into a new folder") from error
    digest = found.pop("sha256", None) if isinstance(found, dict) else None
    if digest is None or found.get("version") != _FORMAT:
        raise FileError(path, f"is not of format {_FORMAT}; embed the prompts again into a new folder")
    try:
        identity = Identity(**found)
    except TypeError as error:
        raise FileError(path, f"was altered ({error}); embed the prompts again into a new folder") from error
    counts = (identity.count, identity.dim, identity.length, identity.shard_size)
    if identity.digest != digest or not all(isinstance(n, int) and n > 0 for n in counts):
        raise FileError(path, "was altered after it was written; embed the prompts again into a new folder")
    return identity


def write_shard(store: Path, identity: Identity, contents: Contents, embeddings: Iterable[Tensor]) -> int:
    """Write one shard from its entries' embeddings [tokens, dim] bfloat16, one after the other; returns its bytes.

    Memory: one entry. What a process that died left of this shard is removed. Raises FileError when the disk refuses,
    ValueError when an embedding is not of the announced form.
    """
    path = file_of(store, contents.name)
    try:
        sweep(path)
        with replacing(path) as file:
            return _write_content(file, identity, contents, embeddings)
    except OSError as error:
        raise FileError(path, f"cannot be written: {error.strerror}; the same command goes on from here") from error


def _write_content(file: BinaryIO, identity: Identity, contents: Contents, embeddings: Iterable[Tensor]) -> int:
    count, dim = len(contents.tokens), identity.dim
    offsets = torch.tensor([0, *contents.tokens]).cumsum(0)
    table = offsets.numpy().astype("<i8").tobytes()
    label = {
        "store": identity.digest,
        "shard": contents.name,
        "longest": max(contents.tokens),
        "cut": list(contents.cut),
    }
    fields = _fields(count, int(offsets[-1]), dim)
    blank = head_bytes({**label, "sha256": "0" * 64}, fields)
    file.write(blank)
    file.write(table)
    file.write(bytes(count * DIGEST_BYTES))
    digests = bytearray()
    for tokens, embedding in zip(contents.tokens, embeddings, strict=True):
        if embedding.shape != (tokens, dim) or embedding.dtype != torch.bfloat16:
            raise ValueError(f"{contents.name}: an embedding is {list(embedding.shape)} {embedding.dtype}, "
                             f"must be {[tokens, dim]} bfloat16")
        rows = bytes_of(embedding.cpu())
        digests += hashlib.sha256(rows).digest()
        file.write(rows)
    size = file.tell()
    file.seek(0)
    file.write(head_bytes({**label, "sha256": _label_digest(label, table, bytes(digests))}, fields))
    file.seek(len(blank) + len(table))
    file.write(digests)
    return size


def _fields(count: int, total: int, dim: int) -> tuple[Field, ...]:
    return (
        Field("offsets", "I64", (count + 1,)),
        Field("digests", "U8", (count, DIGEST_BYTES)),
        Field("tokens", "BF16", (total, dim)),
    )


def _label_digest(label: dict[str, Any], offsets: bytes, digests: bytes) -> str:
    head = json.dumps(label, sort_keys=True).encode()
    return hashlib.sha256(b"%d\n%s%s%s" % (len(head), head, offsets, digests)).hexdigest()


def open_shard(store: Path, identity: Identity, name: str) -> Shard:
    """Check the head of a shard: form, size of the file, owner, and digest of everything but the embeddings.

    Raises FileError when it is missing, cut short, altered or another store's. Reads the first kilobytes only.
    """
    path = file_of(store, name)
    count = 1 if name == NEGATIVE else len(identity.numbers(int(name.removeprefix("shard-"))))
    again = "delete it and run the same `mirai data embed` again"
    try:
        with path.open("rb") as file:
            head = read_head(file)
            offsets = file.read(8 * (count + 1))
            digests = file.read(DIGEST_BYTES * count)
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        options = f"--length {identity.length} --shard-size {identity.shard_size}"
        command = f"mirai data embed PROMPTS --encoder FOLDER --out {store} {options}"
        raise FileError(path, f"is missing: the store is not finished; make it: {command}") from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    if head is None or not _is_ours(head):
        raise FileError(path, f"is damaged: it does not begin as a shard does; {again}")
    label, (total, dim) = head.label, head.fields[-1].shape
    digest = label.pop("sha256", None)
    if digest != _label_digest(label, offsets, digests):
        raise FileError(path, f"is damaged: its tables are not the ones that were written; {again}")
    if label["store"] != identity.digest or label["shard"] != name or dim != identity.dim:
        raise FileError(path, f"belongs to another store or another place in it; {again}")
    bounds = tuple(int.from_bytes(offsets[i : i + 8], "little") for i in range(0, len(offsets), 8))
    expected = head.begin + len(offsets) + len(digests) + 2 * total * dim
    if size != expected or bounds[-1] != total:
        raise FileError(path, f"is cut short or too long: {size} bytes, must be {expected}; {again}")
    return Shard(path, bounds, digests, tuple(label["cut"]), label["longest"], size)


def _is_ours(head: Head) -> bool:
    """Whether the tensors are those of a shard of embeddings."""
    shapes = [field.shape for field in head.fields]
    form = [len(shape) for shape in shapes] == [1, 2, 2]
    return form and head.fields == _fields(shapes[1][0], *shapes[2])


def verify(shard: Shard) -> None:
    """Read a whole shard and check every entry. FileError naming the first that was altered."""
    reader = _Reader(shard)
    for entry in range(len(shard.offsets) - 1):
        reader.rows(entry)


class _Reader:
    """Embeddings of an opened shard, mapped."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        try:
            self._tokens = safe_open(shard.path, framework="pt").get_slice("tokens")
        except (OSError, SafetensorError) as error:
            raise FileError(shard.path, f"cannot be opened: {error}") from error

    def rows(self, entry: int) -> Tensor:
        """[tokens, dim] of an entry of this shard."""
        shard = self.shard
        rows = self._tokens[shard.offsets[entry] : shard.offsets[entry + 1]]
        digest = shard.digests[entry * DIGEST_BYTES : (entry + 1) * DIGEST_BYTES]
        if hashlib.sha256(bytes_of(rows)).digest() != digest:
            what = f"entry {entry} was altered after it was written; delete the file and run `mirai data embed` again"
            raise FileError(shard.path, what)
        return rows


class EmbeddingStore:
    """Conditions of a prompt file, from its store.

    length: rows of an embedding, zeros past the end token. dim: width that is needed; None takes the store's.
    Opening reads the heads of the shards; files are mapped when they are first used, a bounded number at a time.
    Raises FileError when store and prompt file do not belong together, a shard is missing, damaged or holds a prompt
    longer than `length`, or the width is another one; embed raises it for an entry that was altered.
    """

    def __init__(self, path: Path | str, length: int, prompts: PromptFile, dim: int | None = None) -> None:
        self.path, self.length, self.prompts = Path(path), length, prompts
        self.identity = identity = identity_of(self.path)
        if prompts.digest != identity.prompts:
            what = f"holds the embeddings of another file than {prompts.path}, or it was edited since"
            raise FileError(self.path, f"{what}; embed it again into a new folder")
        if dim is not None and dim != identity.dim:
            what = f"holds embeddings of width {identity.dim}, text.dim is {dim}; set text.dim={identity.dim}"
            raise FileError(self.path, what)
        self._shards = [open_shard(self.path, identity, shard_name(i)) for i in range(identity.shards)]
        self._negative = open_shard(self.path, identity, NEGATIVE)
        self._refuse_other_length()
        self._readers: OrderedDict[int, _Reader] = OrderedDict()

    @property
    def size(self) -> int:
        return self.prompts.size

    @property
    def dim(self) -> int:
        return self.identity.dim

    def captions(self, numbers: Sequence[int]) -> list[str]:
        return self.prompts.captions(numbers)

    def embed(self, numbers: Sequence[int]) -> Tensor:
        """[B, length, dim] bfloat16 on the CPU, zeros past the end token. IndexError outside 0 ... size - 1."""
        out = torch.zeros(len(numbers), self.length, self.dim, dtype=torch.bfloat16)
        for row, number in zip(out, numbers, strict=True):
            if not 0 <= number < self.size:
                raise IndexError(f"{self.path} has prompts 0 to {self.size - 1}, not {number}")
            shard, entry = divmod(int(number), self.identity.shard_size)
            embedding = self._reader(shard).rows(entry)
            row[: len(embedding)] = embedding
        return out

    def negative(self) -> Tensor:
        """[1, length, dim] bfloat16 of the negative prompt."""
        out = torch.zeros(1, self.length, self.dim, dtype=torch.bfloat16)
        embedding = _Reader(self._negative).rows(0)
        out[0, : len(embedding)] = embedding
        return out

    def verify(self) -> None:
        """Read everything and check it. FileError naming the first entry that was altered."""
        for shard in (*self._shards, self._negative):
            verify(shard)

    def _reader(self, shard: int) -> _Reader:
        reader = self._readers.pop(shard, None) or _Reader(self._shards[shard])
        self._readers[shard] = reader
        if len(self._readers) > _OPEN_SHARDS:
            self._readers.popitem(last=False)
        return reader

    def _refuse_other_length(self) -> None:
        """What the encoder would give at this length must be what is stored."""
        stored = self.identity.length
        for shard in (*self._shards, self._negative):
            if shard.longest > self.length:
                what = f"holds a prompt of {shard.longest} tokens, text.length is {self.length}"
                raise FileError(shard.path, f"{what}; raise text.length, or embed anew with --length")
            if shard.cut and self.length > stored:
                what = f"holds prompts cut to {stored} tokens ({len(shard.cut)} of them), text.length is {self.length}"
                raise FileError(shard.path, f"{what}; set text.length={stored}, or embed anew with --length")
