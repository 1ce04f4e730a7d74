"""Everything a run is, in one committed directory that any world size can load.

    manifest.json   passport and digests (state/commit.py)
    state.json      extras, hyperparameters of the optimizers, update counts of the averages
    tensors/        torch.distributed.checkpoint: every rank writes its own shards, nothing is gathered

Tensor names: networks/ROLE/NAME, averages/ROLE/NAME, optimizers/ROLE/NAME/MOMENT, samples/CACHE/GLOBAL_SAMPLE, where
NAME is the plain parameter name of the unsharded module. `save`, `load` and `load_network` are called by all ranks
together (or by one process without a process group) and fail on all ranks with the same line.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from mirai_dist.state.commit import CheckpointError, Commit, FileRecord, flushed, latest, manifest_of, verify
from mirai_dist.state.ema import Ema, local, named_tensors

T = TypeVar("T")
_STATE, _TENSORS = "state.json", "tensors"
# How an optimizer computes is the affair of the process that runs it, not of the run that it belongs to.
_OWN_TO_THE_PROCESS = ("params", "foreach", "fused", "capturable", "differentiable")


@dataclass
class TrainState:
    """All that must survive: `save` reads it, `load` fills the same shape in place.

    extras: JSON values, equal on all ranks (cycle, position, cursors, counters, seeds).
    samples: cache name -> global sample number -> tensor; each rank holds the samples it owns.
    """

    networks: dict[str, nn.Module] = field(default_factory=dict)
    optimizers: dict[str, tuple[nn.Module, Optimizer]] = field(default_factory=dict)
    averages: dict[str, Ema] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, dict[int, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveReport:
    """What one save cost: bytes over all ranks, seconds the training loop stood still."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds, read without reading a tensor."""

    passport: dict[str, Any]
    extras: dict[str, Any]
    networks: list[str]
    optimizers: list[str]
    averages: list[str]
    samples: dict[str, list[int]]


