"""AdamW, its learning-rate schedule, clipping and the average of the weights."""

from dataclasses import dataclass, field
from enum import Enum


class Schedule(Enum):
    """How the learning rate goes after the warm-up."""

    constant = "constant"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its learning-rate schedule, clipping and the average of the weights."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of AdamW's first and second moments."""
    eps: float = 1e-8
    """AdamW's epsilon; 1e-15 is usual with QK-norm under bf16."""
    weight_decay: float = 0.0
    """Decoupled decay of weight matrices; norms, biases and embeddings are never decayed."""
    clip: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    warmup_steps: int = 0
    """Steps of linear rise from 0."""
    schedule: Schedule = Schedule.constant
    """What follows the warm-up, until `run.steps`."""
    final_lr: float = 0.0
    """Fraction of `lr` that a cosine schedule ends on."""
    ema_decay: float = 0.9999
    """Largest decay of the averaged weights; at step n it is min(ema_decay, (1+n)/(10+n)). 0 turns it off."""
    ema_on_cpu: bool = False
    """Keep the averaged weights in the host's memory: 4 bytes a parameter less on GPUs, shared by the ranks of ZeRO."""
