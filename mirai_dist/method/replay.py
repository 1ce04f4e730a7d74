"""Replay: on critic steps the predictor alone trains again on the (state, target) pairs of the last generator step.

The generator is not touched. Pairs are kept per sample, on the compute device when they fit and in host memory
otherwise, and run with segments as batch (Video-Mirai section 3.4; spec 7.2 step "predictor replay").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class ReplayStep:
    """A predictor's mean cosine on pairs of one shape, and its gradient, in memory that never moves.

    Nothing in a call depends on values or waits for the device, and it writes to `cosine` and `gradients` alone: it
    can be captured as a CUDA graph once and replayed after every `load`. The graph of autograd ends at the states, so
    none of the backward pass is spent on them.
    """

    def __init__(
        self,
        cosine_of: Callable[[Tensor, Tensor], Tensor],
        parameters: Sequence[Tensor],
        states: Tensor,
        targets: Tensor,
    ) -> None:
        """cosine_of: mean cosine over pairs, as the predictor's forward gives it. parameters: what it depends on, whole
        in this process. states [B, I, S, dim] and targets [B, I, S, D]: of the shapes, dtypes and device of all that
        will be loaded; they are the first."""
        self._cosine_of, self._parameters = cosine_of, tuple(parameters)
        self._states, self._targets = (each.detach().clone() for each in (states, targets))
        self.cosine = torch.zeros((), device=states.device, dtype=torch.promote_types(states.dtype, torch.float32))
        self.gradients = tuple(torch.zeros_like(each) for each in parameters)

    def load(self, states: Tensor, targets: Tensor) -> None:
        """Pairs of the next calls, states [B, I, S, dim] and targets [B, I, S, D]; ValueError for another shape."""
        for memory, given in ((self._states, states), (self._targets, targets)):
            if memory.shape != given.shape:
                raise ValueError(f"pairs {tuple(given.shape)} for a replay step of {tuple(memory.shape)}")
            memory.copy_(given)

    def __call__(self) -> None:
        """Set `cosine`, and `gradients` to the gradient of -cosine by each parameter."""
        with torch.enable_grad():
            cosine = self._cosine_of(self._states, self._targets)
            found = torch.autograd.grad(-cosine, self._parameters)
        self.cosine.copy_(cosine.detach())
        for memory, gradient in zip(self.gradients, found, strict=True):
            memory.copy_(gradient)

    def captured(self) -> torch.cuda.CUDAGraph:
        """The call as a graph. It runs before on a stream of its own, so that whatever is made lazily is there."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        return graph
