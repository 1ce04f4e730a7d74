"""`mirai data convert`: between a store of ours and the published LMDB layout, bit for bit."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mirai_dist.commands.data_progress import Pace, part_console, quiet_console, refuse_below_one, size_text
from mirai_dist.config.error import FileError
from mirai_dist.data.arrays import Part
from mirai_dist.data.clips import open_clips
from mirai_dist.data.latents import CLEAN, ODE, Entry, LatentStore, Plan, StoreWriter
from mirai_dist.data.lmdb_files import LmdbClips, LmdbContents, LmdbShapes, published_timesteps, write_lmdb
from mirai_dist.observe.console import Console

_FOREIGN = "lmdb"  # key of the provenance under which a converted store keeps the shape keys as they stood


def run(options: argparse.Namespace) -> int:
    """The sub-verb. Raises FileError for a source or a target that cannot be used."""
    refuse_below_one({"--shard-size": options.shard_size})
    source = open_clips(options.source)
    if options.to == "mirai":
        if isinstance(source, LatentStore):
            raise FileError(options.source, "is a store already; only LMDB files are converted to one")
        _to_store(source, options)
    else:
        if isinstance(source, LmdbClips):
            raise FileError(options.source, "is of the LMDB layout already")
        _to_lmdb(source, options.out)
    return 0


def _to_store(source: LmdbClips, options: argparse.Namespace) -> None:
    plan = _plan(source, options.shard_size, _timesteps(options.timesteps))
    with closing(part_console(options.out, Part())) as console:
        writer = StoreWriter(options.out, plan)
        todo = writer.missing()
        for damage in writer.damaged:
            console.warn(f"{damage.where} is made again: it {damage.what.partition(';')[0]}")
        pace = Pace(console, sum(len(plan.numbers(shard)) for shard in todo), "convert", "rows")
        for shard in todo:
            writer.write(shard, _entries(source, plan, shard, pace))
        store = writer.seal()
        assert store is not None  # one part makes every shard
        console.say(f"{options.out}: {store.size} entries of {list(plan.shape)} {plan.dtype}, {plan.kind}")


def _plan(source: LmdbClips, shard_size: int, timesteps: tuple[float, ...]) -> Plan:
    states = source.entry_shape[0]
    kind = CLEAN if states == 1 else ODE
    if timesteps and len(timesteps) not in (states - 1, states - 2):
        what = f"names {len(timesteps)}; rows of {states} states have {states - 1} timesteps before the final sample"
        raise FileError("--timesteps", f"{what}, or {states - 2} if the last state is the ground truth")
    if kind == ODE and not timesteps:
        timesteps = source.timesteps
    counts = [{"latents_shape": shapes.latents, "prompts_shape": shapes.prompts} for shapes in source.shapes]
    origin = "as published" if timesteps == published_timesteps(states) else "given"
    return Plan(
        kind,
        source.size,
        source.entry_shape if kind == ODE else source.shape,
        "float16",
        shard_size,
        source.source_digest(),
        timesteps if kind == ODE else (),
        kind == ODE and states == len(timesteps) + 2,
        provenance={_FOREIGN: counts} | ({"timesteps": origin} if kind == ODE else {}),
    )


def _timesteps(text: str) -> tuple[float, ...]:
    try:
        times = tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        times = (-1.0,)
    if any(not 0 < time <= 1000 for time in times) or list(times) != sorted(set(times), reverse=True):
        raise FileError("--timesteps", f"is {text!r}; give falling numbers up to 1000, such as 1000,937.5,833.3,625")
    return times


def _entries(source: LmdbClips, plan: Plan, shard: int, pace: Pace) -> Iterator[Entry]:
    for number in plan.numbers(shard):
        row = source.rows([number])[0]
        if not row.isfinite().all():
            raise FileError(source.path, f"row {number} holds non-finite values; mirai data verify lists all such rows")
        (caption,) = source.captions([number])
        if not caption.strip():
            raise FileError(source.path, f"row {number} has an empty caption; every entry needs one")
        yield Entry(caption, row if plan.kind == ODE else row[-1])
        pace.advance()


@dataclass
class _Rows:
    """Entries of a store as rows of float16; counts the values that bfloat16 held and float16 rounds."""

    store: LatentStore
    rounded: int = 0

    def of(self, number: int) -> tuple[str, Tensor]:
        store = self.store
        entry = store.states([number]) if store.plan.kind == ODE else store.latents([number])
        row = entry.half()
        if not row.isfinite().all():
            raise FileError(store.path, f"entry {number} has values beyond float16, which the LMDB layout holds")
        self.rounded += int((row.to(torch.float32) != entry.to(torch.float32)).sum())
        return store.original_caption(number), row[0]


def _to_lmdb(store: LatentStore, out: Path) -> None:
    with closing(quiet_console()) as console:
        rows = _Rows(store)
        pace = Pace(console, store.size, "convert", "rows")
        row_bytes = 2 * torch.Size(store.plan.shape).numel()
        captions = sum(len(store.original_caption(number).encode()) for number in range(store.size))
        contents = LmdbContents(_shapes(store), store.size, row_bytes, captions)
        write_lmdb(out, contents, _paced(rows, store.size, pace))
        _say_end(store, rows, out, row_bytes, console)


def _say_end(store: LatentStore, rows: _Rows, out: Path, row_bytes: int, console: Console) -> None:
    console.say(f"{out}: {store.size} rows, {size_text(store.size * row_bytes)}")
    if rows.rounded:
        whole = store.size * row_bytes // 2
        console.warn(f"{rows.rounded} of {whole} bfloat16 values are below float16's range and were rounded")


def _paced(rows: _Rows, count: int, pace: Pace) -> Iterator[tuple[str, Tensor]]:
    for number in range(count):
        yield rows.of(number)
        pace.advance()


def _shapes(store: LatentStore) -> LmdbShapes:
    """The shape keys that the rows had if they came from one LMDB file, else those of the published writer."""
    foreign = store.plan.provenance.get(_FOREIGN, [])
    if len(foreign) == 1:
        return LmdbShapes(foreign[0]["latents_shape"], foreign[0]["prompts_shape"])
    row = store.plan.shape if store.plan.kind == ODE else (1, *store.plan.shape)
    return LmdbShapes(" ".join(map(str, (store.size, *row))), str(store.size))
