"""Stores of clean latents and of ODE pairs: made once, shard by shard, and read by number.

    STORE/plan.json                   written first, what is to be made: kind, shape and dtype of an entry, candidates,
                                      shard size, statistics of the latents, provenance; and a digest of all that
    STORE/shard-00000.safetensors     candidates 0 ... shard_size - 1; the next one goes on from there
    STORE/prompts.txt                 line n + 1 is the caption of entry n: a prompt file, `mirai data embed` takes it
    STORE/store.json                  written last, when every shard is there: the plan, the number of entries, entries
                                      and digest of each shard, the digest of prompts.txt; and a digest of all that

A candidate that turns out to be unusable (a video that cannot be decoded) is left out and its shard says why; the
entries are numbered without it. A shard holds one tensor, `latents` [n, ...entry] in bfloat16 or float16, and a label
that carries the plan's digest, captions, the sha256 of each entry, what was left out, and the sha256 of all this: a
flipped byte is found when it is first used, or by `verify`.

Shards are written beside and renamed, so a file of that name is whole, and hold nothing of the process that wrote
them: however often the making is killed and begun again, the bytes are the same.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirai_dist.config.error import FileError
from mirai_dist.data.arrays import (
    Field,
    Head,
    InShards,
    Part,
    begin_store,
    bytes_of,
    digest_of,
    file_of,
    head_bytes,
    json_file,
    read_head,
    replacing,
    shard_name,
    sweep,
)
from mirai_dist.data.prompts import PromptFile

PLAN = "plan.json"
STORE = "store.json"
PROMPTS = "prompts.txt"
EMBEDDINGS = "embeddings"  # folder of the embeddings of prompts.txt, where they are precomputed
CLEAN, ODE = "latents", "ode_pairs"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_AS = {"bfloat16": "BF16", "float16": "F16"}
_FORMAT = 1
_OPEN_SHARDS = 64
_AGAIN = "run the command that made it again"


@dataclass(frozen=True)
class Plan(InShards):
    """What a store is to hold, known before its first entry; the content of plan.json."""

    kind: str  # latents or ode_pairs
    candidates: int  # entries if none has to be left out
    shape: tuple[int, ...]  # of an entry: [F, C, H, W], or [S, F, C, H, W]
    dtype: str  # bfloat16 or float16
    shard_size: int
    source: str  # sha256 of what the entries are made from, in order: names, captions
    timesteps: tuple[float, ...] = ()  # of the states of an ODE pair before the final sample
    truth: bool = False  # the last state of an ODE pair is the ground truth
    statistics: Mapping[str, Sequence[float]] = field(default_factory=dict)  # mean, std that normalised each channel
    provenance: Mapping[str, Any] = field(default_factory=dict)  # digest of VAE or teacher, steps, guidance, shift
    version: int = _FORMAT

    def __post_init__(self) -> None:
        """ValueError for a plan that no store can have."""
        if self.kind not in (CLEAN, ODE) or self.dtype not in DTYPES:
            raise ValueError(f"kind {self.kind!r} of {self.dtype!r}; known: {CLEAN}, {ODE} of {', '.join(DTYPES)}")
        sizes = (self.candidates, self.shard_size, *self.shape)
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"candidates, shard size and shape are {sizes}; all must be positive")
        if len(self.shape) != (4 if self.kind == CLEAN else 5):
            raise ValueError(f"an entry of kind {self.kind} has shape {list(self.shape)}")
        states = len(self.timesteps) + 1 + self.truth
        if self.kind == ODE and self.shape[0] != states:
            raise ValueError(f"{self.shape[0]} states of which {len(self.timesteps)} have a timestep: must be {states}")

    @cached_property
    def content(self) -> dict[str, Any]:
        """As JSON reads it back."""
        return json.loads(json.dumps(asdict(self)))

    @cached_property
    def digest(self) -> str:
        return digest_of(self.content)

    @property
    def entries(self) -> int:
        return self.candidates


@dataclass(frozen=True)
class Entry:
    """One candidate that is stored: latents of the plan's shape and dtype."""

    caption: str
    latents: Tensor


