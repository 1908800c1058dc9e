"""Training the DiT on the latents of a frozen VAE.

Shapes: B batch, C latent channels, T H W frames and pixels, t h w latent frames and cells.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sora_lite.config import DiffusionConfig, DiTConfig, FrameRule, LoraConfig, SamplingConfig
from sora_lite.data.batch import ClipBatch
from sora_lite.data.order import hash_seed
from sora_lite.diffusion.path import PathSample
from sora_lite.diffusion.schedule import STEPS
from sora_lite.evaluation.page import contact_sheet
from sora_lite.generation.frames import draw_given, encode_given
from sora_lite.generation.pipeline import (
    Request,
    check_requests,
    clips_at_once,
    label_numbers,
    make_process,
    sample_latents,
    seeded_normal,
    to_float,
    to_uint8,
)
from sora_lite.generation.text import FrozenReader, make_reader
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.patch import token_grid
from sora_lite.models.pretrained import FrozenTextEncoder, TextFeatures
from sora_lite.models.vae import CausalVAE, Posterior
from sora_lite.parallel.env import Rank
from sora_lite.training.engine import Engine
from sora_lite.training.lora import Adapted, adapt
from sora_lite.training.metrics import Means, count_flops
from sora_lite.training.objective import HeldOut, Loss

TIME_BINS = 5
"""The record shows the loss by bins of the time t, each of width 1 / TIME_BINS."""
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SAMPLES_SHOWN = 8


class DiTObjective:
    """Prediction of the configured target with labels and text, each dropped at random for classifier-free guidance.

    Args:
        model, diffusion: as configured.
        frames: how often which frames are given.
        vae: frozen; stays outside of the engine, whole on every rank.
        encoders: frozen likewise, on the rank's device (`text.open_encoders`), of a model that reads text. They may be
            left out only where nothing is trained (`sora-lite data-preview`).
        seed: of the run.
        rank: this process.
    """

    name = "dit"

    def __init__(
        self,
        model: DiTConfig,
        diffusion: DiffusionConfig,
        vae: CausalVAE,
        encoders: Mapping[str, FrozenTextEncoder] | None = None,
        *,
        frames: Sequence[FrameRule] = (),
        seed: int,
        rank: Rank,
    ) -> None:
        self.config, self.diffusion, self.seed, self.rank = model, diffusion, seed, rank
        self.process = make_process(diffusion)
        self.frames = frames
        self.vae = vae.to(rank.device)
        self.fingerprint = vae.fingerprint()
        self.architecture = {"channels": vae.latent_channels, **asdict(model)}
        dit = VideoDiT(**self.architecture)
        self.module: nn.Module = dit
        self.adapted: Adapted | None = None
        self.encoders = encoders or {}
        self.reader = make_reader(dit, self.encoders, rank.device)
        streams = (dit.num_classes > 0) + (dit.text is not None) + (dit.pooled_features > 0)
        # Independent draws per stream that together drop all with the configured probability.
        self.drop = diffusion.condition_dropout ** (1 / streams)

    def adapt(self, lora: LoraConfig, init_from: str) -> None:
        """Train adapters of the model in `init_from` instead of its weights; see `lora.adapt`."""
        self.adapted = adapt(self.module, self.architecture, lora, init_from)

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of the transformer."""
        _, *cells = self.vae.latent_shape(frames, height, width)
        p, q, r = self.config.patch
        return int(np.prod(token_grid((cells[0], cells[1], cells[2]), (p, q, r))))

    def flops(self, frames: int, height: int, width: int) -> int:
        """Of the DiT alone; the frozen VAE is not counted as the model's work."""
        with torch.device("meta"):
            dit = VideoDiT(**self.architecture)
            latent = torch.empty(1, *self.vae.latent_shape(frames, height, width))
            time = torch.empty(1)
        return count_flops(lambda: dit(latent, time, dit.no_conditions(1)))

    def cost(self, frames: int, height: int, width: int) -> float:
        """FLOPs of encoding a clip, and of the DiT's forward and backward pass, which is two of it. Encoding text is
        left out: it costs the same for clips of all sizes."""
        vae = copy.deepcopy(self.vae).to("meta")
        clip = torch.empty(1, 3, frames, height, width, device="meta")
        return count_flops(lambda: vae.encode(clip)) + 3 * self.flops(frames, height, width)

    def _seed(self, batch: ClipBatch, purpose: str) -> list[int]:
        return [hash_seed(self.seed, batch.step, int(position), purpose) for position in batch.positions]

    def times(self, seeds: list[int], tokens: int) -> Tensor:
        """Training times in [0, 1], one per seed, for clips of so many tokens."""
        normal = seeded_normal((), seeds, self.rank.device)
        return self.process.times(normal, self.diffusion.timesteps.name, tokens)

    def losses(self, output: Tensor, data: Tensor, point: PathSample, time: Tensor) -> dict[str, Tensor]:
        """`loss` of each sample, and its parts `mse` and `vlb` (in bits) where the variance is learned. Each B."""
        error, bound = self.process.losses(output, data, point, time)
        if bound is None:
            return {"loss": error}
        return {"loss": error + self.diffusion.vlb_weight * STEPS * bound, "mse": error, "vlb": bound}

    def conditions(self, batch: ClipBatch) -> Conditions:
        """What is said of each clip, as far as the model reads it.

        Raises:
            UserError: a label that the model does not have.
        """
        requests = self._requests(batch)
        check_requests(requests, num_classes=self.config.num_classes, has_text=self.reader is not None)
        labels = label_numbers([one.label for one in requests], self.config.num_classes, self.rank.device)
        return replace(self._text(batch), labels=labels)

    def _text(self, batch: ClipBatch) -> Conditions:
        """Text of each clip; what was not made beforehand is read or encoded now."""
        if self.reader is None:
            return Conditions()
        if batch.text is None or batch.text_mask is None:
            return self.reader(batch.captions)
        assert isinstance(self.reader, FrozenReader)  # `config.check` lets no other model have such batches
        made = TextFeatures(features=batch.text, mask=batch.text_mask, pooled=batch.pooled)
        return self.reader.complete(made, batch.captions)

    @cached_property
    def _nothing(self) -> Conditions:
        """One row that asks for nothing."""
        labels = label_numbers([-1], self.config.num_classes, self.rank.device)
        return replace(Conditions() if self.reader is None else self.reader([""]), labels=labels)

    def dropped(self, conditions: Conditions, seeds: list[int]) -> Conditions:
        """The conditions, each of them left out at random."""
        draws = torch.stack([torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        left_out = dict(zip(("labels", "text", "pooled"), (draws < self.drop).unbind(1), strict=True))
        return conditions.replaced(self._nothing.rows([0] * len(seeds)), left_out)

    @torch.no_grad()
    def _latents(self, batch: ClipBatch, seeds: list[int]) -> Tensor:
        """Normalised latents B C t h w, drawn from the posterior; only what comes as video is encoded."""
        shape, device = self.vae.latent_shape(*batch.shape), self.rank.device
        mean = torch.empty(len(seeds), *shape, device=device)
        logvar = torch.empty_like(mean)
        if batch.mean is not None and batch.logvar is not None:
            mean[batch.is_latent] = batch.mean.to(device, non_blocking=True)
            logvar[batch.is_latent] = batch.logvar.to(device, non_blocking=True)
        decoded = (~batch.is_latent).nonzero()[:, 0]
        at_once = clips_at_once(*batch.shape)
        video = batch.video.to(device, non_blocking=True)
        for rows, some in zip(decoded.split(at_once), video.split(at_once), strict=True):
            if len(rows):
                posterior = self.vae.encode(to_float(some))
                mean[rows], logvar[rows] = posterior.mean, posterior.logvar
        noise = seeded_normal(shape, seeds, device)
        return self.vae.normalize(Posterior(mean=mean, logvar=logvar).sample(noise))

    def _with_frames(self, conditions: Conditions, video: Tensor, seeds: list[int]) -> Conditions:
        """The conditions, with frames of each clip B 3 T H W given as the seeds draw it."""
        if not self.frames:
            return conditions
        count = self.vae.latent_shape(video.shape[2], video.shape[3], video.shape[4])[1]
        given = torch.stack([draw_given(self.frames, count, seed) for seed in seeds])
        frames, mask = encode_given(self.vae, to_float(video.to(self.rank.device)), given)
        return replace(conditions, frames=frames, frame_mask=mask)

    def _predict(self, engine: Engine, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return engine(x.to(next(engine.module.parameters()).dtype), t, conditions).float()

    def loss(self, engine: Engine, batch: ClipBatch) -> Loss:
        data = self._latents(batch, self._seed(batch, "posterior"))  # B C t h w
        noise = seeded_normal(data.shape[1:], self._seed(batch, "noise"), self.rank.device)
        time = self.times(self._seed(batch, "time"), self.tokens(*batch.shape))  # B
        point = self.process.point(data, noise, time)
        conditions = self.dropped(self.conditions(batch), self._seed(batch, "dropout"))
        conditions = self._with_frames(conditions, batch.video, self._seed(batch, "frames"))
        prediction = self._predict(engine, point.x_t, time, conditions)
        losses = self.losses(prediction, data, point, time)
        each = losses.pop("loss")  # B
        bins = (time * TIME_BINS).long().clamp_max(TIME_BINS - 1)
        parts: dict[str, tuple[Tensor, float | Tensor]] = {
            name: (one.detach().mean(), float(len(one))) for name, one in losses.items()
        }
        for number in range(TIME_BINS):
            inside = (bins == number).float()
            mean = (each.detach() * inside).sum() / inside.sum()
            parts[f"loss_t{number / TIME_BINS:.1f}"] = (mean, inside.sum())
        return Loss(loss=each.mean(), each=each.detach(), parts=parts)

    def validate(self, engine: Engine, held_out: HeldOut) -> dict[str, float]:
        """Loss at fixed times with fixed noise and all conditions; `val_loss` is the mean over the times."""
        means = Means(self.rank)
        for batch, weights in held_out.batches():
            places = batch.positions
            data = self._latents(batch, [hash_seed("validation", int(p), "posterior") for p in places])
            conditions = self.conditions(batch)
            conditions = self._with_frames(
                conditions, batch.video, [hash_seed("validation", int(p), "frames") for p in places]
            )
            for time in VALIDATION_TIMES:
                noise = seeded_normal(
                    data.shape[1:], [hash_seed("validation", int(p), "noise", str(time)) for p in places], data.device
                )
                t = self.process.time(time, data)
                point = self.process.point(data, noise, t)
                losses = self.losses(self._predict(engine, point.x_t, t, conditions), data, point, t)
                losses[f"loss_t{time}"] = losses["loss"]
                for name, each in losses.items():
                    for value, weight in zip(each.tolist(), weights, strict=True):
                        means.add(f"val_{name}", value, weight)
        return means.read()

    def _requests(self, batch: ClipBatch) -> list[Request]:
        """What is said of each clip, as far as the model reads it."""
        return [
            Request(prompt=caption if self.reader is not None else "", label=label if self.config.num_classes else -1)
            for caption, label in zip(batch.captions, batch.labels.tolist(), strict=True)
        ]

    def sample(self, engine: Engine, held_out: HeldOut, path: Path) -> None:
        """Generations for the conditions of a few held-out clips."""
        # All ranks draw the same ones, because all must call the engine equally often.
        batch, _ = held_out.batches()[0]
        mine = self._requests(batch)[:SAMPLES_SHOWN]
        told = self.rank.gather([[request.prompt, request.label] for request in mine])[0]
        requests = [Request(prompt=prompt, label=label) for prompt, label in told]
        latents = sample_latents(
            lambda x, t, conditions: self._predict(engine, x, t, conditions),
            requests,
            shape=self.vae.latent_shape(*held_out.shape),
            num_classes=self.config.num_classes,
            reader=self.reader,
            sampling=SamplingConfig(),
            process=self.process,
            tokens=self.tokens(*held_out.shape),
            seeds=[hash_seed("sample", i) for i in range(len(requests))],
            device=self.rank.device,
        )
        if self.rank.is_main:
            parts = latents.split(clips_at_once(*held_out.shape))
            video = torch.cat([to_uint8(self.vae.decode(self.vae.denormalize(part))) for part in parts])
            contact_sheet(
                list(video.permute(0, 2, 3, 4, 1).cpu().numpy()),
                [request.prompt or str(request.label) for request in requests],
            ).save(path)

    def finish(self, engine: Engine, training: HeldOut) -> None:
        """Nothing to add to the weights."""

    def frozen(self) -> dict[str, torch.Tensor]:
        held = {f"vae.{name}": tensor for name, tensor in self.vae.state_dict().items()}
        for key, encoder in self.encoders.items():
            held |= {f"{key}.{name}": tensor for name, tensor in encoder.state_dict().items()}
        return held

    def state(self) -> dict[str, Any]:
        return {
            "model": self.architecture,
            "vae_fingerprint": self.fingerprint,
            "diffusion": asdict(self.process),
            "text_encoders": {key: encoder.identity for key, encoder in self.encoders.items()},
            "lora": self.adapted and asdict(self.adapted),
        }

    def inputs(self) -> dict[str, str]:
        inputs = {"vae_from": self.fingerprint}
        inputs |= {key: encoder.identity["fingerprint"] for key, encoder in self.encoders.items()}
        if self.adapted is not None:
            inputs["init_from"] = self.adapted.sha256
        return inputs
