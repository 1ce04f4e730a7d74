"""The replay step gives the gradients of the plain replay update, again and again, and spends nothing on its input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mirai_dist.method.foresight import PRESETS, foresight_loss, plain
from mirai_dist.method.replay import ReplayStep
from mirai_dist.models.predictor import Predictor
from tests.tiny_wan import fill, generator

DIM, TARGET_DIM, TOKENS = 8, 6, 5


def pairs(seed: int) -> tuple[Tensor, Tensor]:
    """Of two samples of three segments."""
    draws = generator(seed)
    states, targets = (
        torch.randn(2, 3, TOKENS, width, generator=draws, dtype=torch.float64) for width in (DIM, TARGET_DIM)
    )
    return states, targets


def predictor(gated: bool = False) -> Predictor:
    network = Predictor(DIM, TARGET_DIM, heads=2, blocks=3, gated=gated).double()
    fill(network, 1)
    return network


def step_of(network: Predictor, arithmetic: str = "paper") -> ReplayStep:
    def cosine_of(states: Tensor, targets: Tensor) -> Tensor:
        return network(states, [targets], plain(PRESETS[arithmetic]).cosine)

    return ReplayStep(cosine_of, list(network.parameters()), *pairs(0))


@pytest.mark.parametrize("arithmetic", ["paper", "release"])
def test_it_is_the_plain_update_for_every_pair_that_is_loaded(arithmetic: str) -> None:
    network = predictor(PRESETS[arithmetic].gated_predictor)
    step = step_of(network, arithmetic)
    places = [each.data_ptr() for each in (step.cosine, *step.gradients)]
    for seed in (0, 3, 4):
        states, targets = pairs(seed)
        loss, similarity = foresight_loss(network, states, [targets], plain(PRESETS[arithmetic]))
        expected = torch.autograd.grad(loss, list(network.parameters()))
        if seed:
            step.load(*pairs(seed))
        step()
        assert torch.equal(step.cosine, similarity)
        assert all(torch.equal(mine, other) for mine, other in zip(step.gradients, expected, strict=True))
        assert [each.data_ptr() for each in (step.cosine, *step.gradients)] == places
        with torch.no_grad():  # as an optimizer would: in place
            for parameter, gradient in zip(network.parameters(), step.gradients, strict=True):
                parameter.sub_(0.1 * gradient)


def test_no_product_is_spent_on_the_gradient_of_the_states() -> None:
    network = predictor()
    step = step_of(network)
    with FlopCounterMode(display=False) as ours:
        step()
    states, targets = pairs(0)
    with FlopCounterMode(display=False) as with_input:
        foresight_loss(network, states.requires_grad_(), [targets], plain(PRESETS["paper"]))[0].backward()
    tokens = 2 * 3 * TOKENS
    assert with_input.get_total_flops() - ours.get_total_flops() == 3 * 2 * tokens * DIM * DIM  # q, k, v of a block


def test_pairs_of_another_shape_are_refused() -> None:
    states, targets = pairs(0)
    step = step_of(predictor())
    with pytest.raises(ValueError, match="for a replay step of"):
        step.load(states[:, :2], targets[:, :2])
    with pytest.raises(ValueError, match="for a replay step of"):
        step.load(states, targets[..., :4])
