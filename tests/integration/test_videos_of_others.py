"""Videos in all the ways that people have them go through `sora-data run`, and every packed clip shows what it must."""

import json
import shutil
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import footage
import pytest
import stamped

from data_tools.cli import main as sora_data
from sora_lite.data.index import Index
from sora_lite.data.manifest import Manifest
from sora_lite.data.shards import ShardReader
from sora_lite.data.video import decode_clip

RATE = 25
"""Frames per second of the stamped files (but for the gif's 12.5)."""


def samples(folder: Path) -> list[tuple[dict, list[int]]]:
    """(KEY.json, stamps of the clip's frames) of every sample."""
    found = []
    for split in Manifest.load(folder).splits:
        index = Index.load(folder, split)
        for i in range(len(index)):
            with ShardReader(index.shard_paths[index.shard[i]]) as reader:
                media = reader.read(int(index.media_offset[i]), int(index.media_size[i]), int(index.crc32c[i]))
                meta = reader.read_json(int(index.json_offset[i]), int(index.json_size[i]), int(index.json_crc32c[i]))
            found.append((meta, [stamped.read_stamp(frame) for frame in decode_clip(media, frames=meta["frames"])]))
    return found


def counts(folder: Path) -> dict[str, int]:
    figures = json.loads((folder / "report.json").read_text())["counts"]
    for what in ("sources", "clips"):
        fates = ("packed", "filtered", "duplicate", "quarantined", "removed")
        assert figures[f"{what}_found"] == sum(figures[f"{what}_{fate}"] for fate in fates)
    return figures


@pytest.mark.parametrize("fps", [None, 10.0])
def test_every_packed_clip_holds_exactly_the_promised_frames(fps: float | None, tmp_path: Path) -> None:
    words = ["split.detector=none", "split.clip_frames=7", "split.min_frames=1", "dedupe.near=false", "pack.crf=14"]
    words += [f"split.fps={'null' if fps is None else fps}", "validation_fraction=0", "workers=2"]
    words += ["filter.keep_flagged=[variable_rate,interlaced,hdr]", "pack.preset=veryfast"]
    left = {name: make() for name, make in stamped.MAKERS.items()}
    while left:  # some differ in their containers alone: copies, which wait for their turn
        videos, shards = tmp_path / f"{len(left)}", tmp_path / f"{len(left)}_shards"
        videos.mkdir()
        for name, content in left.items():
            (videos / f"{name}.mp4").write_bytes(content)  # what a file is called does not say what it is
        assert sora_data(["run", str(videos), str(shards), *words]) == 0
        figures = counts(shards)
        assert figures["sources_packed"] + figures["sources_duplicate"] == len(left)
        clips: dict[str, dict[int, list[int]]] = defaultdict(dict)
        for meta, stamps in samples(shards):
            name = meta["source"]["id"].removesuffix(".mp4")
            clips[name][meta["start_pts"]] = stamps
            rate = Fraction(meta["fps"]).limit_denominator(1001)
            assert len(stamps) <= 7 and (rate == fps or fps is None or len(stamped.STAMPS[name]) == 1)
        for name, shown in clips.items():
            stamps = [stamp for _, clip in sorted(shown.items()) for stamp in clip]
            assert stamps == at_rate(name, stamped.STAMPS[name], rate_of(name, fps)), name
            del left[name]
        assert figures["sources_packed"] == len(clips) > 0
        assert sora_data(["verify", str(shards), "workers=2"]) == 0


def rate_of(name: str, fps: float | None) -> Fraction:
    """Frames per second of a source's clips."""
    if fps is not None:
        return Fraction(fps)
    if name.startswith("vfr"):
        times = stamped.uneven()
        return Fraction((len(times) - 1) * RATE, times[-1] - times[0]).limit_denominator(1001)
    return Fraction(25, 2) if name == "animated_gif" else Fraction(RATE)


def at_rate(name: str, stamps: list[int], fps: Fraction) -> list[int]:
    """By the rule itself: at start + i / fps, the last frame whose time is not after it, until the last one ends."""
    own = rate_of(name, None)
    times = [Fraction(tick, RATE) for tick in stamped.uneven()] if name.startswith("vfr") else []
    times = times or [i / own for i in range(len(stamps))]
    chosen, time = [], times[0]
    while time < times[-1] + 1 / own:
        chosen.append(stamps[max(k for k, begin in enumerate(times) if begin <= time)])
        time += 1 / fps
    return chosen if len(stamps) > 1 else stamps


def test_real_videos_become_verified_shards(tmp_path: Path) -> None:
    """All videos of four packages, with cuts, odd sizes and rates, as somebody would call it."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, path in enumerate(footage.clips()):
        shutil.copy(path, videos / f"{number:02d}_{path.name}")
    words = ["split.clip_seconds=2", "split.min_frames=9", "pack.max_side=256", "pack.preset=ultrafast"]
    assert sora_data(["run", str(videos), str(tmp_path / "s"), *words]) == 0
    figures = counts(tmp_path / "s")
    assert figures["sources_found"] == len(list(videos.iterdir())) and figures["clips_packed"] > 20
    assert figures["sources_quarantined"] == 0
    assert sora_data(["verify", str(tmp_path / "s")]) == 0
