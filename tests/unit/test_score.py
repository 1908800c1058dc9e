"""Scores against what is known of pictures that are made for it, and crop boxes of coded files with real bars."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_tools import digits
from data_tools.config import Score, ScoreConfig
from data_tools.score import MEANINGS, ClipScores, Scorer, look_size, looks
from sora_lite.data.video import Box, encode_mp4, read_frames
from sora_lite.errors import UserError


def texture(height: int = 288, width: int = 512, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3) with detail of all sizes, of luma around 128; it can be rolled without a seam."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width)
    plane = np.fft.ifft2(np.fft.fft2(random.normal(size=(height, width))) / np.maximum(frequency, 1)).real
    plane = 128 + 40 * (plane - plane.mean()) / plane.std()
    return np.repeat(plane.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def score(
    frames: list[np.ndarray] | np.ndarray, rate: float = 8.0, upright: tuple[int, int] | None = None
) -> ClipScores:
    timed = [(i / rate, frame) for i, frame in enumerate(frames)]
    return Scorer(ScoreConfig()).score(timed, upright or frames[0].shape[:2])


def test_every_score_has_its_meaning_and_value() -> None:
    assert list(MEANINGS) == [one.value for one in Score] == list(score([texture()]).values)


# -------------------------------------------------------------------------------------------------------- motion


@pytest.mark.parametrize("pixels", [2, 6, 24])
@pytest.mark.parametrize("axis", [0, 1])
def test_motion_is_the_speed_in_widths_per_second(pixels: int, axis: int) -> None:
    picture = texture()
    timed = [(i / 8, np.roll(picture, i * pixels, axis=axis)) for i in looks(24, 8.0, 2.0)]
    measured = Scorer(ScoreConfig()).score(timed, (288, 512)).values
    assert measured["motion"] == pytest.approx(pixels * 8 / 512, rel=0.12)
    assert measured["static_ratio"] == 0


def test_motion_of_a_part_counts_for_its_part() -> None:
    """A quarter of the picture moves."""
    back, front = texture(seed=1), texture(144, 256, seed=2)
    frames = []
    for i in range(9):
        frame = back.copy()
        frame[72:216, 128:384] = np.roll(front, 8 * i, axis=1)
        frames.append(frame)
    assert score(frames).values["motion"] == pytest.approx(8 * 8 / 512 / 4, rel=0.25)


def test_what_does_not_move_has_no_motion() -> None:
    for frames in ([texture()], [texture()] * 9, [np.full((32, 32, 3), 40, np.uint8)] * 9):
        measured = score(frames).values
        assert (measured["motion"], measured["static_ratio"]) == (0, 1)


def test_grain_is_hardly_motion() -> None:
    random = np.random.default_rng(0)
    frames = [(texture() + random.normal(0, 6, (288, 512, 1))).clip(0, 255).astype(np.uint8) for _ in range(9)]
    measured = score(frames).values
    assert measured["motion"] < 0.004
    assert measured["static_ratio"] == 1


def test_the_static_ratio_counts_pairs() -> None:
    a, b = texture(seed=1), texture(seed=2)
    assert score([a, a, a, b, b]).values["static_ratio"] == pytest.approx(3 / 4)


def test_looks_are_spread_and_have_partners() -> None:
    assert looks(32, 8.0, 2.0).tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29]
    assert looks(8, 24.0, 2.0).tolist() == [0, 3, 4, 7]
    assert looks(1, 8.0, 2.0).tolist() == [0]
    assert looks(3, 60.0, 2.0).tolist() == [0, 1, 2]
    assert looks(100, 1.0, 2.0).tolist() == list(range(100))


def test_the_size_looked_at_keeps_the_shape() -> None:
    assert look_size((1080, 1920)) == (288, 512)
    assert look_size((1920, 1080)) == (512, 288)
    assert look_size((144, 176)) == (144, 176)


# ------------------------------------------------------------------------------------------- sharpness, exposure


def test_sharpness_falls_with_blur_and_not_with_contrast() -> None:
    picture = texture()
    sharp = score([picture]).values["sharpness"]
    blurred = [score([cv2.GaussianBlur(picture, (0, 0), sigma)]).values["sharpness"] for sigma in (1, 2, 4)]
    assert sharp > 1.5 * blurred[0] > 1.5**2 * blurred[1] > 1.5**3 * blurred[2]
    faint = (128 + (picture.astype(float) - 128) / 3).round().astype(np.uint8)
    assert score([faint]).values["sharpness"] == pytest.approx(sharp, rel=0.1)
    assert score([np.full((32, 32, 3), 99, np.uint8)]).values["sharpness"] == 0


def test_exposure() -> None:
    """A tenth is black, three tenths are white, the rest is grey."""
    frame = np.full((100, 100, 3), 120, np.uint8)
    frame[40:50], frame[60:90] = 8, 250
    measured = score([frame]).values
    assert (measured["dark_ratio"], measured["bright_ratio"]) == (0.1, 0.3)
    levels = np.array([120] * 6 + [8] + [250] * 3) / 255
    assert measured["brightness"] == pytest.approx(levels.mean())
    assert measured["contrast"] == pytest.approx(levels.std())


# ------------------------------------------------------------------------------------------------------ crop box


def coded(frames: list[np.ndarray], crf: int = 26) -> list[np.ndarray]:
    """What is looked at of a file with these frames."""
    data = encode_mp4(np.stack(frames), Fraction(2), crf, "veryfast")
    return [frame for _, frame in read_frames(data, size=look_size(frames[0].shape[:2]))]


BARS = {
    "letterbox": (360, 640, 46, 46, 0, 0),
    "thin": (360, 640, 9, 9, 0, 0),
    "pillarbox": (540, 960, 0, 0, 121, 121),
    "vertical video": (720, 1280, 0, 0, 438, 438),
    "all around": (480, 640, 60, 60, 52, 52),
    "one": (360, 640, 0, 41, 0, 0),
}


@pytest.mark.parametrize("kind", BARS)
@pytest.mark.parametrize("level", [0, 16])
def test_bars_are_cropped_to_the_last_line(kind: str, level: int) -> None:
    height, width, top, bottom, left, right = BARS[kind]
    inner = texture(height - top - bottom, width - left - right)
    frames = []
    for i in range(4):
        frame = np.full((height, width, 3), level, np.uint8)
        frame[top : height - bottom, left : width - right] = np.roll(inner, 6 * i, axis=1)
        frames.append(frame)
    found = score(coded(frames), 2.0, (height, width))
    crop, cell = found.crop, max(1.0, max(height, width) / 512)
    cut = (crop.top, height - crop.top - crop.height, crop.left, width - crop.left - crop.width)
    for got, bar in zip(cut, (top, bottom, left, right), strict=True):
        assert got % 2 == 0
        assert bar <= got <= (bar + 4 * cell if bar else 0)
    assert found.values["letterbox"] == pytest.approx(1 - crop.height * crop.width / height / width)
    assert found.values["dark_ratio"] < 0.02  # measured inside
    assert found.values["motion"] > 0


def whole(frames: list[np.ndarray] | np.ndarray) -> bool:
    height, width = frames[0].shape[:2]
    return score(coded(list(frames))).crop == Box(top=0, left=0, height=height, width=width)


def test_a_bar_on_a_dark_side_is_as_large_as_the_other_one() -> None:
    """At night the sky is as black as the bar above it."""
    frame = np.zeros((288, 512, 3), np.uint8)
    for column in range(0, 512, 32):
        frame[130 + column % 5 * 9 : 250, column : column + 32] = texture(120 - column % 5 * 9, 32)
    crop = score([frame] * 4).crop
    assert (crop.top, crop.top + crop.height) == (40, 248)


def test_dark_scenes_are_not_cropped() -> None:
    def scene(level: int = 3) -> np.ndarray:
        return np.full((288, 512, 3), level, np.uint8)

    roofs, window, spots, tower, towers, horizon, flash = (scene() for _ in range(7))
    for column in range(0, 512, 64):
        roofs[80 + column % 5 * 9 :, column : column + 64] = 40
        roofs[150 + column % 7 * 4 :, column + 8 : column + 16] = 200
    window[40:120, 60:190] = texture(80, 130)
    for i in range(6):
        cv2.circle(spots, (60 + 75 * i, 100 + 17 * i), 20, (250, 240, 200), -1)
    tower[40:, 75:437] = texture(248, 362)
    towers[40:, :120] = towers[40:, -120:] = texture(248, 120)
    horizon[150:] = texture(138, 512)
    flash[60:] = texture(228, 512)
    pictures = {"roofs": roofs, "window": window, "spots": spots, "tower": tower, "towers": towers, "horizon": horizon}
    for name, picture in {**pictures, "black": scene()}.items():
        assert whole([picture] * 4), name
        assert whole([picture]), name
    assert whole([flash, *[scene()] * 7])
    assert not whole([flash] * 4)


def test_the_digits_of_the_demo_are_not_cropped() -> None:
    pytest.importorskip("sklearn")
    scans, labels = digits._load_scans()
    for digit in range(10):
        scan = int(np.flatnonzero(labels == digit)[0])
        for direction in digits.DIRECTIONS:
            frames = digits.draw(scans[scan], direction)[looks(digits.FRAMES, 8.0, 2.0)]
            assert whole(frames), (digit, direction)
            assert whole([cv2.resize(frame, (96, 96), interpolation=cv2.INTER_LINEAR) for frame in frames])


# -------------------------------------------------------------------------------------------------------- hashes


def test_there_is_a_hash_for_each_second_and_none_where_it_is_black() -> None:
    black = np.zeros((288, 512, 3), np.uint8)
    hashes = score([texture(seed=1)] * 8 + [black] * 8 + [texture(seed=2)] * 4).phash
    assert len(hashes) == 3
    assert hashes[1] == 0
    assert 0 != hashes[0] != hashes[2] != 0
    assert score([texture(seed=1)]).phash == hashes[:1]


def test_seconds_without_a_frame_have_no_hash() -> None:
    frames = [(time, texture(seed=1)) for time in (10.0, 10.4, 13.1)]
    hashes = Scorer(ScoreConfig()).score(frames, (288, 512)).phash
    assert [one != 0 for one in hashes] == [True, False, False, True]


# -------------------------------------------------------------------------------------------------- text, aesthetic


def test_the_text_ratio_is_the_part_that_text_takes() -> None:
    pytest.importorskip("rapidocr")
    scorer = Scorer(ScoreConfig(text=True))
    plain = cv2.GaussianBlur(texture(), (0, 0), 3)
    line = plain.copy()
    cv2.putText(line, "A LINE OF TEXT", (60, 160), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (255, 255, 255), 4)
    (width, height), _ = cv2.getTextSize("A LINE OF TEXT", cv2.FONT_HERSHEY_SIMPLEX, 1.5, 4)
    measured = [scorer.score([(0.0, one)], (288, 512)).values["text_ratio"] for one in (plain, line)]
    assert measured[0] == 0
    assert width * height / (288 * 512) == pytest.approx(measured[1], rel=0.6)


def clip_folder(folder: Path) -> Path:
    """A small random CLIP, and a head that reads the first number of its embedding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        projection_dim=8,
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8, "projection_dim": 8,
        },
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(folder)
    save_file({"weight": np.eye(1, 8, dtype=np.float32), "bias": np.ones(1, np.float32)}, folder / "head.safetensors")
    return folder


