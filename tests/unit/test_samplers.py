"""Samplers on data whose exact predictions are known: a Gaussian (order of convergence) and a mixture (moments)."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from sora_lite.diffusion.path import TARGETS, Prediction
from sora_lite.diffusion.process import Process
from sora_lite.diffusion.sampler import SAMPLERS, Point, sample_ddim, sample_euler, sample_heun
from sora_lite.diffusion.timesteps import sampling_grid

MEAN, STD = 1.5, 0.4
ZERO = torch.tensor(0.0)
MEANS, STDS, WEIGHTS = torch.tensor([-1.0, 0.2, 1.6]), torch.tensor([0.3, 0.1, 0.4]), torch.tensor([0.3, 0.2, 0.5])


def no_noise(step: int) -> Tensor:
    raise AssertionError("a sampler of an ODE asked for noise")


def gaussian(x: Tensor, point: Point) -> Prediction:
    """E[. | x] for data N(MEAN, STD^2)."""
    apart = (x - point.alpha * MEAN) / ((point.alpha * STD) ** 2 + point.sigma**2)
    data, noise = MEAN + point.alpha * STD**2 * apart, point.sigma * apart
    return Prediction(data=data, noise=noise, flow=noise - data)


def circle(steps: int) -> list[Point]:
    """A variance-preserving path of equal angles that begins with a little signal."""
    angles = torch.linspace(1.5, 0, steps + 1, dtype=torch.float64).tolist()
    return [*(Point(angle, math.cos(angle), math.sin(angle)) for angle in angles[:-1]), Point(None, 1.0, 0.0)]


def even_ratios(steps: int) -> list[Point]:
    """Equal steps of log(alpha / sigma), in which DPM-Solver++ is a multistep method, away from both ends."""
    found = []
    for ratio in torch.linspace(-3, 3, steps + 1, dtype=torch.float64).tolist():
        angle = math.atan(math.exp(-ratio))
        found.append(Point(angle, math.cos(angle), math.sin(angle)))
    return found


def straight(steps: int) -> list[Point]:
    return list(Process().grid(steps, 1.5))


def between(first: float, last: float, steps: int) -> list[Point]:
    """Even times of rectified flow; the last may be 0, data."""
    times = torch.linspace(first, last, steps + 1, dtype=torch.float64).tolist()
    return [Point(t, 1 - t, t) for t in times]


def inside(steps: int) -> list[Point]:
    return between(0.9, 0.1, steps)


def from_noise(steps: int) -> list[Point]:
    return between(1.0, 0.1, steps)


def error_of(name: str, points: list[Point]) -> float:
    """Largest distance from the exact flow, which carries quantile to quantile."""
    u = torch.linspace(-2, 2, 41, dtype=torch.float64).view(-1, 1)
    start, end = (
        point.alpha * MEAN + math.hypot(point.alpha * STD, point.sigma) * u for point in (points[0], points[-1])
    )
    return (SAMPLERS[name].sample(gaussian, start, points, no_noise) - end).abs().max().item()


@pytest.mark.parametrize(
    ("name", "order", "grid"),
    [
        *((name, 1, grid) for name in ("euler", "ddim") for grid in (straight, circle, even_ratios)),
        *(("heun", 2, grid) for grid in (straight, circle, even_ratios)),
        *(("dpmpp_2m", 2, grid) for grid in (even_ratios, inside, from_noise)),
    ],
)
def test_ode_sampler_converges_at_its_order(name: str, order: int, grid) -> None:
    errors = [error_of(name, grid(steps)) for steps in (80, 160, 320)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("first", [0.9, 1.0])
def test_dpm_solvers_error_up_to_data(first: float) -> None:
    """It falls as log n / n^2 with even times: near data log(alpha / sigma) steps by log 2, log 3/2, ... for any n."""
    errors = {steps: error_of("dpmpp_2m", between(first, 0.0, steps)) for steps in (320, 640, 1280)}
    scaled = [error * steps**2 / math.log(steps) for steps, error in errors.items()]
    assert max(scaled) < 1.08 * min(scaled)


@pytest.mark.parametrize("grid", [straight, circle])
def test_dpm_solver_beats_euler_up_to_data(grid) -> None:
    assert error_of("dpmpp_2m", grid(160)) < error_of("euler", grid(160)) / 4


def mixture_output(process: Process):
    """output(x, times) of a model that knows the data to be the mixture: the mean of its target, given x."""

    def output(x: Tensor, time: Tensor) -> Tensor:
        point = process.point(torch.ones_like(x), torch.zeros_like(x), time)
        alpha = point.x_t
        sigma = process.point(torch.zeros_like(x), torch.ones_like(x), time).x_t
        means, stds, a, s, at = MEANS.double(), STDS.double(), alpha[..., None], sigma[..., None], x[..., None]
        variance = (a * stds) ** 2 + s**2
        weight = torch.softmax(WEIGHTS.log() - variance.log() / 2 - (at - a * means).square() / (2 * variance), dim=-1)
        apart = (at - a * means) / variance
        data, noise = (weight * (means + a * stds**2 * apart)).sum(-1), (weight * s * apart).sum(-1)
        return TARGETS[process.objective](data, noise, alpha, sigma)

    return output


PROCESSES = {
    "rectified_flow": Process(shift=1.5),
    "epsilon": Process(objective="epsilon"),
    "epsilon_cosine": Process(objective="epsilon", noise_schedule="cosine"),
    "velocity": Process(objective="velocity"),
    "velocity_zero_snr": Process(objective="velocity", zero_terminal_snr=True),
}


def has_the_mixtures_moments(made: Tensor, tolerance: float) -> bool:
    mean = (WEIGHTS * MEANS).sum().item()
    second = (WEIGHTS * (STDS**2 + (MEANS - mean) ** 2)).sum().item()
    third = (WEIGHTS * ((MEANS - mean) ** 3 + 3 * (MEANS - mean) * STDS**2)).sum().item()
    assert made.mean().item() == pytest.approx(mean, abs=tolerance)
    assert made.var().item() == pytest.approx(second, abs=tolerance)
    assert (made - made.mean()).pow(3).mean().item() == pytest.approx(third, abs=2 * tolerance)
    narrow = sum(  # of the narrow component's surroundings
        WEIGHTS[i].item() * (Normal(MEANS[i], STDS[i]).cdf(torch.tensor(0.5)) - Normal(MEANS[i], STDS[i]).cdf(ZERO))
        for i in range(3)
    )
    assert ((made > 0) & (made < 0.5)).double().mean().item() == pytest.approx(float(narrow), abs=tolerance)
    return True


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "ddim"])
def test_ode_samplers_give_the_mixtures_moments(name: str, process: Process) -> None:
    """From the quantiles of noise, so that nothing is left to chance."""
    quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    start = torch.special.ndtri(quantiles).view(-1, 1)
    steps = 250 if SAMPLERS[name].sample in (sample_euler, sample_ddim) else 100
    denoise = process.denoiser(mixture_output(process))
    made = SAMPLERS[name].sample(denoise, start, process.grid(steps, process.shift), no_noise)
    assert has_the_mixtures_moments(made, 0.03)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_stochastic_samplers_give_the_mixtures_moments(name: str, process: Process) -> None:
    if process.objective in SAMPLERS[name].refuses:
        assert "sampling.eta=1" in SAMPLERS[name].refuses[process.objective]
        return
    generator = torch.Generator().manual_seed(0)

    def noise(step: int) -> Tensor:
        return torch.randn(10_000, 1, generator=generator, dtype=torch.float64)

    sample = partial(sample_ddim, eta=1.0) if name == "ddim" else SAMPLERS[name].sample
    made = sample(process.denoiser(mixture_output(process)), noise(0), process.grid(500, 1.0), noise)
    assert has_the_mixtures_moments(made, 0.06)


def literal(velocity, x: Tensor, times: Tensor, heun: bool) -> Tensor:
    """Euler and Heun on dx/dt = velocity, with no word about paths."""
    for t, t_next in pairwise(times):
        h = float(t_next - t)
        slope = velocity(x, torch.full((len(x),), float(t), dtype=torch.float32))
        if heun:
            ahead = velocity(x + h * slope, torch.full((len(x),), float(t_next), dtype=torch.float32))
            x = x + h / 2 * (slope + ahead)
        else:
            x = x + h * slope
    return x


@pytest.mark.parametrize(("sampler", "heun"), [(sample_euler, False), (sample_heun, True)])
@pytest.mark.parametrize("shift", [1.0, 2.0, 3.7])
def test_rectified_flow_is_the_plain_ode_bit_for_bit(sampler, heun: bool, shift: float) -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * x) * (1 + t.view(-1, 1)) - x

    x, process = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), Process()
    made = sampler(process.denoiser(velocity), x, process.grid(25, shift), no_noise)
    assert torch.equal(made, literal(velocity, x, sampling_grid(25, shift), heun))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_ddim_without_noise_is_euler_on_every_path(process: Process) -> None:
    x, denoise, grid = (
        torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1),
        process.denoiser(mixture_output(process)),
        process.grid(20, 1.0),
    )
    torch.testing.assert_close(
        sample_ddim(denoise, x, grid, no_noise), sample_euler(denoise, x, grid, no_noise), rtol=1e-6, atol=1e-6
    )
