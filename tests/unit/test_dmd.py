"""Distribution matching: the gradient in closed form for Gaussians, its normalisation, guidance and timesteps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from mirai_dist.method.dmd import (
    SCHEDULES,
    Conditioning,
    Velocity,
    dmd_loss,
    exit_interval,
    guided,
    noised,
    score_difference,
    score_draws,
    score_timestep,
)

SHAPE = (2, 3, 4, 2, 2)
PROMPTS = Conditioning(torch.ones(2, 5, 6, dtype=torch.float64), torch.zeros(1, 5, 6, dtype=torch.float64))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(*timesteps: float) -> Tensor:
    return torch.tensor(timesteps, dtype=torch.float64)


def denoising_to(estimate: Callable[[Tensor, Tensor], Tensor]) -> Velocity:
    """A network whose x0 is estimate(latent, text)."""

    def velocity(latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return (latent - estimate(latent, text)) / (timesteps / 1000).view(-1, 1, 1, 1, 1)

    return velocity


def constant(fake: Tensor, real: Tensor) -> tuple[Velocity, Velocity]:
    """(teacher, critic) with fixed x0; the teacher's does not depend on the prompt."""
    repeat = denoising_to(lambda latent, text: real.repeat(latent.shape[0] // real.shape[0], 1, 1, 1, 1))
    return repeat, denoising_to(lambda latent, text: fake)


# --- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_derivative_of_the_loss_is_the_gradient_over_numel(dtype: torch.dtype) -> None:
    latents = normal(1).to(dtype).requires_grad_()
    gradient = normal(2).to(dtype)
    (derivative,) = torch.autograd.grad(dmd_loss(latents, gradient), latents)
    atol = 1e-14 if dtype == torch.float64 else 1e-8
    torch.testing.assert_close(derivative, gradient / latents.numel(), rtol=0, atol=atol)
    assert dmd_loss(latents, gradient).item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-6)


def test_masked_frames_get_no_gradient_and_do_not_count() -> None:
    latents, gradient = normal(1).requires_grad_(), normal(2)
    mask = torch.tensor([False, True, True])
    loss = dmd_loss(latents, gradient, mask)
    assert loss.item() == pytest.approx(0.5 * gradient[:, 1:].square().mean().item(), rel=1e-12)
    (derivative,) = torch.autograd.grad(loss, latents)
    assert not derivative[:, 0].any()
    expected = gradient[:, 1:] / latents[:, 1:].numel()
    torch.testing.assert_close(derivative[:, 1:], expected, rtol=0, atol=1e-14)
    assert torch.equal(dmd_loss(latents, gradient, torch.ones(3, dtype=torch.bool)), dmd_loss(latents, gradient))


def test_a_masked_frame_that_is_not_finite_still_shows() -> None:
    """Its values reach the others through the sample's normaliser, so the run must stop as it does without a mask."""
    x, real = normal(1), normal(3)
    x[0, 0, 0, 0, 0] = float("nan")
    g = score_difference(x, normal(4), at(500, 800), PROMPTS, constant(normal(2), real), 3.0).gradient
    assert dmd_loss(x, g, torch.tensor([False, True, True])).isnan()


def test_bf16_latents_keep_a_wide_gradient() -> None:
    latents = normal(1).bfloat16().requires_grad_()
    loss = dmd_loss(latents, normal(2).float())
    assert loss.dtype == torch.float32
    loss.backward()
    assert latents.grad is not None and latents.grad.dtype == torch.bfloat16


# --- the normalised difference -------------------------------------------------------------------------------


def test_difference_by_hand_a_sample_at_a_time() -> None:
    x, fake, real, noisy = normal(1), normal(2), normal(3), normal(4)
    g = score_difference(x, noisy, at(500, 800), PROMPTS, constant(fake, real), guidance=3.0).gradient
    for i in range(2):
        expected = (fake[i] - real[i]) / (x[i] - real[i]).abs().mean()
        torch.testing.assert_close(g[i], expected, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3))
def test_a_common_scale_of_both_differences_does_not_matter(scale: float) -> None:
    x, fake, real, noisy = normal(1), normal(2), normal(3), normal(4)
    g = score_difference(x, noisy, at(500, 800), PROMPTS, constant(fake, real), 3.0).gradient
    scores = constant(x + scale * (fake - x), x + scale * (real - x))
    other = score_difference(x, noisy, at(500, 800), PROMPTS, scores, 3.0).gradient
    torch.testing.assert_close(other, g, rtol=1e-9, atol=1e-9)


