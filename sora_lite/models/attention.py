"""Attention over many tokens on CPUs, trained in less time and more memory than by torch's own.

Torch's (FlashAttention; Dao et al., arXiv 2205.14135) computes the weights of all pairs of tokens again on the way
back, which saves memory traffic on GPUs. Here they are kept, which leaves six matrix products of the seven, and each of
these is made by the library that is fastest for its shape. One head of one sample at a time: as much fits a cache.

Shapes: B batch, N tokens, M tokens attended to, d head width. Results and gradients are B heads N d, in memory B N
heads d.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sora_lite.models.linear import ONEDNN, product, transposed

LEAST, MOST = 1024, 2048
"""Tokens between which it is worth it, as measured on one thread and two. With fewer, calls outweigh the products; with
more, the weights (4 heads N M bytes per sample and layer) would take more memory than all that a block of head width 64
keeps besides."""


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` takes less time than torch's: on the way back, so only where there is one."""
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    here = ONEDNN and all(one.device.type == "cpu" and one.dtype == torch.float32 for one in (q, k, v))
    return trains and here and LEAST <= q.shape[2] <= MOST and LEAST <= k.shape[2] <= MOST


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, float32 on a CPU. It has no second derivatives.

    q: B heads N d; k, v: B heads M d. Returns B heads N d.
    """
    return _Attention.apply(q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Loops that torch.compile would unroll, and products that it must not see (`linear.product`).
        call = torch.ops.sora_lite.attention if torch.compiler.is_compiling() else _forward
        out, weights = call(q, k, v)
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        call = torch.ops.sora_lite.attention_backward if torch.compiler.is_compiling() else _backward
        return call(grad, *ctx.saved_tensors)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the weights, B heads N M."""
    out, weights = _like(q), q.new_empty(*q.shape[:3], k.shape[2])
    scale = q.shape[3] ** -0.5
    for b, h in _heads(q):
        w = weights[b, h]
        torch.mm(q[b, h], transposed(k[b, h] * scale), out=w)
        torch.softmax(w, -1, out=w)
        out[b, h] = product(w, v[b, h].contiguous().t())
    return out, weights


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dv = w^T g; with s = dsoftmax(g v^T): dq = s k / sqrt(d), dk = s^T q / sqrt(d)."""
    grad_q, grad_k, grad_v = _like(q), _like(k), _like(v)
    s = weights.new_empty(weights.shape[2:])
    scale = q.shape[3] ** -0.5
    for b, h in _heads(q):
        w = weights[b, h]
        torch.mm(grad[b, h], transposed(v[b, h]), out=s)
        torch._softmax_backward_data(s, w, -1, w.dtype, grad_input=s)
        grad_q[b, h] = product(s, (k[b, h] * scale).t())
        grad_k[b, h] = product(transposed(q[b, h] * scale), s.t()).t()
        grad_v[b, h] = product(transposed(grad[b, h]), w.t()).t()
    return grad_q, grad_k, grad_v


def _heads(q: Tensor) -> list[tuple[int, int]]:
    return [(b, h) for b in range(q.shape[0]) for h in range(q.shape[1])]


def _like(x: Tensor) -> Tensor:
    """Empty, of the shape of x, in memory B N heads d."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


torch.library.define("sora_lite::attention", "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
torch.library.impl("sora_lite::attention", "CPU", _forward)
torch.library.define(
    "sora_lite::attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor weights) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("sora_lite::attention_backward", "CPU", _backward)


@torch.library.register_fake("sora_lite::attention")
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(*q.shape[:3], k.shape[2])


@torch.library.register_fake("sora_lite::attention_backward")
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)
