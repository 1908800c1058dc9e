"""Which samples, crops, captions and latents a global step holds depends on neither ranks nor workers: all of
{1, 2, 4, 8} x {0, 1, 2, 4}, for raw, latent and mixed data, in buckets and mixtures."""

import shutil
from pathlib import Path

import pytest
from test_loader import assert_same, join
from tiny_inputs import Tiny

from data_tools.cli import main as sora_data
from sora_lite.data.batch import ClipBatch
from sora_lite.data.buckets import Row
from sora_lite.data.compiled import open_index
from sora_lite.data.index import Index
from sora_lite.data.joined import open_join
from sora_lite.data.loader import ClipLoader
from sora_lite.data.manifest import Manifest

RANKS, WORKERS, STEPS = (1, 2, 4, 8), (0, 1, 2, 4), 8
ROWS = [
    Row(shape=(1, 32, 32), keep=0.4, batch=16),
    Row(shape=(9, 16, 16), keep=0.5, batch=8),
    Row(shape=(17, 16, 32), keep=1.0, batch=8),
]
TABLE = ", ".join(
    f"{{resolution: [{row.shape[1]}, {row.shape[2]}], frames: {row.shape[0]}, keep: {row.keep}}}" for row in ROWS
)
KINDS = ("raw", "latent", "mixed")


@pytest.fixture(scope="module")
def sets(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Path, Path | None]]]:
    """Two data sets of each kind: folders of clips and of their latents. In the mixed ones, one has some."""
    root = tmp_path_factory.mktemp("kinds")
    copy = shutil.copytree(tiny.shards, root / "copy", ignore=shutil.ignore_patterns(".cache", ".work"))
    every, some = root / "every", root / "some"
    words = [str(tiny.shards), str(every), f"vae_from={tiny.vae}", f"buckets=[{TABLE}]", "workers=0"]
    assert sora_data(["encode", *words]) == 0
    shutil.copytree(every, some, ignore=shutil.ignore_patterns(".cache", ".work"))
    manifest, index = Manifest.load(some), Index.load(every, "train", content="latents")
    manifest.removed_keys = [index.key(sample) for sample in range(len(index)) if sample % 2]
    manifest.save(some)
    return {
        "raw": [(tiny.shards, None), (copy, None)],
        "latent": [(tiny.shards, every), (copy, every)],
        "mixed": [(tiny.shards, None), (copy, some)],
    }


def steps(
    sets: list[tuple[Path, Path | None]], *, world_size: int = 1, workers: int = 0, start: int = 0
) -> list[ClipBatch]:
    """The global steps, each with the parts of all ranks joined."""
    index = open_index([clips for clips, _ in sets], "train")
    made = open_join(index, [latents for _, latents in sets], "train", content="latents", expected={})
    ranks = []
    for rank in range(world_size):
        loader = ClipLoader(
            index, ROWS, seed=5, block_shards=2, flip=made is None, rank=rank, world_size=world_size, accumulation=1,
            workers=workers, cache_bytes=0, pin=False, weights=[3, 1], image_ratio=0.4, latents=made,
        )  # fmt: skip
        ranks.append([batch for (batch,) in loader.steps(start, STEPS)])
    assert all(len({len(part.keys) for part in parts}) == 1 for parts in zip(*ranks, strict=True)), "equal work"
    return [join(list(parts)) for parts in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def whole(sets: dict) -> dict[str, list[ClipBatch]]:
    """Of each kind, as one process without workers reads it."""
    return {kind: steps(sets[kind]) for kind in KINDS}


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_numbers_of_ranks_and_workers(sets: dict, whole: dict, kind: str, world_size: int) -> None:
    for workers in WORKERS:
        start = WORKERS.index(workers)  # and from another step each time
        found = steps(sets[kind], world_size=world_size, workers=workers, start=start)
        for here, there in zip(found, whole[kind][start:], strict=True):
            assert_same(here, there)


def test_the_kinds_are_what_they_are_called_and_show_the_same_samples(whole: dict) -> None:
    """Otherwise the comparisons above would say little."""
    for raw, latent, mixed in zip(*(whole[kind] for kind in KINDS), strict=True):
        assert raw.keys == latent.keys == mixed.keys and raw.captions == latent.captions == mixed.captions
        assert [view.crop for view in raw.views] == [view.crop for view in latent.views]
        assert not raw.is_latent.any() and latent.is_latent.all() and latent.mean is not None
        assert latent.mean.flatten(1).std(1).min() > 0.01 and raw.video.float().flatten(1).std(1).min() > 1
    assert {batch.shape for batch in whole["raw"]} == {row.shape for row in ROWS}
    parts = [int(batch.is_latent.sum()) / len(batch.keys) for batch in whole["mixed"]]
    assert 0 < sum(parts) < len(parts) / 2
    views = [view for batch in whole["raw"] for view in batch.views]
    assert len({view.start for view in views}) > 2 and {view.flip for view in views} == {True, False}
    assert len({view.crop for view in views}) == 2
