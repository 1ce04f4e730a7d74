"""What a queued job will read, put into the run directory: later edits of checkout or recipe change nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

from mirai_dist.config.error import RecipeError

PACKAGES = ("mirai_dist", "mirai_launch", "mirai_kernels")
_KEPT = (".py", ".typed", ".in")


def code(folder: Path) -> Path:
    """Copy our packages below `folder`, named by their content: the same code is there once. Returns PYTHONPATH.

    Raises RecipeError where the disk refuses.
    """
    files = sorted(_files())
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    place = folder / f"code-{digest.hexdigest()[:12]}"
    if place.exists():
        return place
    beside = place.with_name(f"{place.name}.new")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        for name, path in files:
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, beside / name)
        beside.rename(place)
    except OSError as error:
        raise RecipeError(str(folder), f"the code cannot be copied there ({error}); name another --run-dir") from None
    return place


def _files() -> Iterator[tuple[str, Path]]:
    """(path below the snapshot, file) of every file of our packages, wherever they are installed."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations if spec else None) or []:
            for path in Path(root).rglob("*"):
                if path.suffix in _KEPT and path.is_file():
                    yield f"{package}/{path.relative_to(root).as_posix()}", path
