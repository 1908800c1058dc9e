"""Files, names and tables that mean harm: none reads another file, hangs, ends the run, or leaves its folder."""

import contextlib
import http.server
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import hostile_files as hostile
import numpy as np
import psutil
import pytest
import stamped
from data_runs import snapshot

from data_tools.cli import main
from data_tools.locations import printable
from data_tools.pool import run_tasks
from sora_lite.data.index import Index
from sora_lite.data.manifest import Manifest
from sora_lite.data.shards import ShardReader
from sora_lite.data.video import BadVideo, decode_clip

SECRET = "c4n4ry-of-the-mine"
CANARY_STAMP = 200
"""Frames of the file that nobody may read show numbers from here on."""
STALL_SECONDS, MEMORY_MB = 4, 512
CHECKOUT = Path(__file__).resolve().parents[2]


class Server(http.server.ThreadingHTTPServer):
    """Gives a playable file to whoever asks, and remembers that."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(hostile.good("ts"))

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.shutdown()


# ---------------------------------------------------------------------------------------------------- what is put in


@dataclass(kw_only=True)
class Folder:
    """What is in ROOT/videos, by the names that people read."""

    root: Path
    good: dict[str, int] = field(default_factory=dict)
    """First stamp, of FRAMES each."""
    bad: dict[str, str] = field(default_factory=dict)
    """Regular expression of the reason; empty where the file may as well be packed."""

    def add(self, name: bytes | str, content: bytes) -> str:
        """Write a file; its name for people."""
        path = os.path.join(os.fsencode(self.root / "videos"), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        return printable(os.fsdecode(name))


def stamped_from(number: int) -> bytes:
    """A good mp4 whose frames show numbers from `number` on."""
    pictures = [stamped.picture(number + i, hostile.HEIGHT, hostile.WIDTH) for i in range(hostile.FRAMES)]
    return stamped.h264(":open-gop=0", pictures=pictures)


def set_canaries(root: Path) -> Path:
    """Files beside the videos, last read so long ago that any reading changes that time. Returns the video."""
    rows = json.dumps({"file_name": "plain.mp4", "caption": SECRET})
    contents = {"mp4": stamped_from(CANARY_STAMP), "txt": SECRET.encode(), "jsonl": rows.encode()}
    for suffix, content in contents.items():
        path = root / f"canary.{suffix}"
        path.write_bytes(content)
        os.utime(path, (1e9, 1.1e9))
    return root / "canary.mp4"


def add_what_is_no_file(folder: Folder) -> None:
    """Pipes, sockets, links and sizes."""
    root, videos = folder.root, folder.root / "videos"
    os.mkfifo(videos / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as one:
        descriptor = os.open(videos, os.O_RDONLY)
        one.bind(f"/proc/self/fd/{descriptor}/socket.mp4")  # a socket's path is short
        os.close(descriptor)
    folder.bad |= {"pipe.mp4": "a pipe", "socket.mp4": "a socket"}
    (root / "elsewhere").mkdir()
    (root / "elsewhere/canary.mp4").write_bytes(stamped_from(CANARY_STAMP))
    out = "leads out of the folder"
    for name, target, reason in (
        ("link.mp4", root / "canary.mp4", out),
        ("relative link.mp4", "../canary.mp4", out),
        ("text.png", root / "canary.txt", out),
        ("folder.mp4", root / "elsewhere", "a link to a folder elsewhere"),
        ("device.mp4", "/dev/zero", out),
        ("nowhere.mp4", "nothing.mp4", "leads nowhere"),
        ("loop.mp4", "loop.mp4", "leads nowhere"),
        ("deeper/link.mp4", "../../canary.mp4", out),
    ):
        (videos / name).parent.mkdir(exist_ok=True)
        (videos / name).symlink_to(target)
        folder.bad[name] = reason
    for name, gigabytes, reason in (("hollow.mp4", 60, "header"), ("more hollow.mp4", 65, "65.0 GiB")):
        with (videos / name).open("wb") as file:  # zeros that take no space
            file.write(hostile.movie()[:20])
            file.truncate(gigabytes << 30)
        folder.bad[name] = reason
    (videos / "empty folder.mp4").mkdir()


def add_damaged(folder: Folder, seeds: range) -> None:
    for kind in hostile.GOOD:
        for seed in seeds:
            folder.bad[folder.add(f"damaged {seed}.{kind}", hostile.mutated(kind, seed))] = ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Folder:
    folder = Folder(root=tmp_path_factory.mktemp("hostile") / "root")
    (folder.root / "videos").mkdir(parents=True)
    canary = set_canaries(folder.root)
    for i, name in enumerate([*hostile.NAMES, b"canary.mp4"]):  # the last is what relative names in playlists mean
        folder.good[folder.add(name, stamped_from(30 + i))] = 30 + i
    for name, (make, reason) in hostile.BOMBS.items():
        folder.bad[folder.add(name, make())] = reason
    for name, content in hostile.disguises(canary, server.url).items():
        folder.bad[folder.add(name, content)] = "" if name == "reference by url.mov" else "."
    folder.bad[folder.add("<img src=y onerror=alert(1)>.png", b"text")] = "not a video"
    add_damaged(folder, range(11))
    add_what_is_no_file(folder)
    rows = [
        {"file_name": "canary.mp4", "caption": "x" * 900_000, "group": "\n\x1b[2J", "\x1b[31m": "\0\r\n"},
        {"file_name": "-i.mp4", "captions": ["a\nb", "\x1b]0;title\x07"], "extra": {"a": [1, {"b": "\u202e"}]}},
    ]
    folder.add("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return folder


# ----------------------------------------------------------------------------------------------------- what comes out


@dataclass(kw_only=True)
class Ran:
    """A run as it looks from outside."""

    root: Path
    status: int
    printed: str
    seconds: float
    cpu_seconds: float
    worker_bytes: int
    """Most that a worker had in memory."""
    survivors: list[psutil.Process]
    """Processes that outlived the run."""
    before: dict[bytes, tuple[int, ...]]
    after: dict[bytes, tuple[int, ...]]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.root / "shards/report.json").read_text())

    def left_out(self) -> dict[str, dict[str, str]]:
        """Name of a source that is not packed -> its fate."""
        return {one["name"]: one for one in self.report["sources"]}

    def packed(self) -> dict[str, list[np.ndarray]]:
        """Name of a source -> its clips."""
        clips: dict[str, list[np.ndarray]] = {}
        for split in Manifest.load(self.root / "shards").splits:
            index = Index.load(self.root / "shards", split)
            for i in range(len(index)):
                with ShardReader(index.shard_paths[index.shard[i]]) as reader:
                    media = reader.read(int(index.media_offset[i]), int(index.media_size[i]), int(index.crc32c[i]))
                    meta = reader.read_json(
                        *(int(column[i]) for column in (index.json_offset, index.json_size, index.json_crc32c))
                    )
                clips.setdefault(meta["source"]["id"], []).append(decode_clip(media, frames=int(index.frames[i])))
        return clips


def run(root: Path, *settings: str) -> Ran:
    """`sora-data run` of ROOT/videos in worker processes, as a user starts it."""
    (root / "temporary").mkdir()
    words = ["run", "videos", "shards", "workers=2", f"memory_mb={MEMORY_MB}", f"stall_seconds={STALL_SECONDS}"]
    words += ["split.min_frames=2", "split.detector=none", "dedupe.near=false", "validation_fraction=0.1"]
    words += ["pack.preset=ultrafast", "pack.crf=10", *settings]
    environment = {**os.environ, "TMPDIR": str(root / "temporary"), "PYTHONPATH": str(CHECKOUT)}
    before, begin, used = snapshot(root), time.monotonic(), cpu_seconds()
    workers: set[psutil.Process] = set()
    most = 0
    with (root.parent / "printed").open("w+b") as printed:
        job = psutil.Popen(
            [sys.executable, "-m", "data_tools", *words],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        while job.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                workers.update(job.children(recursive=True))
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    most = max(most, worker.memory_info().rss)
            time.sleep(0.05)
            if time.monotonic() - begin > 200:
                job.kill()
        printed.seek(0)
        text = printed.read().decode("utf-8", "surrogateescape")
    return Ran(
        root=root,
        status=job.returncode,
        printed=text,
        seconds=time.monotonic() - begin,
        cpu_seconds=cpu_seconds() - used,
        worker_bytes=most,
        survivors=psutil.wait_procs(workers, timeout=5)[1],
        before=before,
        after=snapshot(root),
    )


def cpu_seconds() -> float:
    """Of all processes that this one started, and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="module")
