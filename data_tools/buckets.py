"""`sora-data buckets`: a bucket table that fits a data set, with what each row gets and what is lost."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_tools.config import BucketsConfig
from sora_lite.config import Format
from sora_lite.data.buckets import Row, choose, frames_at
from sora_lite.data.index import Index
from sora_lite.errors import UserError

RATIOS = (9 / 21, 9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 21 / 9)
"""Heights divided by widths that rows may have."""
SIDES = (64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024)
"""Sides of squares whose area the pictures of a table may have."""
RATES = (8.0, 10.0, 12.0, 15.0, 16.0, 24.0, 30.0)
FEW = 0.01
"""Part of the samples below which a row is not worth having."""
PICTURE = "buckets.png"


@dataclass(kw_only=True, slots=True)
class Share:
    """A row, and what becomes of its samples. Fractions lie in [0, 1]."""

    resolution: list[int]
    frames: int
    fps: float | None
    samples: int
    cropped: float
    """Part of their area that is cut off, on average."""
    unseen: float
    """Part of their seconds that one pass does not show, on average."""
    enlarged: int
    """Samples that are scaled up."""


def propose(shards: Path, config: BucketsConfig) -> None:
    """Print a table for the train split (or its JSON), and draw it. Raises UserError if no table fits."""
    index = Index.load(shards, "train")
    if not len(index):
        raise UserError(f"{shards}: has no train samples.")
    rows = rows_for(index, config)
    chosen = chosen_rows(index, rows)
    kept = [row for n, row in enumerate(rows) if (chosen == n).sum() >= FEW * len(index)]
    chosen = chosen_rows(index, kept)
    shares = [share_of(index, row, np.flatnonzero(chosen == n)) for n, row in enumerate(kept)]
    short = int((chosen < 0).sum())
    if config.format is Format.json:
        print(json.dumps({"samples": len(index), "too_short": short, "buckets": [asdict(share) for share in shares]}))
        return
    draw(index, shares, shards / PICTURE)
    print("\n".join(table(shares, len(index), short)))
    print(f"{shards / PICTURE}: the same as a picture")


def rows_for(index: Index, config: BucketsConfig) -> list[Row]:
    """Rows for all combinations of a rate, lengths, sizes and aspect ratios that the samples suggest, longest first."""
    moving = index.frames > 1
    fps = config.fps
    if fps is None and moving.any():
        lowest = np.percentile(index.fps[moving], 10)
        fps = max((rate for rate in RATES if rate <= lowest + 0.01), default=float(lowest))
    area = index.height.astype(np.float64) * index.width
    sides = config.sides or [max((side for side in SIDES if side**2 <= np.percentile(area, 10)), default=SIDES[0])]
    lengths = config.frames or lengths_for(frames_at(index.frames, index.fps, fps)[moving], config)
    if not config.frames and not moving.all():
        lengths = [*lengths, 1]
    shapes = {
        (frames, *size_of(side, ratio, config.multiple))
        for frames in lengths
        for side in sides
        for ratio in ratios_for(index, config)
    }
    return [Row(shape=shape, keep=1.0, batch=1, fps=fps) for shape in sorted(shapes, reverse=True)]


def lengths_for(available: np.ndarray, config: BucketsConfig) -> list[int]:
    """Lengths 4k+1, longest first: each next one is that which shows most of what samples have, seen or too short."""
    candidates = np.arange(1, config.longest + 1, 4)
    shown = np.where(candidates <= available[:, None], candidates / available[:, None], 0.0)  # samples x candidates
    taken: list[int] = []
    while len(available) and len(taken) < config.lengths:
        before = shown[:, taken].max(axis=1, initial=0.0)
        taken.append(int(np.maximum(shown, before[:, None]).mean(axis=0).argmax()))
    return sorted({int(candidates[n]) for n in taken}, reverse=True)


def ratios_for(index: Index, config: BucketsConfig) -> list[float]:
    """Aspect ratios, the most useful first, until no more than `config.crop` of the area is cut off on average."""
    own = np.log(index.height / index.width)
    lost = 1 - np.exp(-np.abs(own[:, None] - np.log(RATIOS)))  # samples x ratios
    taken = [int(lost.mean(axis=0).argmin())]
    while len(taken) < config.ratios and lost[:, taken].min(axis=1).mean() > config.crop:
        with_each = [lost[:, [*taken, n]].min(axis=1).mean() for n in range(len(RATIOS))]
        taken.append(int(np.argmin(with_each)))
    return [RATIOS[n] for n in dict.fromkeys(taken)]


def size_of(side: int, ratio: float, multiple: int) -> tuple[int, int]:
    """Height and width near the area of a square, in multiples that the model divides."""
    sizes = (side * ratio**0.5, side / ratio**0.5)
    height, width = (max(multiple, round(size / multiple) * multiple) for size in sizes)
    return height, width


def chosen_rows(index: Index, rows: list[Row]) -> np.ndarray:
    """Row of each sample, as training chooses it."""
    sizes = {"frames": index.frames, "height": index.height, "width": index.width, "own_fps": index.fps}
    return choose(rows, keys=index.keys, **sizes)


def share_of(index: Index, row: Row, samples: np.ndarray) -> Share:
    """What becomes of the samples of a row."""
    frames, height, width = row.shape
    tall, wide = index.height[samples], index.width[samples]
    scale = np.maximum(height / tall, width / wide)
    shown = np.minimum(1.0, height * width / (scale**2 * tall * wide))
    used = frames / frames_at(index.frames[samples], index.fps[samples], row.fps)
    return Share(
        resolution=[height, width],
        frames=frames,
        fps=row.fps,
        samples=len(samples),
        cropped=float(1 - shown.mean()) if len(samples) else 0.0,
        unseen=float(1 - used.mean()) if len(samples) else 0.0,
        enlarged=int((scale > 1.001).sum()),
    )


def table(shares: list[Share], total: int, short: int) -> list[str]:
    """Lines for people, the last of them ready for a command line."""
    lines = [f"{'frames':>6} {'size':>10} {'fps':>6} {'samples':>12} {'cropped':>9} {'unseen':>8} {'enlarged':>10}"]
    rules = []
    for share in shares:
        size, fps = "{}x{}".format(*share.resolution), "own" if share.fps is None else f"{share.fps:g}"
        lines.append(
            f"{share.frames:>6} {size:>10} {fps:>6} {share.samples:>12,} {share.cropped:>9.1%} {share.unseen:>8.1%} "
            f"{share.enlarged:>10,}"
        )
        rate = "" if share.fps is None else f", fps: {share.fps:g}"
        rules.append(f"{{resolution: [{share.resolution[0]}, {share.resolution[1]}], frames: {share.frames}{rate}}}")
    lines.append(f"left out, as too short for every row: {short:,} of {total:,} samples")
    return [*lines, f"'data.buckets=[{', '.join(rules)}]'"]


def draw(index: Index, shares: list[Share], path: Path) -> None:
    """Draw sizes and lengths of samples, and the rows among them."""
    from matplotlib.figure import Figure

    some = index.by_key[:5000]
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(index.width[some], index.height[some], s=6, alpha=0.3, label="samples")
    for size in {tuple(share.resolution) for share in shares}:
        left.plot([0, size[1], size[1]], [size[0], size[0], 0], color="C1", linewidth=1)
    left.set(xlabel="width in pixels", ylabel="height in pixels", title="rows (orange) and samples", xlim=0, ylim=0)
    available = frames_at(index.frames[some], index.fps[some], shares[0].fps if shares else None)
    right.hist(available, bins=40, alpha=0.6)
    for frames in {share.frames for share in shares}:
        right.axvline(frames, color="C1", linewidth=1)
    right.set(xlabel="frames at the table's rate", ylabel="samples", title="lengths of rows (orange) and samples")
    figure.savefig(path, metadata={"Software": None})
