"""`.pt` files of Self-Forcing, Causal-Forcing, CausVid, Video-Mirai and our export: which tensors, which names.

One torch.save dictionary: `generator`, sometimes `generator_ema` beside or instead of it, sometimes a critic or a
foresight predictor, none of which matters here; or a bare state dictionary. Names carry what wrapped the network
when it was saved (spec 3.8). No file is ever allowed to run code.
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mirai_dist.config import FileError

MANIFEST_ENTRY = "mirai"
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_ONLY_IN_DMD = ("critic", "mirai_projector", "foresight_dim_proj")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What torch's unpickler and zip reader raise on damaged bytes.
_DAMAGE = (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError,
           OSError, AssertionError, ArithmeticError, MemoryError, NotImplementedError, ImportError,
           zipfile.BadZipFile)
_OBJECT = re.compile(r"(?:GLOBAL|Unsupported (?:global|class|type)[^\w]*(?:GLOBAL)?)\s*`?([\w.]+)")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a .pt file, mapped into memory: only what is touched is read."""

    file: Path
    key: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        return self.tensor.dtype if self.tensor.dtype in _FLOATS else None

    @property
    def dtype_name(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    def elements(self, start: int, stop: int) -> Tensor:
        return self.tensor.detach().contiguous().view(-1)[start:stop].clone()


@dataclass(frozen=True)
class PtContents:
    """tensors: by official name. kind: "" when the file does not tell. manifest: our own entry, empty if none."""

    tensors: dict[str, StoredTensor]
    kind: str
    manifest: dict[str, Any]


def open_pt(path: Path, which: Literal["raw", "ema"], whole: bool) -> PtContents:
    """Tensors of a .pt file, memory-mapped.

    whole: read a file of the old format, which cannot be mapped, into memory instead of refusing it.
    Raises FileError when the file is damaged, holds anything but tensors, or not the weights asked for.
    """
    content = _loaded(path, whole)
    if not isinstance(content, Mapping):
        raise FileError(path, f"holds a {type(content).__name__}, not a dictionary of weights")
    manifest = content.get(MANIFEST_ENTRY, {})
    if not isinstance(manifest, Mapping):
        raise FileError(path, f"its entry {MANIFEST_ENTRY!r} is no dictionary")
    kind = manifest.get("kind", "dmd" if any(key in content for key in _ONLY_IN_DMD) else "")
    return PtContents(_tensors(path, _chosen(path, content, which)), kind, dict(manifest))


def verify_pt(path: Path) -> None:
    """Read the whole file and compare every record with its CRC, which loading does not. Raises FileError.

    Files of the old format, and those that torch was told to write without CRC (0 is recorded), have nothing to
    compare with.
    """
    if _is_zip(path):
        _check_records(path, lambda record: True)


def plain_name(key: str) -> str:
    """Official name of a key: without what FSDP, checkpointing, torch.compile and the releases' wrapper added."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key.removeprefix("model.")


def _loaded(path: Path, whole: bool) -> Any:
    mapped = _is_zip(path)
    if mapped:
        _check_records(path, lambda record: record.filename.endswith(".pkl"))  # names and shapes: a few kB
    elif not whole:
        raise FileError(path, "has the old format of torch.save, of which no slice can be read; convert it once with "
                              "`mirai import`")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _DAMAGE as error:
        found = _OBJECT.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if found:
            raise FileError(path, f"holds Python objects ({found[1]}) beside tensors; it is not opened, because "
                                  "unpickling them could run code") from error
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileError(path, f"is no readable .pt file, truncated or corrupt ({line[:120]}); copy it again") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _check_records(path: Path, chosen: Callable[[zipfile.ZipInfo], bool]) -> None:
    """FileError when a record of the archive differs from its CRC, or there is no whole archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC and chosen(record):
                    with archive.open(record) as content:
                        while content.read(1 << 20):
                            continue
    except (*_DAMAGE, zlib.error) as error:
        raise FileError(path, f"is no readable .pt file, truncated or corrupt ({error}); copy it again") from error


def _chosen(path: Path, content: Mapping[Any, Any], which: Literal["raw", "ema"]) -> tuple[str, Any]:
    """The dictionary of weights asked for, and the key it was under."""
    if which == "ema":
        if "generator_ema" not in content:
            raise FileError(path, "holds no moving average (no key generator_ema); ask for its raw weights")
        return "generator_ema", content["generator_ema"]
    for key in ("generator", "model"):
        if key in content:
            return key, content[key]
    if "generator_ema" in content:
        raise FileError(path, "holds the moving average alone (generator_ema); ask for it: which: ema in a recipe, "
                              "--which ema on the command line")
    return "", {key: value for key, value in content.items() if key != MANIFEST_ENTRY}


def _tensors(path: Path, chosen: tuple[str, Any]) -> dict[str, StoredTensor]:
    place, entries = chosen
    if not isinstance(entries, Mapping):
        raise FileError(path, f"its entry {place!r} is a {type(entries).__name__}, not a dictionary of weights")
    tensors: dict[str, StoredTensor] = {}
    for key, value in entries.items():
        where = f"{place}.{key}" if place else str(key)
        if not isinstance(key, str) or type(value) not in (Tensor, torch.nn.Parameter):
            raise FileError(path, f"{where} is a {type(value).__name__}, not a tensor: these are no weights of Wan's "
                                  "transformer")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise FileError(path, f"{where} is a sparse, quantised or empty tensor; use plain weights")
        name = plain_name(key)
        if name in tensors:
            raise FileError(path, f"{where} and {tensors[name].key} are the same parameter {name}")
        tensors[name] = StoredTensor(path, where, value)
    if not tensors:
        raise FileError(path, f"its entry {place!r} is empty" if place else "holds no tensors")
    return tensors
