"""Bytes that one Wan block moves outside its matrix products and attention, by arithmetic: released, plain, fused.

    python benchmarks/kernels/count_bytes.py [--json FILE]      needs triton; no GPU, no memory: tensors are fake

Counted is what each operator that torch dispatches reads and writes, every tensor once; views move nothing. The partial
sums inside a fused backward are not seen: 1 to 2 per cent of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirai_dist.attention.patterns import TORCH
from mirai_dist.models.wan.keys import WanShape
from mirai_dist.models.wan.model import BlockInputs, WanBlock
from mirai_dist.models.wan.rope import rotary_table
from mirai_dist.models.wan.token_ops import PLAIN, Placement, Plain, Projections, TokenOps, load

MODELS = {"1.3B": WanShape(1536, 8960, 12, 30, 4096, 16, 256), "14B": WanShape(5120, 13824, 40, 40, 4096, 16, 256)}
GRID, TEXT = (21, 30, 52), 512
TOKENS = GRID[0] * GRID[1] * GRID[2]
NOT_COUNTED = ("mm", "bmm", "addmm", "baddbmm")
UNMOVED = ("dot_product", "empty")  # attention is not counted either; memory that is only taken does not move


@dataclass(frozen=True)
class Moved:
    """Gigabytes one pass of a block moves, outside matrix products and attention, and by how many operators."""

    arithmetic: str
    model: str
    forward: float
    forward_operators: int
    backward: float
    backward_operators: int


class Released(Plain):
    """The operations of the released code, stated anew: RMSNorm in float32 pieces, rotation in complex128 by a table
    that is put together at every call, a sample at a time; modulation as a product and a sum."""

    def place(self, placement: Placement, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_table(placement.grid, placement.first_frame, head_dim, like.device, torch.float64)

    def modulated(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        assert scale is not None and shift is not None  # of the DiT's blocks, they always are
        frames = shift.shape[1], -1
        normed = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        return (normed.unflatten(1, frames) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)

    def queries(self, layer: Projections, x: Tensor) -> Tensor:
        return self._normed(layer.q(x), layer.norm_q.weight).unflatten(-1, (layer.heads, -1))

    def placed(self, layer: Projections, x: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        keys = self._normed(layer.k(x), layer.norm_k.weight).unflatten(-1, (layer.heads, -1))
        values = layer.v(x).unflatten(-1, (layer.heads, -1))
        return self._rotated(self.queries(layer, x), places), self._rotated(keys, places), values

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + 1e-6)).type_as(x) * weight

    def _rotated(self, x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        time, rest = torch.complex(*places).split((22, 42), dim=1)
        turns = torch.cat((time, rest), dim=1).unsqueeze(1)
        samples = []
        for sample in x:
            pairs = torch.view_as_complex(sample.to(torch.float64).unflatten(-1, (-1, 2)).contiguous())
            rotated = torch.view_as_real(pairs * turns).flatten(2)
            samples.append(torch.cat((rotated, sample[x.shape[1] :])))
        return torch.stack(samples).type_as(x)


class Count(TorchDispatchMode):
    """Adds up bytes and operators of what is dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        is_view = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        if is_view or func.namespace == "prim" or name in NOT_COUNTED or any(part in name for part in UNMOVED):
            return out
        tensors = {id(each): each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        written = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        moved = sum(_bytes(each) for each in (*tensors.values(), *written))
        self.bytes += moved
        self.operators += moved >= TOKENS * 1000  # those of the size of the tokens
        return out


def _bytes(x: Tensor) -> int:
    """Of the elements that differ: an expanded dimension is one."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def moved(arithmetic: str, ops: TokenOps, model: str) -> Moved:
    """One bidirectional block over a whole 480p video of 81 frames, in the default dtype."""
    shape = MODELS[model]
    block = WanBlock(shape, TORCH, ops)
    x, modulation, text = (
        torch.empty(1, *size, shape.dim, requires_grad=True) for size in ((TOKENS,), (GRID[0], 6), (TEXT,))
    )
    places = ops.place(Placement(GRID), shape.dim // shape.heads, x)
    inputs = BlockInputs(modulation, places, TORCH.dense, text)
    with Count() as forward:
        out = block(x, inputs)[0]
    leaves = [x, modulation, text, *block.parameters()]
    with Count() as backward:
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    gigabytes = forward.bytes / 1e9, backward.bytes / 1e9
    return Moved(arithmetic, model, gigabytes[0], forward.operators, gigabytes[1], backward.operators)


def table(found: list[Moved]) -> str:
    lines = [
        "| block | arithmetic | forward GB | KB a token | operators | backward GB | KB a token | operators |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.model} | {each.arithmetic} | {each.forward:.2f} | {each.forward * 1e6 / TOKENS:.0f} | "
        f"{each.forward_operators} | {each.backward:.2f} | {each.backward * 1e6 / TOKENS:.0f} | "
        f"{each.backward_operators} |"
        for each in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    file = parser.parse_args().json
    arithmetics = {"released": Released(), "plain": PLAIN, "fused": load()}
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():
        found = [moved(name, ops, model) for model in MODELS for name, ops in arithmetics.items()]
    if file:
        file.write_text(json.dumps({"tokens": TOKENS, "blocks": [asdict(each) for each in found]}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
