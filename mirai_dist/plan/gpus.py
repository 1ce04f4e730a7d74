"""GPUs as data: what a device has, from its vendor's page; dense bf16 without sparsity, as it is sold.

An unknown GPU gets no seconds and no MFU. A peak is never guessed: a wrong one makes every number wrong unseen.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

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
    pattern. slower: attention's fractions, forward and backward, with a kernel that is older than the card."""

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    efficiency: Efficiency
    model: str
    slower: tuple[float, float] | None = None

    def attending(self, attention: str) -> Gpu:
        """The same with the efficiency of a recipe's `parallel.attention`."""
        if attention not in OLDER or self.slower is None:
            return self
        forward, backward = self.slower
        return replace(self, efficiency=replace(self.efficiency, attention=forward, attention_backward=backward))


OLDER = ("sdpa", "sdpa-flash", "sdpa-efficient", "xformers")  # on Hopper and later: FlashAttention-2, or less

# Attention as parallel.attention=auto takes it (attention/select.py). Ampere: FlashAttention-2, 190-230 of 312 TF/s
# (its paper). Hopper without further packages: cuDNN, 618 and 533 of 989 TF/s at 32k tokens and heads of 128; torch's
# own choice, FlashAttention-2, 376 and 335 (MagiAttention's kernel charts). Products on Hopper: 680 of 989 TF/s.
_AMPERE = Efficiency(dense=0.75, attention=0.62, attention_backward=0.55)
_HOPPER = Efficiency(dense=0.69, attention=0.62, attention_backward=0.54)
_FLASH_2 = (0.38, 0.34)
# Rough: no published rates that we know of for these shapes.
_BLACKWELL = Efficiency(dense=0.60, attention=0.45, attention_backward=0.40)
_FLASH_2_ON_BLACKWELL = (0.17, 0.15)
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
        Gpu("h100-80gb", int(79.1 * GIB), 989e12, 3.35e12, 450e9, _HOPPER, r"H100 (80GB HBM3|SXM)", _FLASH_2),
        # NVIDIA H100 NVL page, one card: 835 TF/s bf16 dense, 94 GB, 3.9 TB/s, NVLink 600 GB/s both ways
        Gpu("h100-nvl", int(93.1 * GIB), 835e12, 3.9e12, 300e9, _HOPPER, r"H100 NVL", _FLASH_2),
        # H800 (SXM): H100 with NVLink 400 GB/s both ways
        Gpu("h800", int(79.1 * GIB), 989e12, 3.35e12, 200e9, _HOPPER, r"H800", _FLASH_2),
        # NVIDIA H200 data sheet, SXM: 989 TF/s bf16 dense, 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways
        Gpu("h200-141gb", int(139.8 * GIB), 989e12, 4.8e12, 450e9, _HOPPER, r"H200", _FLASH_2),
        # NVIDIA DGX B200 data sheet, an eighth: 2.25 PF/s bf16 dense, 180 GB, 8 TB/s, NVLink 1.8 TB/s both ways
        Gpu("b200", int(178.3 * GIB), 2250e12, 8.0e12, 900e9, _BLACKWELL, r"B200", _FLASH_2_ON_BLACKWELL),
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
