"""Training losses of diffusion models."""

from torch import Tensor


def mse_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in fp32. B ... -> B."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
