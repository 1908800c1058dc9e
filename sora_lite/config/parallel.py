"""How one step is laid out over processes, and its arithmetic."""

from dataclasses import dataclass
from enum import Enum


class Precision(Enum):
    """Arithmetic of the trained model's forward and backward pass; master weights are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Offload(Enum):
    """Where the fp32 master weights and Adam's moments lie and are updated."""

    none = "none"
    """On the device that trains."""
    cpu = "cpu"
    """In the host's memory, by DeepSpeed's CPUAdam."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How one step is laid out over processes. One process per GPU (or per CPU rank)."""

    zero_stage: int = 2
    """DeepSpeed ZeRO: 0 replicates all, 1 shards optimizer state, 2 also gradients, 3 also parameters."""
    accumulation: int = 1
    """Forward and backward passes per micro-step and rank; does not change what a step holds, only memory."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    compile: bool = False
    """Run each block through torch.compile: faster, after some seconds at the start, at the first clips of a second
    size, which serve all others, and at the first single sample. Needs a C++ compiler."""
    precision: Precision = Precision.fp32
    """bf16 needs ZeRO 1 to 3."""
    offload: Offload = Offload.none
    """Where the optimizer's state lies; cpu needs ZeRO 1 to 3, g++ and, at the first start, some minutes to compile."""
    threads: int | None = None
    """CPU threads per rank for torch; null leaves torch's own choice."""
