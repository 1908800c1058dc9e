"""Shards that are damaged or far away, workers that are killed: nothing hangs, nothing is lost in silence, and what is
intact comes in the same steps."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_server import BadServer, serving
from tiny_inputs import Tiny, call
from torch import Tensor

from sora_lite.data.batch import ClipBatch
from sora_lite.data.buckets import Row
from sora_lite.data.compiled import open_index
from sora_lite.data.index import Index
from sora_lite.data.joined import Joined, open_join
from sora_lite.data.loader import ClipLoader
from sora_lite.data.manifest import Manifest
from sora_lite.data.remote import Location, Patience, Url
from sora_lite.data.shard_cache import ShardCache
from sora_lite.errors import UserError
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.training.data_record import QUARANTINE

STEPS, BATCH = 6, 8


@dataclass(kw_only=True)
class Read:
    """What a run reads from a folder: its clips, or latents of clips that lie elsewhere."""

    folder: Path
    clips: Path | None = None

    @property
    def content(self) -> str:
        return "clips" if self.clips is None else "latents"

    def open(self, place: Location, shard_cache: ShardCache | None = None) -> tuple[Index, Joined | None]:
        """The index of the clips, and what joins it, where the folder's content lies at a place."""
        index = open_index([place if self.clips is None else self.clips], "train", shard_cache=shard_cache)
        if self.clips is None:
            return index, None
        return index, open_join(index, [place], "train", content="latents", expected={})

    def index(self, folder: Path) -> Index:
        """Of the content of a folder."""
        return Index.load(folder, "train", content=self.content)


def loader(index: Index, made: Joined | None, *, workers: int = 0, said: list[str] | None = None) -> ClipLoader:
    return ClipLoader(
        index, [Row(shape=(17, 32, 32), keep=1.0, batch=BATCH)],
        seed=5, block_shards=2, flip=True, rank=0, world_size=1, accumulation=1, workers=workers, cache_bytes=0,
        pin=False, latents=made, worker_timeout=60, say=(said if said is not None else []).append,
    )  # fmt: skip


def steps(opened: tuple[Index, Joined | None], **how: int) -> list[ClipBatch]:
    return [batch for (batch,) in loader(*opened, **how).steps(0, STEPS)]


def tensors(batch: ClipBatch) -> list[Tensor]:
    """Of all samples, whether they are video or latents."""
    return [batch.video] if batch.mean is None or batch.logvar is None else [batch.mean, batch.logvar]


