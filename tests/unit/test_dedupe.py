"""Near duplicates: no pair is missed or made up, against a comparison of all with all."""

import time
from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.dedupe import clusters, phash
from sora_lite.data.video import encode_mp4, read_frames

RANDOM = np.random.default_rng(0)


def arrays(clips: list[list[int]]) -> list[np.ndarray]:
    return [np.array(clip, dtype=np.uint64) for clip in clips]


def all_with_all(clips: list[list[int]], distance: int, overlap: float) -> list[int]:
    """The definition, word by word."""

    def near(a: list[int], b: list[int]) -> bool:
        fewest = min(len(a) - a.count(0), len(b) - b.count(0))
        most = max(
            sum(
                x != 0 and 0 <= i + offset < len(b) and b[i + offset] != 0
                and (x ^ b[i + offset]).bit_count() <= distance
                for i, x in enumerate(a)
            )
            for offset in range(-len(a), len(b) + 1)
        )  # fmt: skip
        return most > 0 and most >= Fraction(str(overlap)) * fewest

    cluster = list(range(len(clips)))
    for j, b in enumerate(clips):
        for i, a in enumerate(clips[:j]):
            if near(a, b):
                low, high = sorted((cluster[i], cluster[j]))
                cluster = [low if one == high else one for one in cluster]
    return cluster


@st.composite
def related_clips(draw: st.DrawFn) -> list[list[int]]:
    """Clips of up to 5 seconds out of a few hashes, each with up to 8 bits flipped, and some without a hash."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    bases = [5, *map(int, random.integers(1, 2**64, size=draw(st.integers(0, 5)), dtype=np.uint64))]

    def second() -> int:
        if random.random() < 0.1:
            return 0
        flips = random.choice(64, size=random.integers(0, 9), replace=False)
        return bases[random.integers(len(bases))] ^ sum(1 << int(bit) for bit in flips)

    return [[second() for _ in range(random.integers(0, 6))] for _ in range(draw(st.integers(0, 14)))]


@settings(max_examples=300, deadline=None)
@given(related_clips(), st.integers(0, 9), st.sampled_from([0.3, 0.5, 0.6, 1.0]), st.sampled_from([2, 4, 256]))
def test_the_clusters_are_those_of_all_with_all(
    clips: list[list[int]], distance: int, overlap: float, crowd: int
) -> None:
    found = clusters(arrays(clips), distance, overlap, crowd)
    assert found.dtype == np.int64
    assert found.tolist() == all_with_all(clips, distance, overlap)


def hashes(count: int) -> np.ndarray:
    return RANDOM.integers(1, 2**64, size=count, dtype=np.uint64)


def test_a_trimmed_copy_is_near_but_shuffled_seconds_are_not() -> None:
    clip = hashes(8)
    assert clusters([clip, clip[3:7]], 6, 1.0).tolist() == [0, 0]
    assert clusters([clip, clip[[6, 4, 2, 0]]], 6, 0.5).tolist() == [0, 1]


def test_black_clips_are_no_duplicates_of_each_other() -> None:
    black = np.zeros(4, dtype=np.uint64)
    one = hashes(1)
    assert clusters([black, black, np.r_[black[:3], one], np.r_[one, black]], 6, 0.5).tolist() == [0, 1, 2, 2]


def test_a_title_that_all_clips_share_joins_none_and_costs_little() -> None:
    clips = [np.r_[np.uint64(12345), hashes(3)] for _ in range(20_000)]
    clips.append(clips[777])
    begin = time.process_time()
    found = clusters(clips, 6, 0.5)
    assert time.process_time() - begin < 10  # all pairs of the shared second are 200 million
    assert found.tolist() == [*range(20_000), 777]


def test_a_view_that_never_changes_is_one_cluster_and_costs_little() -> None:
    base, others = hashes(1)[0], 500
    flips = np.uint64(1) << RANDOM.integers(0, 64, size=(20_000, 4, 2), dtype=np.uint64)
    clips = [*(base ^ flips[:, :, 0] ^ flips[:, :, 1]), *(hashes(4) for _ in range(others))]
    begin = time.process_time()
    found = clusters(clips, 6, 0.5)
    assert time.process_time() - begin < 10  # all pairs of seconds are 3 billion
    assert found.tolist() == [0] * 20_000 + [*range(20_000, 20_000 + others)]


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="distance"):
        clusters([], -1, 0.5)
    with pytest.raises(ValueError, match="overlap"):
        clusters([], 6, 0.0)


# --------------------------------------------------------------------------------------------------- the hash


def luma(frame: np.ndarray) -> np.ndarray:
    return cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)


def scene(seed: int) -> np.ndarray:
    """A picture with the spectrum of natural ones (amplitude 1 / frequency), uint8 (180, 320, 3)."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(180)[:, None] * 180, np.fft.fftfreq(320) * 320)
    phases = np.fft.fft2(random.normal(size=(3, 180, 320)))
    picture = np.fft.ifft2(phases / np.maximum(frequency, 1)).real
    picture = 128 + 48 * (picture - picture.mean()) / picture.std()
    return np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def test_the_hash_survives_coding_scaling_and_brightness() -> None:
    worst = 0
    for seed in range(20):
        original = scene(seed)
        coded = next(iter(read_frames(encode_mp4(original[None], 25, crf=38))))[1]
        smaller = cv2.resize(original, (96, 54), interpolation=cv2.INTER_AREA)
        brighter = (original * 1.1 + 8).clip(0, 255).astype(np.uint8)
        for copy in (coded, smaller, brighter):
            worst = max(worst, (phash(luma(original)) ^ phash(luma(copy))).bit_count())
    assert worst <= 6


def test_the_hashes_of_different_scenes_are_far_apart() -> None:
    found = [phash(luma(scene(seed))) for seed in range(60)]
    assert min((a ^ b).bit_count() for i, a in enumerate(found) for b in found[:i]) > 6


def test_a_flat_picture_has_no_hash() -> None:
    assert phash(np.full((32, 32), 7.0)) == 0
    assert phash(RANDOM.normal(16, 1, size=(32, 32))) == 0
    assert phash(luma(scene(1))) > 0
