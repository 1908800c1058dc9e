"""Sources: found in folders, lists and behind URLs, named so that no name does harm, opened only if they are files."""

import csv
import http.server
import importlib.util
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.lists import Row
from data_tools.locations import open_source, printable
from data_tools.sources import SOURCES_SCHEMA, Source, find_sources
from sora_lite.data.video import BadVideo
from sora_lite.errors import UserError

ODD = [
    b"two\nlines.mp4",
    b"\x1b[31mred.mp4",
    b"bytes \xff\x85.mp4",
    b"back\\slash.mp4",
    b"back\\u000aslash.mp4",
    b"quotes \"'`.mp4",
    b"-i.mp4",
    b"pipe:0.mp4",
    b"http:x.mp4",
    b"concat:a|b.mp4",
    b"a%20b?c#d.mp4",
    "é ü \u202e gnp.mp4".encode(),
    "next\u0085line.mp4".encode(),
]


def by_name(where: object) -> dict[str, Source]:
    sources = find_sources(str(where))
    found = {source.name: source for source in sources}
    assert len(found) == len(sources)
    return found


def content(source: Source) -> bytes:
    with open_source(source.location) as file:
        return file.read()


def refused(where: object) -> str:
    with pytest.raises(UserError) as caught:
        find_sources(str(where))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ folders


def test_any_name_is_a_plain_file_with_a_harmless_name_of_its_own(tmp_path: Path) -> None:
    for name in ODD:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).write_bytes(name)
    found = by_name(tmp_path)
    assert len(found) == len(ODD) and {content(source) for source in found.values()} == set(ODD)
    assert all(name.isprintable() and name.encode() for name in found)
    assert {"two\\u000alines.mp4", "bytes \\xff\\x85.mp4", "next\\u0085line.mp4", "-i.mp4", "pipe:0.mp4"} <= set(found)
    table = pa.Table.from_pylist([source.to_row() for source in found.values()], schema=SOURCES_SCHEMA)
    assert [Source.from_row(row) for row in table.to_pylist()] == list(found.values())


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_different_names_stay_different(one: bytes, other: bytes) -> None:
    shown, also = printable(os.fsdecode(one)), printable(os.fsdecode(other))
    assert shown.isprintable() and (shown == also) == (one == other)


