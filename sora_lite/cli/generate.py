"""`sora-lite generate`: clips from an exported model, as mp4 files, a contact sheet and a page."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sora_lite.config import GenerateConfig, PositionScaling
from sora_lite.data.files import require_folder
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipReader
from sora_lite.data.manifest import Manifest
from sora_lite.data.remote import Location, locate
from sora_lite.data.video import write_mp4
from sora_lite.diffusion.process import Process
from sora_lite.errors import UserError
from sora_lite.evaluation.page import PageClip, contact_sheet, loss_plot, write_page
from sora_lite.evaluation.record import RECORD
from sora_lite.generation.export import Contract, load_dit
from sora_lite.generation.frames import given_frames, read_given
from sora_lite.generation.pipeline import Pipeline, Request
from sora_lite.generation.text import open_encoders
from sora_lite.models.dit import VideoDiT
from sora_lite.models.patch import Grid, token_grid
from sora_lite.models.positions import Scaling
from sora_lite.parallel.env import local_device

DEFAULT_FPS = 8.0


def main(config: GenerateConfig) -> None:
    """Generate and say where the clips lie."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check(config)
    conditioned = config.condition.first is not None or config.condition.last is not None
    prompts = config.prompts if config.prompts or config.labels or not conditioned else [""]
    requests = make_requests(prompts, config.labels, config.count)
    dit, vae, contract = load_dit(Path(config.model_from))
    encoders = open_encoders(config, contract.architecture, local_device(), contract.text_encoders)
    pipeline = Pipeline(dit, vae, Process(**contract.diffusion), local_device(), encoders)
    clip = clip_size(config, contract)
    try:
        token_grid(vae.latent_shape(*clip)[1:], dit.patch)
    except ValueError as error:
        raise UserError(f"frames, resolution: {error}; change them") from error
    frames, height, width = contract.clip
    trained = token_grid(vae.latent_shape(frames, height, width)[1:], dit.patch)
    dit.scaling = scaling(config.position_scaling, trained, dit)
    given = read_given(config.condition, clip, vae.time_factor, len(requests)) if conditioned else None
    generations = pipeline.generate(
        requests, clip=clip, sampling=config.sampling, negative_prompt=config.negative_prompt, given=given
    )
    clips = [video.numpy() for video in tqdm(generations, total=len(requests), desc="generating", unit="clip")]
    out = Path(config.out)
    write(out, requests, clips, config, contract, given_frames(given.mask[0], vae.time_factor) if given else [])
    print(f"{len(clips)} clips in {out}; look at {out / 'index.html'}")


def scaling(choice: PositionScaling, trained: Grid, dit: VideoDiT) -> Scaling | None:
    """How a model treats positions outside of the grid of tokens that it was trained on.

    Raises:
        UserError: the model has no rotary positions, which alone know NTK-aware scaling.
    """
    if choice is PositionScaling.none:
        return None
    if choice is PositionScaling.ntk and dit.positions != "rope":
        raise UserError("position_scaling: ntk is for rotary positions; this model has sincos, so take linear")
    return Scaling(method="ntk" if choice is PositionScaling.ntk else "linear", grid=trained)


def check(config: GenerateConfig) -> None:
    """Raise UserError for what would otherwise show only after the clips are made."""
    require_folder(Path(config.out))
    if config.shards and (content := Manifest.load(locate(config.shards, "shards")).content) != "clips":
        raise UserError(f"shards: {config.shards} holds {content}, not clips; name the shards that they were made of")
    if config.run and not (Path(config.run) / RECORD).is_file():
        raise UserError(f"run: {Path(config.run) / RECORD} does not exist; name the folder of a training run")


def make_requests(prompts: list[str], labels: list[int], count: int) -> list[Request]:
    """One request per prompt (or label, or both side by side) and repetition.

    Raises:
        UserError: nothing is asked for, or prompts and labels differ in number.
    """
    if not prompts and not labels:
        raise UserError("prompts: nothing to generate; give prompts='[\"a text\"]' or labels=[0]")
    if prompts and labels and len(prompts) != len(labels):
        raise UserError(f"labels: {len(labels)} labels for {len(prompts)} prompts; give one per prompt, or none")
    prompts = prompts or [""] * len(labels)
    labels = labels or [-1] * len(prompts)
    return [
        Request(prompt=prompt, label=label) for prompt, label in zip(prompts, labels, strict=True) for _ in range(count)
    ]


def clip_size(config: GenerateConfig, contract: Contract) -> tuple[int, int, int]:
    """(T, H, W): as asked for, else as in training."""
    frames, height, width = contract.clip
    if config.resolution is not None:
        height, width = config.resolution
    return config.frames or frames, height, width


def write(
    out: Path,
    requests: list[Request],
    clips: list[np.ndarray],
    config: GenerateConfig,
    contract: Contract,
    given: list[int],
) -> None:
    """mp4 files, contact_sheet.png and index.html. given: numbers of the frames that were given."""
    out.mkdir(parents=True, exist_ok=True)
    fps = config.fps or contract.fps or DEFAULT_FPS
    captions = [request.prompt or (f"label {request.label}" if request.label >= 0 else "") for request in requests]
    generated = []
    for i, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        name = f"generation_{i:04d}.mp4"
        write_mp4(out / name, clip, fps)
        generated.append(PageClip(file=name, caption=caption))
    contact_sheet(clips, captions, given=given).save(out / "contact_sheet.png")
    real = _real_clips(out, set(captions), locate(config.shards, "shards"), contract, fps) if config.shards else []
    if config.run:
        loss_plot(Path(config.run) / RECORD, out / "loss.png")
    write_page(
        out,
        title=f"Generations of {contract.run}",
        subtitle=f"step {contract.step}, {contract.weights} weights, {config.sampling.sampler.name} sampler with "
        f"{config.sampling.steps} steps, guidance {config.sampling.guidance:g}"
        + (f"; given frames, underlined frame by frame: {', '.join(map(str, given))}" if given else ""),
        generated=generated,
        real=real,
        contact_sheet="contact_sheet.png",
        loss_curve="loss.png" if config.run else None,
    )


def _real_clips(out: Path, captions: set[str], shards: Location, contract: Contract, fps: float) -> list[PageClip]:
    """For each caption a held-out clip that has it, where there is one, at the model's size."""
    index = Index.load(shards, "validation")
    reader = ClipReader(index, cache_bytes=0)
    frames, height, width = contract.clip
    found: dict[str, PageClip] = {}
    for sample in range(len(index)):
        for caption in captions.intersection(reader.captions(sample)) - found.keys():
            name = f"real_{sample:04d}.mp4"
            clip = reader.read(sample, (frames, height, width), contract.fps or None)
            write_mp4(out / name, clip.frames, fps)
            found[caption] = PageClip(file=name, caption=caption)
        if len(found) == len(captions):
            break
    return list(found.values())
