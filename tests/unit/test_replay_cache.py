"""The replay cache gives back what was stored: values, dtypes, sample order, batches; and it stays in its budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mirai_dist.method.replay import ReplayCache

CPU = torch.device("cpu")


def pair(sample: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(state [I, S, dim], target [I, S, D]) of a sample, recognisable by its number."""
    draws = torch.Generator().manual_seed(sample)
    return torch.randn(3, 2, 4, generator=draws, dtype=dtype), torch.randn(3, 2, 5, generator=draws)


def filled(groups: list[list[int]]) -> ReplayCache:
    cache = ReplayCache(CPU)
    for samples in groups:
        pairs = [pair(sample) for sample in samples]
        cache.store(samples, torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]))
    return cache


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_round_trip_in_sample_order_and_in_batches(size: int) -> None:
    cache = filled([[6, 2], [9, 0], [4]])
    assert sum(cache.batches(size), []) == [0, 2, 4, 6, 9]
    batches = [cache.pairs(samples) for samples in cache.batches(size)]
    order = [0, 2, 4, 6, 9]
    assert [len(states) for states, _ in batches] == [len(order[i : i + size]) for i in range(0, 5, size)]
    assert torch.equal(torch.cat([states for states, _ in batches]), torch.stack([pair(s)[0] for s in order]))
    assert torch.equal(torch.cat([targets for _, targets in batches]), torch.stack([pair(s)[1] for s in order]))


def test_pairs_are_detached_copies_in_their_own_dtypes() -> None:
    states, targets = (each[None] for each in pair(1, torch.float64))
    states.requires_grad_()
    cache = ReplayCache(CPU)
    cache.store([1], states * 1, targets.bfloat16())
    kept_states, kept_targets = cache.pairs([1])
    assert not kept_states.requires_grad
    assert (kept_states.dtype, kept_targets.dtype) == (torch.float64, torch.bfloat16)
    shared = targets.clone()
    cache.store([1], states, shared)
    shared.zero_()
    assert torch.equal(cache.pairs([1])[1], targets)  # a copy: the caller may reuse its memory


def test_a_new_pair_replaces_the_old_one_and_clear_forgets() -> None:
    cache = filled([[1, 2]])
    state, target = pair(7)
    cache.store([1], state[None], target[None])
    states, _ = cache.pairs([1, 2])
    assert torch.equal(states, torch.stack([state, pair(2)[0]]))
    cache.clear()
    assert cache.batches(2) == [] and not cache.states and not cache.targets


def test_pairs_over_the_budget_stay_in_host_memory() -> None:
    """The meta device stands for an accelerator: it has a type of its own and no memory."""
    device = torch.device("meta")
    state, target = (each[None] for each in pair(1))
    one = state.nbytes + target.nbytes
    cache = ReplayCache(device, budget=2 * one)
    for sample in range(4):
        cache.store([sample], state, target)
    assert [cache.states[sample].device.type for sample in range(4)] == ["meta", "meta", "cpu", "cpu"]
    assert [cache.targets[sample].device.type for sample in range(4)] == ["meta", "meta", "cpu", "cpu"]
    assert all(part.device == device for samples in cache.batches(3) for part in cache.pairs(samples))
