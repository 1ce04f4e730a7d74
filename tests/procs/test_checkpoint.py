"""Checkpoints over several ranks: bit-exact resume, any world size, nothing missing in silence."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mirai_dist.state.checkpoint import TrainState, describe, load, load_network, newest, save
from mirai_dist.state.commit import CheckpointError, latest
from mirai_dist.state.draws import Draws
from mirai_dist.state.ema import Ema, named_tensors

PASSPORT = {"cycle": 4, "position": 2, "stage": "dmd", "recipe": "abc"}
BATCH = torch.linspace(-1, 1, 24).reshape(4, 6)


class Network(nn.Module):
    """Widths that 2, 3 and 4 ranks do not divide, a parameter shorter than the world, a buffer, a frozen weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList([nn.Linear(6, 7), nn.Linear(7, 37), nn.Linear(37, 1)])
        self.blocks[1].weight.requires_grad_(False)
        self.register_buffer("scale", torch.full((3,), float(seed)))
        draws = Draws(seed, torch.device("cpu"))  # ranks that are threads share torch's global generator
        for name, parameter in self.named_parameters():
            nn.init.uniform_(parameter, -0.5, 0.5, draws.for_parameter(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def network(seed: int, recompute: bool = False, mesh_shape: tuple[int, ...] = ()) -> Network:
    """Sharded over all ranks (or as mesh_shape says); the plain module when there is no process group."""
    module = Network(seed)
    if recompute:
        module.blocks[0] = checkpoint_wrapper(module.blocks[0])
    if dist.is_initialized():
        shape = mesh_shape or (dist.get_world_size(),)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape):])
        for block in module.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return module


def adamw(module: nn.Module, lr: float) -> torch.optim.AdamW:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW([{"params": trained[:2], "lr": lr}, {"params": trained[2:], "weight_decay": 0.1}], lr=lr,
                             betas=(0.1, 0.99))


def fresh(seed: int = 1, recompute: bool = False) -> TrainState:
    generator, critic = network(seed, recompute), network(seed + 1)
    return TrainState(
        networks={"generator": generator, "critic": critic},
        optimizers={"generator": (generator, adamw(generator, 0.02)), "critic": (critic, adamw(critic, 0.05))},
        averages={"generator": Ema(generator, 0.9)},
        extras={"cycle": 0, "cursors": {"generator": 0}, "lr": 0.1 + 0.2},
    )


def train(state: TrainState, steps: int) -> None:
    for _ in range(steps):
        for module, optimizer in state.optimizers.values():
            module(BATCH + state.extras["cycle"] / 10).square().mean().backward()
            for group in optimizer.param_groups:
                group["lr"] *= 0.97
            optimizer.step()
            optimizer.zero_grad()
        state.averages["generator"].update()
        state.extras["cycle"] += 1


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def everything(state: TrainState) -> dict[str, Any]:
    """Each number of a run, unsharded, by name."""
    values: dict[str, Any] = {}
    for role, module in state.networks.items():
        values |= {f"{role}.{name}": full(tensor) for name, tensor in named_tensors(module).items()}
    for role, (module, optimizer) in state.optimizers.items():
        names = {id(tensor): name for name, tensor in named_tensors(module).items()}
        for parameter, moments in optimizer.state.items():
            values |= {f"{role}.{names[id(parameter)]}.{key}": full(value) for key, value in moments.items()}
        for number, group in enumerate(optimizer.param_groups):
            values |= {f"{role}.{number}.{key}": value for key, value in group.items() if key != "params"}
    for role, average in state.averages.items():
        values |= {f"average.{role}.{name}": full(tensor) for name, tensor in average.state_dict().items()}
        values[f"average.{role}.updates"] = average.updates
    return values | {f"extras.{key}": value for key, value in state.extras.items()}


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        assert type(value) is type(other), name
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, f"{name}: {value} is not {other}"


def sample(number: int) -> torch.Tensor:
    return torch.randn(3, 2 + number % 2, generator=torch.Generator().manual_seed(number)).bfloat16()


def refusal(step) -> str:
    """The one line with which a step refuses."""
    with pytest.raises(CheckpointError) as raised:
        step()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_resume_is_bit_exact(threads, tmp_path: Path) -> None:
    def body(rank: int) -> None:
        straight = fresh()
        train(straight, 3)
        report = save(tmp_path / "cycle-000004-position-2", straight, PASSPORT)
        assert report.bytes > 3000 and report.seconds > 0
        train(straight, 3)
        resumed = fresh(seed=50)
        load(tmp_path / "cycle-000004-position-2", resumed)
        assert resumed.extras["cycle"] == 3
        train(resumed, 3)
        left, right = everything(straight), everything(resumed)
        assert "generator.blocks.0.weight.exp_avg_sq" in left and left["generator.0.betas"] == (0.1, 0.99)
        assert_equal(left, right)

    threads(2)(body)
    passport = describe(tmp_path / "cycle-000004-position-2").passport
    assert passport["world_size"] == 2 and passport["torch"] == torch.__version__ and passport["recipe"] == "abc"


