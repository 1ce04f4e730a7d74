"""Weight folders: safetensors shards with an index, config.json, and our mirai.json; written whole or not at all.

    config.json                                           shape of the network, in the words of its layout
    diffusion_pytorch_model.safetensors                   or, when it is more than one file:
    diffusion_pytorch_model-00001-of-0000n.safetensors    shards of at most about 1 GB
    diffusion_pytorch_model.safetensors.index.json        which tensor is in which shard
    mirai.json                                            ours: kind, origin, a checksum of every tensor

The official release and diffusers name these files alike; they differ in the names of the tensors and in the
words of config.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mirai_dist.config import FileError
from mirai_dist.models.wan.keys import PATCH, WanShape
from mirai_dist.state.commit import flush
from mirai_dist.weights.checksums import checksum, shown
from mirai_dist.weights.pt import plain_name
from mirai_dist.weights.stored import SafetensorsFile, Stored, read_json

CONFIG, MANIFEST = "config.json", "mirai.json"
STEM = "diffusion_pytorch_model"
WHOLE, INDEX = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"
FORMAT, VERSION = "mirai-weights", 1
SHARD_BYTES = 1_000_000_000
_TEXT_DIM = 4096  # the official config.json does not mention it


def wan_config(sizes: WanShape) -> dict[str, Any]:
    """config.json of the official release. The number of heads is left out when it is not known (0)."""
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": sizes.dim,
        "eps": 1e-06,
        "ffn_dim": sizes.ffn_dim,
        "freq_dim": sizes.freq_dim,
        "in_dim": sizes.channels,
        "model_type": "t2v",
        "num_heads": sizes.heads,
        "num_layers": sizes.blocks,
        "out_dim": sizes.channels,
        "text_dim": sizes.text_dim,
        "text_len": 512,
    }
    unsaid = {"num_heads": 0, "text_dim": _TEXT_DIM}
    return {key: value for key, value in config.items() if key not in unsaid or value != unsaid[key]}


def diffusers_config(sizes: WanShape) -> dict[str, Any]:
    """config.json of diffusers' WanTransformer3DModel. ValueError when the number of heads is not known."""
    if not sizes.heads:
        raise ValueError("the diffusers layout needs the number of heads")
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.33.0",
        "added_kv_proj_dim": None,
        "attention_head_dim": sizes.dim // sizes.heads,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": sizes.ffn_dim,
        "freq_dim": sizes.freq_dim,
        "image_dim": None,
        "in_channels": sizes.channels,
        "num_attention_heads": sizes.heads,
        "num_layers": sizes.blocks,
        "out_channels": sizes.channels,
        "patch_size": list(PATCH),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": sizes.text_dim,
    }


