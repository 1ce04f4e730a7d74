"""Dense attention by PyTorch: always available, differentiable, no mask."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# What torch may use is a switch of the whole process. Ranks are processes, but in tests they are threads.
_SWITCH = threading.Lock()


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, all of [B, tokens, heads, head_dim]; keys may outnumber queries."""
    return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class OneKernel:
    """`dense` by one of torch's kernels and no other. Raises RuntimeError for what that kernel cannot do."""

    kernel: SDPBackend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with _SWITCH, sdpa_kernel(self.kernel):
            return dense(q, k, v)


CUDNN = OneKernel(SDPBackend.CUDNN_ATTENTION)
FLASH = OneKernel(SDPBackend.FLASH_ATTENTION)  # FlashAttention-2 as torch ships it
EFFICIENT = OneKernel(SDPBackend.EFFICIENT_ATTENTION)
