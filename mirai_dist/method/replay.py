"""Replay: on critic steps the predictor alone trains again on the (state, target) pairs of the last generator step.

The generator is not touched. Pairs are kept per sample, on the compute device when they fit and in host memory
otherwise, and run with segments as batch (Video-Mirai section 3.4; spec 7.2 step "predictor replay").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ReplayCache:
    """(state [I, S, dim], target [I, S, D]) of each sample of the last generator update that this rank owns."""

    def __init__(self, device: torch.device, budget: int | None = None) -> None:
        """budget: bytes of device memory the pairs may take; None asks the device for half of what is free."""
        self.device = device
        self.budget = budget
        self.states: dict[int, Tensor] = {}
        self.targets: dict[int, Tensor] = {}

    def clear(self) -> None:
        self.states, self.targets = {}, {}

    def store(self, samples: Sequence[int], states: Tensor, targets: Tensor) -> None:
        """Keep detached pairs of the samples, states [B, I, S, dim] and targets [B, I, S, D], each in its dtype."""
        place = self._place(states.nbytes + targets.nbytes)
        for index, sample in enumerate(samples):
            self.states[sample] = states[index].detach().to(place, copy=True)
            self.targets[sample] = targets[index].detach().to(place, copy=True)

    def batches(self, size: int) -> list[list[int]]:
        """The samples that have a pair, in order, `size` at a time."""
        samples = sorted(self.states)
        return [samples[first : first + size] for first in range(0, len(samples), size)]

    def pairs(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pairs of these samples on the device: states [B, I, S, dim], targets [B, I, S, D]."""
        states = torch.stack([self.states[s].to(self.device) for s in samples])
        return states, torch.stack([self.targets[s].to(self.device) for s in samples])

    def _place(self, new_bytes: int) -> torch.device:
        if self.device.type == "cpu":
            return self.device
        held = sum(t.nbytes for kept in (self.states, self.targets) for t in kept.values() if t.device == self.device)
        budget = self.budget if self.budget is not None else held + torch.cuda.mem_get_info(self.device)[0] // 2
        return self.device if held + new_bytes <= budget else torch.device("cpu")
