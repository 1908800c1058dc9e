"""Paths, times, schedules, losses and guidance against closed forms. Samplers have a file of their own."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from sora_lite.diffusion.guidance import guided
from sora_lite.diffusion.loss import mse_per_sample
from sora_lite.diffusion.path import TARGETS, prediction
from sora_lite.diffusion.process import Process
from sora_lite.diffusion.sampler import SAMPLERS
from sora_lite.diffusion.schedule import (
    BETAS,
    posterior_mean_weights,
    posterior_variance,
    respaced,
    schedule,
    step_variance,
)
from sora_lite.diffusion.timesteps import logit_normal, sampling_grid, shift, uniform
from sora_lite.diffusion.vlb import bound_term, discretized_log_likelihood, normal_kl
from sora_lite.models.conditions import Conditions
from sora_lite.models.layers import TimestepEmbedding

SCHEDULES = [("linear", False), ("cosine", False), ("linear", True), ("cosine", True)]
STRAIGHT = Process()


def test_straight_path_is_the_literal_formula() -> None:
    """Bit for bit: what was trained before goes on."""
    data, noise, time = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.rand(3)
    point, t = STRAIGHT.point(data, noise, time), time.view(-1, 1, 1)
    assert torch.equal(point.x_t, (1 - t) * data + t * noise) and torch.equal(point.target, noise - data)
    assert torch.equal(STRAIGHT.point(data, noise, torch.zeros(3)).x_t, data)
    assert torch.equal(STRAIGHT.point(data, noise, torch.ones(3)).x_t, noise)
    time, data, noise = time.double(), data.double(), noise.double()
    ahead, here = STRAIGHT.point(data, noise, time + 1e-6), STRAIGHT.point(data, noise, time)
    torch.testing.assert_close((ahead.x_t - here.x_t) / 1e-6, here.target, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", TARGETS)
def test_a_prediction_gives_back_data_and_noise(objective: str) -> None:
    data, noise = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    alpha, sigma = 0.6, 0.4 if objective == "rectified_flow" else 0.8
    output = TARGETS[objective](data, noise, torch.tensor(alpha), torch.tensor(sigma))
    found = prediction(objective, output, alpha * data + sigma * noise, alpha, sigma)
    for got, expected in ((found.data, data), (found.noise, noise), (found.flow, noise - data)):
        torch.testing.assert_close(got, expected)
    assert found.variance is None
    both = prediction(objective, torch.cat([output, torch.ones_like(output)], 1), 0 * data, alpha, sigma)
    assert both.variance is not None and (both.variance == 1).all() and both.data.shape == data.shape


@pytest.mark.parametrize(("name", "zero_terminal"), SCHEDULES)
def test_a_schedule_adds_its_noise_in_independent_steps(name: str, zero_terminal: bool) -> None:
    """q(x_k | data), step by step: x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) noise."""
    table = schedule(name, zero_terminal)
    mean, variance = 1.0, 0.0
    for k in range(1000):
        beta = float(table.betas[k])
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert float(table.alpha[k]) == pytest.approx(mean, rel=1e-9, abs=1e-12)
        assert float(table.sigma[k]) == pytest.approx(math.sqrt(variance), rel=1e-9)
    snr = (table.alpha / table.sigma) ** 2
    assert (snr.diff() < 0).all() and (float(snr[-1]) == 0) == zero_terminal
    torch.testing.assert_close(table.alpha.square(), snr / (1 + snr))  # back from the signal-to-noise ratio
    if zero_terminal:  # the first step stays as it was
        assert float(table.alpha[0]) == pytest.approx(float(schedule(name).alpha[0]), rel=1e-12)


def test_schedules_are_the_papers() -> None:
    linear = BETAS["linear"]()
    assert (float(linear[0]), float(linear[-1])) == (1e-4, 2e-2)
    assert float(linear[500]) == pytest.approx(1e-4 + (2e-2 - 1e-4) * 500 / 999)
    cosine, start = schedule("cosine").alpha.square(), math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    for k in (0, 499, 900):
        expected = math.cos(((k + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / start
        assert float(cosine[k]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("k", "back"), [(1, 1), (500, 1), (999, 1), (999, 40), (300, 300)])
@pytest.mark.parametrize(("name", "zero_terminal"), SCHEDULES)
def test_posterior_is_that_of_the_joint_gaussian(name: str, zero_terminal: bool, k: int, back: int) -> None:
    """x_{k-back} given x_k and data, by conditioning their joint Gaussian, in which the covariance is r sigma_to^2."""
    table = schedule(name, zero_terminal)
    alpha, sigma, alpha_to, sigma_to = (
        float(values[i]) for i in (k, k - back) for values in (table.alpha, table.sigma)
    )
    r = math.prod(math.sqrt(1 - float(beta)) for beta in table.betas[k - back + 1 : k + 1])
    added = 1 - math.prod(1 - float(beta) for beta in table.betas[k - back + 1 : k + 1])
    data, x = 0.7, -1.2
    mean = alpha_to * data + r * sigma_to**2 / sigma**2 * (x - alpha * data)
    of_data, of_x = posterior_mean_weights(alpha, sigma, alpha_to, sigma_to)
    assert of_data * data + of_x * x == pytest.approx(mean, rel=1e-6)
    variance = sigma_to**2 - (r * sigma_to**2) ** 2 / sigma**2
    assert posterior_variance(alpha, sigma, alpha_to, sigma_to) == pytest.approx(variance, rel=1e-5)
    assert step_variance(alpha, sigma, alpha_to, sigma_to) == pytest.approx(added, rel=1e-6)
    if back == 1:
        assert float(table.posterior_variance()[k]) == pytest.approx(variance, rel=1e-5)


def test_respaced_steps_are_guided_diffusions() -> None:
    """Its loop, which adds a stride and rounds."""
    for count in range(2, 1001):
        stride, at, taken = 999 / (count - 1), 0.0, []
        for _ in range(count):
            taken.append(round(at))
            at += stride
        assert respaced(count).tolist() == taken
    assert respaced(1).tolist() == [999]


def test_a_model_is_told_whole_steps() -> None:
    process = Process(objective="epsilon")
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    time = process.times(normal, "uniform", tokens=1)
    steps = 1000 * time
    assert torch.equal(steps, steps.round()) and steps.min() == 0 and steps.max() == 999
    assert torch.histc(steps.float(), 10, 0, 1000).sub(20_000).abs().max() < 600
    told = []
    embedding = TimestepEmbedding(8)
    embedding.mlp = torch.nn.Sequential(torch.nn.Linear(256, 1))
    embedding.mlp[0].register_forward_hook(lambda _m, args, _o: told.append(args[0]))
    embedding(torch.arange(1000, dtype=torch.float64) / 1000)
    assert torch.equal(told[0][:, 0], torch.arange(1000.0).cos())  # the first frequency is 1
    grid = process.grid(250, 1.0)
    assert [round(1000 * p.time) for p in grid[:-1] if p.time is not None] == respaced(250).flip(0).tolist()
    assert grid[-1] == (None, 1.0, 0.0)
    cosine = Process(objective="epsilon", noise_schedule="cosine")
    assert cosine.sampled_steps() == 996 and cosine.grid(996, 1.0)[0].alpha > 0.005 > schedule("cosine").alpha[996]
    assert process.sampled_steps() == Process(objective="velocity", noise_schedule="cosine").sampled_steps() == 1000


def test_normal_kl_is_torchs() -> None:
    mean, other, log_variance, other_log = torch.randn(4, 50, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(other, (other_log / 2).exp()))
    torch.testing.assert_close(normal_kl(mean, log_variance, other, other_log), expected)


def test_discretized_likelihood_sums_to_one_and_is_the_normal_masses() -> None:
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)  # the middles of the 256 bins
    for mean, scale in ((0.3, 0.1), (-0.9, 0.5), (0.0, 0.02)):
        log_scale = torch.full_like(x, math.log(scale))
        found = discretized_log_likelihood(x, torch.full_like(x, mean), log_scale).exp()
        assert found.sum().item() == pytest.approx(1, abs=1e-6)
        normal = Normal(torch.tensor(mean, dtype=torch.float64), scale)
        inside = normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)
        torch.testing.assert_close(found[1:-1], inside[1:-1], rtol=0, atol=6e-4)


@pytest.mark.parametrize("objective", ["epsilon", "velocity"])
def test_variational_bound_is_the_divergence_of_gaussians(objective: str) -> None:
    process, table = Process(objective=objective), schedule("linear")
    generator = torch.Generator().manual_seed(0)
    data, noise, wrong = (torch.randn(4, 2, 3, generator=generator) for _ in range(3))
    fraction = torch.rand(4, 2, 3, generator=generator)
    step = torch.tensor([1, 10, 500, 999])
    time = step.double() / 1000
    point = process.point(data, noise, time)
    output = torch.cat([point.target + 0.1 * wrong, 2 * fraction - 1], dim=1).requires_grad_()
    error, bound = process.losses(output, data, point, time)
    assert bound is not None
    torch.testing.assert_close(error, (0.01 * wrong.square()).flatten(1).mean(1), rtol=1e-4, atol=1e-6)
    for i, k in enumerate(step.tolist()):
        alpha, sigma, beta = float(table.alpha[k]), float(table.sigma[k]), float(table.betas[k])
        last = float(table.alpha[k - 1]) ** 2
        small = beta * (1 - last) / sigma**2  # DDPM, equation 7
        weights = math.sqrt(last) * beta / sigma**2, math.sqrt(1 - beta) * (1 - last) / sigma**2
        model = output[i, :2].double().detach()
        x = point.x_t[i].double()
        guess = (x - sigma * model) / alpha if objective == "epsilon" else alpha * x - sigma * model
        variance = torch.exp(fraction[i].double() * math.log(beta) + (1 - fraction[i].double()) * math.log(small))
        q = Normal(weights[0] * data[i].double() + weights[1] * x, math.sqrt(small))
        p = Normal(weights[0] * guess + weights[1] * x, variance.sqrt())
        expected = kl_divergence(q, p).mean().item() / math.log(2)
        assert bound[i].item() == pytest.approx(expected, rel=2e-3, abs=1e-6)
    bound.sum().backward(retain_graph=True)
    assert output.grad is not None
    assert (output.grad[:, :2] == 0).all() and (output.grad[:, 2:] != 0).any()
    output.grad = None
    error.sum().backward()
    assert (output.grad[:, 2:] == 0).all() and (output.grad[:, :2] != 0).any()


def test_the_bounds_last_term_is_the_likelihood() -> None:
    table, step = schedule("linear"), torch.zeros(3, dtype=torch.int64)
    data = torch.rand(3, 2, 5) * 1.6 - 0.8
    guess, fraction = data + 0.01 * torch.randn_like(data), torch.full_like(data, 0.4)
    found = bound_term(table, step, data=data, x=torch.randn_like(data), predicted_data=guess, variance=fraction)
    low, high = math.log(float(table.posterior_variance()[1])), math.log(1e-4)
    scale = torch.full_like(data, (0.4 * high + 0.6 * low) / 2)
    expected = -discretized_log_likelihood(data, guess, scale).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("alpha", [0.1, 0.21, math.sqrt(16 / 256), math.exp(-1.7), 1.13, math.sqrt(1280 / 256), 12.7])
def test_a_shifted_grid_still_begins_in_pure_noise(alpha: float) -> None:
    """A signal one rounding below 0 has no logarithm, and one above it would pass for a step that has a past."""
    first = Process().grid(5, alpha)[0]
    assert (first.time, first.alpha, first.sigma) == (1.0, 0.0, 1.0)
    still = Process().denoiser(lambda x, time: torch.zeros_like(x))
    x = torch.ones(1, 1)
    assert torch.isfinite(SAMPLERS["dpmpp_2m"].sample(still, x, Process().grid(5, alpha), lambda step: x)).all()


def test_shift_grows_with_tokens_as_published() -> None:
    flux = Process(shift=math.exp(0.5), shift_by="exponential", shift_tokens=256, shift_slope=0.65 / 3840)
    for tokens in (256, 1024, 4096):  # mu is a line through (256, 0.5) and (4096, 1.15)
        mu = tokens * (1.15 - 0.5) / (4096 - 256) + 0.5 - 256 * (1.15 - 0.5) / (4096 - 256)
        assert flux.shift_at(tokens) == pytest.approx(math.exp(mu))
    sd3 = Process(shift=1.5, shift_by="sqrt", shift_tokens=1024)
    assert sd3.shift_at(4096) == pytest.approx(3.0)  # sqrt(m / n), Stable Diffusion 3's equation 23
    assert Process(shift=2.0).shift_at(9) == 2.0
    normal = torch.randn(100)
    assert torch.equal(sd3.times(normal, "logit_normal", 4096), shift(torch.sigmoid(normal), 3.0))


def test_guidance_extrapolates_from_null_to_conditional() -> None:
    def model(x, t, conditions):
        return x * conditions.labels.view(-1, 1) + conditions.text.sum(1, keepdim=True)

    x, t = torch.ones(2, 3), torch.ones(2)
    asked = Conditions(labels=torch.tensor([3.0, 5.0]), text=torch.tensor([[2.0, 1.0], [4.0, 0.0]]))
    null = Conditions(labels=torch.tensor([1.0, 1.0]), text=torch.zeros(2, 1))
    made = guided(model, asked, null, scale=2.5)(x, t)
    conditional, unconditional = model(x, t, asked), model(x, t, null)
    torch.testing.assert_close(made, unconditional + 2.5 * (conditional - unconditional))
    torch.testing.assert_close(guided(model, asked, null, scale=1.0)(x, t), conditional)


def test_guidance_of_some_channels_is_the_published_dits() -> None:
    """DiT's forward_with_cfg: the first channels are guided, the rest and the variance are the conditional ones."""
    asked, null = Conditions(labels=torch.zeros(2, dtype=torch.int64)), Conditions(labels=torch.ones(2).long())
    outputs = torch.randn(2, 8, 3)  # 4 channels and their variance, for each label

    def model(x, t, conditions):
        return outputs[conditions.labels]

    x, t = torch.randn(2, 4, 3), torch.ones(2)
    conditional, unconditional = outputs[0], outputs[1]
    for channels, count in ((3, 3), (None, 4)):
        made = guided(model, asked, null, scale=4.0, channels=channels)(x, t)
        mixed = unconditional[:count] + 4 * (conditional[:count] - unconditional[:count])
        torch.testing.assert_close(made, torch.cat([mixed, conditional[count:]]).expand(2, -1, -1))


