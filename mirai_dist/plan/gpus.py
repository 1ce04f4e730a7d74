"""GPUs as data: what a device has, from its vendor's page; dense bf16 without sparsity, as it is sold.

An unknown GPU gets no seconds and no MFU. A peak is never guessed: a wrong one makes every number wrong unseen.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from mirai_dist.config.error import RecipeError

GIB = 1 << 30


@dataclass(frozen=True)
class Efficiency:
    """Assumed fractions of the peaks that kernels reach: products, attention forward and backward, memory. Not
    measured by us."""

    dense: float
    attention: float
    attention_backward: float
    memory: float = 0.85


@dataclass(frozen=True)
class Gpu:
    """One device. memory: bytes the driver offers, less than the name says. flops: dense bf16 a second. bandwidth: of
    its memory, bytes/s. link: to the other GPUs of a node, bytes/s a direction. model: how its driver calls it, a
    pattern."""

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    efficiency: Efficiency
    model: str


# Torch's default attention on these cards is FlashAttention-2. Its published rates: 190-230 of 312 TF/s on A100 (its
# paper); 376 and 335 of 989 TF/s on H100 at 32k tokens and head 128 (MagiAttention's kernel charts). Products: 0.94 of
# the 788 TF/s that a plain H200 product reached here is 0.69 of 989 for Hopper on H100 (680 TF/s).
_AMPERE = Efficiency(dense=0.75, attention=0.62, attention_backward=0.55)
_HOPPER = Efficiency(dense=0.69, attention=0.38, attention_backward=0.34)
# No published rates that we know for the rest: Hopper's kernels on Blackwell, Ampere's on Ada. Rough.
_BLACKWELL = Efficiency(dense=0.60, attention=0.20, attention_backward=0.18)
_ADA = Efficiency(dense=0.65, attention=0.50, attention_backward=0.45)

GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 data sheet: 312 TF/s bf16; 40 GB 1,555 GB/s, 80 GB SXM 2,039 GB/s; NVLink 600 GB/s both ways
        Gpu("a100-40gb", int(39.4 * GIB), 312e12, 1.555e12, 300e9, _AMPERE, r"A100.*40GB"),
        Gpu("a100-80gb", int(79.1 * GIB), 312e12, 2.039e12, 300e9, _AMPERE, r"A100.*80GB"),
        # NVIDIA A800 data sheet: A100 with NVLink 400 GB/s
        Gpu("a800-80gb", int(79.1 * GIB), 312e12, 2.039e12, 200e9, _AMPERE, r"A800.*80GB"),
        # NVIDIA H100 data sheet, SXM5: 989 TF/s bf16 dense, 3.35 TB/s, NVLink 900 GB/s both ways
        Gpu("h100-80gb", int(79.1 * GIB), 989e12, 3.35e12, 450e9, _HOPPER, r"H100 (80GB HBM3|SXM)"),
        # NVIDIA H100 NVL page, one card: 835 TF/s bf16 dense, 94 GB, 3.9 TB/s, NVLink 600 GB/s both ways
        Gpu("h100-nvl", int(93.1 * GIB), 835e12, 3.9e12, 300e9, _HOPPER, r"H100 NVL"),
        # H800 (SXM): H100 with NVLink 400 GB/s both ways
        Gpu("h800", int(79.1 * GIB), 989e12, 3.35e12, 200e9, _HOPPER, r"H800"),
        # NVIDIA H200 data sheet, SXM: 989 TF/s bf16 dense, 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways
        Gpu("h200-141gb", int(139.8 * GIB), 989e12, 4.8e12, 450e9, _HOPPER, r"H200"),
        # NVIDIA DGX B200 data sheet, an eighth: 2.25 PF/s bf16 dense, 180 GB, 8 TB/s, NVLink 1.8 TB/s both ways
        Gpu("b200", int(178.3 * GIB), 2250e12, 8.0e12, 900e9, _BLACKWELL, r"B200"),
        # NVIDIA L40S data sheet: 362 TF/s bf16 dense, 48 GB, 864 GB/s; no NVLink, PCIe 4.0 x16: 32 GB/s a direction
        Gpu("l40s", int(44.4 * GIB), 362e12, 0.864e12, 32e9, _ADA, r"L40S"),
    )
}


def find(name: str) -> Gpu | None:
    """The GPU of this name; None for one that the table lacks."""
    return GPUS.get(name.lower())


def nearest(name: str) -> list[str]:
    """Names of the table that are closest to this one."""
    return difflib.get_close_matches(name.lower(), GPUS, n=3, cutoff=0.4) or list(GPUS)


def of_model(model: str) -> Gpu | None:
    """The GPU whose driver calls itself this ("NVIDIA H100 80GB HBM3"); None for one that the table lacks."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.model, model)), None)


_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def bytes_of(text: str) -> int:
    """Bytes of "80GiB", "80 GB", "85899345920". RecipeError for what is none, or not positive."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise RecipeError("command line", f"{text!r} is no amount of memory; write it like 80GiB")
    return int(float(match[1]) * _UNITS[match[2]])
