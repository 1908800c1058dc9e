"""What holds for every test: one thread a process, and no way to an account of the person who runs them.

And what many need: a small data set, and a VAE for it.
"""

import os
import signal
from pathlib import Path

import pytest
from tiny_inputs import Tiny, make_vae

# Before torch is imported anywhere. Two ranks with a thread each are what two cores can carry, and sums do not
# change with the machine's core count.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Everything is proven on CPUs, wherever the tests run: two ranks cannot share a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A W&B key of the person who runs the tests must not send their runs anywhere.
os.environ.pop("WANDB_API_KEY", None)
os.environ["NETRC"] = os.devnull
os.environ["WANDB_SILENT"] = "true"

# Left-overs of a surrounding job would make a test believe that it is one of its ranks.
for name in list(os.environ):
    if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        del os.environ[name]

# A shell starts what runs in its background with Ctrl-C ignored, and so would be all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """Root of the checkout under test."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    from data_tools.cli import main as sora_data

    folder = tmp_path_factory.mktemp("tiny")
    videos, shards = str(folder / "videos"), folder / "shards"
    assert sora_data(["digits", videos, "clips=48"]) == 0
    words = ["split.detector=none", "dedupe.near=false", "validation_fraction=0.2", "pack.crf=10", "workers=0"]
    assert sora_data(["run", videos, str(shards), *words]) == 0
    return Tiny(shards=shards, vae=make_vae(folder / "vae", shards, seed=0))


@pytest.fixture(scope="session")
def latents(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all clips of `tiny`. Read only, too."""
    from data_tools.cli import main as sora_data

    out = tmp_path_factory.mktemp("latents") / "latents"
    buckets = "buckets=[{resolution: [32, 32], frames: 17}]"
    assert sora_data(["encode", str(tiny.shards), str(out), f"vae_from={tiny.vae}", buckets, "workers=0"]) == 0
    return out


@pytest.fixture(scope="session")
def tiny_mp4s(tiny: Tiny) -> list[bytes]:
    """24 files of 17 frames of 32x32 each."""
    from sora_lite.data.index import Index

    index = Index.load(tiny.shards, "train")
    content = index.shard_paths[0].read_bytes()
    places = zip(index.media_offset.tolist(), index.media_size.tolist(), strict=True)
    return [content[offset : offset + size] for offset, size in places][:24]
