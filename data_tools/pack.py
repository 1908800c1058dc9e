"""Third stage: encode the planned clips and write them into shards, one after the other.

The plan is a fixed list of clips, and shards take them in its order. So what stands in the manifest says how far an
earlier run came, and the rest of the shards become the same bytes, whoever writes them and however often it is stopped.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.config import PrepareConfig
from data_tools.pool import ordered_map
from data_tools.probe import Probed
from data_tools.sources import Source
from data_tools.split import Tiling
from sora_lite.data.shards import SCHEMA_VERSION, Manifest, Sample, ShardWriter, to_json
from sora_lite.data.video import STILLS, BadVideo, VideoFacts, encode_mp4, encode_png, read_frames
from sora_lite.errors import UserError

CHUNK = 16
"""Most clips that a worker encodes, and holds as files in memory, before it hands them over."""


@dataclass(kw_only=True, slots=True)
class Planned:
    """One source with the clips to be made of it."""

    source: Source
    probed: Probed
    tiling: Tiling
    split: str
    config: PrepareConfig

    @property
    def clips(self) -> int:
        return len(self.tiling.bounds) - 1

    @property
    def facts(self) -> VideoFacts:
        assert self.probed.facts is not None
        return self.probed.facts

    def picks(self, clip: int) -> np.ndarray:
        """Source frames of a clip."""
        return self.tiling.picks[self.tiling.bounds[clip] : self.tiling.bounds[clip + 1]]

    def key(self, clip: int) -> str:
        """Made from content alone: the source's hash and the times of the clip's first and last frame."""
        picks, pts = self.picks(clip), self.facts.pts
        return f"{self.probed.sha256[:16]}_{pts[picks[0]]}_{pts[picks[-1]]}"

    def meta(self, clip: int) -> dict[str, Any]:
        """Content of KEY.json. What is not known is left out."""
        picks, facts, row = self.picks(clip), self.facts, self.source.row
        source = {"id": self.source.name, "sha256": self.probed.sha256, "licence": self.config.licence}
        optional = {"captions": row.captions, "label": row.label, "group": row.group, "extra": row.extra}
        return {
            "schema_version": SCHEMA_VERSION,
            "source": {name: value for name, value in source.items() if value is not None},
            "start_pts": int(facts.pts[picks[0]]),
            "end_pts": int(facts.pts[picks[-1]]),
            "time_base": str(facts.time_base),
            "frames": len(picks),
            "fps": float(self.tiling.fps),
            "height": self.tiling.size[0],
            "width": self.tiling.size[1],
            "sar": str(facts.sar),
            "rotation": facts.rotation,
            "config_hash": self.config.hash(),
            **{name: value for name, value in optional.items() if value is not None and value not in ([], {})},
        }


@dataclass(kw_only=True, slots=True)
class Task:
    """Some consecutive clips of one source: what a worker does at a time."""

    planned: Planned
    first: int
    last: int
    """One past the last clip."""


def plan_hash(plan: list[Planned]) -> str:
    """SHA-256 of everything that will stand in the shards but for the pixels."""
    digest = hashlib.sha256()
    for planned in plan:
        for clip in range(planned.clips):
            digest.update(to_json({"split": planned.split, "key": planned.key(clip), **planned.meta(clip)}))
    return digest.hexdigest()


def pack(plan: list[Planned], folder: Path, manifest: Manifest, config: PrepareConfig) -> None:
    """Write what is planned but not yet in the manifest, committing each shard as it fills up."""
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    tasks = list(_remaining(plan, dict(manifest.splits)))
    total = sum(task.last - task.first for task in tasks)
    writers: dict[str, ShardWriter] = {}
    try:
        with tqdm(total=total, desc="pack", unit="clip", mininterval=0.5) as bar:
            for task, samples in zip(tasks, ordered_map(encode, tasks, config.workers), strict=True):
                for sample in samples:
                    _add(sample, task.planned.split, folder, manifest, writers, config.shard_mb * 2**20)
                    bar.update()
        for split in sorted(writers):
            _commit(split, folder, manifest, writers)
    finally:
        for writer in writers.values():
            writer.discard()


def encode(task: Task) -> list[Sample]:
    """Decode a stretch of a source once and encode its clips. Raises UserError if the file is not what it was."""
    planned, samples = task.planned, []
    frames = _frames(planned, task.first, task.last)
    for clip in range(task.first, task.last):
        shown = islice(frames, len(planned.picks(clip)))
        if planned.facts.container in STILLS:
            ext, media = "png", encode_png(next(shown))
        else:
            ext, media = "mp4", encode_mp4(shown, planned.tiling.fps, planned.config.crf, planned.config.preset)
        samples.append(Sample(key=planned.key(clip), ext=ext, media=media, meta=planned.meta(clip)))
    return samples


def _frames(planned: Planned, first: int, last: int) -> Iterator[np.ndarray]:
    """The output frames of clips first to last - 1, each source frame repeated as often as it is picked."""
    picks, pts = planned.tiling.picks[planned.tiling.bounds[first] : planned.tiling.bounds[last]], planned.facts.pts
    path, height, width = planned.source.path, *planned.tiling.size
    stored = planned.facts.height, planned.facts.width
    # a side that is only odd loses its last row; it is not worth a rescaling
    crop = planned.facts.sar == 1 and stored[0] - height < 2 and stored[1] - width < 2
    wanted, counts = np.unique(picks, return_counts=True)
    shown = dict(zip(wanted.tolist(), counts.tolist(), strict=True))
    reader = read_frames(path, size=None if crop else planned.tiling.size, start=int(pts[wanted[0]]))
    try:
        for number, (time, frame) in enumerate(reader, start=int(wanted[0])):
            if number >= len(pts) or time != pts[number]:
                raise BadVideo(f"frame {number} is not where it was")
            for _ in range(shown.get(number, 0)):
                yield frame[:height, :width]
            if number == wanted[-1]:
                return
        raise BadVideo(f"frame {wanted[-1]} is not there any more")
    except (BadVideo, OSError) as error:
        raise UserError(f"{path}: changed since it was probed ({error}); run the same command again.") from error


def _remaining(plan: list[Planned], committed: dict[str, int]) -> Iterator[Task]:
    """Tasks for all clips but the first `committed[split]` of each split."""
    for planned in plan:
        done = min(committed.get(planned.split, 0), planned.clips)
        if done:
            committed[planned.split] -= done
        for first in range(done, planned.clips, CHUNK):
            yield Task(planned=planned, first=first, last=min(first + CHUNK, planned.clips))


def _add(
    sample: Sample, split: str, folder: Path, manifest: Manifest, writers: dict[str, ShardWriter], limit: int
) -> None:
    if split in writers and writers[split].bytes + len(sample.media) > limit:
        _commit(split, folder, manifest, writers)
    if split not in writers:
        number = sum(entry.split == split for entry in manifest.shards)
        writers[split] = ShardWriter(folder / f"{split}-{number:06d}.tar", split)
    writers[split].add(sample)


def _commit(split: str, folder: Path, manifest: Manifest, writers: dict[str, ShardWriter]) -> None:
    manifest.shards = sorted([*manifest.shards, writers[split].close()], key=lambda entry: entry.path)
    del writers[split]
    manifest.save(folder)
