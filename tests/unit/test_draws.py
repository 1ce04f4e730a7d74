from __future__ import annotations

import pytest
import torch

from mirai_dist.state.cursor import BatchLayout, samples_of_rank
from mirai_dist.state.draws import Draws

CPU = torch.device("cpu")


def noise_of_world(ranks: int, micro_size: int) -> torch.Tensor:
    """Noise of global samples 0..11, put together from what each rank draws for its own samples."""
    rows: dict[int, torch.Tensor] = {}
    for rank in reversed(range(ranks)):
        layout = BatchLayout(ranks, rank, micro_size, 12 // (ranks * micro_size))
        draws = Draws(7, CPU)
        for samples in samples_of_rank(0, layout):
            rows |= zip(samples, draws.normal("noise", 3, 1, samples, (5, 7)), strict=True)
    return torch.stack([rows[number] for number in range(12)])


@pytest.mark.parametrize(("ranks", "micro_size"), [(1, 1), (2, 3), (3, 2), (4, 1), (12, 1)])
def test_noise_is_the_same_over_world_sizes(ranks: int, micro_size: int) -> None:
    assert torch.equal(noise_of_world(1, 12), noise_of_world(ranks, micro_size))


def test_draws_do_not_depend_on_earlier_draws_or_ambient_state() -> None:
    fresh = Draws(1, CPU).normal("noise", 0, 0, [4], (3,))
    used = Draws(1, CPU)
    used.generator("other", 0, 0, 4)
    used.normal("noise", 9, 0, [1, 2], (8,))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(used.normal("noise", 0, 0, [4], (3,)), fresh)
    assert torch.equal(torch.get_rng_state(), before), "a keyed draw must leave torch's global state alone"


def test_every_part_of_the_key_counts() -> None:
    def noise(seed: int, purpose: str, cycle: int, position: int, sample: int) -> tuple[float, ...]:
        return tuple(Draws(seed, CPU).normal(purpose, cycle, position, [sample], (4,)).flatten().tolist())

    keys = [(1, "a", 0, 0, 0), (2, "a", 0, 0, 0), (1, "b", 0, 0, 0), (1, "a", 1, 0, 0), (1, "a", 0, 1, 0),
            (1, "a", 0, 0, 1), (1, "a", 1, 1, 0), (1, "a1", 0, 0, 0)]
    assert len({noise(*key) for key in keys}) == len(keys)


def test_normal_is_fp32_standard_normal() -> None:
    noise = Draws(0, CPU).normal("noise", 0, 0, range(64), (16, 16))
    assert noise.shape == (64, 16, 16) and noise.dtype == torch.float32
    assert abs(noise.mean().item()) < 0.03 and abs(noise.std().item() - 1) < 0.03
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(64)
    assert correlation.abs().max() < 0.35, "two samples share noise"


def test_integers_and_uniforms_cover_their_range_evenly() -> None:
    draws = Draws(5, CPU)
    counts = [0] * 4
    for cycle in range(4000):
        counts[draws.integer("exit", cycle, 0, 0, 4)] += 1
    assert min(counts) > 900 and max(counts) < 1100
    uniforms = torch.tensor([draws.uniform("timestep", 0, 0, sample) for sample in range(4000)], dtype=torch.float64)
    assert 0 <= uniforms.min() and uniforms.max() < 1
    assert abs(uniforms.mean().item() - 0.5) < 0.02 and abs(uniforms.var().item() - 1 / 12) < 0.005


def test_golden_values_hold_for_the_life_of_a_run() -> None:
    draws = Draws(1, CPU)
    assert [draws.integer("exit", cycle, 0, 0, 1000) for cycle in range(4)] == [788, 95, 711, 139]
    assert draws.uniform("timestep", 2, 1, 3) == 0.7034430463390366


def test_integer_refuses_an_empty_range() -> None:
    with pytest.raises(ValueError, match="exit"):
        Draws(1, CPU).integer("exit", 0, 0, 0, 0)


def test_parameters_are_keyed_by_name() -> None:
    draws = Draws(1, torch.device("cpu"))
    first = torch.randn(4, generator=draws.for_parameter("blocks.0.weight"))
    assert torch.equal(first, torch.randn(4, generator=Draws(1, CPU).for_parameter("blocks.0.weight")))
    assert not torch.equal(first, torch.randn(4, generator=draws.for_parameter("blocks.1.weight")))
    assert not torch.equal(first, torch.randn(4, generator=Draws(2, CPU).for_parameter("blocks.0.weight")))