def test_the_aesthetic_score_is_the_head_on_clips_embedding(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path)
    import torch
    from transformers import CLIPModel

    picture = texture(32, 32)
    measured = Scorer(ScoreConfig(aesthetic=str(folder))).score([(0.0, picture)] * 2, (32, 32)).values["aesthetic"]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.tensor(((picture / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)
    model = CLIPModel.from_pretrained(folder)
    embedding = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0].detach()
    assert measured == pytest.approx(1 + float(embedding[0] / embedding.norm()), abs=1e-5)


@pytest.mark.parametrize("fault", ["no head", "no model", "another model", "wrong head"])
def test_a_folder_without_what_aesthetic_needs_is_named(fault: str, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path)
    if fault == "no head":
        (folder / "head.safetensors").unlink()
    elif fault == "no model":
        (folder / "model.safetensors").unlink()
    elif fault == "another model":
        (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    else:
        save_file(
            {"weight": np.eye(1, 9, dtype=np.float32), "bias": np.ones(1, np.float32)}, folder / "head.safetensors"
        )
    with pytest.raises(UserError, match=r"score\.aesthetic=") as error:
        Scorer(ScoreConfig(aesthetic=str(folder)))
    assert "\n" not in str(error.value)


def test_missing_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("rapidocr", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'sora_lite\[text\]'"):
        Scorer(ScoreConfig(text=True))
    with pytest.raises(UserError, match=r"pip install 'sora_lite\[aesthetic\]'"):
        Scorer(ScoreConfig(aesthetic=str(tmp_path)))
