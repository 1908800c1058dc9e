"""Latents with their captions per CPU second through the whole loader, worker processes included: against as many
processes that each go through their shards with `tarfile`, and against stock webdataset in torch's DataLoader.

All read the same shards in the page cache. `tarfile` reads the bytes of every member in order and looks at none: as a
stream, which is how webdataset reads, and from a file in which it may seek; both into the same memory over and over.
webdataset makes tensors of them. Ours comes in the order of training, each latent and each caption against its
checksum, joined to its clip, in batches that another process holds.
"""

import tarfile
import tempfile
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import webdataset
from safetensors.torch import load
from torch.utils.data import DataLoader

from benchmarks.loading import (
    BATCH,
    FPS,
    SHARDS,
    WORKERS,
    facts,
    in_processes,
    loader,
    steady,
    take_turns,
    write_clips,
    write_shards,
)
from sora_lite.data.index import Index
from sora_lite.data.joined import Joined, Latent, latent_sample, open_join
from sora_lite.data.shards import Sample

SHAPE, CELLS = (17, 256, 456), (16, 5, 32, 57)
"""T H W of clips, and C t h w of their latents under a VAE of 4 x 8 x 8."""
COUNT = 512


def write_sets(folder: Path, count: int) -> tuple[Index, Joined]:
    """Clips, which are never opened, and a latent of random numbers of each."""
    rng, media = np.random.default_rng(0), b"never opened"
    numbers = [rng.normal(size=(2, *CELLS)).astype(np.float32) for _ in range(4)]

    def latent(number: int) -> Sample:
        mean, logvar = numbers[number % len(numbers)]
        key, crc32c = f"clip{number:06d}", google_crc32c.value(media)
        posterior = Latent(mean=mean, logvar=logvar)
        return latent_sample(key, posterior, facts(number, SHAPE), shape=SHAPE, fps=FPS, clip_crc32c=crc32c)

    clips = write_clips(folder / "clips", [media], SHAPE, count)
    write_shards(folder / "latents", count, latent, content="latents")
    joined = open_join(clips, [folder / "latents"], "train", content="latents", expected={})
    assert joined is not None
    return clips, joined


def run_ours(clips: Index, latents: Joined) -> float:
    """CPU seconds of as many as there are."""
    return steady(loader(clips, SHAPE, None, latents=latents).steps(0, 10**6), len(clips) // BATCH)


def run_tar(paths: list[Path], mode: str) -> float:
    """CPU seconds of one pass of the plain way."""

    def read(one: int) -> None:
        for path in paths[one::WORKERS]:
            with tarfile.open(path, mode) as archive:
                for member in archive:
                    archive.extractfile(member).read()  # type: ignore[union-attr]

    return in_processes(read)


def run_stock(paths: list[Path], count: int) -> float:
    """CPU seconds of so many latents by what people write with webdataset."""

    def prepare(row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, bytes]:
        tensors = load(row["latent.safetensors"])
        return tensors["mean"], tensors["logvar"], row["json"]

    dataset = (
        webdataset.WebDataset([str(path) for path in paths], shardshuffle=SHARDS).shuffle(32).map(prepare).repeat()
    )
    return steady(iter(DataLoader(dataset.batched(BATCH), batch_size=None, num_workers=WORKERS)), count // BATCH)


def main(*, count: int = COUNT, rounds: int = 3) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        clips, latents = write_sets(Path(folder), count)
        paths = [path for path in latents.index.shard_paths if isinstance(path, Path)]
        candidates = {
            "tarfile, as a stream": lambda: run_tar(paths, "r|"),
            "tarfile, seeking": lambda: run_tar(paths, "r:"),
            "webdataset, safetensors, DataLoader": lambda: run_stock(paths, count),
            "sora_lite": lambda: run_ours(clips, latents),
        }
        seconds = take_turns(candidates, rounds)
    plain = seconds["tarfile, as a stream"]
    print(f"loading latents of {2 * 4 * np.prod(CELLS) / 2**20:.1f} MiB, {WORKERS} processes")
    for name, value in seconds.items():
        print(f"  {name:<38}{count / value:>9.0f} clips/s{plain / value:>8.2f}x")
