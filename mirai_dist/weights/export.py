"""Trained weights for other programs: one network of a sharded checkpoint, in a published layout, with a manifest.

    wan           folder as Wan2.1 publishes it: safetensors in official names, index, config.json
    diffusers     folder for diffusers' WanTransformer3DModel.from_pretrained
    self-forcing  one .pt that the inference scripts of Self-Forcing and Causal-Forcing load strictly

One process without a process group, which holds one tensor (folders: one shard file) at a time. What foresight
trains beside the generator is in the checkpoint and never in an export.
"""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mirai_dist.config import schema
from mirai_dist.config.error import FileError
from mirai_dist.config.kinds import PRODUCES
from mirai_dist.models.wan.keys import WanShape, from_diffusers, shapes_of, to_diffusers
from mirai_dist.state.checkpoint import Description, describe
from mirai_dist.state.commit import CheckpointError, verify
from mirai_dist.weights.checksums import checksum, shown
from mirai_dist.weights.folders import (
    FORMAT,
    VERSION,
    diffusers_config,
    manifest_digest,
    refuse_occupied,
    wan_config,
    write_folder,
)

Layout = Literal["wan", "diffusers", "self-forcing"]
Which = Literal["raw", "ema"]

# The inference scripts of Self-Forcing and Causal-Forcing load this entry into a wrapper that has the DiT as `model`.
# Causal-Forcing would also take what its trainer writes, `model._fsdp_wrapped_module.`; Self-Forcing would not.
_ENTRY = {"raw": "generator", "ema": "generator_ema"}
_PREFIX = "model."
_ALIGNMENT = 64  # bytes; a mapped tensor starts where its numbers may


@dataclass(frozen=True)
class ExportRequest:
    """What to write. `recipe`: of the arm that wrote the checkpoint. `out`: must not exist yet."""

    checkpoint: Path
    recipe: schema.Recipe
    stage: str
    arm: str
    seed: int
    layout: Layout
    which: Which
    out: Path


@dataclass(frozen=True)
class ExportReport:
    """What was written: parameters, bytes on disk of all files, and what the manifest says of their origin."""

    role: str
    parameters: int
    bytes: int
    origin: dict[str, Any]


class StoredNetwork:
    """One network of a verified checkpoint, read tensor by tensor, whatever world size wrote it.

    which="ema": the averages, and the raw values of what is not averaged.
    """

    def __init__(self, checkpoint: Path, role: str, which: Which) -> None:
        self._path = checkpoint
        self._reader = _Reader(checkpoint / "tensors")
        stored = self._reader.metadata.state_dict_metadata
        raw, averages = f"networks/{role}/", f"averages/{role}/"
        self._places: dict[str, str] = {}
        for name in (place.removeprefix(raw) for place in stored if place.startswith(raw)):
            averaged = which == "ema" and averages + name in stored
            self._places[name] = (averages if averaged else raw) + name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Official parameter name -> full shape."""
        return {name: tuple(self._entry(name).size) for name in self._places}

    def read(self, name: str) -> Tensor:
        """One whole tensor in the dtype it was stored in. Raises CheckpointError when the storage does not give it."""
        entry = self._entry(name)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with _single_process():
                dcp.load({self._places[name]: tensor}, storage_reader=self._reader, no_dist=True)
        except dcp.CheckpointException as error:
            line = str(next(iter(error.failures.values()))[0]).partition("\n")[0]
            raise CheckpointError(f"checkpoint {self._path}: {self._places[name]}: {line}") from error
        return tensor

    def _entry(self, name: str) -> TensorStorageMetadata:
        return cast(TensorStorageMetadata, self._reader.metadata.state_dict_metadata[self._places[name]])


class _Reader(dcp.FileSystemReader):
    """Reads the metadata once: it lists every shard of every rank, and torch asks for it again with each tensor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


@contextmanager
def _single_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def export(request: ExportRequest, progress: Callable[[str], None]) -> ExportReport:
    """Write the trained network of a stage (a bidirectional stage's teacher, else the generator) to `request.out`.

    Written beside and renamed. `progress` hears what is being done, at each tensor. Raises FileError when the place
    is taken or cannot be written, when the stage keeps no average, and when recipe and checkpoint are not of one run;
    CheckpointError when the checkpoint is damaged.
    """
    _refuse_place(request)
    progress(f"verifying checkpoint {request.checkpoint.name}")
    verify(request.checkpoint)
    described = describe(request.checkpoint)
    role = _role(request, described)
    sizes = _sizes(request.recipe, role)
    stored = StoredNetwork(request.checkpoint, role, request.which)
    _refuse_other_network(request.checkpoint, stored.shapes, sizes)
    origin = _origin(request, described, role)
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        _write(request, _Source(stored, sizes, progress), origin)
    except OSError as error:
        raise FileError(request.out, f"cannot be written: {error}; give it another place or more space") from error
    parameters = sum(math.prod(shape) for shape in stored.shapes.values())
    return ExportReport(role, parameters, _bytes_of(request.out), origin)


def _refuse_place(request: ExportRequest) -> None:
    """FileError, before anything is read, where the place is taken or the layout cannot hold what the stage trains."""
    out = request.out
    if request.layout != "self-forcing":
        refuse_occupied(out)
        return
    if out.exists():
        raise FileError(out, "exists already; name a new file, or remove this one")
    if out.suffix != ".pt":
        raise FileError(out, "a self-forcing export is one file; end its name in .pt")
    if request.recipe.stages[request.stage].kind == "bidirectional":
        raise FileError(out, f"a self-forcing file holds a causal generator, and stage {request.stage} trains a "
                             "bidirectional teacher; use --to wan or --to diffusers, or another --stage")