@dataclass(frozen=True)
class _Contents:
    """state.json and the names, shapes and dtypes of the stored tensors."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, TensorStorageMetadata]

    def names(self, prefix: str) -> list[str]:
        """Tensor names below `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]

    def roles(self, kind: str) -> list[str]:
        return sorted({name.partition("/")[0] for name in self.names(f"{kind}/")})


def save(path: Path, state: TrainState, passport: Mapping[str, Any]) -> SaveReport:
    """Write `state` as the committed checkpoint `path`; returns once it is on disk.

    `passport` (cycle, position, recipe digest, parent digest, stage, kind ...) goes into the manifest, with world
    size, torch version and time of writing added. Raises CheckpointError on all ranks, leaving earlier checkpoints
    alone, when a tensor is not finite, ranks disagree on the extras, or the disk refuses.
    """
    started = time.perf_counter()
    text = _agreed(path, lambda: _state_text(state))
    if len(set(_gathered(hashlib.sha256(text).hexdigest()))) > 1:
        raise CheckpointError(f"checkpoint {path}: ranks disagree on extras, optimizer settings or averages")
    tensors = _agreed(path, lambda: _finite(_stored_tensors(state), "refusing to save"))
    stamped = {**passport, "world_size": _world_size(), "torch": torch.__version__, "created": time.time()}
    commits: list[Commit] = []  # rank 0 alone holds one

    def begin() -> Path:
        commits.append(Commit(path))
        return commits[0].directory

    try:
        directory = _on_rank_zero(path, begin)
        storage = dcp.FileSystemWriter(directory / _TENSORS, sync_files=False)  # flushed with their digests below
        _transfer(path, lambda: dcp.save(tensors, storage_writer=storage, no_dist=not _ranked()))
        known = {name: record for records in _gathered(_agreed(path, lambda: _own_records(directory)))
                 for name, record in records.items()}

        def seal() -> int:
            commits[0].write(_STATE, text)
            return commits[0].seal(stamped, known)

        size = _on_rank_zero(path, seal)
    except CheckpointError:
        for commit in commits:
            commit.abandon()
        raise
    return SaveReport(size, time.perf_counter() - started)


def newest(root: Path) -> Path | None:
    """`commit.latest` as rank 0 sees it, for all ranks: nodes may list a shared directory differently for a while."""
    return _on_rank_zero(root, lambda: latest(root))


def describe(path: Path) -> Description:
    """What the checkpoint holds; no collective. Raises CheckpointError when it is torn."""
    contents = _contents(path)
    samples = {cache: sorted(int(number) for number in contents.names(f"samples/{cache}/"))
               for cache in contents.roles("samples")}
    return Description(manifest_of(path)["passport"], contents.state["extras"], contents.roles("networks"),
                       sorted(contents.state["optimizers"]), contents.roles("averages"), samples)


def load(path: Path, state: TrainState, samples: Mapping[str, Sequence[int]] | None = None,
         device: torch.device | None = None) -> None:
    """Fill `state` from a checkpoint that any world size wrote, bit for bit.

    Weights, moments and averages are loaded in place, each rank reading its shards; `state.extras` and
    `state.samples` are replaced. `samples` names the global samples that this rank wants of each cache; they are put
    on `device` (CPU by default). Raises CheckpointError on all ranks, naming the component, when the checkpoint is
    damaged, lacks something that `state` has, has something that `state` lacks, or holds a value that is not finite.
    """
    _agreed(path, lambda: verify(path, _rank(), _world_size()))
    contents = _agreed(path, lambda: _contents(path))
    moments: dict[str, dict[str, dict[str, Tensor]]] = {}
    cache: dict[str, dict[int, Tensor]] = {}

    def targets() -> dict[str, Tensor]:
        _same_roles(contents, state)
        tensors = _weights(state)
        _fits(contents, tensors, ("networks/", "averages/"))
        for role, (module, optimizer) in state.optimizers.items():
            moments[role] = _empty_moments(contents, role, module, optimizer)
        cache.update(_empty_samples(contents, samples or {}, device or torch.device("cpu")))
        return tensors | _moment_tensors(moments) | _sample_tensors(cache)

    tensors = _agreed(path, targets)
    _read(path, tensors)
    for role, (module, optimizer) in state.optimizers.items():
        _restore_optimizer(optimizer, module, contents.state["optimizers"][role], moments[role])
    for role, average in state.averages.items():
        average.updates = contents.state["averages"][role]
    state.extras, state.samples = contents.state["extras"], cache


def load_network(path: Path, role: str, module: nn.Module, which: Literal["raw", "ema"]) -> None:
    """Start `module` (sharded or not, in any float dtype) from one network of another stage's checkpoint.

    `which="ema"` takes the averages, and the raw values of what is not averaged (frozen parameters, buffers).
    Raises CheckpointError on all ranks when the file has no such role, no averages of it, or other names or shapes.
    """
    _agreed(path, lambda: verify(path, _rank(), _world_size()))
    contents = _agreed(path, lambda: _contents(path))

    def targets() -> dict[str, Tensor]:
        if role not in contents.roles("networks"):
            raise CheckpointError(f"no network {role!r}, only {contents.roles('networks')}")
        if which == "ema" and role not in contents.roles("averages"):
            raise CheckpointError(f"no averages of {role!r}; it was saved without ema, ask for its raw weights")
        tensors = {f"networks/{role}/{name}": tensor.detach() for name, tensor in named_tensors(module).items()}
        _fits(contents, tensors, (f"networks/{role}/",), same_dtype=False)
        averaged = set(contents.names(f"averages/{role}/")) if which == "ema" else set()
        return {_averaged_name(name, role, averaged): tensor for name, tensor in tensors.items()}

    _read(path, _agreed(path, targets))


# What is stored, and under which name.


def _state_text(state: TrainState) -> bytes:
    """state.json. Raises CheckpointError when something in it would not come back as it was."""
    values = {
        "extras": state.extras,
        "optimizers": {role: _settings(role, module, optimizer)
                       for role, (module, optimizer) in state.optimizers.items()},
        "averages": {role: average.updates for role, average in state.averages.items()},
    }
    try:
        text = json.dumps(values, sort_keys=True, allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"extras and optimizer settings must be finite JSON values: {error}") from error
    if json.loads(text)["extras"] != state.extras:
        raise CheckpointError("extras hold tuples or keys that are not strings; JSON would change them")
    return text.encode()


def _settings(role: str, module: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Hyperparameters of each parameter group, and the names of its parameters in order."""
    names = _names_by_parameter(module)
    groups = []
    for group in optimizer.param_groups:
        unknown = [parameter for parameter in group["params"] if id(parameter) not in names]
        if unknown:
            raise CheckpointError(f"optimizer {role!r} holds a parameter {tuple(unknown[0].shape)} that is not in its "
                                  "network; build the optimizer after the network is sharded")
        values = {key: value for key, value in group.items() if key not in _OWN_TO_THE_PROCESS}
        groups.append({"parameters": [names[id(parameter)] for parameter in group["params"]], "values": values})
    return groups


def _names_by_parameter(module: nn.Module) -> dict[int, str]:
    return {id(tensor): name for name, tensor in named_tensors(module).items()}


def _weights(state: TrainState) -> dict[str, Tensor]:
    tensors = {f"networks/{role}/{name}": tensor.detach()
               for role, module in state.networks.items() for name, tensor in named_tensors(module).items()}
    return tensors | {f"averages/{role}/{name}": tensor
                      for role, average in state.averages.items() for name, tensor in average.state_dict().items()}


def _stored_tensors(state: TrainState) -> dict[str, Tensor]:
    for kind in (state.networks, state.optimizers, state.averages, state.samples):
        for role in kind:
            if "/" in role:
                raise CheckpointError(f"the role {role!r} contains a slash")
    moments = {}
    for role, (module, optimizer) in state.optimizers.items():
        names = _names_by_parameter(module)
        moments[role] = {names[id(parameter)]: values for parameter, values in optimizer.state.items()}
    return _weights(state) | _moment_tensors(moments) | _sample_tensors(state.samples)


def _moment_tensors(moments: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    tensors = {f"optimizers/{role}/{name}/{moment}": value for role, names in moments.items()
               for name, values in names.items() for moment, value in values.items()}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} is a {type(value).__name__}: use an optimizer whose state is all tensors")
    return tensors


def _sample_tensors(samples: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    return {f"samples/{cache}/{number}": tensor for cache, held in samples.items() for number, tensor in held.items()}


def _averaged_name(name: str, role: str, averaged: set[str]) -> str:
    plain = name.removeprefix(f"networks/{role}/")
    return f"averages/{role}/{plain}" if plain in averaged else name


def _finite(tensors: dict[str, Tensor], verdict: str) -> dict[str, Tensor]:
    """The same tensors. Raises CheckpointError naming the first whose local part holds a NaN or an infinity."""
    flags: dict[torch.device, list[Tensor]] = {}
    names: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        part = local(tensor)
        if part.is_floating_point():
            flags.setdefault(part.device, []).append(part.isfinite().all())
            names.setdefault(part.device, []).append(name)
    for where, verdicts in flags.items():
        # One transfer a device, not one a tensor.
        for name, good in zip(names[where], torch.stack(verdicts).tolist(), strict=True):
            if not good:
                raise CheckpointError(f"{name} is not finite: {verdict}")
    return tensors


# What is read, and into what.


def _contents(path: Path) -> _Contents:
    try:
        state = json.loads((path / _STATE).read_bytes())
        stored = dcp.FileSystemReader(path / _TENSORS).read_metadata().state_dict_metadata
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}") from error
    return _Contents(path, state, {name: cast(TensorStorageMetadata, entry) for name, entry in stored.items()})


def _same_roles(contents: _Contents, state: TrainState) -> None:
    kinds = [("network", contents.roles("networks"), state.networks),
             ("optimizer", list(contents.state["optimizers"]), state.optimizers),
             ("average", contents.roles("averages"), state.averages)]
    for kind, stored, live in kinds:
        for role in sorted(set(stored) ^ set(live)):
            place = "this run" if role in stored else "the checkpoint"
            raise CheckpointError(f"{kind} {role!r} is missing from {place}")


def _fits(contents: _Contents, tensors: Mapping[str, Tensor], prefixes: tuple[str, ...],
          same_dtype: bool = True) -> None:
    """Raises CheckpointError naming the first tensor that only one side has, or that differs in shape or dtype."""
    stored = {name for name in contents.tensors if name.startswith(prefixes)}
    for name in sorted(stored ^ set(tensors)):
        raise CheckpointError(f"{name} is missing from {'this run' if name in stored else 'the checkpoint'}")
    for name, tensor in tensors.items():
        entry = contents.tensors[name]
        if entry.size != tensor.shape:
            raise CheckpointError(f"{name} has shape {list(entry.size)} in the file, {list(tensor.shape)} in this run")
        if same_dtype and entry.properties.dtype != tensor.dtype:
            raise CheckpointError(f"{name} is {entry.properties.dtype} in the file, {tensor.dtype} in this run")


def _empty_moments(contents: _Contents, role: str, module: nn.Module,
                   optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Room for the stored state of one optimizer, sharded as its parameters are now."""
    live = [group["parameters"] for group in _settings(role, module, optimizer)]
    stored = [group["parameters"] for group in contents.state["optimizers"][role]]
    if live != stored:
        odd = sorted({name for names in live for name in names} ^ {name for names in stored for name in names})
        raise CheckpointError(f"optimizer {role!r}: its parameter groups differ from the file's"
                              + (f", first in {odd[0]}" if odd else ""))
    parameters = named_tensors(module)
    moments: dict[str, dict[str, Tensor]] = {}
    for place in contents.names(f"optimizers/{role}/"):
        name, _, moment = place.rpartition("/")
        entry, parameter = contents.tensors[f"optimizers/{role}/{place}"], parameters[name]
        dtype = entry.properties.dtype
        moments.setdefault(name, {})[moment] = (
            torch.empty_like(parameter, dtype=dtype, requires_grad=False) if entry.size == parameter.shape
            else torch.empty(entry.size, dtype=dtype))
    return moments


def _empty_samples(contents: _Contents, wanted: Mapping[str, Sequence[int]],
                   device: torch.device) -> dict[str, dict[int, Tensor]]:
    cache: dict[str, dict[int, Tensor]] = {}
    for name, numbers in wanted.items():
        cache[name] = {}
        for number in numbers:
            entry = contents.tensors.get(f"samples/{name}/{number}")
            if entry is None:
                raise CheckpointError(f"sample {number} of {name!r} is missing from the checkpoint")
            cache[name][number] = torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
    return cache


def _restore_optimizer(optimizer: Optimizer, module: nn.Module, settings: Sequence[Mapping[str, Any]],
                       moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Hand moments and hyperparameters to torch's own loader, which puts each on the device its kernel wants."""
    numbers: dict[str, int] = {}
    groups = []
    for group, stored in zip(optimizer.param_groups, settings, strict=True):
        for name in stored["parameters"]:
            numbers[name] = len(numbers)
        # JSON has no tuples (betas); the live group tells which values are.
        values = {key: tuple(value) if isinstance(group.get(key), tuple) else value
                  for key, value in stored["values"].items()}
        groups.append({**group, **values, "params": [numbers[name] for name in stored["parameters"]]})
    optimizer.load_state_dict({"state": {numbers[name]: dict(values) for name, values in moments.items()},
                               "param_groups": groups})


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors in place, each rank reading its own shards, and refuse what is not finite."""
    reader = dcp.FileSystemReader(path / _TENSORS)
    _transfer(path, lambda: dcp.load(tensors, storage_reader=reader, no_dist=not _ranked()))
    _agreed(path, lambda: _finite(tensors, "refusing to load"))


# Doing things together: a failure on one rank is raised on all, so that none waits for another.


def _ranked() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _ranked() else 0


def _world_size() -> int:
    return dist.get_world_size() if _ranked() else 1


def _gathered(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    if not _ranked():
        return [value]
    values: list[Any] = [None] * _world_size()
    dist.all_gather_object(values, value)
    return values


def _agreed(path: Path, step: Callable[[], T]) -> T:
    """Run a step on every rank; when it fails anywhere, raise the lowest failing rank's line everywhere."""
    value, cause = None, None
    try:
        value = step()
    except (CheckpointError, OSError) as error:
        cause = error
    for rank, line in enumerate(_gathered(None if cause is None else str(cause))):
        if line is not None:
            line = line.removeprefix(f"checkpoint {path}: ")
            raise CheckpointError(f"checkpoint {path}: {line}" + (f" (rank {rank})" if _world_size() > 1 else "")
                                  ) from cause
    return cast(T, value)


def _on_rank_zero(path: Path, step: Callable[[], T]) -> T:
    """Run a step on rank 0 alone; its value or its failure is everyone's."""
    return cast(T, _gathered(_agreed(path, lambda: step() if _rank() == 0 else None))[0])


def _transfer(path: Path, step: Callable[[], object]) -> None:
    """Run a torch.distributed.checkpoint call, which agrees on failures by itself but raises a bare BaseException."""
    try:
        with _without_single_process_warning():
            step()
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        line = str(cause).partition("\n")[0]
        raise CheckpointError(f"checkpoint {path}: {type(cause).__name__}: {line} (rank {rank})") from error


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    if _ranked():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _own_records(directory: Path) -> dict[str, FileRecord]:
    """Flush and digest the tensor files that this rank wrote, on the node that has them in its page cache."""
    own = (directory / _TENSORS).glob(f"__{_rank()}_*")
    return flushed(directory, [path.relative_to(directory).as_posix() for path in own])