def test_guidance_holds_in_its_interval_and_is_rescaled() -> None:
    calls = []

    def model(x, t, conditions):
        calls.append(len(x))
        return x * conditions.labels.view(-1, 1, 1) + torch.arange(3.0)

    asked, null = Conditions(labels=torch.tensor([3.0, 5.0])), Conditions(labels=torch.tensor([1.0, 1.0]))
    x = torch.randn(2, 1, 3)
    predict = guided(model, asked, null, scale=5.0, interval=(0.2, 0.6), rescale=0.7)
    for time in (0.1, 0.7):
        assert torch.equal(predict(x, torch.full((2,), time)), model(x, None, asked))
    assert calls[::2] == [2, 2]
    made = predict(x, torch.full((2,), 0.4))
    told, mixed = model(x, None, asked), model(x, None, null) + 5 * (model(x, None, asked) - model(x, None, null))
    ratio = told.std((1, 2), keepdim=True) / mixed.std((1, 2), keepdim=True)
    torch.testing.assert_close(made, 0.7 * mixed * ratio + 0.3 * mixed)
    silent = guided(lambda x, t, conditions: torch.zeros_like(x), asked, null, scale=5.0, rescale=0.7)
    assert torch.equal(silent(x, torch.full((2,), 0.4)), torch.zeros_like(x))


def test_loss_is_per_sample() -> None:
    a, b = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    torch.testing.assert_close(
        mse_per_sample(a, b), torch.stack([((x - y) ** 2).mean() for x, y in zip(a, b, strict=True)])
    )
