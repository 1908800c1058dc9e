"""From noise and conditions to clips.

Shapes: B generations, C latent channels, T H W frames and pixels, t h w latent frames and cells.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from sora_lite.config import DiffusionConfig, Sampler, SamplingConfig
from sora_lite.data.order import hash_seed
from sora_lite.diffusion.guidance import guided
from sora_lite.diffusion.process import Process
from sora_lite.diffusion.sampler import SAMPLERS
from sora_lite.errors import UserError
from sora_lite.generation.frames import Given, decode_with_given, encode_given
from sora_lite.generation.text import TextReader, make_reader
from sora_lite.models.conditions import Conditions
from sora_lite.models.dit import VideoDiT
from sora_lite.models.patch import token_grid
from sora_lite.models.pretrained import FrozenTextEncoder
from sora_lite.models.vae import CausalVAE


def make_process(diffusion: DiffusionConfig) -> Process:
    """The diffusion process that a configuration describes."""
    values = {field.name: getattr(diffusion, field.name) for field in fields(Process)}
    return Process(**{name: value.value if isinstance(value, Enum) else value for name, value in values.items()})


def check_sampling(sampling: SamplingConfig, process: Process, channels: int) -> None:
    """Raise UserError for settings that do not go with a model of this process and so many latent channels."""
    name, objective = sampling.sampler.name, process.objective
    if reason := SAMPLERS[name].refuses.get(objective):
        raise UserError(f"sampling.sampler: {name} does not serve {objective}: {reason}")
    if not process.straight and sampling.shift is not None:
        raise UserError(f"sampling.shift: is for rectified_flow; the model was trained on {objective}: leave it null")
    if not process.straight and sampling.steps > process.sampled_steps():
        most = process.sampled_steps()
        raise UserError(f"sampling.steps: {objective} has {most} steps to sample, not {sampling.steps}; take fewer")
    if (sampling.guidance_channels or 0) > channels:
        raise UserError(
            f"sampling.guidance_channels: the latent has {channels}, not {sampling.guidance_channels}; take fewer"
        )


def seeded_normal(shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor:
    """One standard normal tensor of `shape` per seed: B *shape. Drawn on the CPU, so alike on every device."""
    draws = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).to(device)


def clips_at_once(frames: int, height: int, width: int) -> int:
    """How many clips a VAE codes in one call, so that its activations stay within some GiB."""
    return max(1, 4_000_000 // (frames * height * width))


def to_float(video: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1], contiguous."""
    return video.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def to_uint8(video: Tensor) -> Tensor:
    """float [-1, 1] to uint8 [0, 255], rounded and clamped."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@dataclass(kw_only=True, slots=True, frozen=True)
class Request:
    """What to generate: a prompt, a label, or both. label -1 and prompt "" mean none."""

    prompt: str = ""
    label: int = -1


def check_requests(requests: Sequence[Request], *, num_classes: int, has_text: bool) -> None:
    """Raise UserError for a label or prompt that the model cannot take."""
    for request in requests:
        if request.label >= 0 and num_classes == 0:
            raise UserError(f"labels: {request.label} was asked for, but the model has no labels; give prompts only")
        if not -1 <= request.label < max(num_classes, 1):
            raise UserError(f"labels: {request.label} is out of range; the model has labels 0 to {num_classes - 1}")
        if request.prompt and not has_text:
            raise UserError(f"prompts: {request.prompt!r} was given, but the model reads no text; give labels only")


def conditions(
    requests: Sequence[Request], *, num_classes: int, reader: TextReader | None, device: torch.device
) -> Conditions:
    """As a model with so many classes takes them, whose text a reader reads."""
    text = reader([request.prompt for request in requests]) if reader is not None else Conditions()
    return replace(text, labels=label_numbers([request.label for request in requests], num_classes, device))


def label_numbers(labels: Sequence[int], num_classes: int, device: torch.device) -> Tensor | None:
    """Labels (-1 for none) as a model with so many classes takes them; None for a model without."""
    if not num_classes:
        return None
    return torch.tensor([label if label >= 0 else num_classes for label in labels], device=device)


def sample_latents(
    model: Callable[..., Tensor],
    requests: Sequence[Request],
    *,
    shape: Sequence[int],
    num_classes: int,
    reader: TextReader | None,
    sampling: SamplingConfig,
    process: Process,
    tokens: int,
    negative_prompt: str = "",
    seeds: Sequence[int],
    device: torch.device,
    given: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Normalised latents B C t h w for B requests, from one seed each.

    Args:
        model: `VideoDiT`, or an engine around one.
        shape: latent shape (C, t, h, w).
        reader: of the model's text, None for a model without.
        process: of training; its shift is used where `sampling` names none. tokens: of a clip.
        negative_prompt: what guidance leads away from.
        given: `frames` and `frame_mask` of `Conditions`. Guidance leads to the words, so both sides of it see these.
    """
    check_sampling(sampling, process, shape[0])
    asked, null = (
        conditions(some, num_classes=num_classes, reader=reader, device=device)
        for some in (requests, [Request(prompt=negative_prompt)] * len(requests))
    )
    if given is not None:
        asked, null = (replace(one, frames=given[0], frame_mask=given[1]) for one in (asked, null))
    output = guided(
        model,
        asked,
        null,
        scale=sampling.guidance,
        interval=(sampling.guidance_interval[0], sampling.guidance_interval[1]),
        rescale=sampling.guidance_rescale,
        channels=sampling.guidance_channels,
    )

    def noise(step: int) -> Tensor:
        return seeded_normal(shape, [hash_seed(seed, "sampler", step) for seed in seeds], device)

    sample = SAMPLERS[sampling.sampler.name].sample
    if sampling.sampler is Sampler.ddim:
        sample = partial(sample, eta=sampling.eta)
    grid = process.grid(sampling.steps, sampling.shift or process.shift_at(tokens))
    return sample(process.denoiser(output), seeded_normal(shape, seeds, device), grid, noise)


