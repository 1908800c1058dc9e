"""Captions from files beside the videos, from a real program and from a real server with all its moods."""

import base64
import http.server
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import fsspec
import httpx
import pytest
from PIL import Image

from data_tools.caption import CaptionItem, CaptionRow, caption_clips
from data_tools.config import CaptionConfig, CaptionSource
from sora_lite.data.video import BadVideo
from sora_lite.data.web import retry_after
from sora_lite.errors import UserError

KEY = "sk-very-secret"
STEP = 10
"""Levels of red between one clip's pictures and the next one's, which is how the server knows them."""


def pictures(clip: int, count: int = 3) -> list[bytes]:
    """Red says which clip, green which picture of it."""
    files = [io.BytesIO() for _ in range(count)]
    for i, file in enumerate(files):
        Image.new("RGB", (48, 32), (clip * STEP, i * STEP, 0)).save(file, "JPEG", quality=95)
    return [file.getvalue() for file in files]


def item(clip: int, location: str = "", frames: Callable[[], list[bytes]] | None = None) -> CaptionItem:
    return CaptionItem(key=f"k{clip}", name=f"{clip}.mp4", location=location, frames=frames or (lambda: pictures(clip)))


def rows_of(clips: int, settings: CaptionConfig) -> dict[str, CaptionRow]:
    rows = list(caption_clips(map(item, range(clips)), settings))
    assert len(rows) == clips
    return {row.key: row for row in rows}


# --------------------------------------------------------------------------------------------------------------- http