def _role(request: ExportRequest, described: Description) -> str:
    """The network that the stage trains for use. FileError when the checkpoint has none, or no average of it."""
    path, stage = request.checkpoint, request.recipe.stages[request.stage]
    role = "teacher" if stage.kind == "bidirectional" else "generator"
    if role not in described.networks or described.passport["kind"] != stage.kind:
        raise FileError(path, f"is of a stage of kind {described.passport['kind']} with {_listed(described.networks)}; "
                              f"recipe.yaml says that stage {request.stage} is of kind {stage.kind}")
    if request.which == "ema" and role not in described.averages:
        raise FileError(path, f"holds no moving average of the {role} (stages.{request.stage}.ema.decay is 0, or "
                              "ema.start_update was not reached); add --which raw")
    return role


def _sizes(recipe: schema.Recipe, role: str) -> WanShape:
    network = recipe.teacher if role == "teacher" else recipe.generator
    return WanShape(network.dim, network.ffn_dim, network.heads, network.blocks, recipe.text.dim, recipe.video.channels,
                 network.freq_dim)


def _refuse_other_network(checkpoint: Path, shapes: Mapping[str, tuple[int, ...]], sizes: WanShape) -> None:
    """FileError when the stored parameters are not those of the recipe's network: its config.json would not fit."""
    expected = shapes_of(sizes)
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise FileError(checkpoint, f"{name} has shape {_shown(shapes, name)}, the run's recipe.yaml asks for "
                                        f"{_shown(expected, name)}; put the recipe back that this was trained with")


def _shown(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "none"


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no network"


def _origin(request: ExportRequest, described: Description, role: str) -> dict[str, Any]:
    """What these weights are and where they come from: the manifest without format and checksums.

    step: updates of this very network. parent: what it started from, null for random weights; of its path the last
    part alone, since the rest is of one machine.
    """
    passport = described.passport
    parent = passport.get("starts", {}).get("parent")
    return {
        "kind": PRODUCES[passport["kind"]],
        "which": request.which,
        "run": request.recipe.name,
        "recipe": passport["recipe"],
        "parent": parent and {**parent, "path": Path(parent["path"]).name},
        "stage": request.stage,
        "arm": request.arm,
        "seed": request.seed,
        "cycle": passport["cycle"],
        "step": described.extras["updates"][role],
    }


@dataclass(frozen=True)
class _Source:
    """The tensors to write, in the order of the network, and who hears of each one."""

    stored: StoredNetwork
    sizes: WanShape
    progress: Callable[[str], None]

    @cached_property
    def names(self) -> list[str]:
        return list(shapes_of(self.sizes))

    def tensor(self, name: str) -> Tensor:
        self.progress(f"tensor {self.names.index(name) + 1} of {len(self.names)}")
        return self.stored.read(name)


def _write(request: ExportRequest, source: _Source, origin: Mapping[str, Any]) -> None:
    if request.layout == "wan":
        write_folder(request.out, source.names, source.tensor, wan_config(source.sizes), origin)
    elif request.layout == "diffusers":
        names = [to_diffusers(name) for name in source.names]
        config = diffusers_config(source.sizes)
        write_folder(request.out, names, lambda name: source.tensor(from_diffusers(name)), config, origin)
    else:
        _write_pt(request, source, origin)


def _write_pt(request: ExportRequest, source: _Source, origin: Mapping[str, Any]) -> None:
    """One .pt, beside and renamed. torch.save wants all tensors at once, so they lie in a file that is mapped."""
    out = Path(os.path.abspath(request.out))
    writer = f"{socket.gethostname()}-{os.getpid()}"
    values, beside = (out.with_name(f"{out.name}.{what}-{writer}") for what in ("values", "tmp"))
    try:
        with open(values, "wb") as file:
            spans = {name: _append(file, source.tensor(name)) for name in source.names}
        manifest = {**origin, "format": FORMAT, "version": VERSION,
                    "checksums": {_PREFIX + name: span.checksum for name, span in spans.items()}}
        weights = {_PREFIX + name: tensor for name, tensor in _mapped(values, spans).items()}
        content = {_ENTRY[request.which]: weights, "mirai": {**manifest, "sha256": manifest_digest(manifest)}}
        source.progress(f"writing {out.name}")
        with open(beside, "wb") as file:
            _save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(beside, out)
    finally:
        values.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)


def _save(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # A full disk reaches us as a complaint about the archive's layout; what the file said is behind it.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


@dataclass(frozen=True)
class _Span:
    """Where a tensor's values lie in a flat file."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    checksum: str


def _append(file: BinaryIO, tensor: Tensor) -> _Span:
    file.write(bytes(-file.tell() % _ALIGNMENT))
    span = _Span(file.tell(), tensor.shape, tensor.dtype, shown(checksum(tensor)))
    file.write(tensor.flatten().view(torch.uint8).numpy().data)
    return span


def _mapped(path: Path, spans: Mapping[str, _Span]) -> dict[str, Tensor]:
    """The tensors of a flat file, each in a storage of its own: torch.save writes whole storages."""
    whole = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    tensors = {}
    for name, span in spans.items():
        stop = span.start + span.shape.numel() * span.dtype.itemsize
        storage = cast(torch.UntypedStorage, whole[span.start : stop])
        tensors[name] = torch.empty(0, dtype=span.dtype).set_(storage).view(span.shape)
    return tensors


def _bytes_of(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