@pytest.mark.parametrize("saved_on", [1, 2, 4])
def test_another_world_size_loads_the_same_numbers(threads, tmp_path: Path, saved_on: int) -> None:
    """Weights, moments, averages and cached samples; 0 is a single process without a process group."""
    path = tmp_path / "cycle-000004-position-2"

    def write(rank: int) -> dict[str, Any]:
        state = fresh()
        train(state, 2)
        state.samples = {"replay": {number: sample(number) for number in range(8 + rank, 20, saved_on)}}
        save(path, state, PASSPORT)
        return everything(state)

    written = threads(saved_on)(write)[0]
    assert describe(path).samples == {"replay": list(range(8, 20))}
    for world_size in (0, 1, 2, 3, 4):
        def read(rank: int, world_size: int = world_size) -> None:
            state = fresh(seed=70)
            wanted = list(range(8 + rank, 20, max(1, world_size)))
            load(path, state, {"replay": wanted})
            assert_equal(everything(state), written)
            assert list(state.samples["replay"]) == wanted
            for number, tensor in state.samples["replay"].items():
                assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, sample(number))

        threads(world_size)(read) if world_size else read(0)


def test_recompute_wrappers_do_not_show_in_the_names(threads, tmp_path: Path) -> None:
    path = tmp_path / "cycle-000004-position-2"

    def body(rank: int) -> None:
        state = fresh(recompute=True)
        train(state, 1)
        save(path, state, PASSPORT)
        plain = fresh(seed=9)
        load(path, plain)
        assert_equal(everything(state), everything(plain))
        assert "generator.blocks.0.weight.exp_avg" in everything(state)

    threads(2)(body)


def test_replicas_write_each_shard_once(threads, tmp_path: Path) -> None:
    """Two replicas of two shards (HSDP) store as much as two shards alone, and load as anything else does."""
    def write(rank: int, shape: tuple[int, ...]) -> tuple[int, dict[str, Any]]:
        module = network(1, mesh_shape=shape)
        state = TrainState(networks={"critic": module}, optimizers={"critic": (module, adamw(module, 0.1))})
        module(BATCH).square().mean().backward()
        state.optimizers["critic"][1].step()
        save(tmp_path / f"cycle-00000{len(shape)}-position-0", state, PASSPORT)
        stored = (tmp_path / f"cycle-00000{len(shape)}-position-0" / "tensors").glob("*.distcp")
        return sum(file.stat().st_size for file in stored), everything(state)

    plain_bytes, _ = threads(2)(lambda rank: write(rank, (2,)))[0]
    replicated_bytes, written = threads(4)(lambda rank: write(rank, (2, 2)))[0]
    assert replicated_bytes < 1.2 * plain_bytes

    def read(rank: int) -> None:
        module = network(7)
        state = TrainState(networks={"critic": module}, optimizers={"critic": (module, adamw(module, 0.3))})
        load(tmp_path / "cycle-000002-position-0", state)
        assert_equal(everything(state), written)

    threads(3)(read)


def test_all_ranks_resume_from_what_rank_zero_finds(threads, tmp_path: Path) -> None:
    assert threads(2)(lambda rank: newest(tmp_path)) == [None, None]
    path = tmp_path / "cycle-000001-position-0"
    save(path, TrainState(extras={"cycle": 1}), PASSPORT)
    assert threads(2)(lambda rank: newest(tmp_path)) == [path, path]
    (path / "state.json").write_text("")
    lines = threads(2)(lambda rank: refusal(lambda: newest(tmp_path)))
    assert lines[0] == lines[1] and "none is complete" in lines[0]


def test_saving_changes_nothing_even_before_the_first_step(tmp_path: Path) -> None:
    """Some ways of asking an optimizer for its state make it step; a fresh one must come back fresh."""
    state, untouched = fresh(), fresh()
    save(tmp_path / "cycle-000000-position-0", state, PASSPORT)
    assert_equal(everything(state), everything(untouched))
    resumed = fresh(seed=3)
    load(tmp_path / "cycle-000000-position-0", resumed)
    assert not resumed.optimizers["critic"][1].state
    for one in (state, resumed, untouched):
        train(one, 2)
    assert_equal(everything(resumed), everything(untouched))
    assert_equal(everything(state), everything(untouched))