class Server(http.server.BaseHTTPRequestHandler):
    """Checks every request as a real one would be, and answers in the mood that `moods` gives for (clip, attempt)."""

    protocol_version = "HTTP/1.1"
    moods: Callable[[int, int], str]
    asked: dict[int, list[float]]
    busy: list[int]
    """[requests at this moment, most of them at any moment]"""
    lock = threading.Lock()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, *images = request["messages"][0]["content"]
        shown = []
        for image in images:
            head, _, data = image["image_url"]["url"].partition(",")
            assert head == "data:image/jpeg;base64"
            shown.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((0, 0)))
        clip = round(shown[0][0] / STEP)
        assert [round(green / STEP) for _, green, _ in shown] == [0, 1, 2]
        assert (request["model"], text) == ("some-model", {"type": "text", "text": "What is this?"})
        assert self.path == "/v1/chat/completions" and self.headers["Authorization"] == f"Bearer {KEY}"
        with self.lock:
            self.asked.setdefault(clip, []).append(time.monotonic())
            attempt = len(self.asked[clip])
            self.busy[0] += 1
            self.busy[1] = max(self.busy)
        try:
            self.answer(clip, type(self).moods(clip, attempt), attempt)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.lock:
                self.busy[0] -= 1

    def answer(self, clip: int, mood: str, attempt: int) -> None:
        match mood.split():
            case ["break"]:
                self.close_connection = True
            case ["hang", seconds]:
                time.sleep(float(seconds))
                self.close_connection = True
            case ["status", code, *after]:
                error = {"error": {"message": f"Sorry,\nkey {self.headers['Authorization']} \x1b[31m"}}
                self.reply(int(code), json.dumps(error).encode(), *after)
            case ["say", *words]:
                self.reply(200, " ".join(words).encode())
            case ["slow"]:
                time.sleep(0.3)
                self.answer(clip, "ok", attempt)
            case ["ok"]:
                message = {"content": f" clip {clip}, answer {attempt} é\n"}
                self.reply(200, json.dumps({"choices": [{"message": message}]}).encode())

    def reply(self, status: int, body: bytes, *retry_after: str) -> None:
        self.send_response(status)
        for value in retry_after:
            self.send_header("Retry-After", value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class ManyAtOnce(http.server.ThreadingHTTPServer):
    request_queue_size = 64
    block_on_close = False


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("CAPTION_TEST_KEY", KEY + "\n")
    Server.asked, Server.busy, Server.moods = {}, [0, 0], lambda clip, attempt: "ok"
    running = ManyAtOnce(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1/chat/completions"
    running.shutdown()
    running.server_close()


def asking(url: str, **changes: object) -> CaptionConfig:
    settings = {"model": "some-model", "prompt": "What is this?", "key_env": "CAPTION_TEST_KEY", "retries": 2}
    return CaptionConfig(**{"source": CaptionSource.http, "url": url, **settings, "timeout_seconds": 5.0, **changes})


def test_a_server_is_asked_until_it_answers_and_no_longer(server: str) -> None:
    first = {1: "status 429 2", 2: "status 500", 3: "say no JSON", 4: "break", 5: "hang 6", 6: 'say {"choices": []}'}
    always = {7: "status 400", 8: "status 503", 9: 'say {"choices": [{"message": {"content": null}}]}'}
    Server.moods = lambda clip, attempt: always.get(clip) or (first.get(clip, "ok") if attempt == 1 else "ok")
    rows = rows_of(11, asking(server, retries=1, timeout_seconds=3.0, concurrency=11))
    for clip in (0, *first, 10):
        attempt = 2 if clip in first else 1
        assert rows[f"k{clip}"] == CaptionRow(key=f"k{clip}", captions=[f"clip {clip}, answer {attempt} é"])
        assert len(Server.asked[clip]) == attempt
    assert Server.asked[1][1] - Server.asked[1][0] >= 2, "Retry-After was not kept"
    assert [len(Server.asked[clip]) for clip in always] == [1, 2, 2]
    words = ("answers 400: Sorry, key Bearer *** \\u001b", "answers 503: Sorry", "an empty caption")
    for clip, part in zip(always, words, strict=True):
        row = rows[f"k{clip}"]
        assert row.captions == [] and part in row.reason and KEY not in row.reason and row.reason.isprintable()


def test_a_server_that_never_answers_is_left(server: str) -> None:
    Server.moods = lambda clip, attempt: "hang 4"
    (row,) = rows_of(1, asking(server, retries=0, timeout_seconds=0.3)).values()
    assert row.captions == [] and row.reason == "the server: no answer within 0.3 seconds"


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("7", 7, 7),
        ("1.5", 1.5, 1.5),
        (format_datetime(datetime.now(UTC) + timedelta(hours=5), usegmt=True), 14_000, 18_000),
    ]
    + [("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("soon", None, None), ("-3", None, None), ("nan", None, None)],
)
def test_what_retry_after_may_say(text: str, low: float | None, high: float | None) -> None:
    seconds = retry_after(httpx.Response(429, headers={"Retry-After": text}))
    assert seconds == low if low == high else low <= seconds <= high


def test_several_captions_a_clip_and_several_clips_at_once(server: str) -> None:
    Server.moods = lambda clip, attempt: "slow"
    rows = rows_of(5, asking(server, count=2, concurrency=3))
    assert all(row.captions == [f"clip {key[1:]}, answer {n} é" for n in (1, 2)] for key, row in rows.items())
    assert Server.busy[1] == 3


@pytest.mark.parametrize(
    ("mood", "words"),
    [
        ("status 401", "answers 401: Sorry, key Bearer ***"),
        ("status 404", "check caption.url and caption.model"),
        ("status 307", "check caption.url"),
        ("status 429 0", "takes no more requests now"),
        ("status 429 86400", "takes no more requests now"),
    ],
)
def test_what_would_fail_for_all_stops_the_work_but_loses_no_answer(mood: str, words: str, server: str) -> None:
    Server.moods = lambda clip, attempt: "slow" if clip == 0 else mood
    rows = caption_clips(map(item, range(20)), asking(server, concurrency=2, retries=1))
    assert next(rows).captions == ["clip 0, answer 1 é"]
    with pytest.raises(UserError) as caught:
        next(rows)
    text = str(caught.value)
    assert text.startswith(f"caption.url={server}: ") and words in text and KEY not in text and text.isprintable()
    assert len(Server.asked) <= 3


def test_wrong_addresses_and_keys_are_named(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://name:word@127.0.0.1:1/v1?token=S"
    for settings, words in [
        (asking(url, retries=0), "caption.url=http://127.0.0.1:1/v1: cannot be reached"),
        (asking("localhost:8000"), "needs an address"),
        (asking("file:///etc/passwd"), "needs an address"),
    ]:
        with pytest.raises(UserError) as caught:
            rows_of(1, settings)
        assert words in str(caught.value) and "word" not in str(caught.value)
    monkeypatch.setenv("CAPTION_TEST_KEY", "two\nlines")
    with pytest.raises(UserError, match="holds no key") as caught:
        rows_of(1, asking(server))
    assert "two" not in str(caught.value)


def test_a_clip_that_cannot_be_decoded_is_named_and_the_others_go_on(server: str) -> None:
    def broken() -> list[bytes]:
        raise BadVideo("is cut off")

    rows = list(caption_clips([item(0, frames=broken), item(1)], asking(server)))
    assert rows[0] == CaptionRow(key="k0", reason="is cut off") and rows[1].captions and not Server.asked.get(0)


def test_few_clips_wait_at_a_time_and_nobody_waits_for_the_rest(server: str) -> None:
    Server.moods = lambda clip, attempt: "ok" if clip < 6 else "hang 4"
    taken = Counter[str]()

    def endless() -> Iterator[CaptionItem]:
        for clip in itertools.count():
            taken["clips"] += 1
            yield item(min(clip, 20))

    rows = caption_clips(endless(), asking(server, concurrency=2))
    assert {next(rows).key for _ in range(6)} == {f"k{clip}" for clip in range(6)}
    assert taken["clips"] <= 6 + 5
    began = time.monotonic()
    rows.close()
    assert time.monotonic() - began < 0.5


# ------------------------------------------------------------------------------------------------------------ command

PROGRAM = """
import json, os, pathlib, resource, subprocess, sys, time
from PIL import Image
mood, folder = sys.argv[1], pathlib.Path(sys.argv[2])
names = sorted(path.name for path in folder.iterdir())
clip = json.loads((folder / "clip.json").read_text())
assert names == ["clip.json", *(f"frame{i:03d}.jpg" for i in range(3))]
red, green, _ = Image.open(folder / "frame002.jpg").convert("RGB").getpixel((0, 0))
first = clip["key"] == "k0"
if mood == "fail; touch hurt" and first:
    sys.exit("Traceback\\nno such model")
elif mood == "silent" and first:
    sys.exit()
elif mood == "bytes" and first:
    sys.stdout.buffer.write(b"\\xff")
elif mood == "die" and first:
    os.kill(os.getpid(), 9)
elif mood.startswith("hang") and first:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    partial = pathlib.Path(mood[5:] + ".partial")
    partial.write_text(f"{os.getpid()} {child.pid} {limits[0] == limits[1]}")
    partial.rename(mood[5:])
    time.sleep(60)
else:
    print(f"\\n{clip['source']} is red {red // 10}\\n  and green {green // 10} é ")
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "caption me.py").write_text(PROGRAM)
    return tmp_path / "caption me.py"


def running(program: Path, mood: str, **changes: object) -> CaptionConfig:
    command = [sys.executable, str(program), mood]
    return CaptionConfig(**{"source": CaptionSource.command, "command": command, "concurrency": 2, **changes})


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("fail; touch hurt", "the command ends with status 1: no such model"),
        ("silent", "the command prints no caption"),
        ("bytes", "the command prints what is not UTF-8"),
        ("die", "the command is killed by signal 9: it says nothing"),
    ],
)
def test_a_program_is_run_for_each_clip(mood: str, reason: str, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(program.parent)
    monkeypatch.setenv("TMPDIR", str(program.parent))
    rows = rows_of(2, running(program, mood))
    assert rows["k0"] == CaptionRow(key="k0", reason=reason)
    assert rows["k1"] == CaptionRow(key="k1", captions=["1.mp4 is red 1", "and green 2 é"])
    assert [path.name for path in program.parent.iterdir()] == [program.name], "something was left behind"


def test_a_program_that_hangs_is_ended_with_all_that_it_started(program: Path, tmp_path: Path) -> None:
    rows = rows_of(2, running(program, f"hang {tmp_path}/pids", timeout_seconds=5.0))
    assert "longer than 5 seconds" in rows["k0"].reason and rows["k1"].captions
    one, other, *_ = (tmp_path / "pids").read_text().split()
    assert wait_until(lambda: not is_alive(int(one)) and not is_alive(int(other)), 5)


def test_a_program_that_is_not_there_is_named() -> None:
    settings = CaptionConfig(source=CaptionSource.command, command=["no-such-program"])
    with pytest.raises(UserError, match=r"caption.command=no-such-program: no such program"):
        rows_of(1, settings)


ASK = """
import resource, sys
from data_tools.caption import CaptionItem, caption_clips
from data_tools.config import CaptionConfig, CaptionSource
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
source, *rest = sys.argv[1:]
which = {"url": rest[0]} if source == "http" else {"command": rest}
settings = CaptionConfig(source=CaptionSource[source], model="some-model", prompt="What is this?",
                         key_env="CAPTION_TEST_KEY", timeout_seconds=60.0, concurrency=1, **which)
pictures = sys.stdin.buffer.read().split(b"---")
list(caption_clips([CaptionItem(key="k0", name="n", location="", frames=lambda: pictures)], settings))
"""


def ask_elsewhere(*arguments: str) -> subprocess.Popen[bytes]:
    job = subprocess.Popen([sys.executable, "-c", ASK, *arguments], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert job.stdin is not None
    job.stdin.write(b"---".join(pictures(0)))
    job.stdin.close()
    return job


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_program_ends_with_those_who_wanted_it(how: signal.Signals, program: Path, tmp_path: Path) -> None:
    job = ask_elsewhere("command", sys.executable, str(program), f"hang {tmp_path}/pids")
    assert wait_until((tmp_path / "pids").exists)
    pid, _, unlimited = (tmp_path / "pids").read_text().split()
    assert is_alive(int(pid)) and unlimited == "True"
    job.send_signal(how)
    job.wait(3)
    assert wait_until(lambda: not is_alive(int(pid)), 3)
    with job.stderr:
        assert (b"KeyboardInterrupt" in job.stderr.read()) == (how == signal.SIGINT)


def test_ctrl_c_waits_for_no_server(server: str) -> None:
    Server.moods = lambda clip, attempt: "hang 8"
    job = ask_elsewhere("http", server)
    assert wait_until(lambda: 0 in Server.asked)
    job.send_signal(signal.SIGINT)
    job.wait(2)
    with job.stderr:
        assert b"KeyboardInterrupt" in job.stderr.read()


# ------------------------------------------------------------------------------------------------------------ sidecar


def beside(folder: Path, files: dict[str, bytes], video: str = "a.b.mp4") -> CaptionRow:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    settings = CaptionConfig(source=CaptionSource.sidecar)
    (row,) = caption_clips([item(0, location=str(folder / video), frames=lambda: [][1])], settings)
    return row


@pytest.mark.parametrize(
    ("files", "captions"),
    [
        ({"a.b.txt": b"\xef\xbb\xbf one \r\n\n two \xc3\xa9"}, ["one", "two é"]),
        ({"a.b.json": b'{"captions": ["one", " ", "two\\nlines"], "x": 1}'}, ["one", "two\nlines"]),
        ({"a.b.json": b'{"caption": "one"}', "a.b.txt": b"not looked at"}, ["one"]),
        ({"a.b.mp4": b"", "a.txt": b"of another"}, []),
    ],
)
def test_captions_beside_the_video(files: dict[str, bytes], captions: list[str], tmp_path: Path) -> None:
    assert beside(tmp_path, files) == CaptionRow(key="k0", captions=captions)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.b.txt": b"\xff"}, ".txt beside the video: is not UTF-8"),
        ({"a.b.json": b'{"captions": "one"'}, ".json beside the video: is not JSON with"),
        ({"a.b.json": b'{"captions": [1]}'}, "is not JSON with"),
        ({"a.b.json": b'{"captions": ["\\ud800"]}'}, "is not JSON with"),
        ({"a.b.json": b"[" * 100_000}, "is not JSON with"),
        ({"a.b.txt": b"x" * (1 << 20) + b"y"}, "is larger than 1048576 bytes"),
    ],
)
def test_what_is_wrong_beside_the_video_is_said(files: dict[str, bytes], words: str, tmp_path: Path) -> None:
    row = beside(tmp_path, files)
    assert row.captions == [] and words in row.reason


def test_nothing_else_is_read_as_a_caption(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.txt").symlink_to("../secret.txt")
    (tmp_path / "v" / "good.txt").write_text("good")
    (tmp_path / "v" / "b.txt").symlink_to("good.txt")
    os.mkfifo(tmp_path / "v" / "c.txt")
    assert "leads out of its folder" in beside(tmp_path / "v", {}, "a.mp4").reason
    assert beside(tmp_path / "v", {}, "b.mp4").captions == ["good"]
    assert "is a pipe" in beside(tmp_path / "v", {}, "c.mp4").reason
    odd = os.fsdecode(b'-\xff\n".mp4')
    assert beside(tmp_path / "v", {odd[:-4] + ".txt": b"odd"}, odd).captions == ["odd"]


def test_captions_beside_a_video_behind_a_url() -> None:
    system = fsspec.filesystem("memory")
    system.pipe_file("/captions/a.txt", b"from afar")
    settings = CaptionConfig(source=CaptionSource.sidecar)
    items = [item(i, location=f"memory://captions/{name}.mp4?v=1"[: -4 * (i < 2)]) for i, name in enumerate("ab")]
    rows = {row.key: row for row in caption_clips(items, settings)}
    assert rows["k0"].captions == ["from afar"] and rows["k1"] == CaptionRow(key="k1")
