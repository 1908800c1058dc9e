"""Noise schedules of 1,000 steps (Ho et al., arXiv 2006.11239): x_k = alpha_k data + sigma_k noise.

A schedule is its betas, a float64 vector: step k adds noise of variance beta_k, alpha_k^2 is the product of 1 - beta_j
for all j <= k (in the papers "alpha bar"), and sigma_k^2 = 1 - alpha_k^2. Steps go from 0 (least noise) to 999.
Outside of this package a step is the time k / 1000, in float64, from which 1000 * time is exactly k again.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, repeat
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)

STEPS = 1000
"""Steps of every schedule."""


def linear_betas() -> Tensor:
    """1e-4 to 2e-2 (DDPM, section 4; Peebles & Xie)."""
    return torch.linspace(1e-4, 2e-2, STEPS, dtype=torch.float64)


def cosine_betas() -> Tensor:
    """alpha^2 falls as a squared cosine (Nichol & Dhariwal, arXiv 2102.09672, equation 17); no beta above 0.999."""
    u = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    alpha_squared = ((u + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - alpha_squared[1:] / alpha_squared[:-1]).clamp_max(0.999)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas of the schedule rescaled to end in pure noise (Lin et al., arXiv 2305.08891, algorithm 1)."""
    alpha = (1 - betas).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha_squared = alpha.square()
    return 1 - alpha_squared / torch.cat([alpha_squared.new_ones(1), alpha_squared[:-1]])


BETAS = {"linear": linear_betas, "cosine": cosine_betas}
"""Schedules by name."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Schedule:
    """Tables over the steps, float64, each of shape 1000.

    betas; alpha, sigma: as above; previous_alpha, previous_sigma: those of step k - 1, and 1 and 0 (data) for k = 0.
    """

    betas: Tensor
    alpha: Tensor
    sigma: Tensor
    previous_alpha: Tensor
    previous_sigma: Tensor

    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{k-1} | x_k, data) (DDPM, equation 7); 0 for k = 0."""
        return posterior_variance(self.alpha, self.sigma, self.previous_alpha, self.previous_sigma)


@lru_cache(maxsize=8)
def schedule(name: str, zero_terminal: bool = False) -> Schedule:
    """The schedule `name` of `BETAS`, if asked for with zero signal at its last step."""
    betas = BETAS[name]()
    if zero_terminal:
        betas = zero_terminal_snr(betas)
    alpha_squared = (1 - betas).cumprod(0)
    alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
    one = alpha.new_ones(1)
    return Schedule(
        betas=betas,
        alpha=alpha,
        sigma=sigma,
        previous_alpha=torch.cat([one, alpha[:-1]]),
        previous_sigma=torch.cat([0 * one, sigma[:-1]]),
    )


# One step of any path x = alpha data + sigma noise, from (alpha, sigma) to a less noisy (alpha_to, sigma_to), as if the
# noise had been added in independent steps. For neighbours of a schedule these are the formulas of DDPM, and for every
# n-th of its steps those of the respaced chain (Nichol & Dhariwal, section 4).


def step_variance(alpha: Number, sigma: Number, alpha_to: Number, sigma_to: Number) -> Number:
    """Variance of the noise that the step added: for neighbours of a schedule beta."""
    return sigma**2 - (alpha / alpha_to) ** 2 * sigma_to**2


def posterior_variance(alpha: Number, sigma: Number, alpha_to: Number, sigma_to: Number) -> Number:
    """Variance of x_to given x and the data (DDPM, equation 7): "beta tilde"."""
    return step_variance(alpha, sigma, alpha_to, sigma_to) * sigma_to**2 / sigma**2


def posterior_mean_weights(alpha: Number, sigma: Number, alpha_to: Number, sigma_to: Number) -> tuple[Number, Number]:
    """(weight of the data, weight of x) in the mean of x_to given x and the data (DDPM, equation 7)."""
    of_data = alpha_to * step_variance(alpha, sigma, alpha_to, sigma_to) / sigma**2
    return of_data, alpha / alpha_to * sigma_to**2 / sigma**2


def respaced(count: int, last: int = STEPS - 1) -> Tensor:
    """`count` of the steps 0 to `last`, evenly spaced with both ends, rising (Nichol & Dhariwal).

    The stride is summed up and halves are rounded to even as in the code of DiT, so that the steps are the same. One
    step is the last, since sampling starts from noise.
    """
    if count == 1:
        return torch.tensor([last])
    strides = repeat(last / (count - 1), count - 1)
    return torch.tensor([round(place) for place in accumulate(strides, initial=0.0)])