def test_no_graph_and_no_gradient_reaches_the_scores() -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    latents = normal(1).requires_grad_()

    def network(latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return weight * latent

    noisy = noised(latents, normal(2), at(500, 500))
    assert not noisy.requires_grad
    scored = score_difference(latents, noisy, at(500, 500), PROMPTS, (network, network), 3.0)
    assert not any(each.requires_grad for each in scored)


# --- guidance ------------------------------------------------------------------------------------------------


def test_guidance_formula() -> None:
    conditional, unconditional = normal(1), normal(2)
    torch.testing.assert_close(guided(conditional, unconditional, 3.0), 4 * conditional - 3 * unconditional)
    assert torch.equal(guided(conditional, unconditional, 0.0), conditional)


def test_the_estimates_are_those_the_gradient_was_made_of() -> None:
    """The teacher's x0 is 1 for the prompt and 0 for the negative one, the critic's 7."""
    teacher = denoising_to(lambda latent, text: text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1).expand_as(latent))
    critic = denoising_to(lambda latent, text: torch.full_like(latent, 7.0))
    x, timesteps = normal(1), at(500, 800)
    scored = score_difference(x, normal(4), timesteps, PROMPTS, (teacher, critic), guidance=3.0)
    for found, expected in ((scored.fake, 7.0), (scored.conditional, 1.0), (scored.real, 4.0)):
        torch.testing.assert_close(found, torch.full_like(x, expected), rtol=0, atol=1e-12)
    assert torch.equal(scored.latents, x) and torch.equal(scored.timesteps, timesteps)


def test_the_teacher_is_guided_and_the_critic_is_not() -> None:
    """x0 = the text's mean: 1 for the prompt, 0 for the negative one; guidance 3 makes that 1 + 3 (1 - 0) = 4."""
    read: list[tuple[int, list[float]]] = []

    def network(latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        prompt = text.mean(dim=(1, 2))
        read.append((latent.shape[0], prompt.tolist()))
        return (latent - prompt.view(-1, 1, 1, 1, 1)) / (timesteps / 1000).view(-1, 1, 1, 1, 1)

    x, noisy = torch.full(SHAPE, 6.0, dtype=torch.float64), normal(4)
    g = score_difference(x, noisy, at(500, 800), PROMPTS, (network, network), guidance=3.0).gradient
    torch.testing.assert_close(g, torch.full_like(g, (1 - 4) / (6 - 4)), rtol=0, atol=1e-12)
    assert sorted(read) == [(2, [1.0, 1.0]), (4, [1.0, 1.0, 0.0, 0.0])]


# --- non-finite scores ---------------------------------------------------------------------------------------


def test_a_non_finite_critic_shows_where_it_was() -> None:
    x, fake, real = normal(1), normal(2), normal(3)
    fake[1, 0, 0, 0, 0] = float("nan")
    g = score_difference(x, normal(4), at(500, 800), PROMPTS, constant(fake, real), 3.0).gradient
    assert g.isnan().nonzero().tolist() == [[1, 0, 0, 0, 0]]
    assert dmd_loss(x, g).isnan()


def test_a_non_finite_teacher_spoils_its_sample_alone() -> None:
    x, fake, real = normal(1), normal(2), normal(3)
    real[0, 0, 0, 0, 0] = float("inf")
    g = score_difference(x, normal(4), at(500, 800), PROMPTS, constant(fake, real), 3.0).gradient
    assert g[0].isnan().all()  # through the guidance and the sample's normaliser
    assert g[1].isfinite().all()


# --- Gaussians -----------------------------------------------------------------------------------------------

DATA, GENERATOR = (0.7, 0.5), (-0.4, 1.3)  # mean and standard deviation


def gaussian(mean: float, std: float) -> Normal:
    return Normal(at(mean), at(std))  # of Python floats it would be single precision


def exact(mean: float, std: float) -> Velocity:
    """Velocity E[noise - x0 | x_t] when x0 is N(mean, std^2) in every coordinate."""

    def velocity(latent: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        sigma = (timesteps / 1000).view(-1, 1, 1, 1, 1)
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        centred = latent - (1 - sigma) * mean
        return sigma / variance * centred - (mean + (1 - sigma) * std**2 / variance * centred)

    return velocity


@pytest.mark.parametrize("timestep", [20.0, 300.0, 833.3, 980.0])
def test_difference_is_that_of_the_gaussian_scores(timestep: float) -> None:
    """f - r = sigma^2 / (1 - sigma) (score of the noised generator - score of the noised data)."""
    sigma = timestep / 1000
    x = normal(1)
    noisy = noised(x, normal(2), at(timestep, timestep)).requires_grad_()
    scores = []
    for mean, std in (GENERATOR, DATA):
        marginal = gaussian((1 - sigma) * mean, ((1 - sigma) ** 2 * std**2 + sigma**2) ** 0.5)
        scores.append(torch.autograd.grad(marginal.log_prob(noisy).sum(), noisy)[0])
    difference = sigma**2 / (1 - sigma) * (scores[0] - scores[1])
    g = score_difference(x, noisy, at(timestep, timestep), PROMPTS, (exact(*DATA), exact(*GENERATOR)), 3.0).gradient
    # the normaliser is one positive number a sample
    scale = (difference / g).flatten(1)
    assert (scale > 0).all()
    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale), rtol=1e-6, atol=0)


