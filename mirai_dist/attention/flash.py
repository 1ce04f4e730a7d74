"""Dense attention by the FlashAttention packages, each installed apart from the others.

Generations 2 (Ampere and later), 3 (Hopper) and 4 (Hopper and Blackwell) have one call with the same arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from mirai_dist.attention.patterns import Pattern

MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}


@dataclass(frozen=True)
class FlashAttention:
    """`flash_attn_func` of one generation: q, k, v [B, tokens, heads, head_dim] in float16 or bfloat16."""

    function: Any

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = self.function(q, k, v)
        # Generations 3 and 4 have returned (attended, log-sum-exp) in some versions and attended alone in others.
        return found[0] if isinstance(found, tuple) else found


def load(generation: int) -> Pattern:
    """Dense attention by one generation. Raises ImportError where its package is missing or does not fit torch."""
    return FlashAttention(import_module(MODULES[generation]).flash_attn_func)
