"""Contact sheet, loss curve and page: what they show, and what they refuse."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from sora_lite.data.video import write_mp4
from sora_lite.errors import UserError
from sora_lite.evaluation.page import PageClip, _smooth, contact_sheet, group, loss_plot, write_page


def colour_clip(frames: int, height: int, width: int) -> np.ndarray:
    """Frame t is filled with the colour (t + 1, 200, 100)."""
    clip = np.empty((frames, height, width, 3), np.uint8)
    clip[:] = (0, 200, 100)
    clip[..., 0] = np.arange(1, frames + 1)[:, None, None]
    return clip


def test_contact_sheet_shows_first_to_last_frame_enlarged_by_a_whole_factor() -> None:
    sheet = np.asarray(contact_sheet([colour_clip(17, 32, 32)], ["the digit three moves left"], columns=5))
    shown = sheet[(sheet[..., 1] == 200) & (sheet[..., 2] == 100)][:, 0]
    frames, pixels = np.unique(shown, return_counts=True)
    assert frames.tolist() == [1, 5, 9, 13, 17]
    assert set(pixels) == {96 * 96}


def test_contact_sheet_with_many_mixed_and_odd_clips() -> None:
    clips = [colour_clip(1, 31, 47), colour_clip(3, 720, 1280)] * 12
    captions = ["", "a <b> & a very long caption " * 40, "мяч", "line\nbreak"] * 6
    sheet = contact_sheet(clips, captions)
    assert 0.4 < sheet.width / sheet.height < 2.5
    with pytest.raises(ValueError, match="captions"):
        contact_sheet(clips, captions[:1])
    with pytest.raises(ValueError, match="uint8"):
        contact_sheet([np.zeros((3, 32, 32), np.uint8)], [""])


def test_loss_plot_draws_both_curves_and_passes_over_a_torn_line(tmp_path: Path) -> None:
    records = [{"step": 0, "note": "start"}]
    records += [{"step": step, "loss": 2.0 / step} for step in range(1, 100)]
    records += [{"step": step, "loss": None, "val_loss": 1.0 / step} for step in (50, 99)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(json.dumps(record) for record in records) + '\n{"step": 10')
    loss_plot(metrics, tmp_path / "loss.png")
    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGBA")).astype(int)
    assert picture[0, 0, 3] == 0  # transparent paper
    for colour in [(0x4C, 0x8D, 0xD6), (0xE0, 0x8A, 0x3C)]:
        assert (np.abs(picture[..., :3] - colour).max(-1) < 8).sum() > 200


def test_loss_plot_of_a_run_without_records(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "lr": 0.1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        loss_plot(metrics, tmp_path / "loss.png")


def test_smoothing_keeps_length_level_and_line() -> None:
    np.testing.assert_allclose(_smooth(np.full(200, 3.0)), 3.0)
    np.testing.assert_allclose(_smooth(np.arange(200.0)), np.arange(200.0))
    np.testing.assert_allclose(_smooth(np.array([1.0, 5.0])), [1.0, 5.0])


class Links(HTMLParser):
    """Collects what a page links to; balanced tags are checked on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href") and value is not None]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def write_clip(path: Path, height: int = 32, width: int = 32) -> None:
    path.parent.mkdir(exist_ok=True)
    write_mp4(path, colour_clip(3, height, width), 8)


def test_clips_are_grouped_by_caption() -> None:
    generated = [PageClip(file=file, caption=caption) for file, caption in [("0", "a"), ("1", "b"), ("2", "a")]]
    real = [PageClip(file=file, caption=caption) for file, caption in [("3", "c"), ("4", "b"), ("5", "c")]]
    cards = [(card.caption, card.generated, card.real) for card in group(generated, real)]
    assert cards == [("a", ["0", "2"], []), ("b", ["1"], ["4"]), ("c", [], ["3", "5"])]


def test_page_is_self_contained_escaped_and_links_to_existing_files(tmp_path: Path) -> None:
    clips = ["clips/000 a#b?.mp4", "clips/001.mp4", "real/held-out.mp4"]
    for name in clips:
        write_clip(tmp_path / name)
    pictures = ["contact_sheet.png", "loss.png"]
    for name in pictures:
        (tmp_path / name).write_bytes(b"x")
    caption = '"><img src=x>'
    path = write_page(
        tmp_path,
        title="<script>alert(1)</script>",
        subtitle="a & b",
        generated=[PageClip(file=clips[0], caption=caption), PageClip(file=clips[1], caption="no real clip")],
        real=[PageClip(file=clips[2], caption=caption)],
        figures={"digits <recognised>": "93.5 %"},
        contact_sheet=pictures[0],
        loss_curve=pictures[1],
    )
    text = path.read_text()
    links = Links()
    links.feed(text)
    assert not links.open
    assert {unquote(link) for link in links.found} == {*clips, *pictures}
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"https?:|//|url\(", text)
    assert "width: 128px" in text and "image-rendering: pixelated" in text


def test_page_of_large_clips_without_pictures(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", 270, 480)
    text = write_page(tmp_path, title="t", generated=[PageClip(file="a.mp4", caption="")]).read_text()
    assert "width: 256px" in text and "pixelated" not in text
    assert "<img" not in text and "<h3" not in text and "and real" not in text


@pytest.mark.parametrize("name", ["missing.mp4", "../outside.mp4"])
def test_page_refuses_files_that_are_not_in_its_folder(tmp_path: Path, name: str) -> None:
    write_clip(tmp_path / "outside.mp4")
    out = tmp_path / "page"
    out.mkdir()
    with pytest.raises(ValueError, match="no file inside"):
        write_page(out, title="t", generated=[PageClip(file=name, caption="c")])
