"""Products of a large linear layer by oneDNN, which ours are on CPUs, against MKL's, which are torch's. One thread."""

import torch
from torch.nn import functional as F

from benchmarks.measure import take_turns
from sora_lite.models.linear import product, transposed

SHAPES = [
    (rows, ratio_in * width, ratio_out * width)
    for rows in (256, 1280)
    for width in (384, 768)
    for ratio_in, ratio_out in ((1, 1), (1, 4), (4, 1))
]
"""Tokens, and what the layer reads and makes."""


def ratios(rows: int, width: int, out: int) -> list[float]:
    """MKL's time as a multiple of oneDNN's: forward, back to x, back to the weights."""
    x, weight, bias, grad = torch.randn(rows, width), torch.randn(out, width), torch.randn(out), torch.randn(rows, out)
    seconds = take_turns(
        {
            "forward": lambda: F.linear(x, weight, bias),
            "forward, oneDNN": lambda: product(x, weight, bias),
            "to x": lambda: grad @ weight,
            "to x, oneDNN": lambda: product(grad, weight.t()),
            "to weights": lambda: grad.t() @ x,
            "to weights, oneDNN": lambda: product(transposed(grad), x.t()),
        },
        rounds=30,
        pick=min,
    )
    return [seconds[name] / seconds[f"{name}, oneDNN"] for name in ("forward", "to x", "to weights")]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("CPU time of MKL's product of a linear layer, as a multiple of oneDNN's")
    print(f"  {'rows x in x out':<24}{'forward':>12}{'back to x':>12}{'to weights':>12}")
    for shape in SHAPES:
        name = " x ".join(f"{size:,}" for size in shape)
        print(f"  {name:<24}" + "".join(f"{ratio:>12.2f}" for ratio in ratios(*shape)))
