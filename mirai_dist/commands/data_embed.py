"""`mirai data embed`: the text embeddings of a prompt file, computed once, shard by shard, alone or as a job array."""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mirai_dist.commands.data_progress import Pace, part_console, refuse_below_one, size_text
from mirai_dist.config.error import FileError
from mirai_dist.data import embeddings
from mirai_dist.data.arrays import Part
from mirai_dist.data.embeddings import Contents, Identity, Shard
from mirai_dist.data.prompts import LONG_LINE, Lines, PromptFile
from mirai_dist.models.umt5 import NEGATIVE_PROMPT, Tokens, Umt5Encoder
from mirai_dist.observe.console import Console

_SAMPLE = 256  # prompts whose length stands for all when the size of the store is estimated


@dataclass
class Tally:
    """What this process did."""

    made: int = 0
    found: int = 0
    written: int = 0  # bytes
    cut: list[int] = field(default_factory=list)  # line numbers


def run(options: argparse.Namespace) -> int:
    """The sub-verb. Raises FileError for arguments, prompts, an encoder or a store that cannot be used."""
    part = Part.parse(options.part)
    refuse_below_one({"--length": options.length, "--shard-size": options.shard_size})
    prompts = PromptFile(options.prompts)
    console = part_console(options.out, part)
    try:
        _embed(options, part, prompts, console)
    finally:
        console.close()
    return 0


def _embed(options: argparse.Namespace, part: Part, prompts: PromptFile, console: Console) -> None:
    store: Path = options.out
    _say_report(prompts, console)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Umt5Encoder.load(options.encoder, options.length, device)
    identity = Identity(
        prompts.digest,
        prompts.size,
        encoder.fingerprint,
        encoder.dim,
        options.length,
        options.shard_size,
        hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest(),
    )
    embeddings.establish(store, identity)
    tally = Tally()
    todo = _unfinished(store, identity, part, tally, console)
    work = sum(len(identity.numbers(shard)) for shard in todo)
    _say_estimate(store, prompts, encoder, work, console)
    if part.index == 0 and _finished(store, identity, embeddings.NEGATIVE, console) is None:
        contents, rows = _contents(embeddings.NEGATIVE, encoder, [NEGATIVE_PROMPT], None)
        tally.written += embeddings.write_shard(store, identity, contents, rows)
    pace = Pace(console, work, "embed", "prompts")
    for shard in todo:
        numbers = identity.numbers(shard)
        contents, rows = _contents(embeddings.shard_name(shard), encoder, prompts.captions(numbers), pace)
        tally.written += embeddings.write_shard(store, identity, contents, rows)
        tally.made += 1
        tally.cut += [numbers[entry] + 1 for entry in contents.cut]
    _say_end(store, identity, tally, console)


def _contents(
    name: str, encoder: Umt5Encoder, captions: Sequence[str], pace: Pace | None
) -> tuple[Contents, Iterator[Tensor]]:
    """Token counts of a shard, and its embeddings [tokens, dim], computed as they are taken."""
    tokens = [encoder.tokens(caption) for caption in captions]
    cut = [entry for entry, prompt in enumerate(tokens) if prompt.cut]
    return Contents(name, [len(prompt.ids) for prompt in tokens], cut), _embedded(encoder, tokens, pace)


def _embedded(encoder: Umt5Encoder, tokens: Sequence[Tokens], pace: Pace | None) -> Iterator[Tensor]:
    """Embeddings in order. A prompt that comes again is encoded once and kept until its last time."""
    left = Counter(prompt.ids for prompt in tokens)
    kept: dict[tuple[int, ...], Tensor] = {}
    for prompt in tokens:
        left[prompt.ids] -= 1
        embedding = kept.pop(prompt.ids, None)
        if embedding is None:
            embedding = encoder.embed(prompt).cpu()
        if left[prompt.ids]:
            kept[prompt.ids] = embedding
        yield embedding
        if pace is not None:
            pace.advance()


def _unfinished(store: Path, identity: Identity, part: Part, tally: Tally, console: Console) -> list[int]:
    """Shards of this part that have to be made; the others are read and checked."""
    todo = []
    for shard in part.shards(identity.shards):
        found = _finished(store, identity, embeddings.shard_name(shard), console)
        if found is None:
            todo.append(shard)
        else:
            tally.found += 1
            tally.cut += [identity.numbers(shard)[entry] + 1 for entry in found.cut]
    return todo


def _finished(store: Path, identity: Identity, name: str, console: Console) -> Shard | None:
    """The shard of that name if it is there and every byte of it is right."""
    if not embeddings.file_of(store, name).exists():
        return None
    try:
        shard = embeddings.open_shard(store, identity, name)
        embeddings.verify(shard)
    except FileError as error:
        console.warn(f"{error.where} is made again: it {error.what.partition(';')[0]}")
        return None
    return shard


def _say_report(prompts: PromptFile, console: Console) -> None:
    report = prompts.report()
    size, repeated = size_text(report.bytes), report.repeated.count
    console.say(f"{prompts.path}: {report.prompts} prompts, {size}, {repeated} repeated")
    if report.repeated.count:
        console.say(f"repeated, encoded once a shard: {report.repeated}")
    if report.long.count:
        console.warn(f"longer than {LONG_LINE} bytes: {report.long}; what does not fit is cut off")
    if report.trailing_blanks:
        console.say(f"blank lines after the last prompt, passed over: {report.trailing_blanks}")


def _say_estimate(store: Path, prompts: PromptFile, encoder: Umt5Encoder, work: int, console: Console) -> None:
    """Tokens of a sample stand for those of all prompts."""
    stride = max(1, prompts.size // _SAMPLE)
    sample = [len(encoder.tokens(text).ids) for text in prompts.captions(range(0, prompts.size, stride))]
    mean = sum(sample) / len(sample)
    expected = round(2 * encoder.dim * mean * work)
    free = shutil.disk_usage(store).free
    console.say(
        f"embed {work} prompts of about {mean:.0f} tokens on {encoder.device}: "
        f"about {size_text(expected)}, {size_text(free)} free"
    )
    if expected > free:
        console.warn(f"{store} is on a disk with {size_text(free)} free, about {size_text(expected)} are needed")


def _say_end(store: Path, identity: Identity, tally: Tally, console: Console) -> None:
    if tally.cut:
        console.warn(f"cut to {identity.length} tokens: {Lines.of(sorted(tally.cut))}")
    console.say(f"wrote {size_text(tally.written)} in {tally.made} shards; {tally.found} were there already")
    names = [embeddings.shard_name(shard) for shard in range(identity.shards)]
    missing = sum(not embeddings.file_of(store, name).exists() for name in (*names, embeddings.NEGATIVE))
    if missing:
        console.say(f"{missing} files are left to the other parts")
    else:
        console.say(f"{store} is complete: text.encoder=store text.path={store} text.dim={identity.dim}")
