"""What torch makes of this node: `python -m mirai_dist.runtime.torch_facts` prints it as JSON for `mirai doctor`.

A program of its own there, because a broken installation may end the process that imports it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.cuda.nccl
import torch.distributed as dist

from mirai_dist.node import software
from mirai_dist.node.finding import Finding
from mirai_dist.runtime import measures

_COMPILED = ("flash_attn", "xformers", "triton")  # built against one torch: they may be there and not load


@dataclass(frozen=True)
class Facts:
    """`same`: must be alike on all nodes of a run; `usual`: usually is."""

    same: dict[str, str]
    usual: dict[str, str]
    findings: list[Finding]


def read() -> Facts:
    """Versions and libraries as loaded into this process. Starts CUDA where there is a GPU, but computes nothing."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    same = {"CUDA of torch": torch.version.cuda or "none", "cuDNN": str(torch.backends.cudnn.version() or "none")}
    if dist.is_nccl_available():
        same["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    maps = Path("/proc/self/maps").read_text()
    loaded = software.mapped(maps, "libnccl")
    usual = {"NCCL loaded": ", ".join(loaded) or "none", "libcudart": ", ".join(software.mapped(maps, "libcudart"))}
    described = ", ".join(f"{name} {value}" for name, value in same.items())
    rows = [Finding("torch", "ok", f"{torch.__version__}, {described}")]
    if len(loaded) > 1:
        advice = "unset LD_PRELOAD, and take all but torch's own off LD_LIBRARY_PATH"
        rows.append(Finding("NCCL loaded", "fail", f"{len(loaded)} at once: {', '.join(loaded)}", advice))
    if gpus and not dist.is_nccl_available():
        rows.append(Finding("torch", "fail", "this torch has no NCCL", "install a CUDA build of torch"))
    return Facts(same, usual, rows)


def without_gpu(driver_gpus: int) -> Finding | None:
    """Why torch sees no GPU where the driver has some; None where it sees them or there are none."""
    if not driver_gpus or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        value = f"{torch.__version__} is built for CPUs, and there are {driver_gpus} GPUs"
        return Finding("torch and GPUs", "fail", value, "install a CUDA build of torch")
    value = f"torch for CUDA {torch.version.cuda} cannot use the {driver_gpus} GPUs"
    return Finding("torch and GPUs", "fail", value, "the driver may be too old for it; see nvidia-smi's CUDA version")


def arithmetic() -> list[Finding]:
    """Matrix products on every visible GPU, else on the CPU: sustained speed, and whether the result is right."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rows = []
    for device in [torch.device("cuda", i) for i in range(visible)] or [torch.device("cpu")]:
        check = f"matrix products ({device})"
        try:
            speed = measures.gemm(device)
        except (measures.WrongResult, RuntimeError) as error:
            said = str(error).splitlines()[0]
            rows.append(Finding(check, "suspect" if visible else "fail", said, "take the node out"))
        else:
            kind = str(measures.extent(device).dtype).removeprefix("torch.")
            rows.append(Finding(check, "ok", f"{speed / 1e12:.3g} TFLOP/s in {kind}"))
    return rows


def compiled() -> list[Finding]:
    """Whether the installed packages with compiled parts can be loaded beside this torch."""
    rows = []
    for name in _COMPILED:
        if not importlib.util.find_spec(name):
            continue
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            said = (str(error).splitlines() or ["no reason given"])[0]
            rows.append(Finding(name, "warn", f"installed and cannot be loaded: {said}", "build it for this torch"))
    return rows


def main() -> int:
    """Print everything; the argument is the number of GPUs that the driver has."""
    facts = read()
    missing = without_gpu(int(sys.argv[1]))
    rows = [*facts.findings, *([missing] if missing else []), *arithmetic(), *compiled()]
    sys.stdout.write(json.dumps({"findings": [asdict(row) for row in rows], "same": facts.same, "usual": facts.usual}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
