"""Specification of chunk attention: queries of one segment against [cached | own] keys and values.

No mask: causality is what the cache holds. The cache is a constant: no gradient reaches cached keys and values,
which is what lets a kernel leave out their half of the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_attention(
    q: Tensor, own: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(attended [B, Q, H, D] in the dtype of q, log-sum-exp [B, H, Q] of the scaled scores).

    q [B, Q, H, D]; own (keys, values) [B, K, H, D] carry gradient; cached ones [B, P, H, D], P >= 0, do not.
    Keys come rotated, in any order. Scores and softmax are float32, or float64 for float64 inputs.
    """
    keys, values = own
    if cached is not None:
        keys = torch.cat((cached[0].detach(), keys), dim=1)
        values = torch.cat((cached[1].detach(), values), dim=1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys.to(wide)) * q.shape[-1] ** -0.5
    normaliser = scores.logsumexp(dim=-1)
    weights = (scores - normaliser.unsqueeze(-1)).exp()
    return torch.einsum("bhqk,bkhd->bqhd", weights, values.to(wide)).to(q.dtype), normaliser
