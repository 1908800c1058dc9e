"""Schedules, noising, targets and sampling steps equal those of diffusers' schedulers."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from sora_lite.diffusion.path import TARGETS
from sora_lite.diffusion.process import Process
from sora_lite.diffusion.sampler import Grid, Point, sample_ddim, sample_ddpm, sample_dpmpp_2m, sample_euler
from sora_lite.diffusion.schedule import respaced, schedule

KINDS = {
    "epsilon": (Process(objective="epsilon"), {"prediction_type": "epsilon"}),
    "velocity": (Process(objective="velocity"), {"prediction_type": "v_prediction"}),
    "zero_snr": (
        Process(objective="velocity", zero_terminal_snr=True),
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ),
}
LINEAR = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}


def model(x: Tensor, step: float) -> Tensor:
    """Something that depends on both, of a size that keeps trajectories tame."""
    return torch.tanh(x * (1 + step / 1000)) + 0.1 * torch.cos(x)


def points(process: Process, steps: list[int]) -> Grid:
    table = schedule(process.noise_schedule, process.zero_terminal_snr)
    return [*(Point(k / 1000, float(table.alpha[k]), float(table.sigma[k])) for k in steps), Point(None, 1.0, 0.0)]


def start() -> Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def run(scheduler, output, x: Tensor, **more) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(output(x, float(t)), t, x, **more).prev_sample
    return x


@pytest.mark.parametrize(("ours", "settings"), KINDS.values(), ids=KINDS)
def test_noising_targets_and_losses(ours: Process, settings: dict) -> None:
    theirs = DDPMScheduler(**LINEAR, **settings)
    table = schedule("linear", ours.zero_terminal_snr)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), table.alpha**2, rtol=1e-4, atol=1e-7)
    data, noise = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    step = torch.tensor([0, 1, 250, 500, 900, 999])
    point = ours.point(data, noise, step.double() / 1000)
    torch.testing.assert_close(point.x_t, theirs.add_noise(data, noise, step), rtol=1e-4, atol=1e-5)
    target = noise if ours.objective == "epsilon" else theirs.get_velocity(data, noise, step)
    torch.testing.assert_close(point.target, target, rtol=1e-4, atol=1e-5)
    output = model(point.x_t, 0.0)
    error, bound = ours.losses(output, data, point, step.double() / 1000)
    torch.testing.assert_close(error, (output - target).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    assert bound is None


def test_cosine_schedule() -> None:
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(theirs.betas.double(), schedule("cosine").betas, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("steps", [10, 250])
def test_ddpm(steps: int, variance: str) -> None:
    ours, learned = Process(objective="epsilon"), variance == "learned_range"
    chosen = respaced(steps).flip(0).tolist()
    theirs = DDPMScheduler(**LINEAR, variance_type=variance, clip_sample=False)
    theirs.set_timesteps(timesteps=chosen)

    def output(x: Tensor, step: float) -> Tensor:
        return torch.cat([model(x, step), torch.sin(5 * x)], dim=1) if learned else model(x, step)

    expected = run(theirs, output, start(), generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    denoise = ours.denoiser(lambda x, time: output(x, 1000 * float(time[0])))
    made = sample_ddpm(
        denoise, start(), ours.grid(steps, 1.0), lambda step: torch.randn(2, 4, 3, 3, generator=generator)
    )
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("ours", "settings"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(ours: Process, settings: dict, eta: float) -> None:
    theirs = DDIMScheduler(**LINEAR, **settings, clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(20)
    expected = run(theirs, model, start(), eta=eta, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    made = sample_ddim(
        ours.denoiser(lambda x, time: model(x, 1000 * float(time[0]))),
        start(),
        points(ours, theirs.timesteps.tolist()),
        lambda step: torch.randn(2, 4, 3, 3, generator=generator),
        eta=eta,
    )
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "velocity"])
@pytest.mark.parametrize("steps", [8, 20])
def test_dpm_solver(kind: str, steps: int) -> None:
    ours, settings = KINDS[kind]
    theirs = DPMSolverMultistepScheduler(**LINEAR, **settings, final_sigmas_type="zero", use_lu_lambdas=False)
    theirs.set_timesteps(steps)
    expected = run(theirs, model, start())
    made = sample_dpmpp_2m(
        ours.denoiser(lambda x, time: model(x, 1000 * float(time[0]))),
        start(),
        points(ours, theirs.timesteps.tolist()),
        lambda step: start(),
    )
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [3, 12])
def test_dpm_solver_on_rectified_flow_step_by_step(steps: int) -> None:
    theirs = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    theirs.set_timesteps(steps)
    times = theirs.sigmas.double().tolist()
    grid = [*(Point(t, 1 - t, t) for t in times[:-1]), Point(None, 1.0, 0.0)]
    denoise = Process().denoiser(lambda x, time: model(x, 1000 * float(time[0])))
    x = start()
    for number, t in enumerate(theirs.timesteps):
        x = theirs.step(model(x, 1000 * times[number]), t, x).prev_sample
        made = sample_dpmpp_2m(denoise, start(), grid[: number + 2], lambda step: start())
        torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-5)


def test_flow_matching_euler() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    ours = Process(shift=3.0)
    expected = run(theirs, lambda x, t: model(x, t), start())
    made = sample_euler(
        ours.denoiser(lambda x, time: model(x, 1000 * float(time[0]))), start(), ours.grid(12, 3.0), lambda step: x
    )
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    data, noise, time = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), theirs.sigmas[[1, 5, 9]]
    x = theirs.scale_noise(data, theirs.timesteps[[1, 5, 9]], noise)
    point = ours.point(data, noise, time)
    torch.testing.assert_close(point.x_t, x)
    assert torch.equal(point.target, TARGETS["rectified_flow"](data, noise, time, time))
