"""What training and sampling must agree on: path, prediction, and where on the path a step of training or sampling is.

Shapes: B samples, C channels. Times B in [0, 1]: 0 is data, 1 is noise. They are float32 on the continuous path of
rectified flow, and float64 thousandths on the schedules of 1,000 steps, so that 1000 * time is the step exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_lite.diffusion import schedule, timesteps
from sora_lite.diffusion.loss import mse_per_sample
from sora_lite.diffusion.path import TARGETS, PathSample, Prediction, expand, on_path, prediction
from sora_lite.diffusion.sampler import Denoise, Grid, Point
from sora_lite.diffusion.vlb import bound_term

LEAST_SIGNAL = 0.005
"""Data are found from a predicted noise by division by alpha. The linear schedule ends at 0.0064; the cosine one, at
5e-5, would multiply errors by 20,000, so its last four steps, which are all but pure noise, are not sampled."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Process:
    """A diffusion process. Part of every export of a DiT.

    objective: of `path.TARGETS`. noise_schedule, zero_terminal_snr: of epsilon and velocity, see `schedule`.
    shift, shift_by, shift_tokens, shift_slope: of rectified flow's times, see `timesteps.shift_at`.
    """

    objective: str = "rectified_flow"
    noise_schedule: str = "linear"
    zero_terminal_snr: bool = False
    shift: float = 1.0
    shift_by: str = "fixed"
    shift_tokens: int = 256
    shift_slope: float = 0.0

    def __post_init__(self) -> None:
        for value, known in (
            (self.objective, TARGETS),
            (self.noise_schedule, schedule.BETAS),
            (self.shift_by, timesteps.SHIFTS),
        ):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")

    @property
    def straight(self) -> bool:
        """Whether this is rectified flow, on continuous times; else there are 1,000 steps."""
        return self.objective == "rectified_flow"

    def _table(self) -> schedule.Schedule:
        return schedule.schedule(self.noise_schedule, self.zero_terminal_snr)

    def shift_at(self, tokens: int) -> float:
        """Shift of rectified flow's times for clips of so many tokens."""
        return self.shift * timesteps.SHIFTS[self.shift_by](tokens, self.shift_tokens, self.shift_slope)

    # ------------------------------------------------------------------------------------------------ training

    def times(self, normal: Tensor, density: str, tokens: int) -> Tensor:
        """Training times from standard normal draws. density: of `timesteps.DENSITIES`; tokens: of a clip."""
        drawn = timesteps.DENSITIES[density](normal)
        if self.straight:
            return timesteps.shift(drawn, self.shift_at(tokens))
        return (drawn * schedule.STEPS).long().clamp_max(schedule.STEPS - 1).double() / schedule.STEPS

    def time(self, value: float, like: Tensor) -> Tensor:
        """One time for each sample of a batch, as a model takes it."""
        dtype = torch.float32 if self.straight else torch.float64
        return torch.full((len(like),), value, dtype=dtype, device=like.device)

    def point(self, data: Tensor, noise: Tensor, time: Tensor) -> PathSample:
        """Where a sample is at its time, and what the model should say there."""
        return on_path(self.objective, data, noise, *self._coefficients(time, data))

    def losses(self, output: Tensor, data: Tensor, point: PathSample, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """(mean squared error B, variational bound's term B in bits or None) of an output for `point`.

        There is a bound where the output is B 2C ..., with the variance in its second half. It trains that half alone:
        no gradient goes through the mean (Nichol & Dhariwal, arXiv 2102.09672, section 3.1).
        """
        channels = data.shape[1]
        error = mse_per_sample(output[:, :channels], point.target)
        if output.shape[1] == channels:
            return error, None
        frozen = torch.cat([output[:, :channels].detach(), output[:, channels:]], dim=1).float()
        predicted = prediction(self.objective, frozen, point.x_t, *self._coefficients(time, data))
        assert predicted.variance is not None
        bound = bound_term(
            self._table(),
            self._step(time),
            data=data,
            x=point.x_t,
            predicted_data=predicted.data,
            variance=predicted.variance,
        )
        return error, bound

    @staticmethod
    def _step(time: Tensor) -> Tensor:
        return (time * schedule.STEPS).round().long()

    def _coefficients(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times B, float32, for broadcasting against `like`."""
        if self.straight:
            t = expand(time, like)
            return 1 - t, t
        table, step = self._table(), self._step(time)
        alpha, sigma = (values.to(time.device)[step].float() for values in (table.alpha, table.sigma))
        return expand(alpha, like), expand(sigma, like)

    # ------------------------------------------------------------------------------------------------ sampling

    def sampled_steps(self) -> int:
        """How many steps of the schedule sampling may use: all, but for epsilon those of alpha above LEAST_SIGNAL."""
        alpha = self._table().alpha
        return int((alpha > LEAST_SIGNAL).sum()) if self.objective == "epsilon" else len(alpha)

    def grid(self, steps: int, shift: float) -> Grid:
        """Points for so many steps of a sampler. shift: of rectified flow's times.

        On a schedule they are `schedule.respaced` of its `sampled_steps`, and at most as many.
        """
        if self.straight:
            times = timesteps.sampling_grid(steps, shift).tolist()
            return [Point(t, 1 - t, t) for t in times]
        table = self._table()
        chosen = schedule.respaced(steps, self.sampled_steps() - 1).flip(0)
        rows = zip(chosen.tolist(), table.alpha[chosen].tolist(), table.sigma[chosen].tolist(), strict=True)
        return [*(Point(k / schedule.STEPS, alpha, sigma) for k, alpha, sigma in rows), Point(None, 1.0, 0.0)]

    def denoiser(self, output: Callable[[Tensor, Tensor], Tensor]) -> Denoise:
        """What a sampler calls. output: output(x, times B) of a model, guided or not."""

        def denoise(x: Tensor, point: Point) -> Prediction:
            assert point.time is not None
            return prediction(self.objective, output(x, self.time(point.time, x)), x, point.alpha, point.sigma)

        return denoise
