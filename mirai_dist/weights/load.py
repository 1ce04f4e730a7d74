"""Fill an allocated, sharded network from a weight file: every rank reads its own rows, and together they check.

    1. all ranks see the same file        size, headers, a probe of every tensor
    2. names, shapes and heads fit        strictly
    3. each rank reads, checks, casts     a few MB at a time, so host memory stays near the rank's shard
    4. checksums over all ranks           replicas agree; shards add up to what mirai.json records

A failure on any rank is raised on all, with the rank in the line.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mirai_dist.config import FileError
from mirai_dist.models.wan.keys import WanShape
from mirai_dist.parallel.materialize import own_part
from mirai_dist.state.ema import local, named_tensors
from mirai_dist.weights.checksums import checksum, shown, total
from mirai_dist.weights.files import WeightFile

T = TypeVar("T")
PIECE_BYTES = 16_000_000


@dataclass(frozen=True)
class LoadReport:
    """bytes_read: by this rank. seconds: until all ranks had agreed. checksum: of the file's content, 16 digits,
    the same for every number of ranks and every dtype of the network."""

    bytes_read: int
    seconds: float
    checksum: str


@dataclass(frozen=True)
class _Part:
    """Rows of one tensor that a rank read, and the checksum of what they were in the file and are in the network."""

    start: int
    stop: int
    in_file: int
    in_network: int


def load_into(network: nn.Module, file: WeightFile) -> LoadReport:
    """Overwrite every parameter of `network` (sharded on dimension 0, or whole) with the weights of `file`.

    Values are cast to the parameters' dtype. Collective over all ranks. Raises FileError on all of them alike when
    names, shapes or the number of heads differ, a value is not finite, a rank's copy of the file differs from the
    others', or the content is not what the file's own checksums say.
    """
    started, before = time.perf_counter(), file.bytes_read
    _same_copies(file.path, gathered(agreed(file.path, file.identity)))
    agreed(file.path, lambda: check_fit(network, file))
    parts = agreed(file.path, lambda: _fill(network, file))
    totals = _agreed_totals(file, [dict(zip(parts, each, strict=True)) for each in gathered(list(parts.values()))])
    _check_recorded(file, totals)
    digest = hashlib.sha256("".join(f"{name}={shown(value)};" for name, value in sorted(totals.items())).encode())
    return LoadReport(file.bytes_read - before, time.perf_counter() - started, digest.hexdigest()[:16])


def check_fit(network: nn.Module, file: WeightFile) -> None:
    """FileError unless `network` (allocated or on the meta device) has the names, shapes and heads of the file."""
    ours = {name: tuple(tensor.shape) for name, tensor in named_tensors(network).items()}
    missing = [name for name in ours if name not in file.stored]
    extra = [name for name in file.stored if name not in ours]
    differing = [name for name in ours if name in file.stored and ours[name] != file.shapes[name]]
    lines = _size_lines(network, file.sizes)
    if lines and (missing or extra or differing or lines[0].startswith("heads")):
        raise FileError(file.path, f"does not fit the recipe: {', '.join(lines)}; change the recipe or the weights")
    if missing or extra:
        raise FileError(file.path, f"missing key {missing[0]}" if missing else f"extra key {extra[0]}")
    if differing:
        name = differing[0]
        raise FileError(file.path, f"{name} has shape {list(file.shapes[name])}, {list(ours[name])} in the recipe")


def agreed(path: Path, step: Callable[[], T]) -> T:
    """Run a step on every rank; when it raises FileError anywhere, raise the lowest failing rank's line everywhere."""
    value, cause = None, None
    try:
        value = step()
    except FileError as error:
        cause = error
    except OSError as error:
        cause = FileError(path, f"cannot be read: {error}")
    failures = gathered(None if cause is None else (cause.where, cause.what))
    for rank, failure in enumerate(failures):
        if failure is not None:
            where, what = failure
            raise FileError(where, what + (f" (rank {rank})" if len(failures) > 1 else "")) from cause
    return cast(T, value)


