"""`sora-data buckets`: the table that it proposes is one that training takes, and its figures are right."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data_tools.cli import main
from sora_lite.data.buckets import Row, assign
from sora_lite.data.index import Index
from sora_lite.data.manifest import Manifest
from sora_lite.data.shards import Sample, ShardWriter

SIZES = [(360, 640), (640, 360), (360, 640), (480, 480)]
FRAMES = (150, 60)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shapes and two lengths at 30 fps, some clips of 10 frames, and stills."""
    manifest = Manifest(config_hash="")
    with ShardWriter(tmp_path / "train-000000.tar", split="train") as writer:
        for i in range(240):
            height, width = SIZES[i % 4]
            frames = 1 if i % 10 == 9 else 10 if i % 20 == 8 else FRAMES[i // 4 % 2]
            meta = {"frames": frames, "height": height, "width": width, "fps": 30.0, "source": {"sha256": f"{i:064x}"}}
            writer.add(Sample(key=f"k{i}", ext="mp4", media=b"x", meta=meta))
    manifest.shards.append(writer.entry)
    manifest.save(tmp_path)
    return tmp_path


def test_the_table_fits_the_data(shards: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["buckets", str(shards), "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["buckets"]
    assert {row["frames"] for row in rows} == {57, 145 - 16, 1} and {row["fps"] for row in rows} == {30.0}
    assert sum(row["samples"] for row in rows) + found["too_short"] == found["samples"] == 240
    for row in rows:
        height, width = row["resolution"]
        assert height % 16 == width % 16 == 0 and row["cropped"] <= 0.06 and row["enlarged"] == 0
        if row["frames"] > 1:  # clips of 10 frames become stills
            assert row["unseen"] == pytest.approx({57: 1 - 57 / 60, 129: 1 - 129 / 150}[row["frames"]], abs=0.02)
    index = Index.load(shards, "train")
    table = [Row(shape=(row["frames"], *row["resolution"]), keep=1.0, batch=8, fps=row["fps"]) for row in rows]
    sizes = {"keys": index.keys, "frames": index.frames, "height": index.height, "width": index.width}
    buckets = assign(table, **sizes, own_fps=index.fps, shard=index.shard)
    assert [len(bucket.samples) for bucket in buckets] == [row["samples"] for row in rows]


def test_the_table_for_people(shards: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["buckets", str(shards), "sides=[256]", "frames=[17]", "fps=15", "ratios=1"]) == 0
    out = capsys.readouterr().out
    assert "'data.buckets=[{resolution: [192, 336], frames: 17, fps: 15}]'" in out
    assert "too short for every row: 36 of 240" in out
    assert Image.open(shards / "buckets.png").width > 500


@pytest.mark.parametrize("word", ["multiple=0", "fps=-1", "sides=[0]", "side=[3]"])
def test_what_makes_no_table_is_named(shards: Path, word: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["buckets", str(shards), word]) == 2
    assert word[:4] in capsys.readouterr().err
