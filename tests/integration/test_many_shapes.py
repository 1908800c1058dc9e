"""One run of the real command on clips of 1, 5, 17 and 33 frames at four aspect ratios."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from tiny_inputs import Tiny, call

from sora_lite.data.manifest import Manifest
from sora_lite.data.shards import Sample, ShardWriter
from sora_lite.data.video import encode_mp4, encode_png
from sora_lite.evaluation.record import RECORD, read_record

FRAMES = (33, 17, 5, 1)  # a row takes whatever is long enough, so the longest stand first
SIZES = ((32, 32), (16, 48), (48, 16), (32, 48))
SHAPES = list(itertools.product(FRAMES, SIZES))
EACH, STEPS = 4, 64


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Some clips of each shape: a bright bar that moves."""
    folder = tmp_path / "shards"
    folder.mkdir()
    manifest = Manifest(config_hash="")
    with ShardWriter(folder / "train-000000.tar", split="train") as writer:
        for number, ((frames, (height, width)), label) in enumerate(itertools.product(SHAPES, range(EACH))):
            clip = np.zeros((frames, height, width, 3), dtype=np.uint8)
            for frame in range(frames):
                clip[frame, :, (frame + 3 * label) % width :][:, :4] = 255
            meta = {
                "frames": frames, "height": height, "width": width, "fps": 16.0, "label": label,
                "captions": ["a bar"], "source": {"sha256": f"{number:064x}"},
            }  # fmt: skip
            ext, media = ("png", encode_png(clip[0])) if frames == 1 else ("mp4", encode_mp4(clip, 16, 18))
            writer.add(Sample(key=f"k{number:03d}", ext=ext, media=media, meta=meta))
    manifest.shards.append(writer.entry)
    manifest.save(folder)
    return folder


def test_one_run_trains_on_all_of_them(shards: Path, tiny: Tiny, tmp_path: Path) -> None:
    rows = ", ".join(f"{{resolution: [{h}, {w}], frames: {t}, batch: {EACH}}}" for t, (h, w) in SHAPES)
    assert call(
        "train", "experiment=tiny", f"data.shards={shards}", f"vae_from={tiny.vae}", f"run.root={tmp_path}",
        f"data.buckets=[{rows}]", f"data.divisor={EACH}", f"run.steps={STEPS}", "run.save_every=100",
        "run.validate_every=0", f"data.cache={tmp_path / 'cache'}",
    ) == 0  # fmt: skip
    lines = [line for line in read_record(tmp_path / "tiny" / RECORD) if "loss" in line]
    losses: dict[str, list[float]] = {}
    for line in lines:  # a line a step, of one bucket
        (name,) = (name for name in line if name.startswith("loss_") and name.count("x") == 2)
        losses.setdefault(name, []).append(line[name])
    assert losses.keys() == {f"loss_{t}x{h}x{w}" for t, (h, w) in SHAPES}
    assert len(lines) == STEPS and all(math.isfinite(line["loss"]) for line in lines)
