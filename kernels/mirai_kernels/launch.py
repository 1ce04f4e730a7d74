"""A Triton launch as data: the operators run it, and the compile report builds the very same one without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs


@dataclass(frozen=True)
class Launch:
    """One kernel over a grid of programs. `constants` are compiled in; a None among the arguments is too.

    stages: of the pipeline in which a loop's loads run ahead of its arithmetic.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int = 3

    def run(self) -> None:
        """Raises RuntimeError for tensors that no kernel can run on."""
        tensors = [each for each in self.arguments.values() if isinstance(each, Tensor)]
        if not (knobs.runtime.interpret or all(each.is_cuda for each in tensors)):
            raise RuntimeError(
                f"{self.kernel.__name__} runs on CUDA tensors (and on CPU ones in Triton's interpreter, "
                f"TRITON_INTERPRET=1); got {', '.join(sorted({each.device.type for each in tensors}))}"
            )
        with torch.cuda.device_of(tensors[0]):
            options = {"num_warps": self.warps, "num_stages": self.stages}
            self.kernel[self.grid](**self.arguments, **self.constants, **options)


def padded(width: int) -> int:
    """The next power of two: how wide triton makes a tile for it."""
    return 1 << (width - 1).bit_length()


def programs(count: int, size: int) -> int:
    """Programs that `count` rows need at `size` rows each."""
    return -(-count // size)


def row_warps(width: int) -> int:
    """Warps for a program that holds one row of `width` channels: 16 channels, two 16-byte loads of bf16, a thread."""
    return min(16, max(1, padded(width) // 512))


def check_rows(name: str, x: Tensor) -> None:
    """Raise ValueError unless the last dimension is contiguous, as every row kernel reads it."""
    if x.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension; its strides are {tuple(x.stride())}")
