"""EMA on shards: equal to the unsharded one bit for bit, and silent."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from mirai_dist.state.draws import Draws
from mirai_dist.state.ema import Ema, local, reshard


def network() -> nn.Sequential:
    """Widths that no world size of these tests divides, one parameter smaller than the world, one frozen."""
    draws = Draws(0, torch.device("cpu"))  # ranks that are threads share torch's global generator
    module = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 37), nn.SiLU(), nn.Linear(37, 1))
    for name, parameter in module.named_parameters():
        nn.init.uniform_(parameter, -0.5, 0.5, draws.for_parameter(name))
    module[2].bias.requires_grad_(False)
    return module


def sharded(world_size: int, reshard_after_forward: bool = True) -> nn.Sequential:
    module = network()
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in (module[0], module[2], module[4]):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return module


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(module: nn.Module, ema: Ema, steps: int) -> None:
    """SGD on a fixed batch that every rank shares, so that sharded and unsharded networks train alike."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    batch = torch.linspace(-1, 1, 20).reshape(4, 5)
    for _ in range(steps):
        module(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_sharded_average_equals_the_unsharded_one(threads, world_size: int) -> None:
    plain = network()
    plain_ema = Ema(plain, 0.9)
    noise = [torch.randn(100, 40, generator=torch.Generator().manual_seed(step)) for step in range(5)]

    def disturb(module: nn.Module, step: int) -> None:
        """Add the same noise to the same weights, whoever holds them."""
        with torch.no_grad():
            for number, parameter in enumerate(module.parameters()):
                change = noise[step].flatten()[number : number + parameter.numel()].reshape(parameter.shape)
                if isinstance(parameter, DTensor):
                    change = distribute_tensor(change, parameter.device_mesh, parameter.placements)
                parameter.add_(change)

    for step in range(5):
        disturb(plain, step)
        plain_ema.update()
    expected = plain_ema.state_dict()

    def body(rank: int) -> None:
        module = sharded(world_size)
        ema = Ema(module, 0.9)
        for step in range(5):
            disturb(module, step)
            with CommDebugMode() as communication:
                ema.update()
            assert communication.get_total_counts() == 0
        assert ema.updates == 5 and "2.bias" not in ema.state_dict() and len(expected) == 5
        for name, average in ema.state_dict().items():
            assert torch.equal(full(average), expected[name]), name
            assert not torch.equal(full(average), dict(plain.named_parameters())[name])

    threads(world_size)(body)


def test_average_follows_its_formula() -> None:
    module = network()
    ema = Ema(module, 0.75)
    reference = {name: weight.detach().double() for name, weight in module.named_parameters() if weight.requires_grad}
    for _ in range(4):
        with torch.no_grad():
            for weight in module.parameters():
                weight.mul_(1.3).add_(0.1)
        ema.update()
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                reference[name] = 0.75 * reference[name] + 0.25 * weight.detach().double()
    for name, average in ema.state_dict().items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), reference[name], rtol=1e-6, atol=1e-7)


def test_a_low_precision_network_is_averaged_in_fp32() -> None:
    """Steps below bf16's resolution add up in the average; a bf16 average would stand still."""
    module = network().bfloat16()
    ema = Ema(module, 0.999)
    before = {name: average.clone() for name, average in ema.state_dict().items()}
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(1.5)
    ema.update()
    assert all((average != before[name]).any() for name, average in ema.state_dict().items())


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_swapped_computes_with_the_average_and_restores(threads, reshard_after_forward: bool) -> None:
    plain = network()
    plain_ema = Ema(plain, 0.5)
    train(plain, plain_ema, 3)
    probe = torch.linspace(0, 1, 10).reshape(2, 5)
    averaged = network()
    plain_ema.copy_to(averaged)
    expected_raw, expected_average = plain(probe), averaged(probe)
    assert (expected_raw - expected_average).abs().max() > 1e-4

    def body(rank: int) -> None:
        module = sharded(3, reshard_after_forward)
        ema = Ema(module, 0.5)
        train(module, ema, 3)
        raw = [local(weight.detach()).clone() for weight in module.parameters()]
        with torch.no_grad():
            torch.testing.assert_close(module(probe), expected_raw)  # leaves a gathered copy when not resharding
            with ema.swapped(module):
                torch.testing.assert_close(module(probe), expected_average)
            torch.testing.assert_close(module(probe), expected_raw)
            try:
                with ema.swapped(module):
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                torch.testing.assert_close(module(probe), expected_raw)
        reshard(module)
        for before, weight in zip(raw, module.parameters(), strict=True):
            assert torch.equal(before, local(weight.detach()))

    threads(3)(body)


def test_state_moves_between_averages() -> None:
    source, target = Ema(network(), 0.5), Ema(nn.Sequential(*network()), 0.5)
    for average in source.state_dict().values():
        average.add_(1)
    target.load_state_dict(source.state_dict())
    assert all(torch.equal(target.state_dict()[name], average) for name, average in source.state_dict().items())
    with pytest.raises(KeyError, match=r"4\.bias"):
        target.load_state_dict({name: v for name, v in source.state_dict().items() if name != "4.bias"})


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="decay is 1"):
        Ema(network(), 1.0)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        Ema(network().requires_grad_(False), 0.9)
    with pytest.raises(ValueError, match=r"ema 0\.weight"):
        Ema(network(), 0.9).copy_to(nn.Sequential(nn.Linear(3, 3)))
