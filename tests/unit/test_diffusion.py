import math
from itertools import pairwise

import pytest
import torch

from sora_lite.diffusion.guidance import guided
from sora_lite.diffusion.loss import mse_per_sample
from sora_lite.diffusion.path import rectified_flow
from sora_lite.diffusion.sampler import sample_euler, sample_heun
from sora_lite.diffusion.timesteps import logit_normal, sampling_grid, shift, uniform
from sora_lite.models.conditions import Conditions

MEAN, STD = 1.5, 0.4


def gaussian_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[noise - data | x_t] for data N(MEAN, STD^2), in closed form."""
    t = t.view(-1, 1)
    variance = ((1 - t) * STD) ** 2 + t**2
    slope = (t - (1 - t) * STD**2) / variance
    return -MEAN + slope * (x - (1 - t) * MEAN)


def exact_flow(x: torch.Tensor) -> torch.Tensor:
    """Where the flow carries noise: quantile to quantile."""
    return MEAN + STD * x


def test_path_ends_and_target() -> None:
    data, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    assert torch.equal(rectified_flow(data, noise, torch.zeros(3)).x_t, data)
    assert torch.equal(rectified_flow(data, noise, torch.ones(3)).x_t, noise)
    time = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    data, noise = data.double(), noise.double()
    ahead, here = rectified_flow(data, noise, time + 1e-6), rectified_flow(data, noise, time)
    torch.testing.assert_close((ahead.x_t - here.x_t) / 1e-6, here.target, rtol=1e-6, atol=1e-7)


def test_path_minimises_at_the_closed_form_velocity() -> None:
    """The loss's minimiser is the conditional mean that the sampler test below integrates."""
    generator = torch.Generator().manual_seed(0)
    data = MEAN + STD * torch.randn(400_000, 1, generator=generator)
    point = rectified_flow(data, torch.randn(400_000, 1, generator=generator), torch.full((400_000,), 0.6))
    near = (point.x_t - 0.9).abs().squeeze(1) < 0.05
    expected = gaussian_velocity(torch.tensor([[0.9]]), torch.tensor([0.6])).item()
    assert point.target[near].mean().item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1), (sample_heun, 2)])
def test_sampler_converges_at_its_order(sampler, order: int) -> None:
    x = torch.linspace(-2, 2, 41, dtype=torch.float64).view(-1, 1)
    errors = [
        (sampler(gaussian_velocity, x, sampling_grid(steps)) - exact_flow(x)).abs().max().item()
        for steps in (40, 80, 160)
    ]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_sampler_gives_the_gaussians_moments(sampler) -> None:
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    made = sampler(gaussian_velocity, noise, sampling_grid(100, 1.5))
    assert made.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert made.std().item() == pytest.approx(STD, abs=0.02)


def test_times() -> None:
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    drawn = uniform(normal)
    assert drawn.min() > 0 and drawn.max() < 1
    assert torch.histc(drawn, 10, 0, 1).sub(10_000).abs().max() < 400
    middle = logit_normal(normal)
    inside = (middle - 0.5).abs() < 0.25  # |z| < ln 3
    assert inside.float().mean().item() == pytest.approx(math.erf(math.log(3) / math.sqrt(2)), abs=0.01)


def test_shift_is_resolutions_noise_ratio() -> None:
    """Shifting by alpha multiplies t / (1 - t) by alpha."""
    time = torch.linspace(0.05, 0.95, 10)
    moved = shift(time, 3.0)
    torch.testing.assert_close(moved / (1 - moved), 3 * time / (1 - time), rtol=1e-5, atol=0)
    grid = sampling_grid(4, 3.0)
    assert (grid[0], grid[-1], len(grid)) == (1, 0, 5)
    assert (grid.diff() < 0).all()


def test_guidance_extrapolates_from_null_to_conditional() -> None:
    def model(x, t, conditions):
        return x * conditions.labels.view(-1, 1) + conditions.text.sum(1, keepdim=True)

    x, t = torch.ones(2, 3), torch.ones(2)
    asked = Conditions(labels=torch.tensor([3.0, 5.0]), text=torch.tensor([[2.0, 1.0], [4.0, 0.0]]))
    null = Conditions(labels=torch.tensor([1.0, 1.0]), text=torch.zeros(2, 1))
    made = guided(model, 2.5, asked, null)(x, t)
    conditional, unconditional = model(x, t, asked), model(x, t, null)
    torch.testing.assert_close(made, unconditional + 2.5 * (conditional - unconditional))
    torch.testing.assert_close(guided(model, 1.0, asked, null)(x, t), conditional)


def test_loss_is_per_sample() -> None:
    a, b = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    torch.testing.assert_close(
        mse_per_sample(a, b), torch.stack([((x - y) ** 2).mean() for x, y in zip(a, b, strict=True)])
    )
