"""A linear layer whose large matrix products are oneDNN's on CPUs."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    # oneDNN and torch's layer above it keep code for each number of rows, half a MiB apiece and by default 1,024 times.
    # Both look here at their first product. To make it again takes a millisecond.
    os.environ.setdefault(_cache, "128")

ONEDNN = torch.backends.mkldnn.is_available()
LARGE = 2**17
"""Weights of a layer from which on the faster product is worth the longer way to it, as measured on an AMD EPYC."""
FEW_THREADS = 2
"""So many threads copy a transpose more slowly together than a single one that goes about it in another way."""


class Linear(nn.Linear):
    """`nn.Linear`, with the same results to rounding; large ones have no second derivatives on CPUs.

    Torch has two libraries for matrix products on CPUs, and in float32 it asks MKL, where it has it. The other one,
    oneDNN, is faster (`python -m benchmarks linear`), but for the way back to the weights from fewer than some 64 rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: ... in_features. Returns ... out_features."""
        large = ONEDNN and self.in_features * self.out_features >= LARGE and x.numel() > 0
        here = x.device.type == self.weight.device.type == "cpu"
        if large and here and x.dtype == self.weight.dtype == torch.float32 and self.weight.is_contiguous():
            y = _Linear.apply(x.reshape(-1, self.in_features), self.weight, self.bias)
            return y.view(*x.shape[:-1], self.out_features)
        return super().forward(x)


class _Linear(torch.autograd.Function):
    """y = x W^T + b, where x is n x in_features."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx = g W, dW = g^T x, db = sum of g."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if needs_x else None,
            product(transposed(grad), x.contiguous().t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, without derivatives. x: n x in_features.

    weight must be contiguous, or the transpose of what is: for others oneDNN's code is a thousand times slower.
    """
    # torch.compile makes no code of oneDNN's products by weights that change, so there it must not see what this is.
    call = torch.ops.sora_lite.product if torch.compiler.is_compiling() else _onednn
    return call(x, weight, bias)


def transposed(x: Tensor) -> Tensor:
    """x^T of a matrix, contiguous. `product` would copy a first factor that is not, but more slowly."""
    if torch.compiler.is_compiling() or torch.get_num_threads() > FEW_THREADS:
        return x.t().contiguous()
    # On one thread torch's copy of a transpose takes three times as long as its shuffle of one pixel's channels, which
    # is the same.
    rows, columns = x.shape
    pixel = x.contiguous().as_strided((1, x.numel(), 1, 1), (x.numel(), 1, x.numel(), x.numel()))
    return F.channel_shuffle(pixel, rows).view(columns, rows)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # it is read as if it were
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


torch.library.define("sora_lite::product", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("sora_lite::product", "CPU", _onednn)


@torch.library.register_fake("sora_lite::product")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
