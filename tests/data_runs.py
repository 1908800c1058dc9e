"""`sora-data` called in this process, and what it leaves in a folder of shards."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_tools.cli import main
from sora_lite.data.index import Index
from sora_lite.data.shards import ShardReader
from sora_lite.data.video import decode_clip


def sora_data(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def samples_of(folder: Path, split: str) -> dict[str, tuple[np.ndarray, dict]]:
    """key -> (frames, meta), read as the loader reads them."""
    index, samples = Index.load(folder, split), {}
    for i in range(len(index)):
        with ShardReader(index.shard_paths[index.shard[i]]) as reader:
            media = reader.read(int(index.media_offset[i]), int(index.media_size[i]), int(index.crc32c[i]))
            meta = json.loads(
                reader.read(int(index.json_offset[i]), int(index.json_size[i]), int(index.json_crc32c[i]))
            )
        samples[index.key(i)] = decode_clip(media, frames=int(index.frames[i])), meta
    return samples


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def records_of(folder: Path, split: str) -> set[tuple[str, str]]:
    return {(meta["source"]["id"], key) for key, (_, meta) in samples_of(folder, split).items()}


def noise(seed: int, frames: int = 17) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8)


def snapshot(root: Path) -> dict[bytes, tuple[int, ...]]:
    """Everything under a folder but the shards: kind, identity, and of files size, time of change; of canaries, when
    they were last read."""
    found = {}
    for parent, folders, files in os.walk(os.fsencode(root)):
        if b"shards" in folders:
            folders.remove(b"shards")
        for name in [*folders, *files]:
            status = os.lstat(path := os.path.join(parent, name))
            read = status.st_atime_ns if name.startswith(b"canary") and parent == os.fsencode(root) else 0
            rest = (status.st_size, status.st_mtime_ns, read) if name in files else ()
            found[path] = (status.st_mode, status.st_ino, *rest)
    return found


def printed_by(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str]:
    status = sora_data(*words)
    captured = capsys.readouterr()
    return status, captured.out + captured.err
