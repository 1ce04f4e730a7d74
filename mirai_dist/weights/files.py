"""Published weights, opened: official and diffusers folders, single safetensors files, `.pt` files of the releases.

`open_weights` reads headers only, checks that they are a Wan text-to-video transformer to the last name and shape,
and presents all layouts alike: by official names, any slice readable without the rest. Nothing here is collective.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mirai_dist.config import FileError
from mirai_dist.config.kinds import MEANING
from mirai_dist.models.wan.keys import WanShape
from mirai_dist.weights.contents import official_names, strict_sizes
from mirai_dist.weights.folders import check_manifest, manifest_checksums, open_folder
from mirai_dist.weights.pt import open_pt
from mirai_dist.weights.stored import SafetensorsFile, Stored, foreign_format, total_bytes

Which = Literal["raw", "ema"]
_PROBE = 32  # elements a tensor that every rank reads to compare its copy of a file with the others'


@dataclass
class WeightFile:
    """Weights of one network. Names are Wan's official ones, whatever the file calls them.

    layout: "wan", "diffusers" or "pt". kind: see config.kinds; "" when the file does not record it.
    assumed: the kind is not written down but follows from the folder being an official or diffusers one.
    which: "raw" or "ema". manifest: what mirai.json (or the entry of our own .pt) says; empty for other people's.
    checksums: recorded checksum of each tensor; empty if none. bytes_read: by `read`, of this object.
    """

    path: Path
    layout: str
    kind: str
    which: str
    sizes: WanShape
    stored: Mapping[str, Stored]
    assumed: bool = False
    manifest: Mapping[str, Any] = field(default_factory=dict)
    checksums: Mapping[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    dtypes: dict[str, torch.dtype] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = {name: stored.shape for name, stored in self.stored.items()}
        self.dtypes = {name: stored.dtype for name, stored in self.stored.items() if stored.dtype is not None}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors' data."""
        return total_bytes(self.stored)

    def shape_of_network(self) -> WanShape:
        """(dim, ffn_dim, heads or 0 where the file does not tell, blocks, text_dim, channels, freq_dim)."""
        return self.sizes

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor or a slice of it (steps of 1), CPU, in the file's dtype.

        Whole rows of the first dimension are read and nothing else; slices of further dimensions are cut out of them.
        Raises FileError when the disk fails or the file became shorter, KeyError for a name that is not in it.
        """
        stored = self.stored[name]
        start, stop, step = (index[0] if index else slice(None)).indices(stored.shape[0])
        assert step == 1
        row = math.prod(stored.shape[1:])
        try:
            values = stored.elements(start * row, max(start, stop) * row)
        except OSError as error:
            raise FileError(stored.file, f"{stored.key} cannot be read: {error.strerror}") from error
        self.bytes_read += values.nbytes
        rows = values.view(-1, *stored.shape[1:])
        return rows if index is None or len(index) == 1 else rows[(slice(None), *index[1:])].contiguous()

    def refuse_not_finite(self, name: str, values: Tensor) -> None:
        """FileError when one of these values of a tensor is NaN or infinite."""
        if values.numel() and not all(bound.isfinite() for bound in values.aminmax()):
            stored = self.stored[name]
            raise FileError(stored.file, f"{stored.key} holds NaN or infinite values; the weights are damaged, or of "
                                         "a training that diverged")

    def refuse_altered(self, name: str, found: int, where: str = "") -> None:
        """FileError when a whole tensor's checksum is not the recorded one, if one is recorded."""
        if self.checksums.get(name, found) != found:
            stored = self.stored[name]
            raise FileError(stored.file, f"{stored.key} is not what its checksum says{where}: the file was damaged or "
                                         "altered; copy or import it again")

    def identity(self) -> dict[str, str]:
        """What makes two copies of the file the same, cheap to compare: size, headers, and a probe of each tensor.

        The probe reads at most 32 elements a tensor, at a place that depends on its name; not in `bytes_read`.
        """
        content = hashlib.sha256()
        layout = []
        for name, stored in self.stored.items():
            count = math.prod(stored.shape)
            start = zlib.crc32(name.encode()) % max(1, count - _PROBE + 1)
            values = stored.elements(start, min(count, start + _PROBE))
            content.update(values.view(torch.uint8).numpy().tobytes())
            layout.append((name, stored.key, stored.shape, stored.dtype_name, stored.file.name))
        described = json.dumps([layout, dict(self.manifest), self.sizes], sort_keys=True, default=str)
        return {
            "size": f"{sum(path.stat().st_size for path in {stored.file for stored in self.stored.values()})} bytes",
            "headers": hashlib.sha256(described.encode()).hexdigest()[:12],
            "content": content.hexdigest()[:12],
        }


