"""A tiny DiT learns four clips by heart: data, loss, optimizer, averaging, export and sampler work together."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_inputs import call
from torch import Tensor

from data_tools.cli import main as sora_data
from sora_lite.cli.compose import compose
from sora_lite.config import SamplingConfig
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipReader
from sora_lite.data.video import encode_mp4
from sora_lite.diffusion.process import Process
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.generation import export
from sora_lite.generation.pipeline import Pipeline, Request, to_float, to_uint8
from sora_lite.models.vae import CausalVAE

STEPS = 280
LABELS = (7, 2, 5, 0)
SHAPE = (17, 16, 16)


def draw(label: int) -> np.ndarray:
    """A bright disc that goes its own way over its own background: uint8 T H W 3."""
    t, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    angle = 2 * np.pi * label / 10
    distance = np.hypot(x - 0.5 * t * np.cos(angle), y - 0.5 * t * np.sin(angle))
    disc = np.clip((0.5 - distance) * 8, 0, 1)[..., None]
    colour = 0.5 + 0.5 * np.cos(angle + np.array([0, 2, 4]))
    return np.round(255 * (disc * colour + (1 - disc) * 0.3 * colour[::-1])).astype(np.uint8)


def pack(folder: Path) -> Path:
    """The four clips as shards."""
    videos, shards = folder / "videos", folder / "shards"
    videos.mkdir()
    rows = []
    for label in LABELS:
        (videos / f"{label}.mp4").write_bytes(encode_mp4(draw(label), 8, 10))
        rows.append(json.dumps({"file_name": f"{label}.mp4", "label": label}))
    (videos / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    words = ["split.detector=none", "dedupe.near=false", "validation_fraction=0", "pack.crf=10", "workers=0"]
    assert sora_data(["run", str(videos), str(shards), *words]) == 0
    return shards


def train_vae(folder: Path, video: Tensor) -> Path:
    """A VAE of these clips alone, without posterior noise: what is left for the DiT to learn has no floor."""
    torch.manual_seed(0)
    architecture = asdict(compose("train_vae", ["experiment=tiny_vae", "data.shards=none"]).vae)
    vae = CausalVAE(**architecture)
    with torch.no_grad():
        vae.to_posterior.weight[vae.latent_channels :] = 0
        vae.to_posterior.bias[vae.latent_channels :] = -20
    steps = 180
    adamw = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, steps)
    for _ in range(steps):
        (vae.decode(vae.encode(video).mean) - video).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        schedule.step()
    with torch.no_grad():
        std, mean = torch.std_mean(vae.encode(video).mean, (0, 2, 3, 4))
        vae.latent_mean.copy_(mean)
        vae.latent_std.copy_(std)
    contract = export.Contract(
        kind="vae",
        architecture=architecture,
        run="vae",
        step=steps,
        weights="raw",
        clip=list(SHAPE),
        fps=0.0,
        vae_fingerprint=vae.fingerprint(),
    )
    export.write(folder, contract, vae.state_dict())
    return folder


@dataclass(kw_only=True)
class Learned:
    run: Path
    video: Tensor
    """The four clips, 4 3 T H W in [-1, 1]."""
    labels: list[int]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    folder = tmp_path_factory.mktemp("overfit")
    shards = pack(folder)
    reader = ClipReader(Index.load(shards, "train"), cache_bytes=0)
    clips = [reader.read(sample, SHAPE) for sample in range(len(LABELS))]
    video = to_float(torch.from_numpy(np.stack([clip.frames for clip in clips])).permute(0, 4, 1, 2, 3))
    vae = train_vae(folder / "vae", video)
    status = call(
        "train", "experiment=tiny", f"data.shards={shards}", f"vae_from={vae}", f"run.root={folder}", "run.name=dit",
        f"run.steps={STEPS}", f"run.save_every={STEPS}", "run.log_every=1", "logging.peak_tflops=1",
        "data.buckets=[{resolution: [16, 16], frames: 17, batch: 32}]", "data.cache_mb=16",
        "model.width=64", "model.text=null", "diffusion.condition_dropout=0",
        "optim.lr=1e-2", "optim.schedule=cosine", "optim.ema_decay=0.98",
    )  # fmt: skip
    assert status == 0
    assert call("export", f"run={folder / 'dit'}") == 0
    return Learned(run=folder / "dit", video=video, labels=[clip.label for clip in clips])


def test_the_loss_falls_below_a_twentieth(learned: Learned) -> None:
    losses = [line["loss"] for line in read_record(learned.run / RECORD)]
    assert len(losses) == STEPS
    first, last = losses[0], np.mean(losses[-20:])
    assert last < 0.05 * first, f"from {first:.3f} to {last:.3f}"


@torch.no_grad()
def test_generations_are_the_clips_that_were_asked_for(learned: Learned) -> None:
    dit, vae, contract = export.load_dit(learned.run)
    known = vae.normalize(vae.encode(learned.video).mean)  # 4 C t h w
    pipeline = Pipeline(dit, vae, Process(**contract.diffusion), torch.device("cpu"))
    draws = 3
    requests = [Request(label=label) for label in learned.labels for _ in range(draws)]
    generated = list(pipeline.generate(requests, clip=SHAPE, sampling=SamplingConfig(guidance=1.0)))
    clips = to_float(torch.stack(generated)).permute(0, 4, 1, 2, 3)
    wanted = torch.arange(len(LABELS)).repeat_interleave(draws)

    # As pictures, against what the VAE makes of the clips at best: RMS of values in [-1, 1].
    shown = to_float(to_uint8(vae.decode(vae.denormalize(known))))
    assert (shown - learned.video).square().mean().sqrt() < 0.3
    distances = rms(clips, shown)
    assert distances.argmin(1).equal(wanted)
    others = rms(shown, shown).fill_diagonal_(torch.inf).min(1).values[wanted]
    right = distances.gather(1, wanted[:, None])[:, 0]
    assert (right < 0.25 * others).all(), f"{right} against {others}"

    # And as latents, found again from the pictures.
    latents = vae.normalize(vae.encode(clips).mean)
    assert rms(latents, vae.normalize(vae.encode(shown).mean)).argmin(1).equal(wanted)


def rms(one: Tensor, other: Tensor) -> Tensor:
    """Root mean square difference of each of `one` (A ...) to each of `other` (B ...): A B."""
    return torch.cdist(one.flatten(1), other.flatten(1)) / one[0].numel() ** 0.5
