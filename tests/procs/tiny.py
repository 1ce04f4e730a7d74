"""Training cycles small enough for a test: stages of tiny.yaml on ranks that are threads, and all of their numbers.

Networks start from random weights instead of a parent's checkpoint, and without the zeros that real ones start
with: a head of zeros would make most gradients zero, and zeros are equal whatever is broken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mirai_dist.config import load, schema
from mirai_dist.config.jobs import Job
from mirai_dist.cycle import roles
from mirai_dist.cycle.cycle import Loop
from mirai_dist.cycle.desk import Desk
from mirai_dist.cycle.gallery import Gallery
from mirai_dist.cycle.pipeline import Place, make_run
from mirai_dist.cycle.saver import Saver
from mirai_dist.cycle.stages import STAGES, Run, Stage
from mirai_dist.cycle.starts import Starts
from mirai_dist.cycle.watch import Watch
from mirai_dist.models import predictor
from mirai_dist.models.wan import model as wan_model
from mirai_dist.observe.console import Console
from mirai_dist.observe.sinks import Sinks
from mirai_dist.observe.slow import SlowRanks
from mirai_dist.operate.events import Events
from mirai_dist.parallel.engine_fsdp import FsdpEngine
from mirai_dist.plan.shards import ShardPlan
from mirai_dist.runtime.bootstrap import World
from mirai_dist.runtime.signals import StopRequest
from mirai_dist.state.draws import Draws
from mirai_dist.state.ema import local, named_tensors

RECIPE = Path(__file__).with_name("tiny.yaml")
CPU = torch.device("cpu")
SEED = 5
TIMEOUT = 200.0  # seconds for ranks that are threads; a busy machine is ten times slower than a free one
torch.set_num_threads(1)  # a rank has one; two that wait for each other's cores are ten times slower


def recipe(*overrides: str) -> schema.Recipe:
    """The recipe of the tests (tiny.yaml), with overrides."""
    return load(RECIPE, overrides).recipe


def lively_initialise(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """First values with no parameter at zero or one."""
    scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
    parameter.normal_(generator=generator).mul_(scale)
    if parameter.ndim == 1 and name.endswith("weight"):  # of norms
        parameter.add_(1.0)


@contextmanager
def lively(dtype: str = "") -> Iterator[None]:
    """Stages built inside start with `lively_initialise`; with a dtype, they store and compute in it throughout.

    Ranks that are threads share what is patched: the first to enter patches, the last to leave takes it back.
    """
    with _lively_lock:
        if not _lively_ranks:
            _lively_patches.enter_context(_patched(dtype))
        _lively_ranks.append(dtype)
    assert len(set(_lively_ranks)) == 1, "ranks build in different dtypes"
    try:
        yield
    finally:
        with _lively_lock:
            _lively_ranks.pop()
            if not _lively_ranks:
                _lively_patches.close()


_lively_lock, _lively_ranks, _lively_patches = threading.Lock(), [], ExitStack()


@contextmanager
def _patched(dtype: str) -> Iterator[None]:
    with ExitStack() as patches:
        for module in (wan_model, predictor):
            patches.enter_context(mock.patch.object(module, "initialise", lively_initialise))
        if dtype:
            for name in ("wan_plan", "predictor_plan"):
                patches.enter_context(mock.patch.object(roles, name, _in_dtype(getattr(roles, name), dtype)))
        yield


def _in_dtype(plan_of: Any, dtype: str) -> Any:
    def plan(*args: Any, **named: Any) -> ShardPlan:
        return dataclasses.replace(plan_of(*args, **named), storage_dtype=dtype, compute_dtype=dtype)
    return plan


def in_dtype(recipe: schema.Recipe, dtype: str) -> schema.Recipe:
    """The recipe with a compute dtype that no file may ask for (float64); build its stages in `lively(dtype)`."""
    return dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, compute_dtype=dtype))


def console(folder: Path) -> Console:
    return Console(dist.get_rank(), "here", folder / "logs" / f"rank-{dist.get_rank()}.log")


def world(device: torch.device = CPU) -> World:
    """This rank among those of the present process group, all on one host."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return World(rank, rank, ranks, ranks, "here", device, store=None)  # type: ignore[arg-type]  # stages need none


def run_of(recipe: schema.Recipe, seed: int = SEED, stage: str = "distil", run_dir: Path = Path(),
           device: torch.device = CPU) -> Run:
    """What stages share, on this rank of the present process group, made as the pipeline makes it."""
    place = Place(world(device), run_dir, None, StopRequest())  # type: ignore[arg-type]
    return make_run(Job(stage, "", Path(), recipe, seed), place)


class WideDraws(Draws):
    """Noise in float64, of the same values."""

    def normal(self, *key: Any) -> Tensor:
        return super().normal(*key).double()


