"""Segment-prefix attention as an operator of torch: dense calls over prefixes of segments, joined by log-sum-exp.

Clean segment i and noisy segment i + 1 see the same clean prefix 0 .. i. So a doubled sequence of n segments is n dense
calls, the queries of these two together against a prefix of the keys, and one batched call a sample, of every noisy
segment with itself; noisy rows are the two parts merged. Backward makes the same calls, each with the merged output
and log-sum-exp, and adds up. No mask is built, and keys and values are read where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mirai_kernels.chunk_attention.launch import DENSE, TRITON, check_tensors
from mirai_kernels.dense_attention.library import Attended, Library
from mirai_kernels.dense_attention.triton_merge import merge_launch


def segment_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, segment_tokens: int, doubled: bool, by: str = TRITON
) -> Tensor:
    """Attended [B, N, H, D] of q, k, v [B, N, H, D], all with gradient.

    doubled: N / 2 clean tokens and then as many noisy ones (`reference.teacher_forced_mask`); else N tokens of which
    each sees its own segment and all earlier ones (`reference.segment_causal_mask`). by: "triton" or the library that
    computes the dense calls. ValueError unless these are whole segments, and as in `check_tensors`.
    """
    check_tensors((q, k, v), by)
    if not q.shape == k.shape == v.shape or not q.shape[1] or q.shape[1] % ((1 + doubled) * segment_tokens):
        kind = "clean and as many noisy segments" if doubled else "segments"
        raise ValueError(f"{q.shape[1]} queries, {k.shape[1]} keys: not the same whole {kind} of {segment_tokens}")
    return _forward(q.contiguous(), k.contiguous(), v.contiguous(), segment_tokens, doubled, by)[0]


class _Rows:
    """Where the tokens of q [B, N, H, D] stand that one dense call takes."""

    def __init__(self, q: Tensor, segment: int, doubled: bool) -> None:
        self.segment = segment
        self.clean = q.shape[1] // (1 + doubled)
        self.total = q.shape[1]

    def prefixes(self) -> Iterator[tuple[list[slice], slice]]:
        """(queries, keys) of the calls over clean prefixes: a clean segment and the noisy one after it, if any."""
        for end in range(self.segment, self.clean + 1, self.segment):
            queries = [slice(end - self.segment, end)]
            if self.clean + end < self.total:
                queries.append(slice(self.clean + end, self.clean + end + self.segment))
            yield queries, slice(0, end)

    def noisy(self, tensor: Tensor, sample: int) -> Tensor:
        """The noisy segments of one sample of [B, N, H, D] as a batch [segments, tokens, H, D], a view."""
        return tensor[sample, self.clean :].unflatten(0, (-1, self.segment))

    def noisy_lse(self, lse: Tensor, sample: int) -> Tensor:
        """The same of [B, H, N]: [segments, H, tokens]."""
        return lse[sample, :, self.clean :].unflatten(1, (-1, self.segment)).transpose(0, 1)


def _joined(tensor: Tensor, places: list[slice], dim: int) -> Tensor:
    """Queries of a call, one after another; contiguous."""
    return torch.cat([tensor.narrow(dim, place.start, place.stop - place.start) for place in places], dim)


@torch.library.custom_op("mirai::segment_prefix_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, segment: int, doubled: bool, by: str) -> tuple[Tensor, Tensor]:
    """(attended, log-sum-exp [B, H, N])"""
    dense, rows = DENSE[by], _Rows(q, segment, doubled)
    out = torch.empty_like(q)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    if doubled:
        for sample in range(q.shape[0]):
            own = dense.forward(rows.noisy(q, sample), rows.noisy(k, sample), rows.noisy(v, sample))
            rows.noisy(out, sample).copy_(own.out)
            rows.noisy_lse(lse, sample).copy_(own.lse)
    for places, prefix in rows.prefixes():
        found = dense.forward(_joined(q, places, 1), k[:, prefix], v[:, prefix])
        clean, *noisy = places
        out[:, clean] = found.out[:, :segment]
        lse[:, :, clean] = found.lse[:, :, :segment]
        for place in noisy:
            before = Attended(found.out[:, segment:], found.lse[:, :, segment:])
            merge_launch(Attended(out[:, place], lse[:, :, place]), before).run()
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, segment: int, doubled: bool, by: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("mirai::segment_prefix_attention_backward", mutates_args=())
def _backward(grad_out: Tensor, tensors: list[Tensor], segment: int, doubled: bool, by: str) -> list[Tensor]:
    """Gradients of q, k, v; tensors: q, k, v, out, lse. They add up in float32."""
    q, k, v, out, lse = tensors
    dense, rows = DENSE[by], _Rows(q, segment, doubled)
    sums = [torch.zeros(each.shape, dtype=torch.float32, device=each.device) for each in (q, k, v)]
    for places, prefix in rows.prefixes():
        grad, queries, attended = (_joined(each, places, 1) for each in (grad_out, q, out))
        merged = Attended(attended, _joined(lse, places, 2))
        found = dense.backward(grad, queries, k[:, prefix], v[:, prefix], merged)
        for index, place in enumerate(places):
            sums[0][:, place] += found.q[:, index * segment : (index + 1) * segment]
        sums[1][:, prefix] += found.k
        sums[2][:, prefix] += found.v
    if doubled:
        _add_noisy(sums, grad_out, tensors, dense, rows)
    return [total.to(each.dtype) for total, each in zip(sums, (q, k, v), strict=True)]


def _add_noisy(sums: list[Tensor], grad_out: Tensor, tensors: list[Tensor], dense: Library, rows: _Rows) -> None:
    """Add to the sums what noisy segments give themselves."""
    lse = tensors[4]
    for sample in range(lse.shape[0]):
        grad, q, k, v, out = (rows.noisy(each, sample) for each in (grad_out, *tensors[:4]))
        merged = Attended(out, rows.noisy_lse(lse, sample).contiguous())
        for total, part in zip(sums, dense.backward(grad, q, k, v, merged), strict=True):
            rows.noisy(total, sample).add_(part)


@_backward.register_fake
def _(grad_out: Tensor, tensors: list[Tensor], segment: int, doubled: bool, by: str) -> list[Tensor]:
    return [torch.empty_like(each) for each in tensors[:3]]


def _setup(ctx, inputs, output) -> None:
    q, k, v, ctx.segment, ctx.doubled, ctx.by = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _gradients(ctx, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = _backward(grad_out.contiguous(), list(ctx.saved_tensors), ctx.segment, ctx.doubled, ctx.by)
    return (*found, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup)
