"""Remote shards: what is read is what was written, whatever the server and other processes do."""

import fcntl
import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from bad_server import BadServer, serving

from sora_lite.data.index import Index, OpenShards
from sora_lite.data.manifest import Manifest
from sora_lite.data.remote import Patience, ReadCounts, Url, locate
from sora_lite.data.shard_cache import ShardCache
from sora_lite.data.shards import DamagedSample, Sample, ShardWriter
from sora_lite.errors import UserError

IMPATIENT = Patience(retries=2, timeout=0.5)
SIZE = 3 << 20
"""Bytes of a shard, about."""


def make_set(folder: Path, shards: int) -> Manifest:
    """Shards of four samples each, of random bytes."""
    folder.mkdir()
    manifest = Manifest(config_hash="c")
    for number in range(shards):
        with ShardWriter(folder / f"train-{number:06d}.tar", split="train") as writer:
            for i in range(4 * number, 4 * number + 4):
                meta = {"frames": 17, "height": 32, "width": 48, "fps": 8, "source": {"sha256": f"{i:064x}"}}
                media = hashlib.shake_128(bytes([i])).digest(SIZE // 4)
                writer.add(Sample(key=f"{i:016x}_0_1", ext="mp4", media=media, meta=meta))
        manifest.shards.append(writer.entry)
    manifest.save(folder)
    return manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "shards"
    make_set(path, 6)
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[BadServer]:
    with serving(folder) as one:
        yield one


@pytest.fixture
def index(server: BadServer, tmp_path: Path) -> Index:
    """Of the server, with a cache that holds three shards and a bit."""
    index = Index.load(Url(server.url), "train")
    index.shard_cache = ShardCache(tmp_path / "cache", int(3.5 * SIZE), IMPATIENT)
    return index


def read_sample(shards: OpenShards, i: int) -> bytes:
    index = shards.index
    return shards[int(index.shard[i])].read(int(index.media_offset[i]), int(index.media_size[i]), int(index.crc32c[i]))


def expected(i: int) -> bytes:
    return hashlib.shake_128(bytes([i])).digest(SIZE // 4)


def test_locations() -> None:
    assert locate("a/b", "k") == Path("a/b") and locate("file:///a/b", "k") == Path("/a/b")
    assert str(locate("http://h/a/", "k") / "x y.tar") == "http://h/a/x%20y.tar"
    assert locate("memory://a", "k") / "b" == Url("memory://a/b")
    for text, reason in (
        ("http://h/a?sig=1", "plain URL"),
        ("zip://a::http://h/b", "plain URL"),
        ("https://me:secret@h/a", "password"),
        ("nope://a", "no protocol"),
        ("s3://bucket/a", "pip install s3fs"),
    ):
        with pytest.raises(UserError, match=f"^data.shards: .*{reason}") as caught:
            locate(text, "data.shards")
        assert "secret" not in str(caught.value) and "sig" not in str(caught.value)


def test_what_is_read_is_what_was_written(index: Index, server: BadServer, folder: Path) -> None:
    local, shards = OpenShards(Index.load(folder, "train")), OpenShards(index, limit=2)
    for i in (0, 1, 23, 5, 2, 3):
        assert read_sample(shards, i) == read_sample(local, i) == expected(i)
    counts = shards.counts.take()
    assert (counts.cache_misses, counts.cache_hits, counts.io_retries) == (3, 1, 0)
    assert counts.bytes_read == 6 * (SIZE // 4) and counts.bytes_fetched == sum(index.shard_bytes[n] for n in (0, 5, 1))
    assert shards.counts == ReadCounts()


def test_a_file_system_of_fsspec(folder: Path, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe(f"/far/{path.name}", path.read_bytes())
    index = Index.load(locate("memory://far", "k"), "train")
    index.shard_cache = ShardCache(tmp_path, 2 * SIZE, IMPATIENT)
    assert read_sample(OpenShards(index), 7) == expected(7)
    system.rm(str(index.shard_paths[2]))
    with pytest.raises(UserError, match=r"train-000002\.tar: the shard is missing"):
        OpenShards(index)[2]
    system.rm("/far", recursive=True)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", ["500", "drop", "stall", "wrong", "long"])
def test_one_fault_changes_nothing(index: Index, server: BadServer, fault: str, ranges: bool) -> None:
    server.faults["train-000001.tar"], server.ranges = [fault], ranges
    shards = OpenShards(index)
    assert read_sample(shards, 4) == expected(4)
    assert shards.counts.io_retries == 1 and server.asked["train-000001.tar"] == 2
    if ranges and fault == "drop":
        assert shards.counts.bytes_fetched == index.shard_bytes[1]  # went on where it broke off


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("500", "answers 500"), ("stall", "timed out|sent"), ("wrong", "SHA-256"), ("long", "gives more than")],
)
def test_a_fault_that_stays_ends_the_run(index: Index, server: BadServer, fault: str, reason: str) -> None:
    server.faults["train-000001.tar"] = [fault] * 50
    with pytest.raises(UserError, match=rf"train-000001.tar: cannot be read \(.*({reason})") as caught:
        OpenShards(index)[1]
    assert len(str(caught.value).splitlines()) == 1


def test_manifest_and_index_files_too(server: BadServer) -> None:
    server.faults |= {"manifest.json": ["wrong", "500"], "train-000003.idx.parquet": ["wrong", "drop"]}
    assert len(Index.load(Url(server.url), "train")) == 24
    assert server.asked["manifest.json"] == 3 and server.asked["train-000003.idx.parquet"] == 3
    with pytest.raises(UserError, match=r"manifest\.json: not found"):
        Index.load(Url(f"{server.url}/elsewhere"), "train")


def test_the_size_is_bounded_and_what_is_open_stays(index: Index, tmp_path: Path) -> None:
    shards = OpenShards(index, limit=1)
    for i in (0, 4, 8, 0, 12):  # shard 1 is the one that was opened longest ago
        assert read_sample(shards, i) == expected(i)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= index.shard_cache.limit_bytes
    there = {number for number in range(6) if (tmp_path / "cache" / f"{index.shard_sha256[number]}.tar").exists()}
    assert there == {0, 2, 3}
    held = OpenShards(index)
    for i in range(0, 24, 4):  # all six stay open: more than the limit, and none is taken away
        read_sample(held, i)
    misses = held.counts.cache_misses
    again = OpenShards(index)
    for i in range(0, 24, 4):
        assert read_sample(again, i) == expected(i)
    assert again.counts.cache_misses == 0 < misses
    cache = index.shard_cache
    held.close(), again.close()
    assert cache.hold(index.shard_paths[0], index.shard_sha256[0], index.shard_bytes[0], ReadCounts()) is not None
    index.shard_cache = ShardCache(tmp_path / "small", SIZE // 2)
    with pytest.raises(UserError, match=r"data\.shard_cache_gb: .* is less than"):
        OpenShards(index)[0]


def test_without_force_nothing_goes_above_the_limit(index: Index, server: BadServer) -> None:
    shards = OpenShards(index)
    for i in (0, 4, 8):
        read_sample(shards, i)
    ask = index.shard_paths[3], index.shard_sha256[3], index.shard_bytes[3], ReadCounts()
    assert index.shard_cache.hold(*ask, force=False) is None and not server.asked["train-000003.tar"]
    shards.close()
    held = index.shard_cache.hold(*ask, force=False)
    assert held is not None
    os.close(held)


def test_a_file_that_the_disk_has_spoilt_is_fetched_again(index: Index, tmp_path: Path, server: BadServer) -> None:
    shards = OpenShards(index)
    assert read_sample(shards, 0) == expected(0)
    path = tmp_path / "cache" / f"{index.shard_sha256[0]}.tar"
    with path.open("r+b") as file:
        file.seek(int(index.media_offset[1]) + 9)
        file.write(b"spoilt")
    assert read_sample(shards, 1) == expected(1) and read_sample(OpenShards(index), 1) == expected(1)
    assert server.asked["train-000000.tar"] == 2 and shards.counts.io_retries == 1
    index.crc32c[2] += 1  # of a wrong index the shard is not guilty: the sample is
    with pytest.raises(DamagedSample, match="wrong checksum"):
        read_sample(shards, 2)
    assert server.asked["train-000000.tar"] == 2


def _read_all(index: Index, failed: "multiprocessing.Queue[str]") -> None:
    try:
        shards = OpenShards(index, limit=1)
        for i in range(24):
            assert read_sample(shards, i) == expected(i)
    except BaseException as error:  # noqa: BLE001 - told to the test
        failed.put(repr(error))


def test_many_processes_fetch_each_shard_once(index: Index, server: BadServer, tmp_path: Path) -> None:
    index.shard_cache = ShardCache(tmp_path / "cache", 7 * SIZE, Patience())
    fork = multiprocessing.get_context("fork")
    failed = fork.Queue()
    processes = [fork.Process(target=_read_all, args=(index, failed)) for _ in range(4)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(60)
    assert failed.empty() and [one.exitcode for one in processes] == [0] * 4
    assert {server.asked[f"train-{n:06d}.tar"] for n in range(6)} == {1}


def test_kill_9_while_fetching(index: Index, server: BadServer, tmp_path: Path) -> None:
    """Another process goes on where the dead one was, and nothing stays that is not whole."""
    index.shard_cache = ShardCache(tmp_path / "cache", 7 * SIZE, Patience())
    server.faults["train-000002.tar"] = ["stall"]
    child = multiprocessing.get_context("fork").Process(target=OpenShards(index).__getitem__, args=(2,))
    child.start()
    partial = tmp_path / "cache" / f"{index.shard_sha256[2]}.{index.shard_bytes[2]}.partial"
    while not (partial.exists() and partial.stat().st_size >= SIZE // 4):
        time.sleep(0.01)
    with partial.open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    shards = OpenShards(index)
    assert read_sample(shards, 8) == expected(8) and not partial.exists()
    assert shards.counts.bytes_fetched < index.shard_bytes[2]
    assert [path.name for path in (tmp_path / "cache").glob("*.partial")] == []


def test_a_cache_that_cannot_be_written(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    index.shard_cache = ShardCache(tmp_path / "file" / "cache", 7 * SIZE)
    with pytest.raises(UserError, match=r"data\.shard_cache: .*cannot be written"):
        OpenShards(index)[0]


def test_hostile_checksums_name_no_files(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "set", 1)
    manifest.shards[0].sha256 = "../../../etc/x"
    manifest.save(tmp_path / "set")
    with pytest.raises(UserError, match="no SHA-256"):
        Manifest.load(tmp_path / "set")


def test_few_files_are_open(folder: Path) -> None:
    shards = OpenShards(Index.load(folder, "train"), limit=2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        for i in range(24):
            assert read_sample(shards, i) == expected(i)
            assert len(os.listdir("/proc/self/fd")) <= before + 2
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before
