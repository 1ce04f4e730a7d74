"""Dense attention by torch's own kernels, with what its public call hides: the log-sum-exp, and the backward.

The backward takes output and log-sum-exp from outside. Given those over all keys, the backward over some of the keys
is exact for these, and gradients of the queries over parts add up: it is how ring attention goes backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_ATEN = torch.ops.aten


class Attended(NamedTuple):
    """out [B, Q, H, D] and lse [B, H, Q], log-sum-exp of the scaled scores in float32 or wider; both contiguous."""

    out: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """Of q [B, Q, H, D] and of k and v [B, K, H, D]; contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Library:
    """q [B, Q, H, D] to k and v [B, K, H, D], all of them, scaled by D^-0.5.

    forward(q, k, v); backward(grad_out [B, Q, H, D], q, k, v, attended).
    """

    forward: Callable[[Tensor, Tensor, Tensor], Attended]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Attended], Gradients]


def _by_heads(*tensors: Tensor) -> list[Tensor]:
    """[B, N, H, D] as views [B, H, N, D], which is how torch's kernels count."""
    return [each.transpose(1, 2) for each in tensors]


def _by_tokens(*tensors: Tensor) -> list[Tensor]:
    return [each.transpose(1, 2).contiguous() for each in tensors]


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(*_by_heads(q, k, v), None, True)
    return Attended(_by_tokens(out)[0], lse.squeeze(-1).contiguous())


def _cudnn_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended) -> Gradients:
    grad, q, k, v, out = _by_heads(grad_out, q, k, v, attended.out)
    lse = attended.lse.unsqueeze(-1)
    lengths = q.shape[2], k.shape[2]
    found = _ATEN._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, *_no_dropout(q), None, None, None, *lengths, 0.0, False
    )
    return Gradients(*_by_tokens(*found))


def _flash_forward(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(*_by_heads(q, k, v))
    return Attended(_by_tokens(out)[0], lse.contiguous())


def _flash_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended) -> Gradients:
    grad, q, k, v, out = _by_heads(grad_out, q, k, v, attended.out)
    lengths = q.shape[2], k.shape[2]
    found = _ATEN._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, attended.lse, None, None, *lengths, 0.0, False, *_no_dropout(q)
    )
    return Gradients(*_by_tokens(*found))


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """Seed and offset of the draws that a backward without dropout does not make."""
    return tuple(torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))  # type: ignore[return-value]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(*_by_heads(q, k, v))
    return Attended(_by_tokens(out)[0], lse.contiguous())


def _cpu_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended) -> Gradients:
    grad, q, k, v, out = _by_heads(grad_out, q, k, v, attended.out)
    found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, attended.lse, 0.0, False
    )
    return Gradients(*_by_tokens(*found))


LIBRARIES = {
    "cudnn": Library(_cudnn_forward, _cudnn_backward),
    "flash": Library(_flash_forward, _flash_backward),  # FlashAttention-2 as torch ships it
    "cpu": Library(_cpu_forward, _cpu_backward),
}