def ran(folder: Folder) -> Ran:
    return run(folder.root)


def check_fates(folder: Folder, ran: Ran) -> None:
    """Each source has one fate, with a reason that people can read, and that no defect of this program wrote."""
    names = Counter(one["name"] for one in ran.report["sources"])
    names.update(ran.packed().keys())
    assert names == Counter([*folder.good, *folder.bad])
    counts = ran.report["counts"]
    for what in ("sources", "clips"):
        kinds = [counts[f"{what}_{kind}"] for kind in ("packed", "filtered", "duplicate", "quarantined", "removed")]
        assert counts[f"{what}_found"] == sum(kinds)
    assert counts["sources_found"] == len(names)
    for one in [*ran.report["sources"], *ran.report["clips"]]:
        assert one["reason"] and one["reason"].isprintable() and len(one["reason"]) < 800, one
        assert not re.search(r"\w at \w+\.py:\d|<\w+\.\w+ ", one["reason"]), one


# --------------------------------------------------------------------------------------------------------- whole runs


def test_the_traps_catch_a_player(server: Server, tmp_path: Path) -> None:
    """One that opens what it is given reads the canary, and asks the server."""
    texts = hostile.playlists(Path("canary.mp4"), server.url)
    (tmp_path / "canary.mp4").write_bytes(stamped_from(CANARY_STAMP))
    (tmp_path / "a.mp4").write_bytes(texts["concat relative"])
    with av.open(str(tmp_path / "a.mp4")) as file:
        stamps = [stamped.read_stamp(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    assert stamps == list(range(CANARY_STAMP, CANARY_STAMP + hostile.FRAMES))
    (tmp_path / "a.mp4").write_bytes(texts["concat http"])
    with av.open(
        str(tmp_path / "a.mp4"), container_options={"safe": "0", "protocol_whitelist": "file,http,tcp"}
    ) as file:
        assert next(file.decode(video=0)).width == hostile.WIDTH
    assert server.asked.pop() == "/concat.ts" and not server.asked


def test_each_file_has_one_fate_and_its_reason(folder: Folder, ran: Ran) -> None:
    assert ran.status == 0, ran.printed[-3000:]
    check_fates(folder, ran)
    left_out = ran.left_out()
    for name, reason in folder.bad.items():
        if reason:
            assert left_out[name]["kind"] in ("quarantined", "filtered")
            assert re.search(reason, left_out[name]["reason"]), left_out[name]
    assert "Traceback" not in ran.printed and "\x1b" not in ran.printed


def test_good_files_among_them_are_packed_exactly(folder: Folder, ran: Ran) -> None:
    packed = ran.packed()
    for name, first in folder.good.items():
        stamps = [stamped.read_stamp(frame) for clip in packed[name] for frame in clip]
        assert stamps == list(range(first, first + hostile.FRAMES)), name
    assert main(["verify", str(ran.root / "shards"), "workers=0"]) == 0


def test_nothing_else_was_read_or_written(ran: Ran, server: Server) -> None:
    assert ran.after == ran.before
    assert server.asked == []
    stamps = {stamped.read_stamp(frame) for clips in ran.packed().values() for clip in clips for frame in clip}
    assert max(stamps) < CANARY_STAMP
    written = [path.read_bytes() for path in (ran.root / "shards").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in content for content in [*written, ran.printed.encode("utf-8", "surrogateescape")])


def test_time_and_memory_are_bounded_and_no_process_stays(ran: Ran) -> None:
    assert ran.seconds < 150
    assert 100e6 < ran.worker_bytes < (MEMORY_MB + 250) * 2**20
    assert ran.survivors == []


def test_the_page_shows_their_names_and_runs_none_of_them(ran: Ran) -> None:
    """Last, since it writes into the shards' folder."""
    words = ["workers=2", f"memory_mb={MEMORY_MB}", f"stall_seconds={STALL_SECONDS}"]
    assert main(["report", str(ran.root / "shards"), *words]) == 0
    page = (ran.root / "shards/report.html").read_text()
    assert "&lt;img src=y" in page and not re.search(r"<img src=[xy]|\x1b", page)


def test_reasons_are_one_printable_line() -> None:
    def work(task: dict[str, Any]) -> list[dict[str, Any]]:
        raise task["kind"](f"\x1b[2J is\r\nno\udcff {'name' * 1000}")

    for kind in (BadVideo, OSError, ValueError):
        (outcome,) = run_tasks(work, [("a", {"kind": kind})], workers=0, stall_seconds=1, memory_mb=64)
        assert outcome.reason.isprintable() and "[2J is no" in outcome.reason and len(outcome.reason) <= 500


@pytest.mark.slow
def test_hundreds_of_damaged_files(tmp_path: Path) -> None:
    folder = Folder(root=tmp_path / "root")
    (folder.root / "videos").mkdir(parents=True)
    add_damaged(folder, range(100, 160))
    assert len(folder.bad) >= 500
    ran = run(folder.root)
    assert ran.status == 0, ran.printed[-3000:]
    check_fates(folder, ran)
    assert ran.after == ran.before and ran.survivors == []
    assert main(["verify", str(ran.root / "shards"), "workers=0"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [256, 1024])
def test_a_file_that_wants_gigabytes_gets_what_is_allowed(megabytes: int, tmp_path: Path) -> None:
    """Its tables would take more than 7 GB, as one sees where a limit of 4 GB is used up to the last."""
    folder = Folder(root=tmp_path / "root")
    folder.bad[folder.add("tables.mp4", hostile.BOMBS["tables.mp4"][0]())] = "."
    folder.good[folder.add("good.mp4", stamped_from(0))] = 0
    ran = run(folder.root, f"memory_mb={megabytes}", "stall_seconds=30")
    assert ran.status == 0, ran.printed[-3000:]
    check_fates(folder, ran)
    assert 0.8 * megabytes * 2**20 < ran.worker_bytes < (megabytes + 250) * 2**20


def test_lists_name_files_and_nothing_else(server: Server, tmp_path: Path) -> None:
    set_canaries(tmp_path)
    (tmp_path / "good.mp4").write_bytes(stamped_from(0))
    (tmp_path / "folder").mkdir()
    names = [
        "pipe:0",
        "concat:canary.mp4|canary.mp4",
        "subfile,,start,0,end,9,,:canary.mp4",
        "data:video/mp4;base64,AAAA",
    ]
    names += ["crypto:canary.mp4", "http:good.mp4", "/dev/zero", "/dev/stdin", "/proc/self/mem", "folder", "good.mp4"]
    rows = [{"path": name, "caption": "\x1b[2J"} for name in names]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["workers=1", f"stall_seconds={STALL_SECONDS}", "split.min_frames=2", "split.detector=none"]
    assert main(["run", str(tmp_path / "list.jsonl"), str(tmp_path / "shards"), *words]) == 0
    report = json.loads((tmp_path / "shards/report.json").read_text())
    assert {one["name"] for one in report["sources"]} == {name for name in names if name != "good.mp4"}
    assert all(
        re.match(r"is a (device|folder)|cannot be read: |.*Invalid argument", one["reason"])
        for one in report["sources"]
    ), report
    assert report["counts"]["sources_packed"] == 1 and server.asked == []
    for name in ("chain::http://a/b.mp4", "ssh2://a/b.mp4", "file://canary.mp4"):
        (tmp_path / "list.jsonl").write_text(json.dumps({"path": name}))
        assert main(["run", str(tmp_path / "list.jsonl"), str(tmp_path / "others"), *words]) == 2


@pytest.mark.parametrize(
    "row",
    [
        '{"file_name": "a.mp4", "x": ' + "[" * 900 + "]" * 900 + "}",
        '{"file_name": "a.mp4", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"file_name": "a.mp4", "x": "' + "x" * 30_000_000 + '"}',
        '{"file_name": "a.mp4", "x": ' + "9" * 100_000 + "}",
        '{"file_name": "a.mp4", "x": "\\ud800"}',
        '{"file_name": "a.mp4", "x": NaN}',
        '{"file_name": "../canary.mp4"}',
        '{"file_name": "a.mp4\\u0000"}',
        '{"file_name": "\x1b[2J"}',
    ],
    ids=lambda row: row[:40],
)
def test_metadata_that_no_clip_should_carry(row: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    set_canaries(tmp_path)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(hostile.good("mp4"))
    (tmp_path / "videos/metadata.jsonl").write_text(row + "\n")
    assert main(["run", str(tmp_path / "videos"), str(tmp_path / "shards"), "workers=0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/videos/metadata.jsonl, line 1: ") and line.isprintable()
    assert len(line) < 1000
