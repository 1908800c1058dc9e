"""Shards that are damaged or far away, workers that are killed: nothing hangs, nothing is lost in silence, and what is
intact comes in the same steps."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_server import BadServer, serving
from tiny_inputs import Tiny, call

from sora_lite.data.batch import ClipBatch
from sora_lite.data.buckets import Row
from sora_lite.data.compiled import open_index
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipLoader
from sora_lite.data.remote import Patience, Url
from sora_lite.data.shard_cache import ShardCache
from sora_lite.data.shards import Manifest
from sora_lite.errors import UserError
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.training.data_record import QUARANTINE

STEPS, BATCH = 6, 8


def loader(index: Index, *, workers: int = 0, said: list[str] | None = None) -> ClipLoader:
    return ClipLoader(
        index, [Row(shape=(17, 32, 32), keep=1.0, batch=BATCH)],
        seed=5, block_shards=2, flip=True, rank=0, world_size=1, accumulation=1, workers=workers, cache_bytes=0,
        pin=False, worker_timeout=60, say=(said if said is not None else []).append,
    )  # fmt: skip


def steps(index: Index, **how: int) -> list[ClipBatch]:
    return [batch for (batch,) in loader(index, **how).steps(0, STEPS)]


def assert_same(found: list[ClipBatch], expected: list[ClipBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.keys, one.captions, one.bad) == (other.keys, other.captions, other.bad)
        assert one.video.equal(other.video)


@pytest.fixture(scope="module")
def whole(tiny: Tiny) -> list[ClipBatch]:
    return steps(Index.load(tiny.shards, "train"))


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.shards, tmp_path / "shards", ignore=shutil.ignore_patterns(".cache")))


# ---------------------------------------------------------------------------------------------------- far away


@pytest.fixture
def server(tiny: Tiny) -> Iterator[BadServer]:
    with serving(tiny.shards) as one:
        yield one


def remote(server: BadServer, cache: Path, limit: int = 1 << 30) -> Index:
    patience = Patience(retries=3, timeout=1.0)
    return open_index([Url(server.url)], "train", shard_cache=ShardCache(cache, limit, patience))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_server_changes_nothing(server: BadServer, tmp_path: Path, whole: list[ClipBatch], workers: int) -> None:
    index = remote(server, tmp_path / "cache")
    for path, fault in zip(index.shard_paths, ["500", "stall", "drop", "wrong", "long"] * 9, strict=False):
        server.faults[path.name] = [fault, "500"]
    found = steps(index, workers=workers)
    assert_same(found, whole)
    asked = sum(server.asked[path.name] for path in index.shard_paths)
    assert asked == 3 * len(index.shard_paths) and sum(batch.reads.io_retries for batch in found) == asked * 2 // 3
    assert sum(batch.reads.bytes_fetched for batch in found) >= sum(index.shard_bytes)
    assert sum(batch.reads.cache_misses + batch.reads.cache_hits for batch in found) > 0
    again = steps(remote(server, tmp_path / "cache"), workers=workers)
    assert_same(again, whole)
    assert sum(server.asked[path.name] for path in index.shard_paths) == asked  # all of it lay in the cache


def test_a_cache_that_holds_one_shard(server: BadServer, tmp_path: Path, whole: list[ClipBatch]) -> None:
    limit = max(Index.load(Url(server.url), "train").shard_bytes)
    index = remote(server, tmp_path / "cache", limit)
    found = steps(index, workers=2)
    assert_same(found, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_stays_bad_stops_the_run(server: BadServer, tmp_path: Path, workers: int) -> None:
    index = remote(server, tmp_path / "cache")
    server.faults[index.shard_paths[0].name] = ["500"] * 1000
    with pytest.raises(UserError, match=r"\.tar: cannot be read \(the server answers 500"):
        steps(index, workers=workers)


def test_a_run_from_a_url(tiny: Tiny, server: BadServer, tmp_path: Path) -> None:
    def train(root: str, shards: object) -> list[dict]:
        words = ["experiment=tiny", f"data.shards={shards}", f"vae_from={tiny.vae}", f"run.root={tmp_path / root}"]
        words += [f"data.shard_cache={tmp_path / 'cache'}", "data.shard_cache_gb=0.1", "data.io_timeout=1"]
        assert call("train", *words, "data.workers=1") == 0
        return [line for line in read_record(tmp_path / root / "tiny" / RECORD) if "loss" in line]

    server.every_fault = ["500", "wrong"]  # the manifest comes first
    server.faults = {path.name: ["500", "drop"] for path in tiny.shards.glob("*.tar")}
    near, far = train("near", tiny.shards), train("far", server.url + "/")
    assert [line["loss"] for line in near] == [line["loss"] for line in far] and len(far) == 4
    assert sum(line["io_retries"] for line in far) > 0 == sum(line["io_retries"] for line in near)
    assert sum(line["bytes_fetched"] for line in far) > 0 == sum(line["bytes_fetched"] for line in near)
    assert [line["bytes_read"] for line in near] == [line["bytes_read"] for line in far]
    for line in near:
        assert line["clips_17x32x32"] == 8 and line["padding"] == 0 and line["bad_samples"] == 0
        assert line["decode_seconds"] > 0 and line["bytes_read"] > 0 and line["worker_restarts"] == 0
        assert line["coverage"] == pytest.approx(line["pass"] % 1 or 1)


# ---------------------------------------------------------------------------------------------------- kill -9


def test_killed_workers_change_nothing(tiny: Tiny) -> None:
    said: list[str] = []
    index, many = Index.load(tiny.shards, "train"), 16  # so many that some are asked for after the workers have died
    one = loader(index, workers=2, said=said)
    found = []
    for step, (batch,) in enumerate(one.steps(0, many)):
        found.append(batch)
        if step in (0, 2):
            for process in one.workers.processes:
                with contextlib.suppress(ProcessLookupError):  # it has been killed before, and nothing was asked since
                    os.kill(process, signal.SIGKILL)
    assert_same(found, [batch for (batch,) in loader(index).steps(0, many)])
    assert one.workers.restarts == len(said) >= 2 and all("SIGKILL" in text for text in said)


def test_a_killed_prefetcher_changes_nothing(server: BadServer, tmp_path: Path, whole: list[ClipBatch]) -> None:
    said: list[str] = []
    one = loader(remote(server, tmp_path / "cache"), workers=1, said=said)
    found = []
    for step, (batch,) in enumerate(one.steps(0, STEPS)):
        found.append(batch)
        if step == 1:
            process = one._prefetcher._process
            process.kill()
            process.join()
    assert_same(found, whole)
    assert len(said) == one.workers.restarts == 1 and "fetches shards" in said[0]


# ---------------------------------------------------------------------------------------------------- damage


def rewrite(folder: Path, number: int, change: Callable[[pa.Table], pa.Table], tar: bytes | None = None) -> None:
    """Write another index (and tar) for a training shard, with a manifest that says it is right."""
    manifest = Manifest.load(folder)
    entry = [one for one in manifest.shards if one.split == "train"][number]
    pq.write_table(change(pq.read_table(folder / entry.index)), folder / entry.index)
    entry.index_sha256 = hashlib.sha256((folder / entry.index).read_bytes()).hexdigest()
    if tar is not None:
        (folder / entry.path).write_bytes(tar)
        entry.bytes, entry.sha256 = len(tar), hashlib.sha256(tar).hexdigest()
    manifest.save(folder)


def replaced(found: list[ClipBatch], whole: list[ClipBatch]) -> set[str]:
    """Keys that were replaced; all else must be as it is in the whole data set."""
    bad = [one for batch in found for one in batch.bad]
    for one in bad:
        assert one.shard.endswith(".tar") and one.reason and one.replaced_by == found[one.step].keys[one.position]
    first = {(one.step, one.position) for one in bad}
    for step, (batch, expected) in enumerate(zip(found, whole, strict=True)):
        kept = [i for i in range(BATCH) if (step, i) not in first]
        assert [batch.keys[i] for i in kept] == [expected.keys[i] for i in kept]
        assert batch.video[kept].equal(expected.video[kept])
    return {whole[step].keys[place] for step, place in first}


def test_a_shard_that_is_cut_off_while_training(copy: Path, whole: list[ClipBatch]) -> None:
    index = Index.load(copy, "train")
    half = int(index.media_offset[index.shard == 0][-3]) + 5
    os.truncate(index.shard_paths[0], half)
    ends = np.maximum(index.media_offset + index.media_size, index.json_offset + index.json_size)
    lost = {index.key(int(i)) for i in np.flatnonzero((index.shard == 0) & (ends > half))}
    seen = {key for batch in whole for key in batch.keys}
    for workers in (0, 2):
        found = steps(index, workers=workers)
        assert replaced(found, whole) == lost & seen
        assert all("ends" in one.reason for batch in found for one in batch.bad) and lost & seen


def test_an_index_that_points_elsewhere(copy: Path, whole: list[ClipBatch]) -> None:
    def shift(table: pa.Table) -> pa.Table:
        offsets = table["media_offset"].to_pylist()
        offsets[0] += 512
        return table.set_column(table.schema.get_field_index("media_offset"), "media_offset", pa.array(offsets))

    rewrite(copy, 0, shift)
    index = Index.load(copy, "train")
    assert replaced(steps(index), whole) == {index.key(0)} & {key for batch in whole for key in batch.keys}


def test_members_that_do_not_lie_together(copy: Path, whole: list[ClipBatch], tmp_path: Path) -> None:
    index = Index.load(copy, "train")
    with tarfile.open(index.shard_paths[0]) as old, tarfile.open(tmp_path / "new.tar", "w") as new:
        for member in sorted(old, key=lambda one: (one.name.partition(".")[2], one.name)):
            new.addfile(member, old.extractfile(member))
    with tarfile.open(tmp_path / "new.tar") as new:
        places = {member.name: member.offset_data for member in new}

    def move(table: pa.Table) -> pa.Table:
        for column, ext in (("media_offset", ".mp4"), ("json_offset", ".json")):
            moved = pa.array([places[key + ext] for key in table["key"].to_pylist()])
            table = table.set_column(table.schema.get_field_index(column), column, moved)
        return table

    rewrite(copy, 0, move, (tmp_path / "new.tar").read_bytes())
    assert_same(steps(Index.load(copy, "train")), whole)


def test_the_quarantine_lists_each_once(tiny: Tiny, copy: Path, tmp_path: Path) -> None:
    index = Index.load(copy, "train")
    with index.shard_paths[0].open("r+b") as file:
        file.seek(int(index.media_offset[0]))
        file.write(b"damage!!")
    words = ["experiment=tiny", f"data.shards={copy}", f"vae_from={tiny.vae}", f"run.root={tmp_path}", "data.workers=1"]
    words += ["data.max_bad_fraction=0.9", "run.save_every=7"]
    path = tmp_path / "tiny" / QUARANTINE
    assert call("train", *words, "run.steps=7") == 0
    first = path.read_text()
    assert call("train", *words, "run.steps=14") == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.read_text().startswith(first) and len(lines) >= 2  # seen once a pass
    assert {line["key"] for line in lines} == {index.key(0)}
    assert len({(line["step"], line["position"]) for line in lines}) == len(lines)
    for line in lines:
        assert line["shard"] == index.shard_paths[0].name and "wrong checksum" in line["reason"]
        assert line["replaced_by"] != line["key"]
    record = [line for line in read_record(tmp_path / "tiny" / RECORD) if "loss" in line]
    assert sum(line["bad_samples"] for line in record) == len(lines)
    shown = [line["bad_by_shard"] for line in record if "bad_by_shard" in line]
    assert shown[-1] == f"{index.shard_paths[0].name} {len(lines)}"
    shutil.rmtree(tmp_path / "tiny" / "checkpoints")  # the same steps come again, as after a kill
    path.write_text(path.read_text() + '{"key": "torn')
    assert call("train", *words, "run.steps=14") == 0
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
