"""Pictures for people: a contact sheet of clips, a loss curve, and a page that shows generations beside real clips."""

import math
import textwrap
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sora_lite.data.video import probe
from sora_lite.errors import UserError
from sora_lite.evaluation.record import read_record
from sora_lite.evaluation.template import environment

CELL = 96
"""Height in pixels that a frame on a contact sheet has at least."""
VIDEO = 128
"""Width in pixels that a clip on the page has at least, and half of what it has at most."""
_GAP = 3
_MARGIN = 18
_PAPER, _INK = (24, 24, 27), (212, 212, 216)
_GREY, _BLUE, _ORANGE = "#84848c", "#4c8dd6", "#e08a3c"


def contact_sheet(
    clips: Sequence[np.ndarray], captions: Sequence[str], columns: int = 6, given: Container[int] = ()
) -> Image.Image:
    """Lay clips out on one picture: a strip of `columns` frames each, spread over the clip, under its caption.

    clips: uint8 (T, H, W, 3), any sizes; tiny ones are enlarged by a whole factor without smoothing, so that every
    pixel stays visible. Strips stand side by side where many would make a tall ribbon. Frames whose numbers are in
    `given` have an orange line below them.
    """
    if not clips or len(clips) != len(captions):
        raise ValueError(f"{len(clips)} clips and {len(captions)} captions: there must be as many, and at least one")
    strips = [_strip(clip, columns, given) for clip in clips]
    width, height = max(s.width for s in strips), max(s.height for s in strips)
    font = _font(15)
    letters = max(8, int(width / font.getlength("n")))
    texts = [textwrap.wrap(caption, letters, max_lines=2, placeholder=" …") or [""] for caption in captions]
    line = sum(font.getmetrics()) + 2
    header = line * max(map(len, texts)) + 4
    cell_width, cell_height = width + _MARGIN, height + header + _MARGIN
    across = max(1, min(len(strips), round(math.sqrt(len(strips) * cell_height / cell_width * 1.2))))
    down = math.ceil(len(strips) / across)
    sheet = Image.new("RGB", (across * cell_width + _MARGIN, down * cell_height + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (strip, text) in enumerate(zip(strips, texts, strict=True)):
        x, y = _MARGIN + i % across * cell_width, _MARGIN + i // across * cell_height
        # one after the other: only so does every font engine keep the same distance of lines
        for n, words in enumerate(text):
            pen.text((x, y + n * line), words, font=font, fill=_INK)
        sheet.paste(strip, (x, y + header))
    return sheet


def loss_plot(metrics: Path, out: Path, train: str = "loss", validation: str = "val_loss") -> None:
    """Draw the training loss (each record, and smoothed) and the validation loss over steps as a PNG.

    metrics: a run's metrics.jsonl; records that lack both keys are passed over, and of a step that was taken again
    after a resume the last record counts. The background is transparent: it fits light and dark pages.
    """
    from matplotlib.figure import Figure  # half a second that other users of this module need not wait for

    curves: dict[str, dict[int, float]] = {train: {}, validation: {}}
    for record in read_record(metrics):
        for key, curve in curves.items():
            if record.get(key) is not None:
                curve[record["step"]] = record[key]
    if not any(curves.values()):
        raise UserError(f"{metrics} holds no record with {train!r} or {validation!r}: train for some steps first.")
    figure = Figure(figsize=(8, 3.6), dpi=150, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    if curves[train]:
        steps, losses = _series(curves[train])
        axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=_BLUE, linewidth=1.8, label="training (smoothed)")
    if curves[validation]:
        steps, losses = _series(curves[validation])
        axes.plot(steps, losses, "o-", color=_ORANGE, linewidth=1.4, markersize=4, label="validation")
    values = np.array([value for curve in curves.values() for value in curve.values()])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 8 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("step", color=_GREY)
    axes.set_ylabel("loss", color=_GREY)
    axes.tick_params(which="both", colors=_GREY)
    axes.grid(color=_GREY, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.legend(frameon=False, labelcolor=_GREY)
    figure.savefig(out, metadata={"Software": None})


@dataclass(kw_only=True, slots=True)
class PageClip:
    """A clip on the page: an mp4 file, named relative to the page's folder, and the text that belongs to it."""

    file: str
    caption: str


@dataclass(kw_only=True, slots=True)
class Card:
    """What the page shows in one frame: all clips of one caption."""

    caption: str
    generated: list[str] = field(default_factory=list)
    real: list[str] = field(default_factory=list)


def write_page(
    out: Path,
    *,
    title: str,
    generated: Sequence[PageClip],
    real: Sequence[PageClip] = (),
    subtitle: str = "",
    figures: dict[str, str] | None = None,
    contact_sheet: str | None = None,
    loss_curve: str | None = None,
) -> Path:
    """Write `out`/index.html, which shows generations beside real clips of the same caption, and return its path.

    figures: rows of a table, already formatted. contact_sheet, loss_curve: pictures. Files are named relative to
    `out` and must be there (ValueError): the page needs nothing outside its folder, so that this can be moved or sent.
    """
    clips = [*generated, *real]
    if not clips:
        raise ValueError("a page needs at least one clip")
    for name in [*(clip.file for clip in clips), *filter(None, (contact_sheet, loss_curve))]:
        if not (out / name).is_file() or not (out / name).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{name!r} is no file inside {out}")
    templates = environment(Path(__file__).parent)
    templates.filters["link"] = quote
    width = probe(out / clips[0].file).width
    page = templates.get_template("page.html.jinja").render(
        title=title,
        subtitle=subtitle,
        cards=group(generated, real),
        width=min(width * _enlargement(width, VIDEO), 2 * VIDEO),
        tiny=width < VIDEO,
        figures=figures or {},
        contact_sheet=contact_sheet,
        loss_curve=loss_curve,
    )
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def group(generated: Sequence[PageClip], real: Sequence[PageClip]) -> list[Card]:
    """One card per caption in order of first appearance, so that captions with generations come first."""
    cards: dict[str, Card] = {}
    for clip in generated:
        cards.setdefault(clip.caption, Card(caption=clip.caption)).generated.append(clip.file)
    for clip in real:
        cards.setdefault(clip.caption, Card(caption=clip.caption)).real.append(clip.file)
    return list(cards.values())


def _enlargement(side: int, least: int) -> int:
    return max(1, math.ceil(least / side))


def _strip(clip: np.ndarray, columns: int, given: Container[int]) -> Image.Image:
    """Up to `columns` frames of a clip, from its first to its last, in a row."""
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not len(clip):
        raise ValueError(f"a clip must be uint8 (T, H, W, 3), not {clip.dtype} {clip.shape}")
    chosen = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
    height, width = clip.shape[1:3]
    if height < CELL:
        factor = _enlargement(height, CELL)
        size, how = (width * factor, height * factor), Image.Resampling.NEAREST
    else:
        factor = min(1.0, 2 * CELL / height)
        size, how = (max(1, round(width * factor)), round(height * factor)), Image.Resampling.LANCZOS
    strip = Image.new("RGB", (len(chosen) * (size[0] + _GAP) - _GAP, size[1] + 2 * _GAP), _PAPER)
    pen = ImageDraw.Draw(strip)
    for column, t in enumerate(chosen.tolist()):
        x = column * (size[0] + _GAP)
        strip.paste(Image.fromarray(clip[t]).resize(size, how), (x, 0))
        if t in given:
            pen.rectangle((x, size[1] + _GAP, x + size[0] - 1, size[1] + 2 * _GAP - 1), fill=_ORANGE)
    return strip


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries: it has most of the world's letters, and is the same on every machine."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _series(curve: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    steps = sorted(curve)
    return np.array(steps), np.array([curve[step] for step in steps], dtype=float)


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a thirtieth of the curve; at its ends the window is shorter."""
    half = len(losses) // 60
    total = np.concatenate([[0.0], np.cumsum(losses)])
    at = np.arange(len(losses))
    reach = np.minimum(half, np.minimum(at, len(losses) - 1 - at))
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)