@pytest.mark.parametrize("timestep", [100.0, 500.0, 937.5])
def test_the_loss_follows_the_kl_divergence_of_the_noised_gaussians(timestep: float) -> None:
    """Generator x = m + s z. d loss / d(m, s) is parallel to d KL(noised generator | noised data) / d(m, s).

    z and the noise take the values +-1 in all combinations: expectations of a quadratic are exact on them.
    """
    sigma = timestep / 1000
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in GENERATOR)
    z = at(1, 1, -1, -1).view(1, 1, 1, 2, 2)
    noise = at(1, -1, 1, -1).view(1, 1, 1, 2, 2)
    x = mean + std * z
    noisy = noised(x, noise, at(timestep))
    prompts = Conditioning(PROMPTS.text[:1], PROMPTS.negative)
    g = score_difference(x, noisy, at(timestep), prompts, (exact(*DATA), exact(*GENERATOR)), guidance=3.0).gradient
    ours = torch.stack(torch.autograd.grad(dmd_loss(x, g), (mean, std)))

    spread = ((1 - sigma) ** 2 * std**2 + sigma**2).sqrt()
    data = gaussian((1 - sigma) * DATA[0], ((1 - sigma) ** 2 * DATA[1] ** 2 + sigma**2) ** 0.5)
    divergence = kl_divergence(Normal((1 - sigma) * mean, spread), data)
    closed = torch.stack(torch.autograd.grad(divergence, (mean, std)))
    velocity = exact(*DATA)(noisy, at(timestep), PROMPTS.text)
    normaliser = (x - (noisy - sigma * velocity)).abs().mean()
    expected = closed * (sigma / (1 - sigma)) ** 2 / normaliser
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-9, atol=1e-12)
    # descending it moves the generator toward the data
    assert ours[0] < 0 < ours[1]


def test_a_generator_that_matches_the_data_gets_no_gradient() -> None:
    x = normal(1)
    noisy = noised(x, normal(2), at(500, 700))
    g = score_difference(x, noisy, at(500, 700), PROMPTS, (exact(*DATA), exact(*DATA)), guidance=3.0).gradient
    assert g.abs().max() < 1e-14


# --- timesteps -----------------------------------------------------------------------------------------------


def test_score_timesteps_as_published() -> None:
    every = [score_timestep(draw, 5.0, 20.0, 980.0) for draw in range(1000)]
    assert every.count(980.0) == 92  # 9.2 % of the draws
    assert sum(every) / 1000 == pytest.approx(746, abs=0.5)
    assert min(every) == 20.0 and every[5] > 20.0
    assert every == sorted(every)
    assert every[500] == pytest.approx(2500 / 3)


@pytest.mark.parametrize(
    ("steps", "intervals"),
    [
        ([1000, 750, 500, 250], [(1000, 750), (750, 500), (500, 250), (250, 0)]),
        ([1000, 500], [(1000, 500), (500, 0)]),
        ([1000], [(1000, 0)]),
        ([800, 600, 50], [(800, 600), (600, 50), (50, 0)]),
    ],
)
def test_intervals_of_exit_steps(steps: list[int], intervals: list[tuple[int, int]]) -> None:
    assert [exit_interval(steps, i) for i in range(len(steps))] == intervals
    for i, (start, end) in enumerate(intervals):
        assert score_draws(steps, i, "none") == range(1000)
        assert score_draws(steps, i, "lower") == range(end, 1000)
        assert score_draws(steps, i, "both") == range(end, start)


def test_score_timesteps_follow_the_exit_step() -> None:
    """Exit 1 of the four steps hands on what 750 down to 500 made: at shift 5 that is 833.3 to below 937.5."""
    steps = [1000, 750, 500, 250]
    lower, both = ([score_timestep(u, 5.0, 20.0, 980.0) for u in score_draws(steps, 1, s)] for s in ("lower", "both"))
    assert (min(lower), max(lower)) == (pytest.approx(2500 / 3), 980.0)
    assert both == lower[:250] and 937 < max(both) < 937.5
    last = [score_timestep(u, 5.0, 20.0, 980.0) for u in score_draws(steps, 3, "both")]
    assert min(last) == 20.0 and max(last) < 625


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_draw_without_schedule_is_the_timestep_it_always_was(schedule: str) -> None:
    """One step spans everything: then, and without a schedule, draw number u is u."""
    assert list(score_draws([1000], 0, schedule)) == list(range(1000))


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="no schedule 'upper' of score timesteps; there are none, lower, both"):
        score_draws([1000], 0, "upper")
