"""The compiled index and buckets: the same as those in memory, complete or not there, and never out of date."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sora_lite.data import compiled, index
from sora_lite.data.buckets import Row
from sora_lite.data.compiled import ColumnWriter, open_buckets, open_index
from sora_lite.data.index import COLUMNS, Index
from sora_lite.data.manifest import Manifest
from sora_lite.data.order import Order
from sora_lite.data.shards import Sample, ShardWriter
from sora_lite.errors import UserError

ROWS = [
    Row(shape=(17, 32, 48), keep=0.5, batch=8, fps=8.0),
    Row(shape=(1, 32, 48), keep=1.0, batch=8, fps=8.0),
    Row(shape=(5, 48, 32), keep=1.0, batch=4, fps=8.0),
]


def make_set(folder: Path, shards: int = 3, per_shard: int = 20, name: str = "k") -> Manifest:
    """Samples of several lengths and shapes, whose keys grow longer from shard to shard."""
    folder.mkdir()
    manifest = Manifest(config_hash="c", counts={"clips_captioned": per_shard})
    for s in range(shards):
        split = "validation" if s == 1 else "train"
        with ShardWriter(folder / f"{split}-{s:06d}.tar", split=split) as writer:
            for i in range(per_shard):
                size = (32, 48) if i % 3 else (48, 32)
                meta = {"frames": 5 + i, "height": size[0], "width": size[1], "fps": 8.0}
                meta["source"] = {"sha256": f"{i:016x}" + 48 * "0"}
                key = f"{name}{'x' * s}{(7 * i) % per_shard:03d}"
                writer.add(Sample(key=key, ext="png" if i == 5 else "mp4", media=bytes([i]) * (10 + i), meta=meta))
        manifest.shards.append(writer.entry)
    manifest.save(folder)
    return manifest


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    make_set(tmp_path / "a", shards=4)
    make_set(tmp_path / "b", per_shard=9, name="other_longer_key_")
    return [tmp_path / "a", tmp_path / "b"]


def assert_same(one: Index, other: Index) -> None:
    assert list(one.shard_paths) == list(other.shard_paths)
    assert list(one.shard_paths[-3:]) == list(other.shard_paths)[-3:]
    assert (one.set_shards, one.removed) == (other.set_shards, other.removed)
    assert (one.counts, one.fingerprint()) == (other.counts, other.fingerprint())
    for name in ("by_key", *COLUMNS):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype and (mine == theirs).all(), name


@pytest.mark.parametrize("split", ["train", "validation", "nothing"])
def test_what_is_mapped_is_what_is_read(
    folders: list[Path], split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "GROUP", 1)  # one shard a piece
    for some in (folders[:1], folders):
        mapped = open_index(some, split)
        assert_same(mapped, Index.load(some, split))
        assert_same(open_index(some, split), mapped)
    assert mapped.set_samples() == {"train": [60, 18], "validation": [20, 9], "nothing": [0, 0]}[split]
    assert {path.parent for path in folders[0].glob(".cache/*")} == {folders[0] / ".cache"}
    elsewhere = open_index(folders, split, cache=tmp_path / "cache" / "deep")
    assert elsewhere.folder.parent == tmp_path / "cache" / "deep" and not (folders[1] / ".cache").exists()


def test_first_by_key_are_few_where_there_are_many(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (index, compiled):
        monkeypatch.setattr(module, "BY_KEY", 7)
    monkeypatch.setattr(index, "GROUP", 1)
    mapped = open_index(folders, "train")
    assert [mapped.key(i) for i in mapped.by_key] == sorted(mapped.key(i) for i in range(len(mapped)))[:7]
    assert_same(mapped, Index.load(folders, "train"))


def test_buckets_are_those_in_memory(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "CHUNK", 7)
    in_memory, mapped = Index.load(folders, "train"), open_index(folders, "train")
    expected = open_buckets(in_memory, ROWS)
    for _ in range(2):  # compiled, then found
        buckets = open_buckets(mapped, ROWS)
        for one, other in zip(buckets, expected, strict=True):
            assert (one.shape, one.batch) == (other.shape, other.batch)
            assert all((getattr(one, n) == getattr(other, n)).all() for n in ("samples", "shards", "starts"))
            assert one.digest and not other.digest and one.fingerprint() == other.fingerprint()
    orders = [
        Order(some, seed=1, block_shards=2, set_shards=mapped.set_shards, weights=[2, 1])
        for some in (buckets, expected)
    ]
    assert orders[0].fingerprint() == orders[1].fingerprint()
    for step in range(40):
        assert (orders[0].step(step)[0].samples == orders[1].step(step)[0].samples).all()
    other_rows = [*ROWS[:2], Row(shape=(5, 48, 32), keep=0.9, batch=4)]
    open_buckets(mapped, other_rows)
    open_buckets(mapped, [replace(row, fps=7.0) for row in ROWS])
    open_buckets(
        mapped, [*ROWS[:2], Row(shape=(5, 48, 32), keep=1.0, batch=64, fps=8.0)]
    )  # the batch decides no bucket
    assert len(list(mapped.folder.glob("buckets-*"))) == 3


def test_a_row_without_samples_is_named_and_leaves_nothing(folders: list[Path]) -> None:
    mapped = open_index(folders, "train")
    rows = [*ROWS, Row(shape=(41, 32, 48), keep=1.0, batch=8)]
    for one in (mapped, Index.load(folders, "train")):
        with pytest.raises(UserError, match=r"data\.buckets\[3\]: none of the 78 samples.*longest has 24 frames"):
            open_buckets(one, rows)
    assert not list(mapped.folder.glob("buckets-*"))


def test_other_content_gets_another_folder(folders: list[Path]) -> None:
    first = open_index(folders, "train")
    manifest = Manifest.load(folders[1])
    manifest.removed_keys, manifest.removed_sources = [first.key(70)], [f"{3:016x}"]
    manifest.save(folders[1])
    second = open_index(folders, "train")
    assert second.folder != first.folder and first.key(70) in second.removed and len(second.removed) == 3
    assert_same(second, Index.load(folders, "train"))
    assert second.fingerprint() != first.fingerprint()
    second.shard_paths[-1].unlink()
    with pytest.raises(UserError, match=r"train-000002\.tar: named in the manifest but missing"):
        open_index(folders, "train")
    assert len(open_index(folders, "train", check=False)) == len(second)


def test_many_may_compile_at_once(folders: list[Path]) -> None:
    def work(_: int) -> list[int]:
        return open_buckets(open_index(folders, "train"), ROWS)[0].samples.tolist()

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(work, range(6)))
    assert all(one == results[0] for one in results)
    assert not list(folders[0].rglob("*.partial")) and len(list((folders[0] / ".cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_or_read(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(ColumnWriter, "append", full)
        with pytest.raises(UserError, match=r"data\.cache: .*index-.*No space left.*name a folder") as caught:
            open_index(folders, "train")
    assert len(str(caught.value).splitlines()) == 1 and not list((folders[0] / ".cache").iterdir())
    (folders[0] / "file").touch()
    for cache in (folders[0] / "file", folders[0] / "file/below", Path("/proc/nowhere")):
        with pytest.raises(UserError, match=r"data\.cache: .*name a folder"):
            open_index(folders, "train", cache=cache)
    mapped = open_index(folders, "train")
    (mapped.folder / "frames.npy").write_bytes((mapped.folder / "frames.npy").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"frames\.npy: cannot be read.*delete the folder .*index-"):
        open_index(folders, "train")


def test_what_a_killed_process_left_is_swept_away(folders: list[Path]) -> None:
    left = folders[0] / ".cache" / "index-0.0.partial"
    left.mkdir(parents=True)
    (left / "keys.npy").touch()
    open_index(folders, "train")
    assert left.exists()  # its process may be alive
    for path in (left, left / "keys.npy"):
        os.utime(path, (0, 0))
    open_index(folders, "validation")
    assert not left.exists()


def test_texts_may_become_wider(tmp_path: Path) -> None:
    with ColumnWriter(tmp_path / "x.npy", np.dtype("S1")) as writer:
        for text in (b"a", b"", b"longer", b"short", "é".encode() * 9):
            writer.append(np.array([text, text]))
    assert (
        np.load(tmp_path / "x.npy").tolist()
        == [b"a", b"a", b"", b"", b"longer", b"longer", b"short", b"short"] + ["é".encode() * 9] * 2
    )
