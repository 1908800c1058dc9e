"""The report's arithmetic: everything is counted once, at any stage; and the page stays small whatever the data set."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools import plan as planning
from data_tools import report, report_frames, report_histogram, report_page
from data_tools.compose import parse
from data_tools.config import SCORES, DataConfig
from data_tools.job import Job
from data_tools.lists import Row
from data_tools.plan import Packed, Plan
from data_tools.probe import Probed, probe_key
from data_tools.sources import Source
from sora_lite.data.manifest import Manifest
from sora_lite.data.shards import Sample, ShardWriter
from sora_lite.data.video import BadVideo, VideoFacts

RULES = "filter.rules=[{score: motion, min: 0.25}, {score: sharpness, max_percentile: 90}]"


def make(folder: Path, sources: int, frames: int, *words: str, stages: int = 5) -> tuple[Job, Plan]:
    """A job whose files do not exist, with its plan after so many stages. Of the sources one is broken, one a copy.

    Clips have 20 frames of a 10th of a second; scores are drawn at random, with motion uniform in [0, 1].
    """
    config = parse(DataConfig, ["workers=0", "split.clip_frames=20", *words])
    job = Job(folder / "shards", config)
    job.folder.mkdir(exist_ok=True)
    found = [Source(location=str(folder / f"{i}.mp4"), name=f"{i}.mp4", row=Row()) for i in range(sources)]
    probed = {}
    for i, source in enumerate(found):
        facts = VideoFacts(
            container="mov",
            codec="h264",
            width=64,
            height=48,
            sar=Fraction(1),
            rotation=0,
            time_base=Fraction(1, 10),
            average_rate=Fraction(10),
            pts=np.arange(frames),
            bit_depth=8,
            hdr=False,
            interlaced=False,
            variable_rate=False,
            frames_hash=f"{max(i, 1):032x}",
        )
        one = Probed.from_facts(f"{i:016x}" + 48 * "0", facts)
        reason = "cut off \x1b[31m" + "x" * 1000 if i == 2 else ""
        probed[probe_key(source)] = {"reason": reason, "sha256": one.sha256, **one.row}
    keys = {source.name: probe_key(source) for source in found}
    plan = planning.choose(found, keys, probed, Packed(), config)
    if stages > 1:
        shots = {"reason": "", "kinds": ["cut"], "firsts": [50], "lasts": [50]}
        planning.cut(plan, {f"{i:016x}" + 48 * "0": shots for i in range(sources)}, Packed(), config)
    if stages > 2:
        planning.sieve(plan, score_rows(plan), config)
    if stages > 3:
        planning.thin(plan, Packed(), config)
    if stages > 4:
        planning.finish(plan)
    return job, plan


def score_rows(plan: Plan) -> dict[str, dict]:
    random = np.random.default_rng(0)
    values = random.random((len(plan.clips), len(SCORES)))
    hashes = random.integers(1, 2**64, (len(plan.clips), 2), dtype=np.uint64)
    each = len(plan.media[0].clips)
    hashes[each : 2 * each] = hashes[:each][: len(hashes) - each]  # the second source looks like the first
    return {
        clip.key: {"reason": "", "crop": [0, 0, 48, 64], "phash": one.tolist()} | dict(zip(SCORES, row, strict=True))
        for clip, row, one in zip(plan.clips, values.tolist(), hashes, strict=True)
    }


def table_of(text: str) -> dict[str, list[int]]:
    """Fate -> sources, clips, frames."""
    rows = re.findall(r"^([a-z ]{1,14}?) +([\d,]+) +([\d,]+) +([\d,]+) +[\d,:]+$", text, flags=re.MULTILINE)
    return {name: [int(figure.replace(",", "")) for figure in figures] for name, *figures in rows}


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_nothing_is_lost_in_the_table_after_any_stage(tmp_path: Path, stages: int) -> None:
    job, plan = make(tmp_path, 8, 130, RULES, stages=stages)
    table = table_of(report.summary(plan, job.folder))
    found = table.pop("found")
    assert found == [8, len(plan.clips), sum(clip.frames for clip in plan.clips)]
    assert [sum(column) for column in zip(*table.values(), strict=True)] == found
    assert (table["quarantined"][0], table["duplicate"][0]) == (1, 1)
    assert ("left so far" in table) == (stages < 5)
    if stages == 5:
        counts = plan.count()
        assert {f"clips_{kind}": row[1] for kind, row in table.items()}.items() <= counts.items()
        assert table["packed"][2] == counts["frames_packed"] > 0
        report.save(job, plan)
        saved = json.loads((job.folder / "report.json").read_text())
        assert saved["counts"] == counts
        assert len(saved["clips"]) == counts["clips_found"] - counts["clips_packed"] > 0
        assert [row["name"] for row in saved["sources"] if row["kind"] == "duplicate"] == ["1.mp4"]


def test_a_source_without_clips_that_are_left_has_its_fate_at_once(tmp_path: Path) -> None:
    job, plan = make(tmp_path, 8, 130, "filter.rules=[{score: motion, min: 2}]", stages=3)
    table = table_of(report.summary(plan, job.folder))
    assert (table["filtered"][0], "left so far" in table) == (6, False)
    report.save(job, plan)
    names = {row["name"]: row["kind"] for row in json.loads((job.folder / "report.json").read_text())["sources"]}
    assert names.pop("2.mp4") == "quarantined" and names.pop("1.mp4") == "duplicate"
    assert names == {f"{i}.mp4": "filtered" for i in (0, 3, 4, 5, 6, 7)}
    assert "0.mp4" not in plan.source_fates


def test_the_table_groups_reasons_and_cannot_steer_a_terminal(tmp_path: Path) -> None:
    job, plan = make(tmp_path, 8, 130, RULES)
    text = report.summary(plan, job.folder, longest=1)
    assert re.search(r"^  quarantined +2\.mp4: cut off �\[31mx+ …$", text, flags=re.MULTILINE)
    assert "and 1 more sources;" in text and "\x1b" not in text and max(map(len, text.splitlines())) < 400
    text = report.summary(plan, job.folder)
    below, above, alike = (
        sum(fate.reason.startswith(words) for fate in plan.clip_fates.values()) for words in ("mot", "sharp", "looks")
    )
    assert re.search(rf"filtered +{below} clips: motion below 0.25$", text, flags=re.MULTILINE)
    assert re.search(
        rf"filtered +{above} clips?: sharpness above 0\.\d+ \(90th percentile\)$", text, flags=re.MULTILINE
    )
    assert re.search(rf"duplicate +{alike} clips: looks like another clip$", text, flags=re.MULTILINE)


def test_the_table_counts_shards_and_warns_without_validation(tmp_path: Path) -> None:
    _, plan = make(tmp_path, 3, 60)
    manifest = Manifest(config_hash="")
    meta = {"frames": 1, "height": 2, "width": 2, "fps": 1.0, "source": {"sha256": "ab"}}
    for number in range(2):
        with ShardWriter(tmp_path / f"train-00000{number}.tar", "train") as writer:
            writer.add(Sample(key="a", ext="png", media=bytes(2**20), meta=meta))
        manifest.shards.append(writer.entry)
    manifest.save(tmp_path)
    text = report.summary(plan, tmp_path)
    assert re.search(r"^train +2 clips in 2 shards, 2\.0 MiB$", text, flags=re.MULTILINE)
    assert "no val_loss" in text
    manifest.shards[1].split = "validation"
    manifest.save(tmp_path)
    text = report.summary(plan, tmp_path)
    assert re.search(r"^validation +1 clip in 1 shard, 1\.0 MiB$", text, flags=re.MULTILINE)
    assert "no val_loss" not in text


def test_clock() -> None:
    assert [report.clock(seconds) for seconds in (0, 59.6, 3599.4, 3_600_000)] == [
        "0:00:00",
        "0:01:00",
        "0:59:59",
        "1,000:00:00",
    ]
    assert report.clock(Fraction(599, 10), digits=1) == "0:00:59.9"


@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60),
    low=st.none() | st.floats(-2e3, 0),
    high=st.none() | st.floats(0, 2e3),
)
def test_a_histogram_holds_every_clip_once(values: Sequence[float], low: float | None, high: float | None) -> None:
    ends = [(kind, end) for kind, end in (("min", low), ("max", high)) if end is not None]
    drawn = report_histogram.histogram(np.array(values), ends)
    counts = [re.findall(r"([\d,]+) (?:clips?|left out)", bar.title) + ["0"] for bar in drawn.bars]
    assert sum(int(count[0]) for count in counts) == len(values)
    outside = [v for v in values if (low is not None and v < low) or (high is not None and v > high)]
    assert sum(int(count[1]) for count in counts) == len(outside)
    assert all(0 <= bar.left < report_histogram.WIDTH and bar.kept + bar.out > 0 for bar in drawn.bars)
    places = [place for place, _ in [*drawn.ticks, *drawn.marks, *drawn.ends]]
    assert all(0 <= place <= report_histogram.WIDTH for place in places) and len(drawn.ticks) <= 12


def test_a_few_far_values_do_not_squeeze_the_others() -> None:
    values = np.r_[np.linspace(0, 1, 1000), 1e6]
    drawn = report_histogram.histogram(values, [])
    assert len(drawn.bars) > 20 and drawn.bars[-1].title.startswith(drawn.bars[-1].title.split(" to ")[0] + " to …")


def test_how_alike_clips_are() -> None:
    assert report_page._alike([0, 0b1111, 0], [1 << 60, 0b0111]) == (1.0, 1, 1)
    assert report_page._alike([1, 2, 4], [2]) == (0.0, 1, 0)
    assert report_page._alike([1, 2 | 4], [1, 16]) == ((0 + 3) / 2, 0, 0)


def test_frames_are_the_first_at_or_after_their_times_and_far_ones_are_leapt_to() -> None:
    begun = []

    def begin(pts: int) -> Iterator[tuple[int, np.ndarray]]:
        begun.append(pts)
        return ((time, np.array(time)) for time in range(0, 1000, 10) if time >= pts)

    def at(times: list[int], far: int | None) -> list[int]:
        begun.clear()
        return [int(frame) for _, frame in report_frames._frames_at(begin, times, far)]

    assert at([5, 8, 10, 11, 500, 505], 100) == [10, 10, 10, 20, 500, 510] and begun == [5, 500]
    assert at([5, 500], None) == [10, 500] and begun == [5]
    with pytest.raises(BadVideo, match="changed"):
        at([5, 995], None)


def test_rows_hold_what_is_next_to_a_threshold_from_many_sources(tmp_path: Path) -> None:
    job, plan = make(
        tmp_path, 30, 130, "filter.rules=[{score: motion, min: 0.25, max: 0.75}, {score: contrast, max: 0.5}]"
    )
    for row in plan.scores.values():
        row["brightness"] = 0.0 if row["brightness"] < 0.9 else 1.0
        row["text_ratio"] = None
    page = report_page.Page(job, plan)
    sections = {name: page._section(name, values) for name, values in page.columns.items()}
    assert "text_ratio" not in sections

    values = sorted(row["motion"] for row in plan.scores.values())
    shown = [[tile.value for tile in row.tiles] for row in sections["motion"].rows]
    below, above = [v for v in values if v < 0.25], [v for v in values if v >= 0.25]
    assert shown[:2] == [[f"{v:.3g}" for v in chosen] for chosen in (below[-4:], above[:4])]
    below, above = [v for v in values if v <= 0.75], [v for v in values if v > 0.75]
    assert shown[2:] == [[f"{v:.3g}" for v in chosen] for chosen in (below[-4:], above[:4])]
    assert [row.title.split(":")[0] for row in sections["motion"].rows] == ["left out", "kept", "kept", "left out"]
    outside = sum(v < 0.25 or v > 0.75 for v in values)
    assert f": {outside} of {len(values)} clips" in sections["motion"].effect
    assert [len(row.tiles) for row in sections["contrast"].rows] == [6, 6]

    # of clips with equal values those of different sources are shown
    lowest, highest = sections["brightness"].rows
    assert len({tile.name for tile in lowest.tiles}) == 6
    assert {tile.value for tile in lowest.tiles} == {"0"} and {tile.value for tile in highest.tiles} == {"1"}

    effects = page._effects()
    motion = np.array([row["motion"] for row in plan.scores.values()])
    masks = [(motion < 0.25) | (motion > 0.75), np.array([row["contrast"] > 0.5 for row in plan.scores.values()])]
    assert [effect.alone for effect in effects] == [int(mask.sum()) for mask in masks]
    assert effects[0].only == int((masks[0] & ~masks[1]).sum())


def test_a_page_of_many_clips_is_small_and_quick_even_if_no_file_is_there(tmp_path: Path) -> None:
    ends = ", ".join(f"{{score: {name}, min: 0.1, max: 0.9}}" for name in SCORES)
    job, plan = make(tmp_path, 2010, 520, f"filter.rules=[{ends}]", "dedupe.near=false")
    assert len(plan.clips) > 50_000
    begun = time.monotonic()
    path = report.write(job, plan)
    seconds = time.monotonic() - begun
    page = path.read_text()
    assert 150 < page.count('class="picture empty"') <= 300
    assert page.count("No such file or directory") > 100 and "<img" not in page
    assert len(page) < 2**20
    assert seconds < 30


def test_a_page_before_anything_is_scored(tmp_path: Path) -> None:
    for stages in (1, 2):
        job, plan = make(tmp_path, 3, 130, stages=stages)
        page = report.write(job, plan).read_text()
        assert "left so far" in page and "<svg" not in page
