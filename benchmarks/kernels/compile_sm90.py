"""Compile every kernel for sm_90a at the shapes of Wan-1.3B and Wan-14B, without a GPU, and say what it takes.

    python benchmarks/kernels/compile_sm90.py [--only FAMILY] [--json FILE]

needs triton; TRITON_INTERPRET must not be set.

Launches are the operators' own, over tensors of no memory; equal ones are compiled once. Registers and spills are
those of the assembler that triton brings.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mirai_kernels.chunk_attention import launch as chunk_attention
from mirai_kernels.chunk_attention.launch import Cached, Segment
from mirai_kernels.cosine_head import triton_cosine
from mirai_kernels.dense_attention.library import Attended
from mirai_kernels.dense_attention.triton_merge import merge_launch
from mirai_kernels.launch import Launch
from mirai_kernels.qk_norm_rope_cache import triton_norm_rope
from mirai_kernels.qk_norm_rope_cache.reference import Placement
from mirai_kernels.residual_modulate import triton_residual_modulate

TARGET = GPUTarget("cuda", 90, 32)
MODELS = {"1.3B": (1536, 12), "14B": (5120, 40)}
CHUNK = 4680  # tokens
PAST = {  # by the tokens that a chunk sees: runs of the cache, as they lie with and without a sink before a ring
    4680: {"no past": ()},
    32760: {"one run": (0, 28080), "three runs": (0, 1560, 3120, 9360, 12480, 32760)},
}
GRIDS = {4680: (3, 30, 52), 32760: (21, 30, 52)}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    int: "i32",
    float: "fp32",
}
ASSEMBLER = Path(next(iter(triton.__path__))) / "backends/nvidia/bin/ptxas"


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on sm_90a; shared in bytes a program, wide_* are 16-byte accesses in its PTX, narrow
    ones take two bytes or fewer. Matrix products are Hopper's (wgmma) or those of older cards (mma_sync)."""

    kernel: str
    model: str
    tokens: int
    warps: int
    registers: int
    spilled_bytes: int
    shared: int
    wide_loads: int
    wide_stores: int
    narrow_loads: int
    wgmma: int
    mma_sync: int


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def norm_rope(width: int, heads: int, tokens: int) -> Iterator[tuple[str, Launch]]:
    placement, weight = Placement(GRIDS[tokens], 6), empty(width)
    table = empty(1024, 64, dtype=torch.float32), empty(1024, 64, dtype=torch.float32)
    x, y = empty(1, tokens, width), empty(1, tokens, heads, width // heads)
    for name, count in (("norm_rope", 1), ("qk_norm_rope", 2), ("qk_norm_rope_cache", 3)):
        weights: list[Tensor | None] = [weight] * min(count, 2)
        launch = triton_norm_rope.forward_launch([x] * count, [y] * count, weights, placement, table)
        yield f"{name} forward", launch
    yield "norm_rope backward", triton_norm_rope.backward_launch(y, x, weight, placement, table)[0]


def residual_modulate(width: int, heads: int, tokens: int) -> Iterator[tuple[str, Launch]]:
    x, row_scale = empty(1, tokens, width), empty(1, tokens, 1, dtype=torch.float32)
    vectors = empty(1, GRIDS[tokens][0], 6, width).unbind(dim=2)
    gate, scale, shift = vectors[:3]
    sources = (x, x, gate, scale, shift)
    yield "residual_modulate forward", triton_residual_modulate.forward_launch(sources, x, x)
    yield "modulate forward", triton_residual_modulate.forward_launch((x, None, None, scale, shift), None, x)
    scaled = x.to(torch.float8_e4m3fn)
    yield "residual_modulate_e4m3 forward", triton_residual_modulate.forward_launch(sources, x, scaled, row_scale)
    frames = GRIDS[tokens][0]
    saved = (x, x, gate, scale)
    yield "residual_modulate backward", triton_residual_modulate.backward_launch((x, x), saved, frames, x, x)[0]
    saved = (x, None, None, scale)
    yield "modulate backward", triton_residual_modulate.backward_launch((None, x), saved, frames, x, None)[0]


def attention(width: int, heads: int, tokens: int) -> Iterator[tuple[str, Launch]]:
    """Of one chunk that sees `tokens` tokens, its own among them, in a cache of a whole video."""
    store, own = empty(1, 32760, heads, width // heads), empty(1, CHUNK, heads, width // heads)
    attended = Attended(own, empty(1, heads, CHUNK, dtype=torch.float32))
    segment = Segment(own, own, own)
    for name, runs in PAST[tokens].items():
        cached = Cached(store, store, runs)
        yield f"attention forward, {name}", chunk_attention.forward_launch(segment, cached)[0]
        yield f"attention dQ, {name}", chunk_attention.queries_launch(segment, cached, attended, own)[0]
        if runs:
            found = chunk_attention.queries_launch(segment, cached, attended, own, own_part=own)[0]
            yield f"attention dQ of cached keys, {name}", found
    yield "attention dK dV of own keys", chunk_attention.own_launch(segment, attended.lse, own, attended.lse)[0]
    yield "attention merge", merge_launch(attended, attended)


def cosine_head(width: int, heads: int, tokens: int) -> Iterator[tuple[str, Launch]]:
    """The features' width is that of the 14B encoder for every generator; here it goes with the model."""
    x, cosine = empty(tokens, width), empty(tokens, dtype=torch.float32)
    for name, gradient in (("cosine_head forward with gradient", True), ("cosine_head forward", False)):
        yield name, triton_cosine.cosine_launch(x, x, cosine, gradient)
    segments = max(2, tokens // 4680)
    features = empty(1, tokens, width)
    out = triton_cosine.target_like(features, segments, (0, 1))
    yield "fuse_targets", triton_cosine.fuse_launch(features, segments, (0, 1), out)


Family = Callable[[int, int, int], Iterator[tuple[str, Launch]]]
FAMILIES: tuple[Family, ...] = (attention, norm_rope, residual_modulate, cosine_head)


def type_of(value: object) -> str:
    return f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else TYPES[type(value)]


def source(launch: Launch) -> ASTSource:
    """The launch as triton specialises it: pointers and strides that sixteen divides are known to be so."""
    names = launch.kernel.arg_names
    signature, attributes = {}, {}
    constants = {name: value for name, value in launch.arguments.items() if value is None} | launch.constants
    for index, name in enumerate(names):
        value = launch.arguments.get(name)
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = type_of(value)
        specialised = not launch.kernel.params[index].do_not_specialize
        if specialised and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    fixed = {(names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=fixed, attrs=attributes)


def measured(name: str, model: str, tokens: int, launch: Launch) -> Compiled:
    """Compile one launch. Raises subprocess.CalledProcessError when the assembler refuses it."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source(launch), target=TARGET, options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [str(ASSEMBLER), "-v", "--gpu-name", "sm_90a", str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Compiled(
        kernel=name,
        model=model,
        tokens=tokens,
        warps=launch.warps,
        registers=int(re.findall(r"Used (\d+) registers", said)[0]),
        spilled_bytes=sum(int(each) for each in re.findall(r"(\d+) bytes spill", said)),
        shared=compiled.metadata.shared,
        wide_loads=len(re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64)|cp\.async\.c[ag]\..*, 0x10, ", ptx)),
        wide_stores=len(re.findall(r"st\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
        narrow_loads=len(re.findall(r"ld\.global\S*\.[bus](?:8|16)\b", ptx)),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma_sync=len(re.findall(r"\bmma\.sync", ptx)),
    )


def rows(families: Sequence[Family]) -> Iterator[Compiled]:
    known: dict[str, Compiled] = {}
    for model, (width, heads) in MODELS.items():
        for tokens in GRIDS:
            for family in families:
                for name, launch in family(width, heads, tokens):
                    key = f"{source(launch).hash()} {launch.warps} {launch.stages}"
                    if key not in known:
                        known[key] = measured(name, model, tokens, launch)
                    yield Compiled(**(asdict(known[key]) | {"kernel": name, "model": model, "tokens": tokens}))


def table(found: list[Compiled]) -> str:
    lines = [
        "| kernel | model | tokens | warps | registers | spilled | shared bytes | 16-byte loads, stores | wgmma |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.kernel} | {each.model} | {each.tokens:,} | {each.warps} | {each.registers} | {each.spilled_bytes} | "
        f"{each.shared:,} | {each.wide_loads}, {each.wide_stores} | {each.wgmma} |"
        for each in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--only", choices=[each.__name__ for each in FAMILIES], help="these kernels alone")
    arguments = parser.parse_args()
    file = arguments.json
    if knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: there is nothing to compile for the interpreter")
    found = list(rows([each for each in FAMILIES if arguments.only in (None, each.__name__)]))
    if file:
        document = {"triton": triton.__version__, "torch": torch.__version__, "target": "sm_90a"}
        file.write_text(json.dumps(document | {"kernels": [asdict(each) for each in found]}, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
