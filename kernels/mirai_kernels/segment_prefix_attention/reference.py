"""Specification of segment-prefix attention: dense attention under an explicit boolean mask.

Two masks over tokens that stand segment after segment: segment-causal, and teacher-forced over the doubled
sequence [clean | noisy] (Causal-Forcing). A kernel never builds them: each row is one or two runs of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_causal_mask(tokens: int, segment_tokens: int, device: torch.device | None = None) -> Tensor:
    """[tokens, tokens], true where query (row) sees key (column): its own segment, whole, and all earlier ones."""
    segment = torch.arange(tokens, device=device) // segment_tokens
    return segment[:, None] >= segment[None, :]


def teacher_forced_mask(tokens: int, segment_tokens: int, device: torch.device | None = None) -> Tensor:
    """[2 tokens, 2 tokens] of a doubled sequence: `tokens` clean ones, then as many noisy ones.

    A clean query sees the clean segments up to its own. A noisy one sees the clean segments before its own, and
    its own noisy segment; never the clean version of itself, never another noisy segment.
    """
    segment = torch.arange(tokens, device=device) // segment_tokens
    clean = segment[:, None] >= segment[None, :]
    earlier = segment[:, None] > segment[None, :]
    own = segment[:, None] == segment[None, :]
    return torch.cat((torch.cat((clean, torch.zeros_like(own)), 1), torch.cat((earlier, own), 1)), 0)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys a query sees; q, k, v [B, N, H, D], mask [N, N]; dtype of q.

    Scores and softmax are float32, or float64 for float64 inputs. Every query must see at least one key.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.to(wide)).to(q.dtype)