def test_what_is_no_file_of_the_folder_is_named_and_never_opened(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "secret.mp4").write_bytes(b"secret")
    (folder / "good.MP4").write_bytes(b"good")
    (folder / "sub" / "also.mkv").write_bytes(b"also")
    (folder / "sub" / ".hidden.mp4").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"")
    (folder / "inside.mp4").symlink_to("good.MP4")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "out.mp4").symlink_to(elsewhere / "secret.mp4")
    (folder / "nowhere.mp4").symlink_to("gone")
    (folder / "circle.mp4").symlink_to("circle.mp4")
    (folder / "more").symlink_to(elsewhere)
    os.mkfifo(folder / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket.mp4"))
    found = by_name(folder)
    assert {name for name, source in found.items() if not source.reason} == {"good.MP4", "sub/also.mkv", "inside.mp4"}
    assert content(found["inside.mp4"]) == b"good"
    assert "out of the folder" in found["out.mp4"].reason and "not followed" in found["more"].reason
    assert "leads nowhere" in found["nowhere.mp4"].reason and "leads nowhere" in found["circle.mp4"].reason
    assert "not opened" in found["pipe.mp4"].reason and "not opened" in found["socket.mp4"].reason
    signal.alarm(20)
    for name, words in [("pipe.mp4", "a pipe"), ("socket.mp4", "a socket"), ("sub", "a folder")]:
        with pytest.raises(BadVideo, match=words):
            open_source(str(folder / name))
    with pytest.raises(BadVideo, match="a device"):
        open_source("/dev/zero")
    signal.alarm(0)
    with pytest.raises(FileNotFoundError, match="cannot be read: No such file"):
        open_source(str(folder / "gone.mp4"))
    assert found["nowhere.mp4"].stamp() == "-" and found["good.MP4"].stamp().startswith("4-")


def test_metadata_may_name_other_files_of_the_folder(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.bin", ".c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    rows = [{"file_name": "./a.mp4", "label": 3.0}, {"file_name": "b.bin", "group": 7}, {"file_name": ".c.mp4"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = by_name(tmp_path)
    assert found["a.mp4"].row == Row(label=3) and found["b.bin"].row == Row(group="7") and ".c.mp4" in found


def test_where_nothing_can_be_found_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.mp4").write_bytes(b"")
    for where, words in [
        (tmp_path / "gone", "no such folder"),
        (tmp_path / "one.mp4", "neither a folder nor a list"),
        (tmp_path / "empty", "holds no videos"),
        (f"zip://*::{tmp_path}/a.zip", "chains of URLs"),
        ("file://videos", "third slash"),
        ("nosuch://bucket/videos", "no protocol"),
    ]:
        assert words in refused(where)


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/a", "s3fs"), ("gs://b/a", "gcsfs")])
def test_a_missing_package_is_named(url: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    (tmp_path / "list.csv").write_text(f"url\n{url}.mp4\n")
    assert f"pip install {package}" in refused(url) and f"pip install {package}" in refused(tmp_path / "list.csv")


# -------------------------------------------------------------------------------------------------------------- lists


def test_lists_of_all_formats_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    paths = ["a, b.mp4", "../other/c.mp4", str(tmp_path / "lists" / "d.mp4"), "new\nline.mp4"]
    rows = [
        {"path": paths[0], "caption": 'says "é"', "label": 3, "url": "https://x/y", "when": "2020-01-02"},
        {"path": paths[1], "captions": ["one", "two, three"], "group": "g"},
        {"path": paths[2]},
        {"path": paths[3]},
    ]
    columns = ["path", "caption", "captions", "label", "group", "url", "when"]
    with (tmp_path / "lists" / "l.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(
            [{**row, "captions": json.dumps(row["captions"])} if "captions" in row else row for row in rows]
        )
    (tmp_path / "lists" / "l.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pq.write_table(
        pa.Table.from_pylist([dict.fromkeys(columns) | row for row in rows]), tmp_path / "lists" / "l.parquet"
    )
    found = by_name(tmp_path / "lists" / "l.csv")
    assert found == by_name(tmp_path / "lists" / "l.jsonl") == by_name(tmp_path / "lists" / "l.parquet")
    other = str(tmp_path / "other" / "c.mp4")
    assert set(found) == {"a, b.mp4", other, "d.mp4", "new\\u000aline.mp4"} and found[other].location == other
    first = Row(captions=['says "é"'], label=3, extra={"url": "https://x/y", "when": "2020-01-02"})
    assert found["a, b.mp4"].row == first
    assert found[other].row == Row(captions=["one", "two, three"], group="g") and found["d.mp4"].row == Row()


def test_parquet_may_hold_bytes_as_names_and_other_types(tmp_path: Path) -> None:
    name = b"n\xff.mp4"
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"here")
    types = [("file_name", pa.binary()), ("label", pa.float64()), ("day", pa.date32()), ("deep", pa.list_(pa.int8()))]
    rows = [
        {"file_name": name, "label": 2.0, "day": 0, "deep": [1]},
        {"file_name": b"gone.mp4", "label": float("nan")},
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(types)), tmp_path / "l.parquet")
    found = by_name(tmp_path / "l.parquet")
    assert found["n\\xff.mp4"].row == Row(label=2, extra={"day": "1970-01-01", "deep": [1]})
    assert content(found["n\\xff.mp4"]) == b"here" and found["gone.mp4"].row == Row()


@pytest.mark.parametrize(
    ("suffix", "text", "words"),
    [
        ("csv", "path,label\na.mp4,3\nb.mp4,cat\n", "line 3: label must be an integer, not 'cat'; mend or remove this"),
        ("csv", "path,label\na.mp4\n", "line 2: has 1 cells where the first line has 2"),
        ("csv", 'path\n"a.mp4" b\n', "line 2: is no CSV"),
        ("csv", "name,label\na.mp4,3\n", "one of file_name,"),
        ("csv", "path,path\na.mp4,b.mp4\n", "once each"),
        ("csv", "path,captions\na.mp4,[1]\n", "line 2: caption must be a text"),
        ("csv", "path\na.mp4\n./a.mp4\n", "line 3: file_name './a.mp4' stands in an earlier line too"),
        ("jsonl", '{"path": "a.mp4"}\n{"path": 5}', "line 2: needs a text in one of file_name, path, url, video"),
        ("jsonl", '{"path": "a.mp4"}\n\n{"path"', "line 3: "),
        ("jsonl", "[" * 100_000, "line 1: maximum recursion"),
        ("jsonl", '{"path": "a\\u0000.mp4"}', "line 1: 'a\\\\x00.mp4' cannot be the name"),
        ("jsonl", '{"path": "a\\ud800.mp4"}', "line 1: "),
        ("jsonl", '{"path": "a.mp4", "caption": "\\ud800"}', "line 1: "),
        ("jsonl", '{"path": "a.mp4", "x": NaN}', "line 1: "),
        ("jsonl", '{"path": "a.mp4", "label": 9999999999999999999}', "line 1: label must be an integer"),
        ("jsonl", '{"path": "zip://a.mp4::http://x/y.zip"}', "line 1: chains of URLs"),
        ("parquet", "PAR1 no", "l.parquet: "),
        ("jsonl", "", "holds no videos"),
    ],
)
def test_mistakes_in_lists_are_named_by_line(suffix: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / f"l.{suffix}").write_text(text)
    assert f"l.{suffix}" in refused(tmp_path / f"l.{suffix}") and words in refused(tmp_path / f"l.{suffix}")


def test_mistakes_in_parquet_are_named_by_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"file_name": ["a.mp4", "b.mp4"], "x": [None, b"raw"]}), tmp_path / "l.parquet")
    assert "l.parquet, row 2: holds bytes" in refused(tmp_path / "l.parquet")