@dataclass(frozen=True)
class LeftOut:
    """One candidate that cannot be stored: its name, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Shard:
    """A shard whose head is right; nothing of the latents has been read."""

    path: Path
    begin: int
    captions: tuple[str, ...]
    digests: tuple[str, ...]  # sha256 of each entry
    left_out: tuple[LeftOut, ...]
    digest: str  # of the label

    def __len__(self) -> int:
        return len(self.captions)


class StoreWriter:
    """Makes the shards of one part of a store, and the store once every part is done.

    Raises FileError when the folder is of another plan, naming what differs, or cannot be written.
    """

    def __init__(self, path: Path, plan: Plan, part: Part | None = None) -> None:
        self.path, self.plan, self.part = Path(path), plan, part or Part()
        self.damaged: list[FileError] = []  # what `missing` found wrong with shards that are made again
        self._establish()

    def _establish(self) -> None:
        begin_store(self.path, PLAN, self.plan.content)
        found, asked = plan_of(self.path).content, self.plan.content
        for name, value in asked.items():
            if found[name] != value:
                what = f"is of a store with another {name}: {_short(found[name])}, asked for {_short(value)}"
                raise FileError(self.path / PLAN, f"{what}; name another folder with --out, or delete this one")

    def missing(self) -> list[int]:
        """Shards of this part that have to be made. Those that are there are read, every byte."""
        todo = []
        for shard in self.part.shards(self.plan.shards):
            if not file_of(self.path, shard_name(shard)).exists():
                todo.append(shard)
                continue
            try:
                opened = open_shard(self.path, self.plan, shard)
                reader = _Reader(opened, self.plan)
                for entry in range(len(opened)):
                    reader.check(entry)
            except FileError as error:
                self.damaged.append(error)
                todo.append(shard)
        return todo

    def write(self, shard: int, entries: Iterable[Entry | LeftOut]) -> Shard:
        """Write one shard from its candidates, one after the other, whole or not at all.

        Memory: the entries of a shard. FileError when an entry is not finite, has no caption or the disk refuses;
        ValueError when there are more or fewer than the plan says, or one of another shape or dtype.
        """
        stored: list[Tensor] = []
        label: dict[str, Any] = {"store": self.plan.digest, "shard": shard_name(shard)}
        label |= {"captions": [], "digests": [], "left_out": []}
        numbers, count = self.plan.numbers(shard), 0
        for count, entry in enumerate(entries, 1):
            if isinstance(entry, LeftOut):
                label["left_out"].append([entry.what, entry.why])
                continue
            latents = self._checked(entry, numbers[0] + count - 1)
            stored.append(latents)
            label["captions"].append(entry.caption)
            label["digests"].append(hashlib.sha256(bytes_of(latents)).hexdigest())
        if count != len(numbers):
            raise ValueError(f"{shard_name(shard)} has {len(numbers)} candidates, {count} were given")
        path = file_of(self.path, shard_name(shard))
        head = head_bytes({**label, "sha256": digest_of(label)}, (_field(self.plan, len(stored)),))
        try:
            sweep(path)
            with replacing(path) as file:
                file.write(head)
                for latents in stored:
                    file.write(bytes_of(latents))
        except OSError as error:
            raise FileError(path, f"cannot be written: {error.strerror}; the same command goes on from here") from error
        return open_shard(self.path, self.plan, shard)

    def _checked(self, entry: Entry, number: int) -> Tensor:
        latents = entry.latents.detach().cpu().contiguous()
        if tuple(latents.shape) != self.plan.shape or latents.dtype != DTYPES[self.plan.dtype]:
            found = f"{list(latents.shape)} {latents.dtype}"
            raise ValueError(f"entry {number} is {found}, must be {list(self.plan.shape)} {self.plan.dtype}")
        if not latents.isfinite().all():
            raise FileError(self.path, f"candidate {number} came out with non-finite values; it cannot be stored")
        if not one_line(entry.caption):
            raise FileError(self.path, f"candidate {number} has no caption; every entry needs one")
        return latents

    def seal(self) -> LatentStore | None:
        """Write prompts.txt and store.json if every shard is there, whoever made it, and open the store.

        None when shards are left to other parts. FileError when a shard is damaged or there is no entry at all.
        """
        if not all(file_of(self.path, shard_name(shard)).exists() for shard in range(self.plan.shards)):
            return None
        shards = [open_shard(self.path, self.plan, shard) for shard in range(self.plan.shards)]
        lines = [one_line(caption) for shard in shards for caption in shard.captions]
        if not lines:
            raise FileError(self.path, f"has no entry: all {self.plan.candidates} candidates were left out")
        prompts = "".join(f"{line}\n" for line in lines).encode()
        content = {
            "plan": self.plan.content,
            "count": len(lines),
            "shards": [[len(shard), shard.digest] for shard in shards],
            "prompts": hashlib.sha256(prompts).hexdigest(),
        }
        try:
            for name, data in ((PROMPTS, prompts), (STORE, json_file({**content, "sha256": digest_of(content)}))):
                with replacing(self.path / name) as file:
                    file.write(data)
        except OSError as error:
            raise FileError(self.path, f"cannot be written: {error.strerror}; {_AGAIN}") from error
        return LatentStore(self.path)


class LatentStore:
    """Clean latents or ODE pairs of a finished store: `Clips`, and `OdePairs` if kind is ode_pairs.

    Opening reads store.json and prompts.txt; shards are opened and mapped when they are first used, a bounded number
    at a time. Raises FileError when the store is not finished or damaged; reading raises it for the first entry that
    was altered, naming entry and file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        content = _manifest(self.path)
        self.plan = _plan_from(content["plan"], self.path / STORE)
        self._shards: list[list[Any]] = content["shards"]
        self._ends = list(accumulate(count for count, _ in self._shards))
        prompts = PromptFile(self.path / PROMPTS)
        if prompts.digest != content["prompts"] or not (prompts.size == content["count"] == self._ends[-1]):
            what = f"is not the one that was written with the store; delete {STORE} and {_AGAIN}"
            raise FileError(prompts.path, what)
        self.prompts = prompts
        self.digest: str = content["sha256"]  # of everything: it covers the digest of every entry
        self._readers: OrderedDict[int, _Reader] = OrderedDict()

    @property
    def size(self) -> int:
        return self._ends[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plan.shape[-4:]

    @property
    def timesteps(self) -> tuple[float, ...]:
        return self.plan.timesteps

    @property
    def truth(self) -> bool:
        return self.plan.truth

    def captions(self, numbers: Sequence[int]) -> list[str]:
        return self.prompts.captions(numbers)

    def original_caption(self, number: int) -> str:
        """The caption as it was given, with the line breaks that prompts.txt cannot hold."""
        shard, entry = self._place(number)
        return self._reader(shard).shard.captions[entry]

    def latents(self, numbers: Sequence[int]) -> Tensor:
        entries = self._read(numbers)
        return entries if self.plan.kind == CLEAN else entries[:, -1]

    def states(self, numbers: Sequence[int]) -> Tensor:
        if self.plan.kind != ODE:
            raise FileError(self.path, "holds clean latents, no trajectories; make some: mirai data make ode")
        return self._read(numbers)

    def left_out(self) -> list[LeftOut]:
        """Candidates that are no entries. Reads the head of every shard."""
        return [item for shard in range(len(self._shards)) for item in self._opened(shard).left_out]

    def verify(self) -> Iterator[FileError]:
        """Read everything; one error for each shard that cannot be opened and each entry that was altered."""
        for shard in range(len(self._shards)):
            try:
                reader = _Reader(self._opened(shard), self.plan)
            except FileError as error:
                yield error
                continue
            for entry in range(len(reader.shard)):
                try:
                    reader.check(entry)
                except FileError as error:
                    yield error

    def _read(self, numbers: Sequence[int]) -> Tensor:
        out = torch.empty((len(numbers), *self.plan.shape), dtype=DTYPES[self.plan.dtype])
        for row, number in zip(out, numbers, strict=True):
            shard, entry = self._place(int(number))
            self._reader(shard).read(entry, row)
        return out

    def _place(self, number: int) -> tuple[int, int]:
        """(shard, entry in it) of an entry."""
        if not 0 <= number < self.size:
            raise IndexError(f"{self.path} has entries 0 to {self.size - 1}, not {number}")
        shard = bisect_right(self._ends, number)
        return shard, number - (self._ends[shard - 1] if shard else 0)

    def _opened(self, shard: int) -> Shard:
        opened = open_shard(self.path, self.plan, shard)
        if [len(opened), opened.digest] != self._shards[shard]:
            raise FileError(opened.path, f"is not the one that {STORE} names; delete it and {_AGAIN}")
        return opened

    def _reader(self, shard: int) -> _Reader:
        reader = self._readers.pop(shard, None) or _Reader(self._opened(shard), self.plan)
        self._readers[shard] = reader
        if len(self._readers) > _OPEN_SHARDS:
            self._readers.popitem(last=False)
        return reader


class _Reader:
    """Entries of an opened shard, mapped."""

    def __init__(self, shard: Shard, plan: Plan) -> None:
        self.shard = shard
        self._bytes = _field(plan, 1).bytes
        self._row = torch.empty(plan.shape, dtype=DTYPES[plan.dtype], device="meta")
        try:
            with shard.path.open("rb") as file:
                self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise FileError(shard.path, f"cannot be mapped: {error}") from error

    def read(self, entry: int, out: Tensor) -> None:
        """Copy one entry to `out`, then compare the digest of what arrived there."""
        begin = self.shard.begin + entry * self._bytes
        target = bytes_of(out)
        target[:] = self._data[begin : begin + self._bytes]
        if hashlib.sha256(target).hexdigest() != self.shard.digests[entry]:
            what = f"entry {entry} of this file was altered after it was written; delete the file and {_AGAIN}"
            raise FileError(self.shard.path, what)

    def check(self, entry: int) -> None:
        """FileError if the entry is not the one that was written."""
        self.read(entry, torch.empty_like(self._row, device="cpu"))


def open_shard(store: Path, plan: Plan, shard: int) -> Shard:
    """Check the head of a shard: form, size of the file, owner, and digest of everything but the latents.

    Raises FileError when it is missing, cut short, altered or another store's. Reads the first kilobytes only.
    """
    path = file_of(store, shard_name(shard))
    try:
        with path.open("rb") as file:
            head = read_head(file)
            size = file.seek(0, 2)
    except FileNotFoundError:
        raise FileError(path, f"is missing; {_AGAIN}, it makes what is missing") from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    label = head.label if head else {}
    digest = label.pop("sha256", None)
    if head is None or digest != digest_of(label):
        raise FileError(path, f"is damaged: its head is not the one that was written; delete it and {_AGAIN}")
    if label.get("store") != plan.digest or label.get("shard") != shard_name(shard):
        raise FileError(path, f"belongs to another store or another place in it; delete it and {_AGAIN}")
    if head.fields != (_field(plan, len(label["captions"])),):
        raise FileError(path, f"is damaged: it holds {_forms(head)}; delete it and {_AGAIN}")
    if size != head.end:
        raise FileError(path, f"is cut short or too long: {size} bytes, must be {head.end}; delete it and {_AGAIN}")
    left_out = tuple(LeftOut(*item) for item in label["left_out"])
    return Shard(path, head.begin, tuple(label["captions"]), tuple(label["digests"]), left_out, digest)


def plan_of(store: Path) -> Plan:
    """Content of a store's plan.json, finished or not. FileError when there is none or it was damaged."""
    content = _record(store, PLAN)
    digest = content.pop("sha256", None)
    if digest != digest_of(content):
        raise FileError(store / PLAN, f"was altered after it was written; delete it and {_AGAIN}")
    return _plan_from(content, store / PLAN)


def one_line(caption: str) -> str:
    """A caption as a line of a prompt file; empty if it says nothing."""
    return caption.replace("\r", " ").replace("\n", " ").replace("\0", " ").lstrip("\ufeff").rstrip()


def _field(plan: Plan, count: int) -> Field:
    return Field("latents", _STORED_AS[plan.dtype], (count, *plan.shape))


def _forms(head: Head) -> str:
    return ", ".join(f"{item.name} {item.dtype} {list(item.shape)}" for item in head.fields)[:120] or "no tensor"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plan_from(content: Mapping[str, Any], file: Path) -> Plan:
    """A plan whose digest was right. FileError for one that this version does not know."""
    values = dict(content)
    if values.get("version") != _FORMAT:
        raise FileError(file, f"is of format {values.get('version')}, this is format {_FORMAT}; make the store again")
    try:
        values |= {name: tuple(values[name]) for name in ("shape", "timesteps")}
        return Plan(**values)
    except (TypeError, ValueError, KeyError) as error:
        raise FileError(file, f"cannot be used ({error}); make the store again") from error


def _manifest(store: Path) -> dict[str, Any]:
    """Content of store.json, digest checked and left in."""
    if not (store / STORE).exists() and (store / PLAN).exists():
        plan = plan_of(store)
        left = [shard for shard in range(plan.shards) if not file_of(store, shard_name(shard)).exists()]
        what = f"{len(left)} of {plan.shards} shards are missing" if left else f"it has no {STORE}"
        raise FileError(store, f"is not finished: {what}; {_AGAIN}")
    content = _record(store, STORE)
    if "encoder" in content:
        raise FileError(store, "holds text embeddings, not latents; name the folder of latents or ODE pairs")
    digest = content.pop("sha256", None)
    if digest != digest_of(content) or not _is_manifest(content):
        raise FileError(store / STORE, f"was altered after it was written; delete it and {_AGAIN}")
    return {**content, "sha256": digest}


def _is_manifest(content: Mapping[str, Any]) -> bool:
    shards = content.get("shards")
    listed = isinstance(shards, list) and all(isinstance(item, list) and len(item) == 2 for item in shards)
    return bool(listed and shards) and isinstance(content.get("plan"), dict) and {"count", "prompts"} <= content.keys()


def _record(store: Path, name: str) -> dict[str, Any]:
    """A JSON object of a store. FileError when there is none."""
    path = store / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "no such folder" if not store.exists() else f"holds no {name}: not a store of latents"
        raise FileError(store, f"{what}; make one: mirai data latents, make or convert") from None
    except NotADirectoryError:
        raise FileError(store, "is a file; name the folder of the store") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(path, f"cannot be read ({str(error)[:120]}); delete it and {_AGAIN}") from error
    if not isinstance(content, dict):
        raise FileError(path, f"holds no object; delete it and {_AGAIN}")
    return content