def gathered(value: T) -> list[T]:
    """Every rank's value, on every rank; without a process group, this one's."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _size_lines(network: nn.Module, theirs: WanShape) -> list[str]:
    """`dim is 1536 in the file, 5120 in the recipe`, for each number that differs, the number of heads first."""
    shape = getattr(network, "shape", None)
    keys = {"text_dim": "text.dim", "channels": "video.channels"}
    lines = []
    for name in sorted(WanShape._fields, key=lambda name: name != "heads"):
        ours, given = getattr(shape, name, None), getattr(theirs, name)
        if ours is not None and given != ours and not (name == "heads" and given == 0):
            lines.append(f"{keys.get(name, name)} is {given} in the file, {ours} in the recipe")
    return lines


@torch.no_grad()
def _fill(network: nn.Module, file: WeightFile) -> dict[str, _Part]:
    """Read this rank's rows of every parameter into it."""
    parts = {}
    for name, parameter in named_tensors(network).items():
        own = own_part(torch.empty(parameter.shape, device="meta"), parameter)
        row = math.prod(parameter.shape[1:])
        first = own.storage_offset() // row
        target = local(parameter.detach())
        if own.numel() != target.numel() or tuple(own.shape[1:]) != tuple(parameter.shape[1:]):
            raise ValueError(f"{name} is not sharded on its first dimension alone")
        parts[name] = _fill_rows(file, name, target, first)
    return parts


def _fill_rows(file: WeightFile, name: str, target: Tensor, first: int) -> _Part:
    """Read rows from `first` on into `target`, in pieces."""
    row = math.prod(target.shape[1:])
    rows = max(1, PIECE_BYTES // (row * file.dtypes[name].itemsize))
    in_file, in_network = [], []
    for start in range(0, target.shape[0], rows):
        stop = min(start + rows, target.shape[0])
        values = file.read(name, (slice(first + start, first + stop),))
        file.refuse_not_finite(name, values)
        offset = (first + start) * row
        in_file.append(checksum(values, offset))
        if values.dtype == target.dtype:
            expected = in_file[-1]
        else:
            values = values.to(target.dtype)
            file.refuse_not_finite(name, values)
            expected = checksum(values, offset)
        target[start:stop].copy_(values)
        in_network.append(checksum(target[start:stop], offset))
        if in_network[-1] != expected:
            raise FileError(file.path, f"{name} is not in memory as it was read; do not use this machine")
    return _Part(first, first + target.shape[0], total(in_file), total(in_network))


def _same_copies(path: Path, identities: Sequence[Mapping[str, str]]) -> None:
    """FileError naming the ranks whose file is not the others'."""
    for aspect in identities[0]:
        seen = [identity[aspect] for identity in identities]
        usual = Counter(seen).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(seen) if value != usual]
        if odd:
            ranks = f"rank {odd[0]}" + (f" and {len(odd) - 1} more" if len(odd) > 1 else "")
            raise FileError(path, f"is another file on {ranks}: {aspect} {seen[odd[0]]}, {usual} on rank "
                                  f"{seen.index(usual)}; copy it to all nodes again")


def _agreed_totals(file: WeightFile, ranks: Sequence[Mapping[str, _Part]]) -> dict[str, int]:
    """Checksum of every whole tensor in the file. FileError when ranks that read the same rows got other values."""
    totals = {}
    for name in ranks[0]:
        by_rows: dict[int, list[tuple[int, _Part]]] = {}
        for rank, parts in enumerate(ranks):
            if parts[name].stop > parts[name].start:
                by_rows.setdefault(parts[name].start, []).append((rank, parts[name]))
        for readers in by_rows.values():
            usual = Counter(part for _, part in readers).most_common(1)[0][0]
            odd = [rank for rank, part in readers if part != usual]
            if odd:
                same = next(rank for rank, part in readers if part == usual)
                raise FileError(file.path, f"{name} was read with other values on rank {odd[0]} than on rank {same}; "
                                           "copy the file to all nodes again")
        parts = [readers[0][1] for _, readers in sorted(by_rows.items())]
        ends = [0, *(part.stop for part in parts)]
        assert [part.start for part in parts] == ends[:-1] and ends[-1] == file.shapes[name][0], name
        totals[name] = total(part.in_file for part in parts)
    return totals


def _check_recorded(file: WeightFile, totals: Mapping[str, int]) -> None:
    """FileError naming tensor and ranks when the content is not what the file's own checksums say."""
    wrong = [name for name, recorded in file.checksums.items() if totals[name] != recorded]
    if not wrong:
        return
    name = wrong[0]
    # Sums over ranks do not tell whose part is wrong: now that something is, each looks at its whole copy.
    found = gathered(agreed(file.path, lambda: _whole_checksum(file, name)))
    damaged = [rank for rank, value in enumerate(found) if value != file.checksums[name]]
    where = f" on rank {', '.join(map(str, damaged))}" if damaged and len(found) > 1 else ""
    file.refuse_altered(name, totals[name], where)


def _whole_checksum(file: WeightFile, name: str) -> int:
    shape = file.shapes[name]
    row = math.prod(shape[1:])
    rows = max(1, PIECE_BYTES // (row * file.dtypes[name].itemsize))
    return total(checksum(file.read(name, (slice(start, start + rows),)), start * row)
                 for start in range(0, shape[0], rows))
