"""The report of a real run: a page that shows the right frames, whatever the files and captions are called."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from data_runs import sora_data
from PIL import Image

from data_tools.report_frames import BOX
from sora_lite.data.video import write_mp4

TAG = "<img src=x onerror=alert(1)>.mp4"
RED, BLUE, GREEN = (200, 60, 60), (60, 60, 200), (60, 160, 60)


def shot(colour: tuple[int, int, int], frames: int, speed: int, seed: int) -> np.ndarray:
    """uint8 (frames, 96, 128, 3): a soft pattern of one hue, which moves by `speed` pixels a frame."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8), dtype=np.uint8)
    pattern = np.asarray(Image.fromarray(coarse).resize((128, 96), Image.Resampling.BICUBIC)) / 255
    picture = (0.4 + 0.6 * pattern[..., None]) * np.array(colour)
    return np.stack([np.roll(picture, t * speed, axis=1) for t in range(frames)]).astype(np.uint8)


class Seen(HTMLParser):
    """What a browser would take from a page; balanced tags are checked on the way."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, list[Image.Image | str]] = {"": []}
        """id of a heading or section -> its pictures, or the reasons why there are none, in order."""
        self.text = ""
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.add(tag)
        assert not [name for name in named if name.startswith("on")]
        if named.get("id"):
            self.sections[str(named["id"])] = []
        if tag == "img":
            kind, _, content = (named["src"] or "").partition(",")
            assert kind == "data:image/jpeg;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(content)))
            picture.load()
            self.current.append(picture)
        elif named.get("class") == "picture empty":
            self.current.append(named["title"] or "")
        elif "src" in named or "href" in named:
            self.links.append(named.get("src") or named.get("href") or "")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    @property
    def current(self) -> list[Image.Image | str]:
        return self.sections[list(self.sections)[-1]]

    def hues(self, section: str) -> list[str]:
        """Which channel is the strongest in each picture of a section."""
        means = [np.asarray(picture).mean((0, 1)) for picture in self.sections[section]]
        return ["RGB"[int(mean.argmax())] for mean in means]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shots, a coarser copy of them, a film that stands still under a bad name, and two files that are none."""
    folder = tmp_path_factory.mktemp("report")
    videos = folder / "videos"
    videos.mkdir()
    film = np.concatenate([shot(RED, 24, 3, seed=1), shot(BLUE, 24, 5, seed=2)])
    write_mp4(videos / "film.mp4", film, 12, crf=10)
    write_mp4(videos / "copy.mp4", film, 12, crf=35)
    write_mp4(videos / TAG, shot(GREEN, 24, 0, seed=3), 12, crf=10)
    (videos / "b\x1b[31m\n'\"&.mp4").write_bytes(b"#EXTM3U\nfile:///etc/passwd\n")
    with open(os.fsencode(videos) + b"/\xff.mp4", "wb") as file:
        file.write(b"")
    captions = ["<script>alert(1)</script>", "a\x00\u202eb"]
    rows = [{"file_name": name, "captions": captions} for name in ("film.mp4", "copy.mp4")]
    (videos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ("split.clip_frames=12", "split.min_frames=8", "workers=1", "filter.rules=[{score: motion, min: 0.02}]")
    assert sora_data("probe", videos, folder / "shards", *settings) == 0
    for stage in ("split", "score", "filter", "dedupe"):
        assert sora_data(stage, folder / "shards") == 0
    assert sora_data("report", folder / "shards") == 0
    return folder / "shards"


def test_the_page_shows_frames_on_both_sides_of_thresholds_and_cuts(shards: Path) -> None:
    page = Seen((shards / "report.html").read_text())
    # two clips of the film that stands still are below the threshold, with first and last frame, in front of the others
    hues = page.hues("motion")
    assert hues[:4] == ["G"] * 4 and set(hues[4:]) == {"R", "B"} and len(hues) == 4 + 2 * 6
    assert page.hues("cuts") == ["R", "B"] * 2
    pairs = page.hues("duplicates")
    assert len(pairs) == 8 and pairs[::2] == pairs[1::2]
    assert set(page.hues("captions")) <= {"R", "B"}
    for section in ("sharpness", "brightness", "contrast"):
        assert len(page.sections[section]) == 10
    sizes = {picture.size for pictures in page.sections.values() for picture in pictures}
    assert sizes == {BOX[::-1]}  # 4 : 3, as the films are
    words = " ".join(page.text.split())
    assert "motion at least 0.02 2 2" in words
    assert "min 0.02: 2 of 10 clips (20.0 %) left out" in words


def test_the_page_is_one_file_that_runs_nothing_and_shows_names_as_they_are(shards: Path) -> None:
    text = (shards / "report.html").read_text()
    page = Seen(text)
    assert all(link.startswith("#") and link[1:] in page.sections for link in page.links)
    assert "script" not in page.tags and "object" not in page.tags and "base" not in page.tags
    bare = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", text)
    bare = bare.replace("http://localhost:8000/v1/chat/completions", "")  # a setting, shown as text
    assert not re.search(r"https?:|[^:]//|url\(|@import", bare)
    assert "default-src 'none'" in text
    assert TAG in page.text and "<script>alert(1)</script>" in page.text
    assert r"b\u001b[31m\u000a'" in page.text and r"\xff.mp4" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)
    assert "not a video container" in page.text and "the file is empty" in page.text


def test_a_source_that_was_damaged_leaves_empty_places_with_the_reason(shards: Path) -> None:
    folder = shards.parent / "videos"
    before = Seen((shards / "report.html").read_text())
    stamp = (folder / TAG).stat()
    content = (folder / TAG).read_bytes()
    try:
        # same size and time: nobody can see beforehand that it is another file
        (folder / TAG).write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
        os.utime(folder / TAG, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert sora_data("report", shards) == 0
    finally:
        (folder / TAG).write_bytes(content)
        os.utime(folder / TAG, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = Seen((shards / "report.html").read_text())
    assert {name: len(pictures) for name, pictures in after.sections.items()} == {
        name: len(pictures) for name, pictures in before.sections.items()
    }
    assert all(isinstance(reason, str) and reason for reason in after.sections["motion"][:4])
    assert all(isinstance(picture, Image.Image) for picture in after.sections["motion"][4:])


def test_report_json_is_stable(shards: Path) -> None:
    before = (shards / "report.json").read_bytes()
    assert sora_data("report", shards) == 0
    assert (shards / "report.json").read_bytes() == before
    content = json.loads(before)
    counts = content["counts"]
    assert (counts["sources_found"], counts["sources_quarantined"], counts["sources_left"]) == (5, 2, 1)
    assert (counts["clips_found"], counts["clips_filtered"], counts["clips_duplicate"], counts["clips_left"]) == (
        10,
        2,
        4,
        4,
    )
    assert [row["kind"] for row in content["sources"]] == ["quarantined"] * 2 + ["filtered", "duplicate"]
    assert {row["reason"].split()[0] for row in content["clips"] if row["kind"] == "filtered"} == {"motion"}
