"""Whole-block activation recomputation, inside the FSDP unit.

The block's `forward` is replaced, not the block: FSDP's hooks stay outside (parameters are gathered once for
recomputation and backward together) and parameter names stay official. Blocks are pure, so a recomputed block
repeats no cache write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(network: nn.Module, paths: Sequence[str]) -> None:
    """Keep only the inputs of the named submodules for backward; passes without gradient are unaffected."""
    for path in paths:
        module = network.get_submodule(path)
        module.forward = _Recomputed(module.forward)  # type: ignore[method-assign]


class _Recomputed:
    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # no network here draws random numbers, so there is no state to restore
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
