"""Versions, paths and settings of the software here, from files alone: nothing is imported to look at it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from mirai_dist.node.finding import Finding

# package -> what its absence means; the names that pip knows them by.
OPTIONAL = {
    "triton": "the Triton kernels cannot be used",
    "flash-attn": "its attention cannot be used",
    "xformers": "its attention cannot be used",
    "deepspeed": "sharding is FSDP2, which is the default",
    "diffusers": "no Wan VAE: latents must be prepared elsewhere",
    "transformers": "no UMT5: embeddings must be prepared elsewhere",
    "lmdb": "the published LMDB layout cannot be read",
}
_NEEDED = ("torch", "numpy", "safetensors", "tensorboard", "pillow", "av")
_SYSTEM = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/local/cuda/lib64")
_SETTINGS = ("NCCL_", "GLOO_", "FI_", "UCX_", "TORCH_NCCL_", "OFI_")
_INJECTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_CONTAINERS = {"ENROOT_ROOTFS": "enroot", "APPTAINER_CONTAINER": "apptainer", "SINGULARITY_CONTAINER": "singularity"}


def version(package: str) -> str:
    """Installed version of a package, empty where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """What must be the same on every node of a run."""
    packages = {name: version(name) for name in (*_NEEDED, *OPTIONAL)}
    code = {"python": platform.python_version(), "mirai_dist code": code_digest()}
    return code | {name: found or "none" for name, found in packages.items()}


def paths() -> dict[str, str]:
    """Where it comes from: usually the same on every node."""
    torch = importlib.util.find_spec("torch")
    return {
        "python path": sys.executable,
        "mirai_dist path": str(Path(__file__).parents[1]),
        "torch path": str(Path(torch.origin).parent) if torch and torch.origin else "none",
    }


def settings(env: Mapping[str, str]) -> dict[str, str]:
    """The site's network variables that are in force, and the library path."""
    names = [name for name in env if name.startswith(_SETTINGS) or name in ("LD_LIBRARY_PATH", "LD_PRELOAD")]
    return {name: env[name] for name in sorted(names)}


def code_digest() -> str:
    """First digits of the SHA-256 over our own source files: nodes with another state of the code differ in it."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def library_path(env: Mapping[str, str], root: Path = Path("/"), wheels: Iterable[str] | None = None) -> list[Path]:
    """Every libnccl that a process here may load, in the order of the search: LD_LIBRARY_PATH, the wheel, the system.

    Links to one file count once. wheels: folders of installed packages (default: sys.path).
    """
    listed = [Path(folder) for folder in env.get("LD_LIBRARY_PATH", "").split(":") if folder]
    installed = [Path(folder, "nvidia/nccl/lib") for folder in (sys.path if wheels is None else wheels)]
    found: dict[Path, Path] = {}
    for folder in [*listed, *installed, *(root / each for each in _SYSTEM)]:
        for file in sorted(folder.glob("libnccl*.so*")):
            found.setdefault(file.resolve(), file)
    return list(found.values())


def mapped(maps: str, stem: str) -> list[str]:
    """Distinct files named `stem`*.so* in the text of /proc/PID/maps: what the process has really loaded."""
    files = [line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6]
    return sorted({file for file in files if Path(file).name.startswith(f"{stem}.so")})


def nccl(libraries: list[Path]) -> Finding:
    """Whether more than one NCCL can be loaded, and which comes first."""
    files = [path for path in libraries if path.name.startswith("libnccl.so")]
    if len(files) < 2:
        found = str(files[0]) if files else "none on the library path"
        return Finding("NCCL library", "ok" if files else "skip", found)
    value = f"{len(files)} different: {', '.join(map(str, files))}"
    advice = "torch wants the one it was built with; take the others off LD_LIBRARY_PATH"
    return Finding("NCCL library", "warn", value, advice)


def packages() -> list[Finding]:
    """Installed packages, and what the absence of each means."""
    missing = [name for name in _NEEDED if not version(name)]
    rows = [_python(), Finding("mirai_dist", "ok", f"code {code_digest()} in {Path(__file__).parents[1]}")]
    if missing:
        value = f"not installed: {', '.join(missing)}"
        rows.append(Finding("training", "skip", value, "check, plan and submit work; train needs mirai-dist[train]"))
    else:
        rows.append(Finding("training", "ok", ", ".join(f"{name} {version(name)}" for name in _NEEDED)))
    for name, without in OPTIONAL.items():
        found = version(name)
        rows.append(Finding(name, "ok" if found else "skip", found or f"not installed: {without}"))
    ffmpeg = shutil.which("ffmpeg")
    rows.append(Finding("ffmpeg", "ok" if ffmpeg else "skip", ffmpeg or "not found: not needed where av is installed"))
    return rows


def _python() -> Finding:
    value = f"{platform.python_version()} at {sys.executable}"
    old = sys.version_info < (3, 11)
    return Finding("python", "fail" if old else "ok", value, "3.11 or newer is needed" if old else "")


def surroundings(env: Mapping[str, str], root: Path = Path("/")) -> list[Finding]:
    """Container, and the site's network variables."""
    kinds = [kind for variable, kind in _CONTAINERS.items() if env.get(variable)]
    if (root / ".dockerenv").exists():
        kinds.append("docker")
    named = " ".join(f"{name}={value}" for name, value in settings(env).items())
    container = Finding("container", "ok", ", ".join(kinds) or "none seen")
    return [container, Finding("network variables", "ok", named or "none set")]


def injected(env: Mapping[str, str]) -> list[Finding]:
    """A launcher's variables where there is no launcher, as some containers' hooks set them."""
    names = [name for name in _INJECTED if name in env]
    if not names:
        return []
    advice = "a run started here would take itself for one rank of many; unset them"
    return [Finding("launcher variables", "warn", f"set here: {', '.join(names)}", advice)]


def node_name(env: Mapping[str, str] = os.environ) -> str:
    """This node as the scheduler calls it (--nodelist, --exclude), else its host name."""
    return env.get("SLURMD_NODENAME") or platform.node()