# --------------------------------------------------------------------------------------------------------------- URLs


def test_file_urls_are_paths(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a")
    (tmp_path / "l.jsonl").write_text(json.dumps({"video": f"file://{tmp_path}/a.mp4"}))
    assert by_name(f"file://{tmp_path}") == by_name(tmp_path) == by_name(f"file://{tmp_path}/l.jsonl")


def test_folders_and_lists_of_any_file_system(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    files = {"a.mp4": b"aa", "sub/b?c.mkv": b"b", ".no.mp4": b"", "no.txt": b"", "metadata.jsonl": b""}
    files["metadata.jsonl"] = b'{"file_name": "a.mp4", "caption": "A"}'
    for name, data in files.items():
        system.pipe_file(f"/videos/{name}", data)
    found = by_name("memory://videos/")
    assert {name: source.location for name, source in found.items()} == {
        "a.mp4": "memory://videos/a.mp4",
        next(name for name in found if name != "a.mp4"): "memory://videos/sub/b?c.mkv",
    }
    assert found["a.mp4"].row == Row(captions=["A"]) and content(found["a.mp4"]) == b"aa"
    assert Source.from_row(found["a.mp4"].to_row()) == found["a.mp4"]
    before = found["a.mp4"].stamp()
    assert before.startswith("2-") and by_name("memory://videos")["a.mp4"].stamp() == before
    system.pipe_file("/videos/a.mp4", b"aaa")
    assert by_name("memory://videos")["a.mp4"].stamp() != before
    (tmp_path / "l.csv").write_text("url\nmemory://videos/a.mp4\nmemory://videos/gone.mp4\n")
    listed = by_name(tmp_path / "l.csv")
    assert content(listed["memory://videos/a.mp4"]) == b"aaa" and listed["memory://videos/gone.mp4"].stamp() == "-"
    with pytest.raises(FileNotFoundError, match=r"memory://videos/gone\.mp4"):
        open_source("memory://videos/gone.mp4")
    with pytest.raises(BadVideo, match="larger than 2 bytes"):
        open_source("memory://videos/a.mp4", max_bytes=2)
    system.pipe_file("/videos/metadata.jsonl", b'{"file_name": "gone.mp4"}')
    assert "metadata.jsonl, line 1: file_name 'gone.mp4' does not exist" in refused("memory://videos")


FILES = {"/d/l.jsonl": b"", "/d/a b.mp4": b"A" * 3_000_000, "/d/busy.mp4": b"late", "/d/breaks.mp4": b"B" * 200_000}


class Server(http.server.BaseHTTPRequestHandler):
    """Gives FILES; `busy` only at the second time, `breaks` breaks off at the first, what is signed refuses HEAD."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.reply(403 if "?" in self.path else 200, body=False)

    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        first = name not in self.asked
        self.asked.append(name)
        if "busy" in name and first:
            self.send_response(429)
            self.send_header("Retry-After", "0")
            self.end_headers()
        elif "moved" in name:
            self.send_response(302)
            self.send_header("Location", "/d/busy.mp4")
            self.end_headers()
        else:
            self.reply(200, body=True, part=0.5 if "breaks" in name and first else 1.0)

    def reply(self, status: int, body: bool, part: float = 1.0) -> None:
        data = FILES.get(self.path.partition("?")[0].replace("%20", " "))
        self.send_response(404 if data is None else status)
        self.send_header("Content-Length", str(len(data or b"")))
        self.send_header("ETag", '"v1"')
        self.end_headers()
        if body and data:
            self.wfile.write(data[: int(len(data) * part)])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "*")
    Server.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_lists_and_files_behind_http(site: str) -> None:
    signed = site.replace("//", "//user:word@") + "/d/busy.mp4?signature=S"
    names = ["a b.mp4", f"{site}/d/breaks.mp4", f"{site}/gone.mp4", signed, f"{site}/moved.mp4"]
    FILES["/d/l.jsonl"] = "\n".join(json.dumps({"url": name}) for name in names).encode()
    found = by_name(f"{site}/d/l.jsonl?signature=S")
    private = next(name for name in found if "busy" in name)
    assert set(found) == {"a%20b.mp4", "breaks.mp4", f"{site}/gone.mp4", f"{site}/moved.mp4", private}
    assert re.fullmatch(re.escape(site) + r"/d/busy\.mp4\?[0-9a-f]{16}", private)
    assert found["a%20b.mp4"].stamp() == '3000000-"v1"' and found[f"{site}/gone.mp4"].stamp() == "-"
    assert found[private].stamp() == '4-"v1"'
    assert content(found["a%20b.mp4"]) == FILES["/d/a b.mp4"] and content(found["breaks.mp4"]) == FILES["/d/breaks.mp4"]
    assert content(found[private]) == content(found[f"{site}/moved.mp4"]) == b"late"
    with open_source(found["breaks.mp4"].location) as one, open_source(found["breaks.mp4"].location) as other:
        assert [one.read(), other.read()] == [FILES["/d/breaks.mp4"]] * 2
    assert Server.asked.count("/d/breaks.mp4") == 3, "the last file is not fetched again"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{site}/gone.mp4") + ".*404"):
        open_source(found[f"{site}/gone.mp4"].location)
    assert Server.asked.count("/gone.mp4") == 3, "what is not there is not asked for again and again"
    with pytest.raises(BadVideo, match="larger than 10 bytes"):
        open_source(found["a%20b.mp4"].location, max_bytes=10)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x.mp4", "file:///etc/passwd", "memory://x.mp4", "sftp://h/x"])
def test_a_list_from_elsewhere_names_no_file_of_this_machine(name: str, site: str) -> None:
    FILES["/d/l.jsonl"] = json.dumps({"file_name": name}).encode()
    assert "/d/l.jsonl, line 1: " in refused(f"{site}/d/l.jsonl") and "from elsewhere" in refused(f"{site}/d/l.jsonl")


def test_a_folder_behind_http(site: str) -> None:
    pytest.importorskip("aiohttp")
    FILES["/d"] = b'<a href="../">up</a> <a href="a%20b.mp4">a b</a> <a href="?C=N">sort</a> <a href="/x.mp4">x</a>'
    try:
        found = by_name(f"{site}/d/")
    finally:
        del FILES["/d"]
    assert set(found) == {"a%20b.mp4"} and content(found["a%20b.mp4"]) == FILES["/d/a b.mp4"]