@pytest.mark.parametrize("kind", ["networks", "optimizers", "averages"])
def test_a_missing_component_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "cycle-000004-position-2"
    partial, whole = fresh(), fresh()
    train(partial, 1)
    del getattr(partial, kind)["generator"]
    save(path, partial, PASSPORT)
    line = refusal(lambda: load(path, whole))
    assert f"{kind[:-1]} 'generator' is missing from the checkpoint" in line
    save(path, whole, PASSPORT)
    assert f"{kind[:-1]} 'generator' is missing from this run" in refusal(lambda: load(path, partial))


def test_a_network_of_another_shape_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cycle-000004-position-2"
    save(path, fresh(), PASSPORT)
    other = fresh()
    other.networks["critic"].extra = nn.Linear(2, 2)
    assert "networks/critic/extra.bias is missing from the checkpoint" in refusal(lambda: load(path, other))
    other = fresh()
    other.networks["critic"].scale = torch.zeros(5)
    assert "networks/critic/scale has shape [3] in the file, [5] in this run" in refusal(lambda: load(path, other))
    other = fresh()
    other.networks["critic"].scale = torch.zeros(3, dtype=torch.float64)
    assert "networks/critic/scale is torch.float32 in the file" in refusal(lambda: load(path, other))
    other = fresh()
    other.optimizers["critic"][1].param_groups[1]["params"].pop()
    assert "optimizer 'critic': its parameter groups differ" in refusal(lambda: load(path, other))
    assert "sample 3 of 'replay' is missing" in refusal(lambda: load(path, fresh(), {"replay": [3]}))


@pytest.mark.parametrize("place", ["weight", "moment", "average", "sample"])
def test_a_value_that_is_not_finite_is_refused_on_all_ranks(threads, tmp_path: Path, place: str) -> None:
    """Only rank 1's shard holds the NaN; both ranks refuse, name it, and the older checkpoint stays."""
    def body(rank: int) -> list[str]:
        state = fresh()
        train(state, 1)
        save(tmp_path / "cycle-000001-position-0", state, PASSPORT)
        critic: Any = state.networks["critic"]
        optimizer = state.optimizers["critic"][1]
        poisoned = {"weight": critic.blocks[1].bias, "moment": optimizer.state[critic.blocks[1].bias]["exp_avg"],
                    "average": state.averages["generator"].state_dict()["blocks.1.bias"],
                    "sample": torch.zeros(2)}[place]
        if rank == 1:
            target = poisoned.to_local() if isinstance(poisoned, DTensor) else poisoned
            target.data[-1] = torch.nan
        state.samples = {"replay": {rank: torch.zeros(2) if rank == 0 or place != "sample" else poisoned}}
        return [refusal(lambda: save(tmp_path / "cycle-000002-position-0", state, PASSPORT))]

    lines = threads(2)(body)
    assert lines[0] == lines[1]
    name = {"weight": "networks/critic/blocks.1.bias", "moment": "optimizers/critic/blocks.1.bias/exp_avg",
            "average": "averages/generator/blocks.1.bias", "sample": "samples/replay/1"}[place]
    assert f"{name} is not finite: refusing to save (rank 1)" in lines[0][0]
    assert [path.name for path in tmp_path.iterdir()] == ["cycle-000001-position-0"]


def test_stored_values_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cycle-000001-position-0"
    state = fresh()
    state.networks["critic"].get_buffer("scale")[1] = torch.inf
    with monkeypatch.context() as patch:
        patch.setattr("mirai_dist.state.checkpoint._finite", lambda tensors, verdict: tensors)
        save(path, state, PASSPORT)
    assert "networks/critic/scale is not finite: refusing to load" in refusal(lambda: load(path, fresh()))


def test_a_damaged_checkpoint_is_refused_on_all_ranks(threads, tmp_path: Path) -> None:
    path = tmp_path / "cycle-000001-position-0"
    save(path, fresh(), PASSPORT)
    file = path / "tensors" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    lines = threads(2)(lambda rank: refusal(lambda: load(path, fresh())))
    assert lines[0] == lines[1] and "tensors/__0_0.distcp was altered" in lines[0]


