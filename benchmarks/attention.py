"""Attention that keeps its weights, which ours does in training on CPUs, against torch's own. Forward and back, one
thread."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import take_turns
from sora_lite.memory import keep_memory
from sora_lite.models.attention import LEAST, MOST, attention

TOKENS = (256, 512, 768, LEAST, 1280, MOST)
HEADS, WIDTHS = 6, (32, 64, 128)


def ratio(tokens: int, width: int) -> float:
    """Torch's time as a multiple of ours, with queries, keys and values side by side, as one layer makes them."""
    qkv = torch.randn(1, tokens, 3, HEADS, width).unbind(2)
    q, k, v = (one.transpose(1, 2).requires_grad_() for one in qkv)
    grad = torch.randn(1, tokens, HEADS, width).transpose(1, 2)

    def step(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), grad)

    seconds = take_turns(
        {"ours": lambda: step(attention), "torch": lambda: step(F.scaled_dot_product_attention)}, rounds=15, pick=min
    )
    return seconds["torch"] / seconds["ours"]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_memory()
    print(
        f"CPU time of torch's attention of {HEADS} heads, as a multiple of ours, which is used from {LEAST:,} tokens on"
    )
    print(f"  {'head width':<14}" + "".join(f"{width:>8}" for width in WIDTHS))
    for tokens in TOKENS:
        print(f"  {f'{tokens:,} tokens':<14}" + "".join(f"{ratio(tokens, width):>8.2f}" for width in WIDTHS))
