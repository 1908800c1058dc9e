"""`sora-lite evaluate`: does a generation show what was asked for? Judged by classifiers trained on real clips."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sora_lite.cli.evaluate_frames import evaluate_frames
from sora_lite.config import EvaluateConfig
from sora_lite.data.files import replace_file, require_folder
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipReader
from sora_lite.data.remote import Location, locate
from sora_lite.diffusion.process import Process
from sora_lite.errors import UserError
from sora_lite.evaluation.judge import Judge, accuracy, nearest_distances, psnr_db, train_judge
from sora_lite.generation.export import Contract, load_dit
from sora_lite.generation.pipeline import Pipeline, Request, check_sampling, to_float, to_uint8
from sora_lite.generation.text import open_encoders, reads_text
from sora_lite.models.vae import CausalVAE
from sora_lite.parallel.env import local_device


class LabelledClips:
    """Clips of one split, decoded at the model's size, with their attributes.

    clips: uint8 N T H W 3. values: attribute -> one text per clip. requests: what makes the model show the like, as far
    as it reads text and labels.
    """

    def __init__(self, shards: Location, split: str, attributes: list[str], contract: Contract) -> None:
        index = Index.load(shards, split)
        reader = ClipReader(index, cache_bytes=0)
        shape = (contract.clip[0], contract.clip[1], contract.clip[2])
        clips, self.requests = [], []
        self.values: dict[str, list[str]] = {name: [] for name in attributes}
        for sample in tqdm(range(len(index)), desc=f"reading {split}", unit="clip", mininterval=1):
            clip, extra = reader.read(sample, shape, contract.fps or None), reader.meta(sample).get("extra") or {}
            for name in attributes:
                if name not in extra:
                    known = ", ".join(sorted(extra)) or "none"
                    raise UserError(f"attributes: clip {index.key(sample)} has no {name!r} (it has: {known})")
                self.values[name].append(str(extra[name]))
            clips.append(clip.frames)
            prompt = clip.captions[0] if clip.captions and reads_text(contract.architecture) else ""
            label = clip.label if contract.architecture["num_classes"] else -1
            self.requests.append(Request(prompt=prompt, label=label))
        if not clips:
            raise UserError(f"shards: {shards} has no {split} clips; pack with a larger validation_fraction")
        self.clips = np.stack(clips)

    def targets(self, name: str, classes: list[str]) -> np.ndarray:
        """The attribute as class numbers."""
        return np.array([classes.index(value) for value in self.values[name]])


def main(config: EvaluateConfig) -> None:
    """Evaluate, print the figures and write them as JSON."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    if out.is_dir():
        raise UserError(f"out: {out} is a folder; name a file such as {out / 'evaluation.json'}")
    require_folder(out.parent)
    figures = evaluate(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, json.dumps(figures, indent=2).encode() + b"\n")
    for name, value in figures.items():
        print(f"{name:<44}{value:>12.4f}" if isinstance(value, float) else f"{name:<44}{value!s:>12}")
    print(f"written to {out}")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All figures. Accuracies are fractions of clips, distances root mean squares of pixels in [0, 1]."""
    dit, vae, contract = load_dit(Path(config.model_from))
    if config.frames and dit.embed_frames is None:
        raise UserError("frames: this model reads no frames; train one with model.frame_conditions=true")
    check_sampling(config.sampling, Process(**contract.diffusion), vae.latent_channels)
    encoders = open_encoders(config, contract.architecture, local_device(), contract.text_encoders)
    shards = locate(config.shards, "shards")
    train = LabelledClips(shards, "train", config.attributes, contract)
    held_out = LabelledClips(shards, "validation", config.attributes, contract)
    classes = {name: sorted(set(train.values[name]) | set(held_out.values[name])) for name in config.attributes}
    figures: dict[str, Any] = {
        "model_step": contract.step, "training_clips": len(train.clips), "held_out_clips": len(held_out.clips),
    }  # fmt: skip
    judges: dict[str, Judge] = {}
    for name in config.attributes:
        judges[name] = train_judge(
            train.clips, train.targets(name, classes[name]), len(classes[name]), steps=config.judge_steps, name=name
        )
        figures[f"classifier_{name}_accuracy"] = accuracy(
            judges[name], held_out.clips, held_out.targets(name, classes[name])
        )
    figures |= _reconstructions(vae, held_out, judges, classes, config.clips)

    pipeline = Pipeline(dit, vae, Process(**contract.diffusion), local_device(), encoders)
    if config.frames:
        few = slice(0, config.count)
        known = {name: (judges[name], held_out.targets(name, classes[name])[few]) for name in config.attributes}
        for mode in config.frames:
            figures |= evaluate_frames(
                pipeline, mode, held_out.clips[few], held_out.requests[few], known, config.sampling
            )
        return figures | {"generations": len(held_out.clips[few]), "guidance": config.sampling.guidance}
    requests, wanted = _spread(held_out, config.attributes, config.count)
    clip = (contract.clip[0], contract.clip[1], contract.clip[2])
    for prefix, guidance in (("", config.sampling.guidance), ("unguided_", 1.0)):
        made = pipeline.generate(requests, clip=clip, sampling=replace(config.sampling, guidance=guidance))
        clips = np.stack(_progress(made, len(requests), f"generating, guidance {guidance:g}"))
        for name in config.attributes:
            targets = np.array([classes[name].index(values[name]) for values in wanted])
            figures[f"{prefix}{name}_accuracy"] = accuracy(judges[name], clips, targets)
        if not prefix:
            figures |= _memorised(clips, train.clips, held_out.clips[: len(clips)])
    figures |= {"generations": len(requests), "guidance": config.sampling.guidance, "steps": config.sampling.steps}
    return figures


def _progress(made: Iterable[torch.Tensor], total: int, what: str) -> list[np.ndarray]:
    return [video.numpy() for video in tqdm(made, total=total, desc=what, unit="clip")]


def _spread(clips: LabelledClips, attributes: list[str], count: int) -> tuple[list[Request], list[dict[str, str]]]:
    """`count` requests taken from real clips, all combinations of the attributes alike, and what each asks for."""
    by_values: dict[tuple[str, ...], list[Request]] = defaultdict(list)
    for i, request in enumerate(clips.requests):
        by_values[tuple(clips.values[name][i] for name in attributes)].append(request)
    combinations = sorted(by_values)
    chosen = list(itertools.islice(itertools.cycle(combinations), count))
    return [by_values[one][0] for one in chosen], [dict(zip(attributes, one, strict=True)) for one in chosen]


@torch.no_grad()
def _reconstructions(
    vae: CausalVAE, held_out: LabelledClips, judges: dict[str, Judge], classes: dict[str, list[str]], count: int
) -> dict[str, Any]:
    """What the VAE alone keeps of held-out clips: the upper bound for any generation."""
    real = held_out.clips[:count]
    decoded = []
    for start in range(0, len(real), 50):
        video = to_float(torch.from_numpy(real[start : start + 50]).permute(0, 4, 1, 2, 3))
        decoded.append(to_uint8(vae.decode(vae.encode(video).mean)).permute(0, 2, 3, 4, 1).numpy())
    clips = np.concatenate(decoded)
    _, frames, height, width, channels = clips.shape
    figures: dict[str, Any] = {
        f"reconstruction_{name}_accuracy": accuracy(judge, clips, held_out.targets(name, classes[name])[:count])
        for name, judge in judges.items()
    }
    pixels = channels * frames * height * width
    figures["vae_psnr_db"] = float(psnr_db(real, clips).mean())
    figures["vae_compression"] = pixels / float(np.prod(vae.latent_shape(frames, height, width)))
    return figures


def _memorised(clips: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Distances to the nearest training clip, of generations and of as many real held-out clips for comparison."""
    generated, real = nearest_distances(clips, train).distance, nearest_distances(held_out, train).distance
    return {
        "nearest_training_distance_median": float(np.median(generated)),
        "nearest_training_distance_min": float(generated.min()),
        "held_out_nearest_training_distance_median": float(np.median(real)),
        "held_out_nearest_training_distance_min": float(real.min()),
    }
