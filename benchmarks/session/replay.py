"""The replay step: by autograd as the trainer takes it, in static memory, and as a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.session.measure import NO_CUDA, Case, Desk, Work
from benchmarks.session.one_gpu import RECIPE, SMALL
from benchmarks.session.traces import GAPS, breakdown, recorded
from mirai_dist.attention.patterns import Backends
from mirai_dist.attention.select import Need, select
from mirai_dist.config import load, schema
from mirai_dist.cycle import comparing
from mirai_dist.method.foresight import PRESETS, Comparison, foresight_loss, plain
from mirai_dist.method.replay import ReplayStep
from mirai_dist.models.predictor import Predictor
from mirai_dist.models.wan import token_ops
from mirai_dist.models.wan.token_ops import PLAIN, TokenOps
from mirai_dist.plan import flops, passes, time

CLOSE = 1e-2  # relative difference of a gradient between a replayed graph and the step run again; bf16 sums may differ


@dataclass(frozen=True)
class Way:
    """What computes a predictor and its comparison with targets, which are of this dtype."""

    ops: TokenOps
    comparison: Comparison
    targets: torch.dtype


def steps(desk: Desk) -> None:
    """One sample's pairs at the recipe's shapes, in the compute dtype and without FSDP."""
    recipe = load(RECIPE, SMALL if desk.rehearsal else ()).recipe
    one = passes.predictor_pass(recipe, batch=1)
    states, drawn = (desk.drawn(1, one.batch, one.tokens, each.dim) for each in (recipe.generator, recipe.teacher))
    dense, backends = chosen(desk, recipe)
    shape = f"{one.batch} segments of {one.tokens} tokens, {recipe.generator.dim} to {recipe.teacher.dim}"
    case = Case("replay step", "", shape, work(recipe, dense))
    ran: dict[str, Callable[[], object]] = {}

    def timed(variant: str, function: Callable[[], object]) -> None:
        if desk.time(replace(case, variant=variant), function) is not None:
            ran[variant] = function

    for name, way in ways(desk, recipe, case).items():
        network, targets, by = predictor(desk, recipe, backends, way.ops), drawn.to(way.targets), f"{name}, {dense}"
        timed(f"autograd, {by}", autograd_step(network, way.comparison, states, targets))
        step = ReplayStep(partial(mean_cosine, network, way.comparison), list(network.parameters()), states, targets)
        timed(f"static memory, {by}", step)
        ran |= _graph(desk, replace(case, variant=f"CUDA graph, {by}"), step, (states, targets))
    for variant, function in ran.items():  # last: a profiler may get in the way of what is captured after it
        _profiled(desk, Case("replay step under the profiler", variant, shape), function)


def mean_cosine(network: Predictor, comparison: Comparison, states: Tensor, targets: Tensor) -> Tensor:
    """Of states [B, I, S, dim] and the targets [B, I, S, D] of the one answer that a dmd stage's predictor gives."""
    return network(states, [targets], comparison.cosine)


def _graph(desk: Desk, case: Case, step: ReplayStep, pairs: tuple[Tensor, Tensor]) -> dict[str, Callable[[], object]]:
    """The same as a graph, by its variant, if it leaves the same numbers."""
    if not desk.cuda:
        desk.skip(case, f"a CUDA graph {NO_CUDA}")
        return {}
    try:
        graph = step.captured()
    except RuntimeError as error:
        desk.skip(case, f"cannot be captured: {str(error).splitlines()[0]}")
        return {}
    difference = replayed_difference(step, graph.replay, pairs)
    if not difference <= CLOSE:
        desk.skip(case, f"leaves numbers that are {difference:.1e} from those of the step itself")
        return {}
    ran = desk.time(case, graph.replay, difference=difference) is not None
    return {case.variant: graph.replay} if ran else {}


def _profiled(desk: Desk, case: Case, function: Callable[[], object]) -> None:
    """One call: how many times it starts something on the device, and how long nothing runs there."""
    trace = desk.out / "replay.json.gz"
    recorded(trace, {"warming up": function, case.name: function})
    found = breakdown(trace, case.name)
    desk.write(case, ms=found.wall, launches=found.launches, idle_ms=found.kinds[GAPS])


def ways(desk: Desk, recipe: schema.Recipe, case: Case) -> dict[str, Way]:
    """In plain torch, and by our kernels where they run; else their reason is a row."""
    arithmetic = PRESETS[recipe.foresight.preset]
    found = {"plain": Way(PLAIN, plain(arithmetic), torch.float32 if arithmetic.wide_fusion else desk.dtype)}
    if not desk.cuda:
        desk.skip(replace(case, variant="fused"), NO_CUDA)
        return found
    return found | {"fused": Way(token_ops.load(), comparing.load(arithmetic), desk.dtype)}


def chosen(desk: Desk, recipe: schema.Recipe) -> tuple[str, Backends]:
    """What attends: its name, and what a network's constructor takes."""
    head_dim = recipe.generator.dim // recipe.generator.heads
    choice = select("auto", "dense", Need(desk.device.type, desk.dtype, (head_dim,)))
    return choice.dense, choice.backends


def predictor(desk: Desk, recipe: schema.Recipe, backends: Backends, ops: TokenOps) -> Predictor:
    """The recipe's, whole, with small normal numbers."""
    generator, gated = recipe.generator, PRESETS[recipe.foresight.preset].gated_predictor
    sizes = generator.dim, recipe.teacher.dim, generator.heads, recipe.foresight.predictor_blocks
    with torch.device(desk.device):
        network = Predictor(*sizes, gated, backends, ops).to(desk.dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return network


def autograd_step(
    network: Predictor, comparison: Comparison, states: Tensor, targets: Tensor
) -> Callable[[], Sequence[Tensor]]:
    """What phases.replay_update does of it: the loss, and its gradient by the parameters."""
    parameters = list(network.parameters())

    def run() -> Sequence[Tensor]:
        return torch.autograd.grad(foresight_loss(network, states, [targets], comparison)[0], parameters)

    return run


def work(recipe: schema.Recipe, dense: str) -> tuple[Work, ...]:
    """Forward and backward as the planner counts them; plain torch moves three times what its forward does."""
    one = replace(passes.predictor_pass(recipe, batch=1), past=0)
    forward, backward = flops.forward(recipe, one), flops.backward(recipe, one)
    return (
        Work("gemm", forward.dense + backward.dense),
        Work(f"attention {dense}", forward.attention),
        Work(f"attention {dense} backward", backward.attention),
        Work("memory", 3 * time.elementwise(recipe, one)),
    )


def replayed_difference(step: ReplayStep, replay: Callable[[], None], pairs: tuple[Tensor, Tensor]) -> float:
    """Largest relative difference between what `replay` leaves and what the step leaves, on other pairs than those it
    was captured with: their targets are turned round, and with them what the step leaves."""
    states, targets = pairs
    step.load(states, -targets)
    left = (step.cosine, *step.gradients)
    step()
    expected = [each.clone() for each in left]
    for each in left:
        each.zero_()
    replay()
    differences = [(mine - other).norm() / other.norm() for mine, other in zip(left, expected, strict=True)]
    return torch.stack([each.float() for each in differences]).max().item()
