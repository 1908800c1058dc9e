"""What the model learns to predict, and at which times."""

from dataclasses import dataclass
from enum import Enum


class TimestepSampling(Enum):
    """Density from which training draws the time t in [0, 1]."""

    logit_normal = "logit_normal"
    uniform = "uniform"


class DiffusionObjective(Enum):
    """What the model predicts: noise - data on the straight path, the noise, or v = alpha noise - sigma data."""

    rectified_flow = "rectified_flow"
    epsilon = "epsilon"
    velocity = "velocity"


class NoiseSchedule(Enum):
    """Schedule of 1,000 steps for the objectives epsilon and velocity."""

    linear = "linear"
    cosine = "cosine"


class ShiftBy(Enum):
    """How the time shift of rectified flow depends on the number of tokens: not, with its square root (Stable
    Diffusion 3), or exponentially (FLUX.1)."""

    fixed = "fixed"
    sqrt = "sqrt"
    exponential = "exponential"


@dataclass(kw_only=True, slots=True)
class DiffusionConfig:
    """What the model learns to predict, how training draws times, and how often it drops conditions."""

    objective: DiffusionObjective = DiffusionObjective.rectified_flow
    """What the model predicts."""
    timesteps: TimestepSampling = TimestepSampling.logit_normal
    """Density of the training times; `uniform` for objectives with a noise schedule."""
    noise_schedule: NoiseSchedule = NoiseSchedule.linear
    """Noise schedule of epsilon and velocity; rectified flow has none."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that its last step is pure noise; with velocity alone."""
    vlb_weight: float = 0.001
    """Weight of the variational bound, summed over its 1,000 terms, for a model that learns its variance."""
    shift: float = 1.0
    """Time shift alpha of t' = alpha t / (1 + (alpha-1) t), for rectified flow; above 1 favours noise (many tokens)."""
    shift_by: ShiftBy = ShiftBy.fixed
    """How the shift depends on the tokens of a clip: fixed; sqrt: shift * sqrt(tokens / shift_tokens); exponential:
    shift * exp(shift_slope * (tokens - shift_tokens))."""
    shift_tokens: int = 256
    """Number of tokens at which the shift is `shift`."""
    shift_slope: float = 0.65 / 3840
    """Growth of the shift's logarithm per token, for `exponential`; by default that of FLUX.1."""
    condition_dropout: float = 0.1
    """Probability that all conditions are dropped together, for classifier-free guidance."""
