"""Products of a large linear layer by oneDNN, which ours are on CPUs, against MKL's, which are torch's. One thread."""

import torch
from torch.nn import functional as F

from benchmarks.measure import take_turns
from sora_lite.models.linear import product

SHAPES = [(rows, width, out) for rows in (256, 1280) for width in (384, 768) for out in (width, 4 * width)]
"""Tokens, and what the layer reads and makes."""


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("CPU time of MKL's product of a linear layer, as a multiple of oneDNN's")
    print(f"  {'rows x in x out':<24}{'forward':>10}{'back to x':>12}{'to weights':>12}")
    for rows, width, out in SHAPES:
        x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
        grad = torch.randn(rows, out)
        seconds = take_turns(
            {
                "forward": lambda: F.linear(x, weight, bias),
                "forward, oneDNN": lambda: product(x, weight, bias),
                "x": lambda: grad @ weight,
                "x, oneDNN": lambda: product(grad, weight.t()),
                "weights": lambda: grad.t() @ x,
                "weights, oneDNN": lambda: product(grad.t(), x.t()),
            },
            rounds=30,
            pick=min,
        )
        ratios = [seconds[name] / seconds[f"{name}, oneDNN"] for name in ("forward", "x", "weights")]
        print(f"  {f'{rows:,} x {width} x {out:,}':<24}{ratios[0]:>10.2f}{ratios[1]:>12.2f}{ratios[2]:>12.2f}")
