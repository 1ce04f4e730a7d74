"""Activation recomputation of whole blocks, or of all of a block but its attention, inside the FSDP unit.

The block's `forward` is replaced, not the block: FSDP's hooks stay outside (parameters are gathered once for
recomputation and backward together) and parameter names stay official. Blocks with gradient write nothing, so a
recomputed block repeats no cache write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

# Attention as torch's dispatcher sees it, which is what can be kept: torch's own kernels, with the axis of tokens
# [B, H, N, D], those that our kernels join, and the flash-attn package's second generation, [B, N, H, D].
_KEPT = {
    "aten::_scaled_dot_product_flash_attention": 2,
    "aten::_scaled_dot_product_cudnn_attention": 2,
    "aten::_scaled_dot_product_efficient_attention": 2,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 2,
    "mirai::chunk_attention": 1,
    "mirai::segment_prefix_attention": 1,
    "flash_attn::_flash_attn_forward": 1,
}


def recompute(network: nn.Module, paths: Sequence[str], keep_attention: bool = False) -> None:
    """Keep only the inputs of the named submodules for backward, and if asked what attention over at least as many
    keys as queries gave; passes without gradient are unaffected."""
    contexts = partial(create_selective_checkpoint_contexts, _policy) if keep_attention else noop_context_fn
    for path in paths:
        module = network.get_submodule(path)
        module.forward = _Recomputed(module.forward, contexts)  # type: ignore[method-assign]


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Attention over few keys, as those of a text, is as large to keep as any other and little to compute again."""
    axis = _KEPT.get(getattr(getattr(operator, "_schema", None), "name", ""))
    if axis is None:
        return CheckpointPolicy.PREFER_RECOMPUTE
    queries, keys = args[0].shape[axis], args[1].shape[axis]
    return CheckpointPolicy.MUST_SAVE if keys >= queries else CheckpointPolicy.PREFER_RECOMPUTE


class _Recomputed:
    def __init__(self, forward: Any, contexts: Callable[[], Any]) -> None:
        self.forward, self.contexts = forward, contexts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # no network here draws random numbers, so there is no state to restore
        return checkpoint(
            self.forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=self.contexts, **kwargs
        )
