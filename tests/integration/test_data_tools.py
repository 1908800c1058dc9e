"""`sora-data` as a user calls it: real files in, shards out, whatever happens on the way."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_videos import audio_only
from PIL import Image

from data_tools.cli import main
from data_tools.config import DataConfig, PackConfig, SplitConfig
from data_tools.lists import Row
from data_tools.probe import Probed
from data_tools.probe import facts_of as facts_of_row
from data_tools.sources import Source
from data_tools.split import Media, clip_size, frames_at_rate, held_out, tile
from sora_lite.data.index import Index
from sora_lite.data.manifest import Manifest
from sora_lite.data.shards import ShardReader
from sora_lite.data.video import VideoFacts, decode_clip, encode_mp4, write_mp4

GREY = 4
"""Levels of grey between one frame and the next of a stamped video."""


def stamped(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    levels = (np.arange(frames) * GREY % 256).astype(np.uint8)[:, None, None, None]
    return np.ascontiguousarray(np.broadcast_to(levels, (frames, height, width, 3)))


def numbers(clip: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / GREY) for frame in clip]


def noise(seed: int, frames: int = 17) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8)


def header_last(frames: np.ndarray) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as muxer:
        stream = muxer.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for rgb in frames:
            muxer.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        muxer.mux(stream.encode())
    return out.getvalue()


BAD = {
    "empty.mp4": (lambda: b"", "empty"),
    "text.mp4": (lambda: b"dear reader,\nthis is a letter\n" * 30, "not a video"),
    "audio.mp4": (audio_only, "no video stream"),
    "no_header.mp4": (lambda: header_last(noise(1))[:-1500], "header"),
    "cut.mp4": (lambda: encode_mp4(noise(2), 8, 18)[:20_000], "cut off"),
    "playlist.mp4": (
        lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        "not a video",
    ),
}


PLAIN = ("dedupe.near=false", "split.detector=none")
"""Stamped frames are blank, and all look alike."""
FAST = ("pack.crf=8", "pack.preset=ultrafast")


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


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Good files of several kinds, the bad ones, and a metadata.jsonl."""
    folder = tmp_path / "videos"
    (folder / "sub folder").mkdir(parents=True)
    write_mp4(folder / "short.mp4", stamped(20), 8)
    write_mp4(folder / "sub folder" / "long é.mp4", stamped(50), Fraction(30000, 1001))
    write_mp4(folder / "tiny.mp4", stamped(5), 8)
    shutil.copy(folder / "short.mp4", folder / "twin.mp4")
    Image.fromarray(stamped(11, 40, 51)[10]).save(folder / "still.png")
    for name, (make, _) in BAD.items():
        (folder / name).write_bytes(make())
    (folder / "notes.txt").write_text("not looked at")
    rows = [
        {"file_name": "short.mp4", "caption": "grey grows", "label": 3, "colour": "grey"},
        {"file_name": "sub folder/long é.mp4", "captions": ["one", "two"], "group": "g"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


# ---------------------------------------------------------------------------------------------------------- whole


def test_good_files_are_packed_exactly_and_bad_ones_named(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shards = tmp_path / "shards"
    options = ("split.clip_frames=20", "split.min_frames=9", "validation_fraction=0", "pack.crf=8", "licence=CC0")
    assert sora_data("run", videos, shards, *options, "workers=0", *PLAIN) == 0
    report = json.loads((shards / "report.json").read_text())
    left_out = {item["name"]: (item["kind"], item["reason"]) for item in report["sources"]}
    printed = capsys.readouterr().out
    for name, (_, reason) in BAD.items():
        assert left_out[name][0] == "quarantined" and reason in left_out[name][1]
        assert name in printed
    assert left_out["tiny.mp4"][0] == "filtered" and "too short" in left_out["tiny.mp4"][1]
    assert left_out["twin.mp4"] == ("duplicate", "has the same bytes as short.mp4")
    counts = report["counts"]
    assert (counts["sources_found"], counts["sources_packed"], counts["sources_quarantined"]) == (11, 3, 6)
    assert (counts["clips_packed"], counts["frames_packed"], counts["frames_dropped"]) == (5, 71, 0)

    samples = samples_of(shards, "train")
    clips = {(meta["source"]["id"], meta["start_pts"]): (numbers(clip), meta) for clip, meta in samples.values()}
    long = sorted((start, frames) for (name, start), (frames, _) in clips.items() if "long" in name)
    assert [frames for _, frames in long] == [list(range(20)), list(range(20, 40)), list(range(40, 50))]
    assert clips["short.mp4", 0][0] == list(range(20)) and clips["still.png", 0][0] == [10]
    meta = clips["short.mp4", 0][1]
    assert (meta["captions"], meta["label"], meta["extra"]) == (["grey grows"], 3, {"colour": "grey"})
    assert (meta["fps"], meta["frames"], meta["source"]["licence"]) == (8.0, 20, "CC0")
    assert clips["sub folder/long é.mp4", 0][1]["captions"] == ["one", "two"]
    assert clips["sub folder/long é.mp4", 0][1]["fps"] == pytest.approx(30000 / 1001)
    assert all(
        key == f"{m['source']['sha256'][:16]}_{m['start_pts']}_{m['end_pts']}" for key, (_, m) in samples.items()
    )

    stock = list(webdataset.WebDataset(str(shards / "train-000000.tar"), shardshuffle=False))
    assert {sample["__key__"] for sample in stock} == samples.keys()
    assert sora_data("verify", shards, "workers=0") == 0


def test_rate_and_size_on_request(videos: Path, tmp_path: Path) -> None:
    options = "split.fps=4", "split.min_frames=6", "pack.max_side=24", "pack.crf=8"
    assert sora_data("run", videos, tmp_path / "s", *options, "workers=0", *PLAIN) == 0
    clips = [*samples_of(tmp_path / "s", "train").values(), *samples_of(tmp_path / "s", "validation").values()]
    by_name = {meta["source"]["id"]: (clip, meta) for clip, meta in clips}
    clip, meta = by_name["short.mp4"]
    assert numbers(clip) == list(range(0, 20, 2)) and (meta["fps"], clip.shape[1:3]) == (4.0, (16, 24))
    clip, _ = by_name["sub folder/long é.mp4"]
    assert numbers(clip) == [int(i * 30000 / 1001 / 4) for i in range(7)]


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("matroska", "libx265"), ("mpegts", "libx264")])
def test_long_videos_are_read_in_stretches_and_stay_exact(container: str, codec: str, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    path = tmp_path / "videos" / f"long.{'ts' if container == 'mpegts' else 'mp4'}"
    with av.open(str(path), "w", format=container) as muxer:
        parameters = {f"{codec[3:]}-params": "keyint=30:open-gop=1" + ":log-level=none" * (codec == "libx265")}
        stream = muxer.add_stream(codec, rate=25, options={"crf": "8", **parameters})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for rgb in stamped(203, 64, 64):
            muxer.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        muxer.mux(stream.encode())
    options = "split.clip_frames=5", "split.min_frames=4", "validation_fraction=0", "workers=0", *FAST, *PLAIN
    assert sora_data("run", tmp_path / "videos", tmp_path / "s", *options) == 0
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    assert (report["counts"]["clips_packed"], report["counts"]["frames_dropped"]) == (40, 3)
    samples = samples_of(tmp_path / "s", "train").values()
    shown = [numbers(clip) for clip, meta in sorted(samples, key=lambda sample: sample[1]["start_pts"])]
    assert [n for clip in shown for n in clip] == [n % (256 // GREY) for n in range(200)]


def test_a_second_run_does_nothing_and_other_settings_are_refused(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = ("run", videos, tmp_path / "s", "workers=0", "validation_fraction=0.3", *PLAIN)
    assert sora_data(*run) == 0
    before = files_of(tmp_path / "s")
    assert sora_data(*run) == 0
    assert files_of(tmp_path / "s") == before
    capsys.readouterr()
    for arguments, words in [
        ((*run, "pack.crf=30"), "other settings"),
        ((*run, "split.clip_frame=9"), "nearest is split.clip_frames"),
        ((*run, "clip_frames=9"), "nearest is split.clip_frames"),
        ((*run, "pack.crf=best"), "crf"),
        ((*run, "pack.preset=turbo"), "preset"),
        ((*run, "filter.rules=[{score: movement, min: 1}]"), "movement"),
        ((*run, "filter.rules=[{score: motion}]"), "needs one of"),
        ((*run, "config=nowhere.yaml"), "nowhere.yaml"),
        (("run", tmp_path / "nowhere", tmp_path / "t"), "no such folder"),
        (("verify", tmp_path / "t"), "manifest.json"),
        (("split", tmp_path / "t"), "sora-data run"),
    ]:
        assert sora_data(*arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and words in error
    assert files_of(tmp_path / "s") == before


def test_nothing_usable_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "text.mp4").write_text("no video")
    assert sora_data("run", tmp_path / "videos", tmp_path / "s", "workers=0") == 2
    printed = capsys.readouterr()
    assert "text.mp4: not a video" in printed.out and "none of the 1 sources" in printed.err
    assert json.loads((tmp_path / "s" / "report.json").read_text())["counts"]["sources_quarantined"] == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "a.mp4"', "line 2"),
        ('{"file_name": "gone.mp4"}', "does not exist"),
        ('{"file_name": "../videos/a.mp4", "label": "cat"}', "label must be an integer"),
        ('{"file_name": "../../etc/passwd"}', "leads out of"),
        ('{"file_name": "a.mp4", "caption": 5}', "caption must be a text"),
        ('{"file_name": "b.mp4"}', "earlier line"),
        ('["a.mp4"]', "file_name"),
    ],
)
def test_mistakes_in_metadata_are_named_by_line(
    line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / "videos" / name, stamped(17), 8)
    (tmp_path / "videos" / "metadata.jsonl").write_text('{"file_name": "b.mp4"}\n' + line + "\n")
    assert sora_data("run", tmp_path / "videos", tmp_path / "s", "workers=0") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "metadata.jsonl, line 2" in error and words in error


def test_groups_stay_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    rows = []
    for i in range(24):
        write_mp4(tmp_path / "videos" / f"{i}.mp4", noise(i, frames=2), 8, crf=40)
        rows.append(json.dumps({"file_name": f"{i}.mp4", "group": f"g{i // 3}"}))
    (tmp_path / "videos" / "metadata.jsonl").write_text("\n".join(rows))
    options = "split.min_frames=2", "validation_fraction=0.3", "workers=0", *PLAIN
    assert sora_data("run", tmp_path / "videos", tmp_path / "s", *options) == 0
    train = {meta["group"] for _, meta in samples_of(tmp_path / "s", "train").values()}
    held = {meta["group"] for _, meta in samples_of(tmp_path / "s", "validation").values()}
    assert train and held and not train & held and len(train | held) == 8


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Videos that fill several shards of 1 MiB, and the files that an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "videos").mkdir()
    for i in range(16):
        write_mp4(folder / "videos" / f"{i}.mp4", noise(i, frames=34), 8, crf=10)
    assert sora_data(*many_run(folder / "videos", folder / "shards"), "workers=0") == 0
    assert len(Manifest.load(folder / "shards").shards) >= 4
    return folder / "videos", files_of(folder / "shards")


def many_run(videos: Path, shards: Path) -> tuple[object, ...]:
    return (
        "run",
        videos,
        shards,
        "pack.shard_mb=1",
        "split.clip_frames=17",
        "split.detector=none",
        "validation_fraction=0.2",
        "pack.crf=10",
        "pack.preset=ultrafast",
    )


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_tools", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_workers_do_not_change_a_byte(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    videos, expected = many
    assert sora_data(*many_run(videos, tmp_path / "s"), "workers=2") == 0
    assert files_of(tmp_path / "s") == expected


def test_kill_9_at_any_time_does_not_change_a_byte(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    videos, expected = many
    shards = tmp_path / "s"

    def committed() -> int:
        path = shards / "manifest.json"
        return len(json.loads(path.read_text())["pending"]) if path.exists() else 0

    for state in ("probing", "packing", "one shard", "three shards"):
        job = start(*many_run(videos, shards), "workers=0")
        reached = {
            "probing": lambda: any((shards / ".work").glob("probe/*/*.parquet")),
            "packing": lambda: any(shards.glob("*.tar.partial")),
            "one shard": lambda: committed() >= 1,
            "three shards": lambda: committed() >= 3,
        }[state]
        while not reached() and job.poll() is None:
            time.sleep(0.002)
        job.kill()
        job.wait()
    assert 3 <= committed() < len(json.loads(expected["manifest.json"])["shards"]), "killed too late to show anything"
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("*.tar") if committed()}
    assert sora_data(*many_run(videos, shards), "workers=0") == 0
    assert files_of(shards) == expected
    assert sum(path.stat().st_mtime_ns == then for path, then in kept.items()) >= 3, "committed shards were rewritten"


def test_a_killed_parent_leaves_no_workers_and_a_second_run_is_kept_out(
    many: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    videos, expected = many
    job = start(*many_run(videos, tmp_path / "s"), "workers=2")
    while not any((tmp_path / "s").glob("*.tar.partial")):
        assert job.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(job.pid).children(recursive=True)
    assert sora_data(*many_run(videos, tmp_path / "s"), "workers=0") == 2
    assert "another sora-data" in capsys.readouterr().err
    os.kill(job.pid, 9)
    job.wait()
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert sora_data(*many_run(videos, tmp_path / "s"), "workers=0") == 0
    assert files_of(tmp_path / "s") == expected


def test_verify_finds_any_flipped_byte(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    _, expected = many
    rng = np.random.default_rng(0)
    names = sorted(name for name in expected if name.endswith((".tar", ".parquet")))
    for name, content in expected.items():
        (tmp_path / name).write_bytes(content)
    assert sora_data("verify", tmp_path, "workers=0") == 0
    for name in (names[0], names[1], names[-1], names[-2]):
        bad = bytearray(expected[name])
        bad[rng.integers(0, len(bad))] ^= 1 << int(rng.integers(0, 8))
        (tmp_path / name).write_bytes(bad)
        assert sora_data("verify", tmp_path, "workers=0") == 2
        (tmp_path / name).write_bytes(expected[name])


# ------------------------------------------------------------------------------------------------ later changes


def records(folder: Path) -> set[tuple[str, str]]:
    """(source, key) of all samples that readers see."""
    return {
        (meta["source"]["id"], key)
        for split in Manifest.load(folder).splits
        for key, (_, meta) in samples_of(folder, split).items()
    }


def test_new_sources_become_new_shards_and_what_is_taken_down_stays_away(
    many: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    videos, _ = many
    (tmp_path / "v").mkdir()
    for path in sorted(videos.iterdir())[:6]:
        shutil.copy2(path, tmp_path / "v")
    run = (*many_run(tmp_path / "v", tmp_path / "s"), "workers=0")
    assert sora_data(*run) == 0
    first = Manifest.load(tmp_path / "s")
    splits = {name: split for split in first.splits for name, _ in records_of(tmp_path / "s", split)}

    for path in sorted(videos.iterdir())[6:]:
        shutil.copy2(path, tmp_path / "v")
    shutil.copy2(tmp_path / "v" / "0.mp4", tmp_path / "v" / "copy.mp4")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.tar")}
    assert sora_data(*run) == 0
    assert "copy.mp4" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    second = Manifest.load(tmp_path / "s")
    assert second.shards[: len(first.shards)] == first.shards and len(second.shards) > len(first.shards)
    assert {name for name, _ in records(tmp_path / "s")} == {path.name for path in videos.iterdir()}
    now = {name: split for split in second.splits for name, _ in records_of(tmp_path / "s", split)}
    assert {name: now[name] for name in splits} == splits
    assert sora_data("verify", tmp_path / "s", "workers=0") == 0

    all_of_them = sorted(records(tmp_path / "s"))
    key = all_of_them[0][1]
    other = next(key for name, key in all_of_them if name == "5.mp4")
    assert sora_data("remove", tmp_path / "s", "nonsense", key) == 2
    assert "nonsense" in capsys.readouterr().err
    assert sora_data("remove", tmp_path / "s", key, other[:16]) == 0
    left = {(one, k) for one, k in all_of_them if k != key and one != "5.mp4"}
    assert records(tmp_path / "s") == left
    assert sora_data("verify", tmp_path / "s", "workers=0") == 0
    size = sum(path.stat().st_size for path in (tmp_path / "s").glob("*.tar"))
    assert sora_data("compact", tmp_path / "s") == 0
    assert records(tmp_path / "s") == left
    assert sum(path.stat().st_size for path in (tmp_path / "s").glob("*.tar")) < size
    assert sora_data("verify", tmp_path / "s", "workers=0") == 0
    assert sora_data(*run) == 0
    assert records(tmp_path / "s") == left
    counts = Manifest.load(tmp_path / "s").counts
    assert (counts["sources_removed"], counts["clips_removed"], counts["sources_duplicate"]) == (1, 1, 1)


def records_of(folder: Path, split: str) -> set[tuple[str, str]]:
    return {(meta["source"]["id"], key) for key, (_, meta) in samples_of(folder, split).items()}


def test_stages_alone_add_up_to_a_run(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    videos, expected = many
    words = many_run(videos, tmp_path / "s")[3:]
    assert sora_data("probe", videos, tmp_path / "s", *words, "workers=0") == 0
    assert sora_data("score", tmp_path / "s") == 2
    for stage in ("split", "score", "filter", "dedupe", "caption", "pack"):
        assert sora_data(stage, tmp_path / "s") == 0
    assert files_of(tmp_path / "s") == expected


def test_a_changed_setting_redoes_its_stage_and_what_follows(videos: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"

    def rows(stage: str) -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in work.glob(f"{stage}/*/*.parquet")}

    run = ("run", videos, f"work={work}", "workers=0", "validation_fraction=0", *PLAIN)
    assert sora_data(*run[:2], tmp_path / "a", *run[2:]) == 0
    before = {stage: rows(stage) for stage in ("probe", "split", "score")}
    assert sora_data(*run[:2], tmp_path / "b", *run[2:], "filter.rules=[{score: motion, min: 1000}]") == 2
    assert {stage: rows(stage) for stage in before} == before
    assert sora_data(*run[:2], tmp_path / "c", *run[2:], "score.fps=1") == 0
    assert {stage: rows(stage) for stage in ("probe", "split")} == {k: before[k] for k in ("probe", "split")}
    assert rows("score").keys() > before["score"].keys()


def test_quarantine_is_listed_and_tried_again(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = ("run", videos, tmp_path / "s", "workers=0", "validation_fraction=0", *PLAIN)
    assert sora_data(*run) == 0
    capsys.readouterr()
    assert sora_data("quarantine", "list", tmp_path / "s") == 0
    printed = capsys.readouterr().out
    assert all(name in printed and reason in printed for name, (_, reason) in BAD.items())
    assert "6 in quarantine" in printed
    assert sora_data("quarantine", "retry", tmp_path / "s") == 0
    assert sora_data("quarantine", "list", tmp_path / "s") == 0
    assert "\n0 in quarantine" in capsys.readouterr().out
    assert sora_data(*run) == 0
    assert sora_data("quarantine", "list", tmp_path / "s") == 0
    assert "6 in quarantine" in capsys.readouterr().out


def killed_while_packing(*words: object) -> None:
    """Run until the first shard is committed, then kill -9."""
    manifest = Path(str(words[2])) / "manifest.json"
    job = start(*words)
    while job.poll() is None and not (manifest.exists() and json.loads(manifest.read_text())["pending"]):
        time.sleep(0.002)
    job.kill()
    job.wait()
    assert json.loads(manifest.read_text())["pending"], "it ended before it could be killed"


def test_sources_that_change_after_a_kill_leak_nothing(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """The one source that is held out, as nothing else is, may be another one with more sources."""
    videos, _ = many
    (tmp_path / "v").mkdir()
    for path in sorted(videos.iterdir())[:8]:
        shutil.copy2(path, tmp_path / "v")
    words = ("run", tmp_path / "v", tmp_path / "s", "pack.shard_mb=1", "split.clip_frames=17", "split.detector=none")
    words += ("validation_fraction=0.000001", "pack.crf=10", "pack.preset=ultrafast", "workers=0")
    killed_while_packing(*words)
    for path in sorted(videos.iterdir())[8:]:
        shutil.copy2(path, tmp_path / "v")
    assert sora_data(*words) == 0
    assert sora_data("verify", tmp_path / "s", "workers=0") == 0
    assert {name for name, _ in records(tmp_path / "s")} == {path.name for path in videos.iterdir()}


def test_another_rate_after_a_kill_packs_the_right_frames(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    for i in range(8):
        write_mp4(tmp_path / "v" / f"{i}.mp4", noise(i, frames=64), 24, crf=4)
    words = ("run", tmp_path / "v", tmp_path / "s", "split.clip_frames=64", "split.min_frames=2", "pack.crf=4")
    words += ("split.detector=none", "pack.shard_mb=1", "workers=0")
    killed_while_packing(*words, "split.fps=24")
    (tmp_path / "s" / "manifest.json").unlink()  # as if it had been killed before the first shard
    assert sora_data(*words, "split.fps=8") == 0
    assert sora_data("verify", tmp_path / "s", "workers=0") == 0
    assert (
        not list((tmp_path / "s" / ".work").glob("encode/*/parts/*.tar"))
        or len(list((tmp_path / "s" / ".work").glob("encode/*"))) == 2
    )


def test_groups_and_what_was_taken_down_are_remembered(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By later runs that list none of the sources that are in the shards already."""
    words = (tmp_path / "s", "split.detector=none", "validation_fraction=0.3", "workers=0", "pack.preset=ultrafast")
    for turn in range(2):
        folder = tmp_path / f"{turn}"
        folder.mkdir()
        rows = []
        for i in range(6):
            write_mp4(folder / f"{turn}_{i}.mp4", noise(10 * turn + i), 8, crf=30)
            rows.append(json.dumps({"file_name": f"{turn}_{i}.mp4", "group": f"g{i}"}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(rows))
        assert sora_data("run", folder, *words) == 0
    sides = {
        split: {meta["group"] for _, meta in samples_of(tmp_path / "s", split).values()}
        for split in ("train", "validation")
    }
    assert sides["train"] and sides["validation"] and not sides["train"] & sides["validation"]

    _, meta = next(iter(samples_of(tmp_path / "s", "train").values()))
    name = meta["source"]["id"]
    assert sora_data("remove", tmp_path / "s", meta["source"]["sha256"][:16]) == 0
    (tmp_path / "twin").mkdir()
    with av.open(str(tmp_path / name[0] / name)) as old, av.open(str(tmp_path / "twin" / "a.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    write_mp4(tmp_path / "twin" / "b.mp4", noise(99), 8, crf=30)
    assert sora_data("run", tmp_path / "twin", *words) == 0
    counts = Manifest.load(tmp_path / "s").counts
    assert (counts["sources_removed"], counts["sources_packed"]) == (1, 1)


def test_what_cannot_be_captioned_stays_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    for i in range(3):
        write_mp4(tmp_path / "v" / f"{i}.mp4", noise(i), 8, crf=30)
    (tmp_path / "v" / "0.txt").write_text("one caption\n")
    (tmp_path / "v" / "1.json").write_text("{")
    assert sora_data("run", tmp_path / "v", tmp_path / "s", "caption.source=sidecar", "workers=0") == 0
    after_run = (tmp_path / "s" / "report.json").read_text()
    assert "is not JSON" in after_run
    assert sora_data("report", tmp_path / "s", "workers=0") == 0
    assert json.loads((tmp_path / "s" / "report.json").read_text())["clips"] == json.loads(after_run)["clips"]


def test_folders_that_share_their_work_stay_apart(videos: Path, tmp_path: Path) -> None:
    words = ("validation_fraction=0", "workers=0", *PLAIN)
    assert sora_data("run", videos, tmp_path / "a", *words) == 0
    before = (tmp_path / "a" / "report.json").read_text()
    (tmp_path / "other").mkdir()
    write_mp4(tmp_path / "other" / "new.mp4", stamped(30), 8)
    work = f"work={tmp_path / 'a' / '.work'}"
    assert sora_data("run", tmp_path / "other", tmp_path / "b", *words, work, "pack.max_side=24") == 0
    assert sora_data("report", tmp_path / "a") == 0 and sora_data("pack", tmp_path / "a") == 0
    assert (tmp_path / "a" / "report.json").read_text() == before


# ------------------------------------------------------------------------------------------------------ arithmetic


def facts_of(pts: np.ndarray, rate: Fraction, time_base: Fraction, variable_rate: bool) -> VideoFacts:
    return VideoFacts(
        container="mov",
        codec="h264",
        width=64,
        height=48,
        sar=Fraction(4, 3),
        rotation=90,
        time_base=time_base,
        average_rate=rate,
        bit_depth=8,
        hdr=False,
        interlaced=False,
        variable_rate=variable_rate,
        frames_hash="",
        pts=pts.astype(np.int64),
    )


RATES = st.sampled_from(
    [Fraction(24000, 1001), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(60), Fraction(8)]
)


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(2, 3000), rate=RATES, fps=RATES, start=st.integers(-900, 900), data=st.data())
def test_constant_rate_is_exact_even_where_times_are_rounded_to_milliseconds(
    frames: int, rate: Fraction, fps: Fraction, start: int, data: st.DataObject
) -> None:
    pts = np.array([start + round(i * 1000 / rate) for i in range(frames)])
    first = data.draw(st.integers(0, frames - 1))
    last = data.draw(st.integers(first + 1, frames))
    picks = frames_at_rate(facts_of(pts, rate, Fraction(1, 1000), False), fps, (first, last))
    assert picks.tolist() == [first + i * rate / fps // 1 for i in range(len(picks))]
    assert picks[-1] < last <= first + len(picks) * rate / fps
    if rate == fps:
        assert picks.tolist() == list(range(first, last))


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.integers(1, 4000), min_size=1, max_size=60), fps=RATES, data=st.data())
def test_variable_rate_shows_the_last_frame_before_each_time(
    steps: list[int], fps: Fraction, data: st.DataObject
) -> None:
    pts = np.cumsum([100, *steps])
    rate = Fraction(1000 * len(steps), sum(steps))
    facts = facts_of(pts, rate, Fraction(1, 1000), True)
    first = data.draw(st.integers(0, len(pts) - 1))
    last = data.draw(st.integers(first + 1, len(pts)))
    picks = frames_at_rate(facts, fps, (first, last))
    end = pts[last] if last < len(pts) else pts[-1] + 1000 / rate
    times = [t for i in range(len(picks) + 1) if (t := pts[first] + i * 1000 / fps) < end]
    assert picks.tolist() == [max(k for k, p in enumerate(pts) if p <= t) for t in times]
    assert facts_of_row(Probed.from_facts("ab", facts).row).pts.tolist() == pts.tolist()


def media_of(facts: VideoFacts, *transitions: tuple[str, int, int], **settings_: object) -> Media:
    kinds, firsts, lasts = (list(column) for column in zip(*transitions, strict=True)) if transitions else ([], [], [])
    row = {"kinds": kinds, "firsts": firsts, "lasts": lasts}
    source = Source(location="/a", name="a", row=Row())
    return tile(source, Probed.from_facts("ab" * 32, facts), row, SplitConfig(**settings_))


def spans(media: Media) -> list[tuple[int, int]]:
    return [(media.shots[clip.shot][0] + clip.first, media.shots[clip.shot][0] + clip.last) for clip in media.clips]


def test_tiles_are_gapless_and_the_rest_is_counted() -> None:
    facts = facts_of(np.arange(100), Fraction(8), Fraction(1, 8), False)
    media = media_of(facts, clip_frames=30, min_frames=9)
    assert spans(media) == [(0, 30), (30, 60), (60, 90), (90, 100)] and media.dropped == 0
    media = media_of(facts, clip_frames=30, min_frames=17)
    assert spans(media) == [(0, 30), (30, 60), (60, 90)] and media.dropped == 10
    assert media.size == (48, 85)  # 64 * 4/3 wide
    assert clip_size(media, None, DataConfig(pack=PackConfig(max_side=40))) == (22, 40)
    assert clip_size(media, (24, 85), DataConfig()) == (24, 84)
    assert clip_size(media, (12, 85), DataConfig()) is None
    assert spans(media_of(facts, clip_seconds=4))[0] == (0, 32)


def test_no_clip_crosses_a_boundary() -> None:
    facts = facts_of(np.arange(100), Fraction(8), Fraction(1, 8), False)
    media = media_of(facts, ("cut", 25, 25), ("fade", 60, 70), clip_frames=20, min_frames=5)
    assert spans(media) == [(0, 20), (20, 25), (25, 45), (45, 60), (70, 90), (90, 100)] and media.dropped == 10


@given(groups=st.sets(st.text(max_size=4), max_size=40), more=st.text(max_size=4), fraction=st.floats(0, 0.9))
def test_what_is_held_out_depends_on_the_group_alone(groups: set[str], more: str, fraction: float) -> None:
    held = held_out(groups, fraction)
    assert held <= groups
    if fraction > 0 and len(groups) > 1:
        assert 0 < len(held) < len(groups)
    later = held_out({*groups, more}, fraction, at_least_one=False)
    assert held_out(groups, fraction, at_least_one=False) == later - ({more} - groups)
