"""`mirai data verify`: reads every byte of stores and names each entry that is not what was written."""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from mirai_dist.commands.data_progress import quiet_console
from mirai_dist.config.error import FileError
from mirai_dist.data import embeddings
from mirai_dist.data.latents import LatentStore
from mirai_dist.data.lmdb_files import LmdbClips, holds_lmdb, import_lmdb

_SHOWN = 20


def run(options: argparse.Namespace) -> int:
    """The sub-verb. Every fault is said; FileError at the end when there was one."""
    bad: list[FileError] = []
    with closing(quiet_console()) as console:
        for path in options.stores:
            what, faults = _opened(path)
            found = list(faults)
            for fault in found[:_SHOWN]:
                console.warn(str(fault))
            if len(found) > _SHOWN:
                console.warn(f"{path}: {len(found) - _SHOWN} more")
            console.say(f"{path}: {what}, {f'{len(found)} damaged' if found else 'whole'}")
            bad += found
    if bad:
        raise FileError(bad[0].where, bad[0].what + (f" ({len(bad)} faults in all)" if len(bad) > 1 else ""))
    return 0


def _opened(path: Path) -> tuple[str, Iterator[FileError]]:
    """What a folder holds, and its faults, found as they are taken."""
    if _is_embeddings(path):
        identity = embeddings.identity_of(path)
        return f"embeddings of {identity.count} prompts, every byte read", _embedding_faults(path, identity)
    if holds_lmdb(path):
        return "LMDB: sizes, captions and finiteness of every row (it holds no digests)", _lmdb_faults(path)
    store = LatentStore(path)
    return f"{store.plan.kind}, {store.size} entries, every byte read", store.verify()


def _is_embeddings(path: Path) -> bool:
    try:
        return "encoder" in json.loads((path / embeddings.STORE).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return (path / f"{embeddings.NEGATIVE}.safetensors").exists()


def _embedding_faults(path: Path, identity: embeddings.Identity) -> Iterator[FileError]:
    for name in (*map(embeddings.shard_name, range(identity.shards)), embeddings.NEGATIVE):
        try:
            embeddings.verify(embeddings.open_shard(path, identity, name))
        except FileError as error:
            yield error


def _lmdb_faults(path: Path) -> Iterator[FileError]:
    """Faults of LMDB files, looked for in a process of its own: LMDB trusts its pages, and a damaged one may end it."""
    import_lmdb()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send_faults, args=(path, theirs))
    child.start()
    theirs.close()
    while True:
        try:
            yield FileError(*ours.recv())
        except EOFError:
            break
    child.join()
    if child.exitcode:
        how = f"reading ended with signal {-child.exitcode}"
        yield FileError(path, f"is damaged: LMDB cannot read its own pages ({how}); copy it again")


def _send_faults(path: Path, pipe: Connection) -> None:
    faulthandler.disable()  # what the parent says is enough
    torch.set_num_threads(1)  # the threads of the parent are not in a fork
    try:
        for fault in LmdbClips(path).verify():
            pipe.send((fault.where, fault.what))
    except FileError as error:
        pipe.send((error.where, error.what))