def open_weights(path: Path, which: Which = "raw", whole: bool = False) -> WeightFile:
    """Open weights of any supported form; headers are read and checked, tensors are not.

    which: of a .pt file, the weights as trained or their moving average; a folder has one set of weights, and
    "ema" of it is refused unless mirai.json says that it is an average. whole: read an old .pt file, which cannot be
    read in slices, into memory instead of refusing it.
    Raises FileError, one line with file and key, when these are no usable weights of a Wan text-to-video transformer.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _from_folder(path, which)
        return _from_file(path, which, whole)
    except FileNotFoundError:
        raise FileError(path, "does not exist; look at its spelling") from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}: {error.filename or path}") from error


def checked_kind(file: WeightFile, declared: str) -> str:
    """The kind of the weights, from what the file records and what the recipe or command line declares ("": nothing).

    Raises FileError when the two contradict each other, or neither says anything.
    """
    if declared and file.kind and declared != file.kind:
        why = "a folder of this layout without mirai.json" if file.assumed else "as recorded in it"
        what = f"are weights of kind {file.kind} ({MEANING[file.kind]}; {why}), declared as {declared}"
        cure = f"`mirai import --kind {declared}` records another kind" if file.assumed else "correct the declared kind"
        raise FileError(file.path, f"{what}; {cure}")
    if not declared and not file.kind:
        raise FileError(file.path, f"does not record what its weights are; declare it as one of {', '.join(MEANING)} "
                                   "(weights.NAME.kind in a recipe, --kind of mirai import)")
    return declared or file.kind


def _from_folder(path: Path, which: Which) -> WeightFile:
    folder = open_folder(path)
    tensors, layout = official_names(folder.path, folder.tensors)
    if layout != folder.layout:
        raise FileError(folder.path / "config.json", f"describes the {folder.layout} layout, but the tensors have "
                                                     f"names of the {layout} one")
    sizes = strict_sizes(folder.path, tensors, folder.heads)
    folder.check_config(sizes)
    recorded = folder.manifest.get("which", "raw")
    if which == "ema" and recorded != "ema":
        raise FileError(path, "does not hold a moving average; ask for its raw weights")
    return WeightFile(
        path, layout, _known_kind(path, folder.kind), recorded, sizes, tensors,
        assumed="kind" not in folder.manifest, manifest=folder.manifest,
        checksums=manifest_checksums(path, folder.manifest, {each.key: name for name, each in tensors.items()}),
    )


def _from_file(path: Path, which: Which, whole: bool) -> WeightFile:
    with path.open("rb") as file:
        head = file.read(512)
    if head[:2] == b"PK" or (head[:1] == b"\x80" and "pickle" in foreign_format(head)):
        return _from_pt(path, which, whole)
    if which == "ema":
        raise FileError(path, "does not hold a moving average; ask for its raw weights")
    if not head or (path.suffix != ".safetensors" and head[8:9] != b"{"):
        other = foreign_format(head) or "an unknown kind of file"
        raise FileError(path, f"is {other}; weights are a folder, a .safetensors or a .pt file")
    tensors, layout = official_names(path, SafetensorsFile(path).tensors)
    return WeightFile(path, layout, "", "raw", strict_sizes(path, tensors), tensors)


def _from_pt(path: Path, which: Which, whole: bool) -> WeightFile:
    content = open_pt(path, which, whole)
    tensors, layout = official_names(path, content.tensors)
    if layout != "wan":
        raise FileError(path, "is a .pt file with names of the diffusers layout; give its folder instead")
    if content.manifest:
        check_manifest(path, content.manifest)
    checksums = manifest_checksums(path, content.manifest, {name: name for name in tensors})
    return WeightFile(
        path, "pt", _known_kind(path, content.kind), which, strict_sizes(path, tensors), tensors,
        manifest=content.manifest, checksums=checksums,
    )


def _known_kind(path: Path, kind: Any) -> str:
    if not isinstance(kind, str) or (kind and kind not in MEANING):
        raise FileError(path, f"records the unknown kind {kind!r}; known: {', '.join(MEANING)}")
    return kind
