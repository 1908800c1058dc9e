"""Clips per CPU second out of one shard: ours (any order, each checksum verified) against the plain tar stream."""

import tarfile
import tempfile
from pathlib import Path

import numpy as np
import webdataset

from benchmarks.measure import table, take_turns
from sora_lite.data.index import Index
from sora_lite.data.manifest import Manifest
from sora_lite.data.shards import Sample, ShardReader, ShardWriter
from sora_lite.data.video import decode_clip, encode_mp4

CLIPS, FRAMES, SIDE = 512, 17, 64


def write_shard(folder: Path) -> Path:
    """A data set of one shard in `folder`; a smooth texture that drifts, so that it compresses as real clips do."""
    rng = np.random.default_rng(0)
    media = []
    for _ in range(16):
        texture = np.kron(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        frames = np.stack([texture[t : t + SIDE, t : t + SIDE] for t in range(FRAMES)])  # T H W 3
        media.append(encode_mp4(frames, fps=8, crf=20))
    with ShardWriter(folder / "train-000000.tar", split="train") as writer:
        for i in range(CLIPS):
            source = {"sha256": f"{i:064x}"}
            meta = {"frames": FRAMES, "height": SIDE, "width": SIDE, "fps": 8.0, "source": source}
            writer.add(Sample(key=f"clip{i:05d}", ext="mp4", media=media[i % len(media)], meta=meta))
    Manifest(config_hash="", shards=[writer.entry]).save(folder)
    return writer.path


def stream_tar(path: Path) -> int:
    """The plain way: every member in order, by the standard library, nothing checked."""
    with tarfile.open(path, "r|") as archive:
        return sum(len(archive.extractfile(member).read()) for member in archive)


def stream_webdataset(path: Path) -> int:
    """Stock webdataset, which groups members into samples by their names."""
    return sum(len(row["mp4"]) + len(row["json"]) for row in webdataset.WebDataset(str(path), shardshuffle=False))


def read_shuffled(index: Index) -> list[bytes]:
    """Ours: by offset in a random order, each clip against its checksum."""
    order = np.random.default_rng(0).permutation(len(index))
    with ShardReader(index.shard_paths[0]) as reader:
        return [reader.read(int(index.media_offset[i]), int(index.media_size[i]), int(index.crc32c[i])) for i in order]


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_shard(Path(folder))
        index = Index.load(Path(folder), "train")
        candidates = {
            "tarfile, in order, unchecked": lambda: stream_tar(path),
            "webdataset, in order, unchecked": lambda: stream_webdataset(path),
            "sora_lite, shuffled, checksums verified": lambda: read_shuffled(index),
            "  the same, and every frame decoded": lambda: [
                decode_clip(media, frames=FRAMES) for media in read_shuffled(index)
            ],
        }
        kib = path.stat().st_size / CLIPS / 1024
        title = (
            f"reading {CLIPS} clips of {FRAMES} x {SIDE} x {SIDE} ({kib:.1f} KiB each) from one shard in the page cache"
        )
        print(table(title, "clips", take_turns(candidates), CLIPS))