def stage_of(recipe: schema.Recipe, name: str, engine: type[FsdpEngine] = FsdpEngine, seed: int = SEED,
             run_dir: Path = Path(), device: torch.device = CPU) -> Any:
    """A stage on this rank without parents, its networks sharded over the present process group."""
    run = run_of(recipe, seed, name, run_dir, device)
    wide = recipe.parallel.compute_dtype == "float64"
    run = dataclasses.replace(run, engine=engine(run.engine.mesh, run.engine.device, run.engine.waiting),
                              draws=(WideDraws if wide else Draws)(seed, device))
    return STAGES[recipe.stages[name].kind](name, run, Starts())


def loop_of(stage: Stage, folder: Path, sinks: Sinks, stop: StopRequest, hosts: Sequence[str] = ()) -> Loop:
    """The loop of a stage that keeps everything in `folder`, as the pipeline makes it."""
    rank, ranks = stage.run.rank, stage.run.ranks
    screen, events = console(folder), Events(folder if rank == 0 else None)
    saver = Saver(folder / "checkpoints", stage.recipe.checkpoint, "recipe", rank, screen, events, stage.name)
    desk = Desk(folder, rank, ranks, stop, stage.name)
    return Loop(saver, Watch(screen, sinks, desk, SlowRanks(hosts), events), Gallery(folder, sinks), desk)


def train(stage: Stage, positions: int) -> list[dict[str, float]]:
    """Step through so many positions; the metrics of each, averaged over ranks."""
    found = []
    for _ in range(positions):
        stage.step()
        found.append(stage.observe().values)
        stage.advance()
    return found


def whole(tensor: Tensor) -> Tensor:
    """A copy of the unsharded tensor."""
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


def networks_of(stage: Stage) -> dict[str, nn.Module]:
    """Every network of the stage, frozen ones included, by role."""
    found = {role.name: role.network for role in vars(stage).values() if isinstance(role, roles.Role)}
    assert set(stage.roles) <= set(found)
    return found


def weights(stage: Stage) -> dict[str, Tensor]:
    """Unsharded weights of every network, as "role.parameter"."""
    return {f"{role}.{name}": whole(tensor) for role, network in networks_of(stage).items()
            for name, tensor in named_tensors(network).items()}


def everything(stage: Stage) -> dict[str, Any]:
    """Each number of a stage, unsharded, by name; replay pairs are those of this rank."""
    state = stage.state()
    found: dict[str, Any] = weights(stage)
    for role, (network, optimizer) in state.optimizers.items():
        names = {id(tensor): name for name, tensor in named_tensors(network).items()}
        for parameter, moments in optimizer.state.items():
            found |= {f"{role}.{names[id(parameter)]}.{key}": whole(value) for key, value in moments.items()}
    for role, average in state.averages.items():
        found |= {f"average.{role}.{name}": whole(tensor) for name, tensor in average.state_dict().items()}
        found[f"average.{role}.updates"] = average.updates
    for cache, held in state.samples.items():
        found |= {f"{cache}.{sample}": tensor.clone() for sample, tensor in held.items()}
    return found | {f"extras.{key}": value for key, value in state.extras.items()}


def shard_digests(stage: Stage) -> dict[str, str]:
    """Digest of this rank's shards of each network, optimizer and moving average: "network/critic" and so on."""
    state = stage.state()
    parts: dict[str, list[Tensor]] = {}
    for role, network in networks_of(stage).items():
        parts[f"network/{role}"] = list(named_tensors(network).values())
    for role, (_, optimizer) in state.optimizers.items():
        parts[f"optimizer/{role}"] = [value for moments in optimizer.state.values() for value in moments.values()]
    for role, average in state.averages.items():
        parts[f"average/{role}"] = list(average.state_dict().values())
    return {name: _digest(tensors) for name, tensors in parts.items()}


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(local(tensor.detach()).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def unequal_run(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Names of values of two float64 runs that differ by more than rounding; moving averages are float32 always."""
    wide, narrow = ([{name: value for name, value in side.items() if name.startswith("average.") == averages}
                     for side in (left, right)] for averages in (False, True))
    return unequal(*wide, tolerance=1e-9) + unequal(*narrow, tolerance=1e-6)


def unequal(left: Mapping[str, Any], right: Mapping[str, Any], tolerance: float = 0.0) -> list[str]:
    """Names of values that differ: at all, or (tensors and floats) by more than tolerance times the largest of both."""
    return [name for name in sorted(left.keys() | right.keys())
            if name not in left or name not in right or _differ(left[name], right[name], tolerance)]


def _differ(left: Any, right: Any, tolerance: float) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        left, right = torch.tensor(left), torch.tensor(right)
    if isinstance(left, dict) and isinstance(right, dict):
        return bool(unequal(left, right, tolerance))
    if isinstance(left, list) and isinstance(right, list):
        return len(left) != len(right) or any(_differ(*pair, tolerance) for pair in zip(left, right, strict=True))
    if not isinstance(left, Tensor):
        return bool(left != right)
    if left.shape != right.shape or left.dtype != right.dtype:
        return True
    if not tolerance:
        return not torch.equal(left, right)
    largest = max(left.abs().max().item(), right.abs().max().item())
    return not (left - right).abs().max().item() <= tolerance * largest