def write_folder(
    out: Path, names: Sequence[str], tensor_of: Callable[[str], Tensor], config: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> None:
    """Write a weight folder beside `out`, flush it and rename it: it appears whole or not at all.

    names: the tensors, as they are to be named in the files, in order. tensor_of: gives each when its turn comes;
    values and dtype are kept, and at most one shard is held at a time. config: see `wan_config`, `diffusers_config`.
    manifest: kind, which, recipe, parent, cycle, source ...; format, version and the checksums are added here.
    Raises FileError when `out` is there and not an empty folder, or the disk refuses.
    """
    refuse_occupied(out)
    out = Path(os.path.abspath(out))
    beside = out.with_name(f"{out.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of a process of this number that died here
        beside.mkdir(parents=True)
        checksums = _write_shards(beside, names, tensor_of)
        sealed = {**manifest, "format": FORMAT, "version": VERSION, "checksums": checksums}
        _write_json(beside / CONFIG, config)
        _write_json(beside / MANIFEST, {**sealed, "sha256": manifest_digest(sealed)})
        flush(beside)
        os.rename(beside, out)
        flush(out.parent)
    except (OSError, SafetensorError) as error:
        raise FileError(out, f"cannot be written: {error}; give it another place or more space") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@dataclass(frozen=True)
class FolderContents:
    """A weight folder with its headers read. path: where the files are (`transformer` below a pipeline folder).

    layout: what config.json says, "wan" or "diffusers". tensors: by the names of the files. heads: 0 when unsaid.
    """

    path: Path
    layout: str
    config: Mapping[str, Any]
    tensors: dict[str, Stored]
    manifest: Mapping[str, Any]

    @property
    def heads(self) -> int:
        heads = self.config.get("num_heads" if self.layout == "wan" else "num_attention_heads", 0)
        if type(heads) is not int or heads < 0:
            raise FileError(self.path / CONFIG, f"{heads!r} is no number of heads")
        return heads

    @property
    def kind(self) -> str:
        """What mirai.json records, else what such a folder is published as; "" for a causal network of others."""
        causal = self.config["_class_name"] == "CausalWanModel"
        return self.manifest.get("kind", "" if causal else "diffusion")

    def check_config(self, sizes: WanShape) -> None:
        """FileError when config.json contradicts the tensors, or describes a variant that is not supported."""
        if sizes.heads == 0 and self.layout == "diffusers":
            raise FileError(self.path / CONFIG, "num_attention_heads is missing")
        if sizes.heads and (sizes.dim % sizes.heads or sizes.dim // sizes.heads % 2):
            raise FileError(self.path / CONFIG, f"{sizes.heads} heads do not divide a width of {sizes.dim}")
        for key, ours in (wan_config(sizes) if self.layout == "wan" else diffusers_config(sizes)).items():
            if key in _UNCHECKED or key not in self.config or self.config[key] == ours:
                continue
            if key in _VARIANTS:
                what = f"{key} is {self.config[key]!r}; only {ours!r} is supported (Wan2.1 text-to-video)"
                raise FileError(self.path / CONFIG, what)
            raise FileError(self.path / CONFIG, f"{key} is {self.config[key]!r}, but the tensors say {ours!r}")


_UNCHECKED = ("_class_name", "_diffusers_version", "text_len", "rope_max_seq_len")
_VARIANTS = ("model_type", "eps", "patch_size", "qk_norm", "cross_attn_norm", "added_kv_proj_dim", "image_dim")
_LAYOUTS = {"WanModel": "wan", "CausalWanModel": "wan", "WanTransformer3DModel": "diffusers"}
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,199}", re.ASCII)
_TRANSFORMER = "transformer"  # of a pipeline folder of diffusers


def open_folder(path: Path) -> FolderContents:
    """Read config.json, index, headers and mirai.json of a weight folder. Raises FileError."""
    if _has_weights(path / _TRANSFORMER) and not _has_weights(path):
        if (path / f"{_TRANSFORMER}_2").is_dir():
            raise FileError(path, f"holds two networks, {_TRANSFORMER} and {_TRANSFORMER}_2; name one of them")
        path = path / _TRANSFORMER
    if not _has_weights(path):
        if (path / CONFIG).is_file():
            _layout(path, read_json(path / CONFIG))  # of a text encoder, say: its name tells more than missing files
        raise FileError(path, f"holds no weights ({WHOLE} or {INDEX}){_hint(path)}")
    config = read_json(path / CONFIG)
    layout = _layout(path, config)
    manifest = _manifest(path / MANIFEST) if (path / MANIFEST).exists() else {}
    return FolderContents(path, layout, config, _tensors(path), manifest)


def manifest_checksums(where: Path, manifest: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """Recorded checksums by official name; `names`: official name of each key. Empty when none are recorded.

    Raises FileError when they are of other tensors, or no checksums.
    """
    recorded = manifest.get("checksums", {})
    if not recorded:
        return {}
    try:
        checksums = {names.get(key) or names[plain_name(key)]: int(value, 16) for key, value in recorded.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileError(where, f"has checksums that are not of its tensors ({error}); copy it again") from error
    if len(checksums) != len(names):
        raise FileError(where, f"has {len(checksums)} checksums for {len(names)} tensors; copy it again")
    return checksums


def _layout(path: Path, config: Mapping[str, Any]) -> str:
    """"wan" or "diffusers". FileError when config.json is of another network."""
    name = config.get("_class_name", config.get("architectures"))
    if not isinstance(name, str) or name not in _LAYOUTS:
        what = f"describes {name or 'no network'}; weights of {' or '.join(_LAYOUTS)} (_class_name) are wanted"
        raise FileError(path / CONFIG, what)
    return _LAYOUTS[name]


def _has_weights(path: Path) -> bool:
    return path.is_dir() and ((path / WHOLE).exists() or (path / INDEX).exists() or any(path.glob(f"{STEM}-*-of-*")))


def _hint(path: Path) -> str:
    """What may have been meant by a folder without weights."""
    files = sorted(path.glob("*.pt")) or sorted(path.glob("*.safetensors")) or sorted(path.glob("*/" + WHOLE))
    if files:
        return f"; did you mean {files[0] if files[0].parent == path else files[0].parent}?"
    if (path / "stages").is_dir() or (path / "manifest.json").exists():
        return "; it is a run or checkpoint of mirai train: use `mirai export`"
    return "; name the folder that holds config.json"


def _manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    check_manifest(path, manifest)
    return manifest


def check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """FileError when a manifest of ours is of another format or was altered."""
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise FileError(path, f"is not of format {FORMAT}, version {VERSION}: {manifest.get('format')!r}, version "
                              f"{manifest.get('version')!r}")
    if manifest.get("sha256") != manifest_digest(manifest):
        raise FileError(path, "its manifest was altered after it was written; write the weights again")


def _tensors(path: Path) -> dict[str, Stored]:
    """All tensors of a folder by the names of its files."""
    if not (path / INDEX).exists():
        if not (path / WHOLE).exists():
            raise FileError(path / INDEX, "is missing, and the weights are in several files; copy the whole folder")
        return dict(SafetensorsFile(path / WHOLE).tensors)
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(path / INDEX, "has no weight_map; copy it again")
    tensors: dict[str, Stored] = {}
    shards: dict[str, SafetensorsFile] = {}
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or not _FILE_NAME.fullmatch(shard):
            raise FileError(path / INDEX, f"{key}: {str(shard)[:60]!r} is no name of a file in this folder")
        if shard not in shards:
            if not (path / shard).is_file():
                raise FileError(path / INDEX, f"names the shard {shard}, which is not there; copy the whole folder")
            shards[shard] = SafetensorsFile(path / shard)
        if key not in shards[shard].tensors:
            raise FileError(path / shard, f"missing key {key}, which {INDEX} says is in it")
        tensors[key] = shards[shard].tensors[key]
    for file in shards.values():
        for key in file.tensors:
            if weight_map.get(key) != file.path.name:
                raise FileError(file.path, f"extra key {key}: {INDEX} does not say that it is in this shard")
    return tensors


def refuse_occupied(out: Path) -> None:
    """FileError unless `out` is free: not there, or an empty folder."""
    try:
        if out.is_dir() and any(out.iterdir()):
            raise FileError(out, "is not empty; name a new folder, or remove this one")
        if out.exists() and not out.is_dir():
            raise FileError(out, "is a file; name a new folder")
    except OSError as error:
        raise FileError(out, f"cannot be looked into: {error}") from error


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 over all of a manifest but this digest itself, so that an edited one is noticed."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _write_shards(folder: Path, names: Sequence[str], tensor_of: Callable[[str], Tensor]) -> dict[str, str]:
    """Write all tensors; returns their checksums. Shards get their final names once it is known how many there are."""
    checksums: dict[str, str] = {}
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0

    def write() -> None:
        path = folder / f"shard-{len(shards)}"
        save_file(held, path, metadata={"format": "pt"})
        _as_others(path)
        flush(path)
        shards.append(list(held))
        held.clear()

    for name in names:
        tensor = tensor_of(name).detach().contiguous()
        checksums[name] = shown(checksum(tensor))
        if held and held_bytes + tensor.nbytes > SHARD_BYTES:
            write()
            held_bytes = 0
        # Tensors that share memory cannot be in one file, and a slice would keep the whole alive.
        held[name] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    write()
    _name_shards(folder, shards, total_bytes)
    return checksums


def _name_shards(folder: Path, shards: Sequence[Sequence[str]], total_bytes: int) -> None:
    if len(shards) == 1:
        os.rename(folder / "shard-0", folder / WHOLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"{STEM}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"shard-{number}", folder / final)
        weight_map |= dict.fromkeys(names, final)
    _write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    flush(path)


def _as_others(path: Path) -> None:
    """Give a file the mode that the site's umask gives others: the library makes files for their owner alone."""
    other = path.with_name(f"{path.name}.mode")
    other.touch()
    path.chmod(stat.S_IMODE(other.stat().st_mode))
    other.unlink()

