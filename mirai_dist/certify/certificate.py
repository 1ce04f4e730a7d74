"""A certificate as a file, and what a run may conclude from it.

    FOLDER/<name of the recipe>-<device>.json      FOLDER is parallel.certificate_folder

It speaks of one setting alone: the device, its driver, the versions of what computes, and the kernels' source. Of any
other it says nothing. It covers a recipe where each of the recipe's shapes is among those that were compared.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mirai_dist.certify.compare import PASSED
from mirai_dist.config import FileError
from mirai_dist.config.schema import Recipe

FORMAT = 1
PACKAGES = ("triton", "flash-attn", "flash-attn-4", "xformers")
SOURCES = ("mirai_kernels", "mirai_dist.attention", "mirai_dist.models.wan")


@lru_cache
def setting(device: str) -> dict[str, str]:
    """What decides how a device type ("cpu" or "cuda") computes here."""
    found = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": str(torch.__version__)}
    if device == "cuda":
        found |= {"driver": _driver(), "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found | {name: _version(name) for name in PACKAGES} | {"source": _source()}


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    said = re.search(r"\b\d+\.\d+(\.\d+)?\b", path.read_text()) if path.exists() else None
    return said[0] if said else "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _source() -> str:
    """Digest of the code that computes."""
    digest = hashlib.sha256()
    for name in SOURCES:
        found = importlib.util.find_spec(name)
        assert found is not None and found.submodule_search_locations, f"{name} is a package"
        for folder in found.submodule_search_locations:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def path_of(folder: Path, name: str, device: str) -> Path:
    """Where the certificate of a recipe of this name is for this machine's device."""
    slug = re.sub(r"[^a-z0-9]+", "-", setting(device)["device"].lower()).strip("-")
    return folder / f"{name}-{slug}.json"


def write(path: Path, certificate: dict[str, Any]) -> None:
    """Whole or not at all. FileError where it cannot be written."""
    beside = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(certificate, indent=1) + "\n")
        beside.replace(path)
    except OSError as error:
        raise FileError(path, f"cannot be written: {error}; name another folder with --out") from error


def lacking(recipe: Recipe, device: str, op: str, variant: str, shapes: Iterable[object]) -> str:
    """Why `variant` of `op` is not certified for these shapes on this machine; empty: it is.

    op: the whole name, or its beginning up to a colon. FileError for a file that is no certificate.
    """
    path = path_of(Path(recipe.parallel.certificate_folder), recipe.name, device)
    if not path.exists():
        return f"have no certificate ({path} is not there)"
    certificate = _read(path)
    here = setting(device)
    for name, value in certificate["setting"].items():
        if here.get(name) != value:
            return f"have none for this machine: {path} is for {name} {value}, here is {here.get(name)}"
    rows = [row for row in certificate["rows"] if row["op"].split(":")[0] == op and row["variant"] == variant]
    for shape in map(str, shapes):
        same = [row for row in rows if row["shape"] == shape and row["dtype"] == recipe.parallel.compute_dtype]
        if not same:
            return f"are not certified for {shape} ({path} has other shapes)"
        for row in same:
            if row["state"] != PASSED:
                return f"are {row['state']} in {path}: {row['op']} by {variant} of {shape} {row['reason']}"
    return ""


def failed(recipe: Recipe, device: str, op: str) -> frozenset[str]:
    """Variants of `op` that were compared on this very machine and failed at any shape."""
    path = path_of(Path(recipe.parallel.certificate_folder), recipe.name, device)
    if not path.exists():
        return frozenset()
    certificate = _read(path)
    if certificate["setting"] != setting(device):
        return frozenset()
    return frozenset(row["variant"] for row in certificate["rows"] if row["op"] == op and row["state"] == "failed")


@lru_cache
def _parsed(path: Path, changed: int) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FileError(path, f"is no certificate: {error}; remove it") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FileError(path, f"is no certificate of format {FORMAT}; make it again or remove it")
    return found


def _read(path: Path) -> dict[str, Any]:
    return _parsed(path, path.stat().st_mtime_ns)