class Pipeline:
    """A DiT and its VAE, ready to generate.

    Args:
        dit, vae: in eval mode; moved to the device.
        process: that the DiT was trained on.
        encoders: on the device, for a DiT that reads the features of frozen text encoders (`text.open_encoders`).
    """

    def __init__(
        self,
        dit: VideoDiT,
        vae: CausalVAE,
        process: Process,
        device: torch.device,
        encoders: Mapping[str, FrozenTextEncoder] | None = None,
    ) -> None:
        self.dit, self.vae, self.process, self.device = dit.to(device), vae.to(device), process, device
        self.reader = make_reader(dit, encoders or {}, device)

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        *,
        clip: tuple[int, int, int],
        sampling: SamplingConfig,
        negative_prompt: str = "",
        given: Given | None = None,
    ) -> Iterator[Tensor]:
        """Yield one uint8 clip T H W 3 per request, batch by batch.

        Generation i has its own noise from (sampling.seed, i), so it does not depend on the batch.
        clip: (T, H, W) in frames and pixels. negative_prompt: what guidance leads away from. given: frames to
        keep, a row for each request.

        Raises:
            UserError: the model cannot take a request, the size or the sampling.
        """
        if given is not None and self.dit.embed_frames is None:
            raise UserError("condition: this model reads no frames; train one with model.frame_conditions=true")
        check_requests(requests, num_classes=self.dit.num_classes, has_text=self.reader is not None)
        if negative_prompt and (self.reader is None or sampling.guidance == 1):
            why = "the model reads no text" if self.reader is None else "sampling.guidance=1 leads away from nothing"
            raise UserError(f"negative_prompt: {negative_prompt!r} was given, but {why}; leave it out")
        try:
            shape = self.vae.latent_shape(*clip)
            tokens = math.prod(token_grid((shape[1], shape[2], shape[3]), self.dit.patch))
        except ValueError as error:
            raise UserError(f"frames, resolution: {error}") from error
        for start in range(0, len(requests), sampling.batch):
            batch = requests[start : start + sampling.batch]
            seeds = [hash_seed(sampling.seed, "generation", start + i) for i in range(len(batch))]
            frames = mask = None
            if given is not None:
                video, mask = (one[start : start + len(batch)].to(self.device) for one in (given.video, given.mask))
                frames = encode_given(self.vae, to_float(video), mask)
            latents = sample_latents(
                self.dit,
                batch,
                shape=shape,
                num_classes=self.dit.num_classes,
                reader=self.reader,
                sampling=sampling,
                process=self.process,
                tokens=tokens,
                negative_prompt=negative_prompt,
                seeds=seeds,
                device=self.device,
                given=frames,
            )
            if not latents.isfinite().all():
                raise UserError("sampling: the latents are not finite; take a smaller sampling.guidance")
            for rows in torch.arange(len(batch)).split(clips_at_once(*clip)):
                if frames is None or mask is None:
                    made = self.vae.decode(self.vae.denormalize(latents[rows]))  # b 3 T H W
                else:
                    made = decode_with_given(self.vae, latents[rows], frames[0][rows], mask[rows])
                yield from to_uint8(made).permute(0, 2, 3, 4, 1).cpu()
