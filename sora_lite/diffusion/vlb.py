"""The variational bound that trains a learned variance (Nichol & Dhariwal, arXiv 2102.09672), in bits per dimension.

Formulas and constants are those of the code that DiT was trained with (guided-diffusion), so that its losses are equal.
Tensors are B C ...; results are B.
"""

import math

import torch
from torch import Tensor

from sora_lite.diffusion.path import expand
from sora_lite.diffusion.schedule import Schedule, posterior_mean_weights


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)) of each element, in nats."""
    return 0.5 * (
        other_log_variance
        - log_variance
        - 1
        + (log_variance - other_log_variance).exp()
        + (mean - other_mean).square() * (-other_log_variance).exp()
    )


def _approximate_cdf(x: Tensor) -> Tensor:
    """Normal distribution function, by the tanh that the paper's loss was computed with; within 3e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P(x) of each element under a Gaussian in bins of width 2 / 255, open at the ends of [-1, 1], in nats.

    For pixels in [-1, 1] that come from bytes (DDPM, section 3.3); DiT takes it for latents as it is.
    """
    precision = (-log_scale).exp()
    above = _approximate_cdf(precision * (x - mean + 1 / 255))
    below = _approximate_cdf(precision * (x - mean - 1 / 255))
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp_min(1e-12).log()


def bound_term(
    table: Schedule, step: Tensor, *, data: Tensor, x: Tensor, predicted_data: Tensor, variance: Tensor
) -> Tensor:
    """The bound's term for step k (B int64): KL(q(x_{k-1} | x_k, data) || p(x_{k-1} | x_k)); k = 0: -log p(data | x_0).

    Mean over dimensions, in bits. `predicted_data` gives the mean of p; `variance` in [0, 1], where a model strays
    beyond it too, places its log-variance between those of the posterior and beta (equation 15).
    """
    weights = posterior_mean_weights(table.alpha, table.sigma, table.previous_alpha, table.previous_sigma)
    # The posterior of step 0 has no variance; the bound's code takes that of step 1 for it.
    low = table.posterior_variance()
    low = torch.cat([low[1:2], low[1:]]).log()
    of_data, of_x, low, high = (
        expand(values.to(step.device)[step].float(), x) for values in (*weights, low, table.betas.log())
    )
    log_variance = variance * high + (1 - variance) * low
    mean = of_data * predicted_data + of_x * x
    divergence = normal_kl(of_data * data + of_x * x, low, mean, log_variance)
    likelihood = discretized_log_likelihood(data, mean, 0.5 * log_variance)
    nats = torch.where(expand(step == 0, x), -likelihood, divergence)
    return nats.flatten(1).mean(1) / math.log(2)