def assert_same(found: list[ClipBatch], expected: list[ClipBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.keys, one.captions, one.bad) == (other.keys, other.captions, other.bad)
        assert all(a.equal(b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.fixture(scope="module", params=["clips", "latents"])
def read(request: pytest.FixtureRequest, tiny: Tiny, latents: Path) -> Read:
    return Read(folder=tiny.shards) if request.param == "clips" else Read(folder=latents, clips=tiny.shards)


@pytest.fixture(scope="module")
def whole(read: Read) -> list[ClipBatch]:
    found = steps(read.open(read.folder))
    assert all(batch.is_latent.all() == (read.content == "latents") for batch in found)
    return found


@pytest.fixture
def copy(read: Read, tmp_path: Path) -> Path:
    return Path(shutil.copytree(read.folder, tmp_path / "shards", ignore=shutil.ignore_patterns(".cache", ".work")))


# ---------------------------------------------------------------------------------------------------- far away


@pytest.fixture
def server(read: Read) -> Iterator[BadServer]:
    with serving(read.folder) as one:
        yield one


def remote(read: Read, server: BadServer, cache: Path, limit: int = 1 << 30) -> tuple[Index, Joined | None]:
    return read.open(Url(server.url), ShardCache(cache, limit, Patience(retries=3, timeout=1.0)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_server_changes_nothing(
    read: Read, server: BadServer, tmp_path: Path, whole: list[ClipBatch], workers: int
) -> None:
    far = remote(read, server, tmp_path / "cache")
    index = read.index(read.folder)
    for path, fault in zip(index.shard_paths, ["500", "stall", "drop", "wrong", "long"] * 9, strict=False):
        server.faults[path.name] = [fault, "500"]
    found = steps(far, workers=workers)
    assert_same(found, whole)
    asked = sum(server.asked[path.name] for path in index.shard_paths)
    assert asked == 3 * len(index.shard_paths) and sum(batch.reads.io_retries for batch in found) == asked * 2 // 3
    assert sum(batch.reads.bytes_fetched for batch in found) >= sum(index.shard_bytes)
    assert sum(batch.reads.cache_misses + batch.reads.cache_hits for batch in found) > 0
    again = steps(remote(read, server, tmp_path / "cache"), workers=workers)
    assert_same(again, whole)
    assert sum(server.asked[path.name] for path in index.shard_paths) == asked  # all of it lay in the cache


def test_what_comes_next_is_fetched_before_it_is_read(read: Read, server: BadServer, tmp_path: Path) -> None:
    one = loader(*remote(read, server, tmp_path / "cache"))
    index = read.index(read.folder)
    wanted = {tmp_path / "cache" / f"{sha256}.tar" for sha256 in index.shard_sha256}
    assert one._prefetcher is not None
    with one._prefetcher.running(0, STEPS):
        deadline = time.monotonic() + 60
        while not all(path.exists() for path in wanted) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(path.exists() for path in wanted)
    assert one._prefetcher.take().bytes_fetched == sum(index.shard_bytes)


def test_a_cache_that_holds_one_shard(read: Read, server: BadServer, tmp_path: Path, whole: list[ClipBatch]) -> None:
    limit = max(read.index(read.folder).shard_bytes)
    assert_same(steps(remote(read, server, tmp_path / "cache", limit), workers=2), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_stays_bad_stops_the_run(read: Read, server: BadServer, tmp_path: Path, workers: int) -> None:
    far = remote(read, server, tmp_path / "cache")
    server.faults[read.index(read.folder).shard_paths[0].name] = ["500"] * 1000
    with pytest.raises(UserError, match=r"\.tar: cannot be read \(the server answers 500"):
        steps(far, workers=workers)


def test_a_run_from_urls(tiny: Tiny, latents: Path, tmp_path: Path) -> None:
    """Clips and latents behind URLs: the same losses, whatever the server does; and no shard of clips is fetched."""

    def train(name: str, *words: str) -> list[dict]:
        settings = ["experiment=tiny", f"vae_from={tiny.vae}", f"run.root={tmp_path}", f"run.name={name}"]
        settings += [f"data.shard_cache={tmp_path / 'cache'}", "data.shard_cache_gb=0.1", "data.io_timeout=1"]
        assert call("train", *settings, "data.workers=1", "run.validation_samples=0", *words) == 0
        return [line for line in read_record(tmp_path / name / RECORD) if "loss" in line]

    near = train("near", f"data.shards={tiny.shards}")
    with serving(tiny.shards.parent) as server, serving(latents) as other:
        server.every_fault = ["500", "wrong"]  # the manifest comes first
        server.faults = {f"shards/{path.name}": ["500", "drop"] for path in tiny.shards.glob("*.tar")}
        far = train("far", f"data.shards={server.url}/shards/")
        tars = sum(server.asked[name] for name in server.faults)
        other.faults = {path.name: ["500", "drop"] for path in latents.glob("train-*.tar")}
        made = train("made", f"data.shards={server.url}/shards/", f"data.latents={other.url}/")
        assert sum(server.asked[name] for name in server.faults) == tars > 0
        assert sum(other.asked[name] for name in other.faults) >= 3
    assert [line["loss"] for line in near] == [line["loss"] for line in far] and len(far) == 4
    assert [line["loss"] for line in near] == pytest.approx([line["loss"] for line in made], rel=1e-5)
    for lines in (far, made):
        assert sum(line["io_retries"] for line in lines) > 0 == sum(line["io_retries"] for line in near)
        assert sum(line["bytes_fetched"] for line in lines) > 0 == sum(line["bytes_fetched"] for line in near)
    assert [line["bytes_read"] for line in near] == [line["bytes_read"] for line in far]
    for line in near:
        assert line["clips_17x32x32"] == 8 and line["padding"] == 0 and line["bad_samples"] == 0
        assert line["decode_seconds"] > 0 and line["bytes_read"] > 0 and line["worker_restarts"] == 0
        assert line["coverage"] == pytest.approx(line["pass"] % 1 or 1)


# ---------------------------------------------------------------------------------------------------- kill -9


def test_killed_workers_change_nothing(read: Read) -> None:
    said: list[str] = []
    opened, many = read.open(read.folder), 16  # so many that some are asked for after the workers have died
    one = loader(*opened, workers=2, said=said)
    found = []
    for step, (batch,) in enumerate(one.steps(0, many)):
        found.append(batch)
        if step in (0, 2):
            for process in one.workers.processes:
                with contextlib.suppress(ProcessLookupError):  # it has been killed before, and nothing was asked since
                    os.kill(process, signal.SIGKILL)
    assert_same(found, [batch for (batch,) in loader(*opened).steps(0, many)])
    assert one.workers.restarts == len(said) >= 2 and all("SIGKILL" in text for text in said)


def test_a_killed_prefetcher_changes_nothing(
    read: Read, server: BadServer, tmp_path: Path, whole: list[ClipBatch]
) -> None:
    said: list[str] = []
    one = loader(*remote(read, server, tmp_path / "cache"), workers=1, said=said)
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
        assert all(a[kept].equal(b[kept]) for a, b in zip(tensors(batch), tensors(expected), strict=True))
    return {whole[step].keys[place] for step, place in first}


def test_a_shard_that_is_cut_off_while_training(read: Read, copy: Path, whole: list[ClipBatch]) -> None:
    opened, index = read.open(copy), read.index(copy)
    half = int(index.media_offset[index.shard == 0][-3]) + 5
    os.truncate(index.shard_paths[0], half)
    ends = np.maximum(index.media_offset + index.media_size, index.json_offset + index.json_size)
    lost = {index.key(int(i)) for i in np.flatnonzero((index.shard == 0) & (ends > half))}
    seen = {key for batch in whole for key in batch.keys}
    for workers in (0, 2):
        found = steps(opened, workers=workers)
        assert replaced(found, whole) == lost & seen
        assert all("ends" in one.reason for batch in found for one in batch.bad) and lost & seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_while_training(read: Read, copy: Path, workers: int) -> None:
    opened = read.open(copy)
    for path in copy.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"\.tar: the shard is missing; restore it") as caught:
        steps(opened, workers=workers)
    assert len(str(caught.value).splitlines()) == 1


def test_an_index_that_points_elsewhere(read: Read, copy: Path, whole: list[ClipBatch]) -> None:
    def shift(table: pa.Table) -> pa.Table:
        offsets = table["media_offset"].to_pylist()
        offsets[0] += 512
        return table.set_column(table.schema.get_field_index("media_offset"), "media_offset", pa.array(offsets))

    rewrite(copy, 0, shift)
    index = read.index(copy)
    assert replaced(steps(read.open(copy)), whole) == {index.key(0)} & {key for batch in whole for key in batch.keys}


def test_members_that_do_not_lie_together(read: Read, copy: Path, whole: list[ClipBatch], tmp_path: Path) -> None:
    index = read.index(copy)
    with tarfile.open(index.shard_paths[0]) as old, tarfile.open(tmp_path / "new.tar", "w") as new:
        for member in sorted(old, key=lambda one: (one.name.partition(".")[2], one.name)):
            new.addfile(member, old.extractfile(member))
    with tarfile.open(tmp_path / "new.tar") as new:
        places = {member.name: member.offset_data for member in new}

    def move(table: pa.Table) -> pa.Table:
        for column, ext in (("media_offset", index.ext[0].decode()), ("json_offset", "json")):
            moved = pa.array([places[f"{key}.{ext}"] for key in table["key"].to_pylist()])
            table = table.set_column(table.schema.get_field_index(column), column, moved)
        return table

    rewrite(copy, 0, move, (tmp_path / "new.tar").read_bytes())
    assert_same(steps(read.open(copy)), whole)


@pytest.mark.parametrize("read", ["clips"], indirect=True)
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