def test_extras_must_come_back_as_they_were(threads, tmp_path: Path) -> None:
    path = tmp_path / "cycle-000001-position-0"
    for extras, words in [({"a": (1, 2)}, "tuples"), ({"a": {1: 2}}, "keys that are not strings"),
                          ({"a": float("nan")}, "finite JSON"), ({"a": torch.zeros(1)}, "finite JSON")]:
        assert words in refusal(lambda extras=extras: save(path, TrainState(extras=extras), PASSPORT))

    def body(rank: int) -> None:
        assert "ranks disagree" in refusal(lambda: save(path, TrainState(extras={"cycle": rank}), PASSPORT))

    threads(2)(body)
    assert not list(tmp_path.iterdir())


def test_a_stage_starts_from_its_parent(threads, tmp_path: Path) -> None:
    path = tmp_path / "cycle-000004-position-2"

    def write(rank: int) -> dict[str, Any]:
        state = fresh()
        train(state, 3)
        save(path, state, PASSPORT)
        return everything(state)

    written = threads(2)(write)[0]

    def read(rank: int) -> None:
        for which in ("raw", "ema"):
            module = network(40)
            load_network(path, "generator", module, which)
            for name, tensor in named_tensors(module).items():
                averaged = which == "ema" and f"average.generator.{name}" in written
                assert_equal({"": full(tensor)}, {"": written[f"{'average.' * averaged}generator.{name}"]})
        frozen = network(41).bfloat16()  # a teacher is kept in the compute dtype
        load_network(path, "critic", frozen, "raw")
        assert torch.equal(full(frozen.blocks[0].weight), written["critic.blocks.0.weight"].bfloat16())
        assert "no averages of 'critic'" in refusal(lambda: load_network(path, "critic", network(1), "ema"))
        assert "no network 'teacher'" in refusal(lambda: load_network(path, "teacher", network(1), "raw"))
        wider = nn.ModuleDict({"head": nn.Linear(2, 2)})
        assert "is missing from" in refusal(lambda: load_network(path, "critic", wider, "raw"))

    threads(3)(read)
    read(0)
    assert not torch.equal(written["average.generator.blocks.0.weight"], written["generator.blocks.0.weight"])


def test_a_failed_write_leaves_the_previous_checkpoint(threads, tmp_path: Path, monkeypatch) -> None:
    """The disk fills up under rank 1 only."""
    first = tmp_path / "cycle-000001-position-0"
    threads(2)(lambda rank: save(first, fresh(), PASSPORT))

    def full_disk(tensors, **_) -> None:
        raise OSError(28, "No space left on device")

    from mirai_dist.state import checkpoint

    real = checkpoint.flushed
    monkeypatch.setattr(checkpoint, "flushed",
                        lambda where, names: full_disk(names) if dist.get_rank() == 1 else real(where, names))
    lines = threads(2)(lambda rank: refusal(lambda: save(tmp_path / "cycle-000002-position-0", fresh(), PASSPORT)))
    assert lines[0] == lines[1] and "No space left on device (rank 1)" in lines[0]
    assert list(tmp_path.iterdir()) == [first] and latest(tmp_path) == first


# Real processes: the same over gloo, plus what threads cannot show.


def real_ranks_save(folder: Path) -> None:
    state = fresh()
    train(state, 2)
    state.samples = {"replay": {number: sample(number) for number in range(dist.get_rank(), 6, dist.get_world_size())}}
    save(folder / "cycle-000004-position-2", state, PASSPORT)
    values = everything(state)
    if dist.get_rank() == 0:
        torch.save(values, folder / "written.pt")
    train(state, 2)
    resumed = fresh(seed=8)
    load(folder / "cycle-000004-position-2", resumed, {"replay": [5, 0]})
    assert torch.equal(resumed.samples["replay"][5], sample(5))
    train(resumed, 2)
    assert_equal(everything(state), everything(resumed))
    # A disk too small for rank 1's own shard: torch's writer fails there, and both ranks hear of it.
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    line = refusal(lambda: save(folder / "cycle-000009-position-0", state, PASSPORT))
    assert "(rank 1)" in line, line


def test_real_processes_save_resume_and_hear_of_a_full_disk(torchrun, tmp_path: Path) -> None:
    torchrun(2, real_ranks_save)
    assert latest(tmp_path) == tmp_path / "cycle-000004-position-2"
    assert not [name for name in os.listdir(tmp_path) if ".tmp-" in name]
    state = fresh(seed=8)
    load(tmp_path / "cycle-000004-position-2", state, {"replay": range(6)})
    assert_equal(everything(state), torch.load(tmp_path / "written.pt"))
    assert json.loads((tmp_path / "cycle-000004-position-2" / "state.json").read_text())["extras"]["cycle"] == 2
