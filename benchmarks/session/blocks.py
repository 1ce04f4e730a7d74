"""What stands between products and attention, by three arithmetics; and a cycle put together of blocks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from benchmarks.kernels.count_bytes import MODELS, Released
from benchmarks.session.attention import differentiated
from benchmarks.session.measure import NO_CUDA, Case, Desk, Work
from benchmarks.session.one_gpu import ALL, NAMES, TOO_LARGE, in_words, one_gpu, phase_name
from mirai_dist.attention.patterns import Backends
from mirai_dist.attention.select import Choice, Need, select
from mirai_dist.certify.shapes import Tokens
from mirai_dist.certify.subjects import token_inputs, token_operators
from mirai_dist.config import schema
from mirai_dist.models.wan.keys import WanShape
from mirai_dist.models.wan.kv_cache import Held
from mirai_dist.models.wan.model import BlockInputs, WanBlock
from mirai_dist.models.wan.token_ops import PLAIN, Placement, TokenOps, load
from mirai_dist.plan import passes
from mirai_dist.plan.shapes import frame_tokens, network_of

# Passes over tokens [N, dim] that an operator cannot do without: what it reads and writes, forward and backward.
PASSES = {"placed": (4, 6), "queries": (2, 3), "added and normed": (4, 6), "added and modulated": (4, 6)}
PASSES |= {"gated and modulated": (4, 6), "modulated": (2, 3), "added": (3, 4)}
# KB a token that a block moves outside products and attention, forward and backward, by the width of its model, as
# benchmarks/kernels/count_bytes.py counts; other widths in proportion to the smaller.
MOVED = {
    1536: {"released": (505, 827), "plain": (338, 750), "fused": (95, 222)},
    5120: {"released": (1594, 2614), "plain": (1055, 2365), "fused": (253, 611)},
}
ENCODER = "generator encoder"  # the only phase of foresight in which a Wan network runs


@dataclass(frozen=True)
class Pass:
    """One call of one block: tokens that run, behind a past."""

    model: str
    shape: WanShape
    batch: int
    grid: tuple[int, int, int]
    past: int
    gradient: bool
    text: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def __str__(self) -> str:
        return f"{self.model}: {self.batch} x {self.tokens} tokens behind {self.past}"

    def work(self, arithmetic: str, dense: str) -> tuple[Work, ...]:
        """Forward; with gradient also recomputation and backward."""
        dim, rows = self.shape.dim, self.batch * self.tokens
        flops = rows * (12.0 * dim**2 + 4.0 * dim * self.shape.ffn_dim) + 4.0 * self.batch * self.text * dim**2
        attended = 4.0 * dim * rows * (self.tokens + self.past + self.text)
        counted = dim if dim in MOVED else 1536
        forward, backward = (1e3 * rows * dim / counted * each for each in MOVED[counted][arithmetic])
        found = (
            Work("gemm", (4 if self.gradient else 1) * flops),
            Work(f"attention {dense}", (2 if self.gradient else 1) * attended),
            Work("memory", 2 * forward + backward if self.gradient else forward),
        )
        return found + ((Work(f"attention {dense} backward", 2.5 * attended),) if self.gradient else ())


def arithmetics(desk: Desk, case: Case, head_dim: int) -> Iterator[tuple[str, TokenOps]]:
    """As released, in plain torch, and fused where that runs; else its reason is a row."""
    if head_dim == 128:
        yield "released", Released()
    else:
        desk.skip(replace(case, variant="released"), "is for heads of 128")
    yield "plain", PLAIN
    if importlib.util.find_spec("triton") is None:
        desk.skip(replace(case, variant="fused"), "needs the package triton")
    elif not desk.cuda:
        desk.skip(replace(case, variant="fused"), NO_CUDA)
    else:
        yield "fused", load()


def fused(desk: Desk) -> None:
    """Each operator by each arithmetic, in plain torch compiled too; and the cosine head."""
    shapes = [Tokens(1, 256, 2, (3, 2, 2), 1, 1)] if desk.rehearsal else []
    for name in () if desk.rehearsal else MODELS:
        shapes.append(Tokens(1, MODELS[name].dim, MODELS[name].heads, (21, 30, 52), 1, 1))
    for shape in shapes:
        for name, (kinds, made) in token_operators(shape).items():
            inputs = [each.to(desk.dtype) for each in token_inputs(shape, kinds, desk.device)]
            cases = _operator_cases(name, shape)
            for variant, ops in arithmetics(desk, cases[0], shape.dim // shape.heads):
                _forward_and_backward(desk, variant, cases, made(ops), inputs)
    _cosine_head(desk)
    for name, (kinds, made) in token_operators(shapes[0]).items():  # last: compiling takes longest
        cases = _operator_cases(name, shapes[0])
        if desk.rehearsal:
            desk.skip(replace(cases[0], variant="plain, compiled"), "compiling takes longer than a rehearsal")
        else:
            inputs = [each.to(desk.dtype) for each in token_inputs(shapes[0], kinds, desk.device)]
            _forward_and_backward(desk, "plain, compiled", cases, torch.compile(made(PLAIN)), inputs)


def _operator_cases(name: str, shape: Tokens) -> tuple[Case, Case]:
    """Forward, and forward with backward, of an operator that moves no more than it must."""
    moved = 2.0 * shape.batch * shape.count * shape.dim
    forward, backward = (passes * moved for passes in PASSES[name])
    return (
        Case(f"{name} forward", "", str(shape), (Work("memory", forward),)),
        Case(f"{name} forward and backward", "", str(shape), (Work("memory", forward + backward),)),
    )


def _forward_and_backward(
    desk: Desk, variant: str, cases: tuple[Case, Case], function: Callable[..., Any], inputs: list[Tensor]
) -> None:
    forward, both = (replace(each, variant=variant) for each in cases)
    with torch.no_grad():
        desk.time(forward, lambda: function(*inputs))
    desk.time(both, differentiated(function, inputs))


def _cosine_head(desk: Desk) -> None:
    rows, dim, target_dim = (24, 32, 48) if desk.rehearsal else (32760, 1536, 5120)
    hidden, weight, target = (desk.drawn(*size) for size in ((rows, dim), (target_dim, dim), (rows, target_dim)))
    work = (Work("gemm", 6.0 * rows * dim * target_dim), Work("memory", 4.0 * rows * (dim + target_dim)))
    case = Case("cosine head forward and backward", "plain", f"{rows} x {dim} to {target_dim}", work)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.cosine_similarity((hidden @ weight.T).float(), target.float(), dim=-1).mean()

    desk.time(case, differentiated(plain, [hidden, weight]))
    if not desk.cuda:
        desk.skip(replace(case, variant="fused"), NO_CUDA)
        return
    from mirai_kernels.cosine_head.op import cosine_head

    desk.time(replace(case, variant="fused"), differentiated(lambda h, w: cosine_head(h, w, target), [hidden, weight]))


# --- blocks of a cycle -----------------------------------------------------------------------------------------------


class By(NamedTuple):
    """Who computes a block: between attention and products, and attention; words for both."""

    arithmetic: str
    dense: str
    words: str


def _attending(desk: Desk, shape: WanShape, fused: bool) -> Choice:
    """What a run takes beside this arithmetic: our kernels join attention's parts beside the fused one alone."""
    need = Need(desk.device.type, desk.dtype, (shape.dim // shape.heads,))
    return select("auto", "dense", replace(need, no_kernels="") if fused else need)


def block(desk: Desk, each: Pass, ops: TokenOps, backends: Backends) -> Callable[[], object]:
    """One block's part of a pass, as a network would call it: with gradient it is recomputed in backward."""
    shape = each.shape
    with torch.device(desk.device):
        network = WanBlock(shape, backends, ops).to(desk.dtype)
    x = desk.drawn(each.batch, each.tokens, shape.dim)
    modulation, text = desk.drawn(each.batch, 1, 6, shape.dim), desk.drawn(each.batch, each.text, shape.dim)
    head_dim = shape.dim // shape.heads
    rows = each.grid[1] * each.grid[2]
    places = ops.place(Placement(each.grid, each.past // rows), head_dim, x)
    inputs = BlockInputs(modulation, places, backends.dense, text)
    held = None
    if each.past:
        kept = each.past + each.tokens
        keys, values = (desk.drawn(each.batch, kept, shape.heads, head_dim) for _ in range(2))
        held = Held(keys, values, (0, each.past), () if each.gradient else (each.past, kept))
    if each.gradient:
        leaves = [x.requires_grad_(), *network.parameters()]
        run = lambda: torch.utils.checkpoint.checkpoint(
            lambda x: network(x, inputs, held)[0], x, use_reentrant=False, preserve_rng_state=False
        )
        return lambda: torch.autograd.grad(run(), leaves, x.detach())

    def forward() -> object:
        with torch.no_grad():
            return network(x, inputs, held)[0]

    return forward


def assembled(desk: Desk) -> None:
    """A cycle of the recipe put together: each distinct pass of a Wan network measured on one block, times its blocks
    and how often it is made. Outside: embeddings, heads, predictor, optimizer, and all that FSDP does."""
    one = one_gpu(desk)
    if one is None:
        desk.skip(Case("assembled cycle", "any", "one sample"), TOO_LARGE)
        return
    counted: dict[tuple[Pass, str], float] = {}
    for update in passes.updates(one.recipe, one.recipe.stages[one.job.stage], ranks=1):
        for each in update.passes:
            if each.role not in ("predictor", "text"):
                key = _of_planner(one.recipe, each), phase_name(update.name, each.phase)
                counted[key] = counted.get(key, 0.0) + update.times * each.count * each.blocks
    measured: dict[By, dict[Pass, float | None]] = {}
    for each in dict.fromkeys(each for each, _ in counted):
        kind = "forward, recomputation and backward" if each.gradient else "forward"
        case = Case(f"block {kind}", "", str(each))
        for arithmetic, ops in arithmetics(desk, case, each.shape.dim // each.shape.heads):
            choice = _attending(desk, each.shape, arithmetic == "fused")
            by = By(arithmetic, choice.dense, in_words(arithmetic, choice))
            row = replace(case, variant=by.words, work=each.work(by.arithmetic, by.dense))
            measured.setdefault(by, {})[each] = desk.time(row, block(desk, each, ops, choice.backends))
    for by, times in measured.items():
        _assembled(desk, by, counted, times)


def _of_planner(recipe: schema.Recipe, each: passes.Pass) -> Pass:
    network, channels = network_of(each.role, recipe), recipe.video.channels
    widths = network.dim, network.ffn_dim, network.heads
    shape = WanShape(*widths, network.blocks, recipe.text.dim, channels, network.freq_dim)
    grid = (each.tokens // frame_tokens(recipe), recipe.video.latent_height // 2, recipe.video.latent_width // 2)
    return Pass(f"{network.dim} wide", shape, each.batch, grid, each.past, each.gradient, recipe.text.length)


def _assembled(
    desk: Desk, by: By, counted: dict[tuple[Pass, str], float], times: dict[Pass, float | None]
) -> None:
    """A row a phase, backward in that of its forward, and one for all without and with foresight; a phase of which a
    pass was not measured is not added up."""
    phases: dict[str, list[tuple[float, Pass]]] = {}
    for (each, phase), count in counted.items():
        phases.setdefault(phase, []).append((count, each))
    base = [part for phase, parts in phases.items() if phase != ENCODER for part in parts]
    rows = [(phase, True, parts) for phase, parts in phases.items()]
    rows += [(ALL, False, base), (ALL, True, [*base, *phases[ENCODER]])]
    for phase, foresight, made in rows:
        case = Case(f"{NAMES[foresight]}: {phase}", by.words, f"{sum(count for count, _ in made):.1f} blocks")
        found = [(count, times.get(each), desk.predicted_ms(each.work(*by[:2]))) for count, each in made]
        if any(ms is None for _, ms, _ in found):
            desk.skip(case, "a pass of it was not measured")
            continue
        known = all(predicted is not None for *_, predicted in found)
        predicted = sum(count * (each or 0.0) for count, _, each in found) if known else None
        ms = sum(count * (ms or 0.0) for count, ms, _ in found)
        desk.write(case, phase=phase, foresight=foresight, ms=ms, predicted_ms=predicted)
