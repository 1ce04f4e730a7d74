"""One section of a session, in its own process: python -m benchmarks.session.section NAME OUT SECONDS [--rehearse]"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.session import attention, blocks, cycles, profile_parts, replay
from benchmarks.session.measure import NO_CUDA, Case, Desk, Work

ROOT = Path(__file__).resolve().parents[2]
PRODUCTS = ((8192, 8192, 8192), (32760, 5120, 13824), (4680, 1536, 8960))  # rows, inner, columns
# Tests whose outcome matters most come first: compiling takes long in the last of these.
GATES = ("kernels", "attention_kernels", "recipe_runs", "attention_backends")
RECIPES = {False: "recipes/wan/causal-forcing-chunkwise-mirai-8x8.yaml", True: "recipes/tiny/video_mirai.yaml"}


def ceilings(desk: Desk) -> None:
    """What copies and products reach: what every other rate is held against."""
    _copy(desk, 1 << (16 if desk.rehearsal else 31))
    for rows, inner, columns in ((64, 64, 64),) if desk.rehearsal else PRODUCTS:
        shape, flops = f"{rows} x {inner} x {columns}", 2.0 * rows * inner * columns
        left, right = desk.drawn(rows, inner), desk.drawn(columns, inner)
        desk.time(Case("product", "bf16", shape, (Work("gemm", flops),)), lambda a=left, b=right: a @ b.T)
        case = Case("product", "fp8, scaled by row", shape, (Work("gemm fp8", flops),))
        if not desk.cuda:
            desk.skip(case, NO_CUDA)
            continue
        desk.time(case, _scaled(left, right))


def _copy(desk: Desk, count: int) -> None:
    source = desk.drawn(count)
    target = torch.empty_like(source)
    moved = 2 * source.nbytes
    desk.time(Case("copy", "torch", f"{moved / 1e9:.1f} GB", (Work("memory", moved),)), lambda: target.copy_(source))


def _scaled(left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The product of e4m3 values with a scale a row and a column."""
    from mirai_kernels.residual_modulate.reference import row_scaled

    (a, a_scale), (b, b_scale) = row_scaled(left), row_scaled(right)
    a_scale, b_scale = a_scale.float(), b_scale.float().T
    return lambda: torch._scaled_mm(a, b.T, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)


def gates(desk: Desk) -> None:
    """The tests that are marked gpu."""
    case = Case("tests marked gpu", "pytest", "tests/gpu")
    if not desk.cuda:
        desk.skip(case, NO_CUDA)
        return
    # A module that cannot be imported costs its own tests; at the deadline pytest still says what has failed.
    ends = ["--continue-on-collection-errors", f"--session-timeout={max(1.0, desk.left):.0f}"]
    files = [f"tests/gpu/test_{name}.py" for name in GATES]
    _program(desk, case, ["-m", "pytest", *files, "-m", "gpu", "-q", "-rs", *ends])


def certificate(desk: Desk) -> None:
    """Everything that the recipe computes with, against float64."""
    recipe = RECIPES[desk.rehearsal]
    command = ["-m", "mirai_dist.commands.bench", "kernels", "--certify", recipe]
    _program(desk, Case("certificate", "mirai bench", recipe), [*command, "--out", str(desk.out / "certificates")])


def _program(desk: Desk, case: Case, arguments: list[str]) -> None:
    """A program of its own. What it says goes to the section's log at once, its last line into the row."""
    command, last = [sys.executable, *arguments], "said nothing"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            last = line.strip() or last
    desk.write(case, passed=process.returncode == 0, said=last)


SECTIONS: dict[str, Callable[[Desk], None]] = {
    "ceilings": ceilings,
    "gates": gates,
    "certificate": certificate,
    "cycle": cycles.cycles,
    "profile": profile_parts.parts,
    "replay": replay.steps,
    "assembled": blocks.assembled,
    "attention": attention.backends,
    "chunk_backward": attention.chunk_backward,
    "fused": blocks.fused,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=tuple(SECTIONS))
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    SECTIONS[options.name](Desk(options.name, options.out, options.seconds, options.rehearse))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
