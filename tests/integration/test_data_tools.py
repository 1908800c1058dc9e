"""`sora-data` as a user calls it: real files in, shards out, whatever happens on the way."""

import json
import shutil
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import grey
import pytest
import webdataset
from data_runs import files_of, noise, samples_of, sora_data
from odd_videos import audio_only
from PIL import Image

from sora_lite.data.video import encode_mp4, write_mp4

STEP = 4
stamped, numbers = partial(grey.stamped, height=32, width=48, step=STEP), partial(grey.numbers, step=STEP)


BAD = {
    "empty.mp4": (lambda: b"", "empty"),
    "text.mp4": (lambda: b"dear reader,\nthis is a letter\n" * 30, "not a video"),
    "audio.mp4": (audio_only, "no video stream"),
    "no_header.mp4": (lambda: grey.muxed(noise(1))[:-1500], "header"),
    "cut.mp4": (lambda: encode_mp4(noise(2), 8, 18)[:20_000], "cut off"),
    "playlist.mp4": (
        lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        "not a video",
    ),
}


PLAIN = ("dedupe.near=false", "split.detector=none")
"""Stamped frames are blank, and all look alike."""
FAST = ("pack.crf=8", "pack.preset=ultrafast")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Good files of several kinds, the bad ones, and a metadata.jsonl."""
    folder = tmp_path / "videos"
    (folder / "sub folder").mkdir(parents=True)
    write_mp4(folder / "short.mp4", stamped(20), 8)
    write_mp4(folder / "sub folder" / "long é.mp4", stamped(50), Fraction(30000, 1001))
    write_mp4(folder / "tiny.mp4", stamped(5), 8)
    shutil.copy(folder / "short.mp4", folder / "twin.mp4")
    Image.fromarray(stamped(11, height=40, width=51)[10]).save(folder / "still.png")
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
        for rgb in stamped(203, height=64, width=64):
            muxer.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        muxer.mux(stream.encode())
    options = "split.clip_frames=5", "split.min_frames=4", "validation_fraction=0", "workers=0", *FAST, *PLAIN
    assert sora_data("run", tmp_path / "videos", tmp_path / "s", *options) == 0
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    assert (report["counts"]["clips_packed"], report["counts"]["frames_dropped"]) == (40, 3)
    samples = samples_of(tmp_path / "s", "train").values()
    shown = [numbers(clip) for clip, meta in sorted(samples, key=lambda sample: sample[1]["start_pts"])]
    assert [n for clip in shown for n in clip] == [n % (256 // STEP) for n in range(200)]


def test_a_second_run_does_nothing_and_other_settings_are_refused(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = ("run", videos, tmp_path / "s", "workers=0", "validation_fraction=0.3", *PLAIN)
    assert sora_data(*run) == 0
    before = files_of(tmp_path / "s")
    assert sora_data(*run) == 0
    assert files_of(tmp_path / "s") == before
    (tmp_path / "empty").mkdir()
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
        (("probe", tmp_path / "empty", tmp_path / "t"), "holds no videos"),
        (("verify", tmp_path / "t"), "manifest.json"),
        (("split", tmp_path / "t"), "sora-data run"),
    ]:
        assert sora_data(*arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and words in error
    assert files_of(tmp_path / "s") == before and not (tmp_path / "t").exists()


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


# ------------------------------------------------------------------------------------------------ later changes


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
