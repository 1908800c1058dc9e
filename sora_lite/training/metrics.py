"""Numbers about a run: sums over ranks, speed, and the use that is made of the hardware."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sora_lite.parallel.env import Rank

# Dense bf16 peak in 1e12 FLOP/s, from the makers' data sheets (without sparsity).
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}


class Means:
    """Running means of named values over steps and, when read, over ranks.

    Values may be tensors on the device: they are summed there, and only `read` waits for it.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: float | Tensor, weight: float | Tensor = 1.0) -> None:
        """Count a scalar in. Every rank must use the same names between two reads."""
        pair = (torch.as_tensor(one, dtype=torch.float64, device=self._rank.device) for one in (value, weight))
        value, weight = pair
        if name not in self._sums:
            self._sums[name] = torch.zeros(2, dtype=torch.float64, device=self._rank.device)
        # A mean over nothing may be NaN; it must not touch the sum.
        self._sums[name] += torch.stack([torch.where(weight > 0, value * weight, 0.0), weight])

    def read(self) -> dict[str, float]:
        """Weighted mean of each name over all ranks, then start anew. A collective. Names without weight drop out."""
        names = sorted(self._sums)
        if not names:
            return {}
        totals = self._rank.sum(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums.clear()
        return {name: total / weight for name, (total, weight) in zip(names, totals, strict=True) if weight > 0}


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations (a multiply-add is two) of `call`, which should run on the meta device.

    As in the figures of the DiT paper: of matrix products, and a multiply-add for each element of a layer norm.
    """
    norms = {torch.ops.aten.native_layer_norm: lambda shape, *_, **__: 2 * math.prod(shape)}
    with FlopCounterMode(display=False, custom_mapping=norms) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def peak_flops(device: torch.device, configured_tflops: float | None) -> float:
    """Peak FLOP/s of one device: as configured, else a known GPU's data sheet, else the speed of a matrix product."""
    if configured_tflops is not None:
        return configured_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if known in name:
                return tflops * 1e12
    return _measured_peak(device)


def _measured_peak(device: torch.device, side: int = 1024, repeats: int = 10) -> float:
    a = torch.ones(side, side, device=device)

    def product() -> Tensor:
        result = a @ a
        float(result[0, 0])  # waits for the device
        return result

    product()
    best = min(_seconds(product) for _ in range(repeats))
    return 2 * side**3 / best


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
