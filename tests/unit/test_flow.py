"""The flow-matching schedule: exact noise levels, published step lists and weights, and losses by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirai_dist.method.flow import (
    add_noise,
    clean_from_velocity,
    euler_grid,
    expand_like,
    flow_matching_loss,
    shifted,
    training_weight,
    warped_steps,
)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def at(*timesteps: float) -> Tensor:
    return torch.tensor(timesteps, dtype=torch.float64)


# --- noise and back ------------------------------------------------------------------------------------------


def test_round_trip_over_a_dense_grid_of_levels() -> None:
    timesteps = torch.linspace(0, 1000, 2001, dtype=torch.float64)
    clean, noise = normal(1, 2001, 2, 1, 2, 2), normal(2, 2001, 2, 1, 2, 2)
    noisy = add_noise(clean, noise, timesteps)
    torch.testing.assert_close(clean_from_velocity(noisy, noise - clean, timesteps), clean, rtol=0, atol=1e-13)


def test_velocity_is_the_derivative_of_the_path() -> None:
    clean, noise = normal(1, 1, 2, 1, 2, 2), normal(2, 1, 2, 1, 2, 2)
    step = add_noise(clean, noise, at(501)) - add_noise(clean, noise, at(500))
    torch.testing.assert_close(step * 1000, noise - clean, rtol=0, atol=1e-11)


@settings(max_examples=100, deadline=None)
@given(
    timestep=st.floats(0, 1000),
    x0=st.floats(-100, 100),
    eps=st.floats(-100, 100),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_round_trip_property(timestep: float, x0: float, eps: float, dtype: torch.dtype) -> None:
    clean, noise = (torch.full((1, 1, 1, 1, 1), value, dtype=dtype) for value in (x0, eps))
    noisy = add_noise(clean, noise, at(timestep))
    again = clean_from_velocity(noisy, noise - clean, at(timestep))
    assert again.dtype == dtype
    torch.testing.assert_close(again, clean, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-4)


def test_ends_of_the_path() -> None:
    clean, noise = normal(1, 1, 2, 1, 2, 2), normal(2, 1, 2, 1, 2, 2)
    assert torch.equal(add_noise(clean, noise, at(0)), clean)  # no residual noise in a context pass
    assert torch.equal(add_noise(clean, noise, at(1000)), noise)
    assert torch.equal(clean_from_velocity(noise, noise, at(0)), noise)  # at t = 0, x0 is the input


def test_every_frame_may_have_its_own_level() -> None:
    clean, noise = normal(1, 2, 3, 1, 2, 2), normal(2, 2, 3, 1, 2, 2)
    levels = torch.tensor([[0.0, 250.0, 1000.0], [500.0, 20.0, 980.0]], dtype=torch.float64)
    noisy = add_noise(clean, noise, levels)
    for sample in range(2):
        for frame in range(3):
            sigma = levels[sample, frame] / 1000
            expected = (1 - sigma) * clean[sample, frame] + sigma * noise[sample, frame]
            torch.testing.assert_close(noisy[sample, frame], expected, rtol=0, atol=1e-15)


def test_levels_are_wide_and_values_keep_their_dtype() -> None:
    clean = normal(1, 2, 3, 1, 2, 2, dtype=torch.bfloat16)
    sigma = expand_like(torch.tensor([937.5, 625.0]), clean)
    assert sigma.dtype == torch.float32 and sigma.shape == (2, 1, 1, 1, 1)
    assert sigma.flatten().tolist() == [0.9375, 0.625]
    assert expand_like(at(1.0, 2.0), normal(1, 2, 1, 1, 1, 1)).dtype == torch.float64
    assert add_noise(clean, clean, at(300, 300)).dtype == torch.bfloat16


# --- step lists ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "shift", "warped"),
    [
        ((1000, 750, 500, 250), 5.0, (1000, 937.5, 833.3333, 625)),
        ((1000, 500), 5.0, (1000, 833.3333)),
        ((1000, 800, 600, 400, 200), 5.0, (1000, 952.3810, 882.3529, 769.2308, 555.5556)),
        ((1000, 750, 500, 250), 8.0, (1000, 960, 888.8889, 727.2727)),
        ((1000, 757, 522), 1.0, (1000, 757, 522)),
    ],
)
def test_published_step_lists(steps: tuple[int, ...], shift: float, warped: tuple[float, ...]) -> None:
    assert warped_steps(steps, shift) == pytest.approx(warped, abs=1e-4)


def test_euler_grid_holds_the_step_list() -> None:
    grid = euler_grid(48, 5.0)
    assert len(grid) == 49
    assert [grid[i] for i in (0, 12, 24, 36, 48)] == pytest.approx([1000, 937.5, 2500 / 3, 625, 0])
    assert all(high > low for high, low in zip(grid, grid[1:], strict=False))


def test_last_entries_of_the_published_tables() -> None:
    assert [shifted(i / 1000, 5.0) for i in (3, 2, 1)] == pytest.approx([14.822, 9.921, 4.980], abs=1e-3)
    assert [shifted(i / 1000, 8.0) for i in (3, 2, 1)] == pytest.approx([23.506, 15.779, 7.944], abs=1e-3)
    assert (shifted(0.0, 5.0), shifted(1.0, 5.0)) == (0.0, 1000.0)


# --- weights and loss ----------------------------------------------------------------------------------------


def test_published_training_weights() -> None:
    table = at(*(shifted(1 - i / 1000, 5.0) for i in range(1000)))
    weight = training_weight(table, 5.0)
    values = {0: 0.0, 250: 0.398, 500: 1.025, 750: 1.914, 833: 2.076, 999: 0.032}
    assert {i: weight[i].item() for i in values} == pytest.approx(values, abs=1e-3)
    assert weight.argmax() == 833
    assert weight.mean().item() == pytest.approx(1.0, abs=1e-12)
    assert training_weight(at(0.0), 5.0).item() == pytest.approx(0.0, abs=1e-12)  # never negative past the table


def test_loss_by_hand() -> None:
    clean, noise, velocity = normal(1, 2, 3, 1, 2, 2), normal(2, 2, 3, 1, 2, 2), normal(3, 2, 3, 1, 2, 2)
    error = (velocity - (noise - clean)).square().mean(dim=(2, 3, 4))
    assert flow_matching_loss(velocity, clean, noise).item() == pytest.approx(error.mean().item(), abs=1e-14)
    a_frame = normal(4, 2, 3).abs()
    assert flow_matching_loss(velocity, clean, noise, a_frame).item() == pytest.approx((a_frame * error).mean().item())
    a_sample = normal(5, 2).abs()
    expected = (a_sample[:, None] * error).mean().item()
    assert flow_matching_loss(velocity, clean, noise, a_sample).item() == pytest.approx(expected)
    assert flow_matching_loss(noise - clean, clean, noise).item() == 0


def test_loss_of_bf16_networks_is_fp32() -> None:
    clean, noise = normal(1, 1, 2, 1, 4, 4, dtype=torch.bfloat16), normal(2, 1, 2, 1, 4, 4, dtype=torch.bfloat16)
    assert flow_matching_loss(clean, clean, noise).dtype == torch.float32
