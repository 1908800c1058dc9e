"""Captions of clips: from a file beside the video, a program, or an endpoint that speaks OpenAI's chat completions.

sidecar   clip.txt: a caption per line. clip.json: {"captions": ["...", ...]} or {"caption": "..."}
command   PROGRAM ARGUMENT ... FOLDER, where FOLDER holds frame000.jpg, frame001.jpg, ... in order of time, and
          clip.json with the clip's key and the name of its source; it prints a caption per line
http      POST of the prompt and the pictures; each answer is a caption
"""

import base64
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from data_tools import launch
from data_tools.config import CaptionConfig, CaptionSource
from data_tools.locations import is_url, printable, read_small
from data_tools.pool import beat
from sora_lite.data.video import BadVideo
from sora_lite.data.web import Busy, is_busy, persist, retry_after
from sora_lite.errors import UserError

LARGEST = 1 << 20
"""Bytes of an answer, a sidecar or what a program prints that are read at most."""

_OF_THE_CLIP = (400, 413, 415, 422)
"""Statuses that say no to one request. Others below 500 say no to all of them, and stop the work."""


@dataclass(kw_only=True, slots=True)
class CaptionItem:
    """A clip that wants captions."""

    key: str
    name: str
    """Of its source, for people."""
    location: str
    """Of its source, beside which a sidecar lies."""
    frames: Callable[[], list[bytes]]
    """Gives JPEGs in order of time; called once, in the thread that iterates. May raise BadVideo or OSError."""


@dataclass(kw_only=True, slots=True)
class CaptionRow:
    """A clip's captions, or why it has none."""

    key: str
    captions: list[str] = field(default_factory=list)
    reason: str = ""


class _NoCaption(Exception):
    """This clip gets no caption; others may. The message is the reason."""


class _Stopped(Exception):
    """Nobody waits for the answer any more."""


def caption_clips(items: Iterable[CaptionItem], settings: CaptionConfig) -> Iterator[CaptionRow]:
    """Yield captions of each clip as they come, `settings.concurrency` clips at once.

    A clip that fails for good comes with the reason. A clip without a sidecar has no captions, which is no failure.
    Raises UserError for what would fail for every clip: a missing program, a wrong URL or key, no more quota.
    """
    with ExitStack() as end:
        crew = _crew(settings, end)
        for item in items:
            try:
                pictures = [] if settings.source is CaptionSource.sidecar else item.frames()
            except (BadVideo, OSError) as error:
                yield CaptionRow(key=item.key, reason=str(error))
                continue
            crew.give(item, pictures)
            yield from crew.finished(most_open=2 * settings.concurrency)
        yield from crew.finished(most_open=0)


_Ask = Callable[[CaptionItem, list[bytes]], list[str]]


def _crew(settings: CaptionConfig, end: ExitStack) -> "_Crew":
    """Those who ask, and in `end` what lets go of everything at once."""
    stop = threading.Event()
    match settings.source:
        case CaptionSource.sidecar:
            ask: _Ask = _read_sidecar
        case CaptionSource.command:
            ask = command = _Command(settings, stop)
            end.callback(command.kill)
        case CaptionSource.http:
            ask = endpoint = _Endpoint(settings, stop)
            end.callback(endpoint.close)
        case CaptionSource.metadata:
            raise ValueError("captions of the metadata are those of the source's row")
    crew = _Crew(ask, settings.concurrency, stop)
    end.callback(crew.leave)
    return crew


class _Crew:
    """Threads that ask. They are daemons: whoever has enough of it waits for none of them."""

    def __init__(self, ask: _Ask, size: int, stop: threading.Event) -> None:
        self._ask, self._stop = ask, stop
        self._todo: queue.SimpleQueue[tuple[CaptionItem, list[bytes]] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[CaptionRow | BaseException] = queue.SimpleQueue()
        self._open, self._size = 0, size
        for _ in range(size):
            threading.Thread(target=self._work, daemon=True).start()

    def give(self, item: CaptionItem, pictures: list[bytes]) -> None:
        self._open += 1
        self._todo.put((item, pictures))

    def finished(self, most_open: int) -> Iterator[CaptionRow]:
        """What is finished, waiting until no more than so many clips are open. Raises what a thread raised, last."""
        failure: BaseException | None = None
        while self._open:
            try:
                outcome = self._done.get(block=self._open > most_open, timeout=1.0)
            except queue.Empty:
                beat()
                if self._open <= most_open:
                    return
                continue
            beat()
            self._open -= 1
            if isinstance(outcome, CaptionRow):
                yield outcome
            elif failure is None and not isinstance(outcome, _Stopped):
                failure, most_open = outcome, 0  # answers on their way may be paid for; nothing new is asked
                self._stop.set()
        if failure is not None:
            raise failure

    def leave(self) -> None:
        """Nobody waits for an answer any more."""
        self._stop.set()
        for _ in range(self._size):
            self._todo.put(None)

    def _work(self) -> None:
        while (todo := self._todo.get()) is not None:
            item, pictures = todo
            try:
                if self._stop.is_set():
                    raise _Stopped
                self._done.put(CaptionRow(key=item.key, captions=self._ask(item, pictures)))
            except _NoCaption as reason:
                self._done.put(CaptionRow(key=item.key, reason=str(reason)))
            except BaseException as error:  # noqa: BLE001 - raised by the thread that iterates
                self._done.put(error)


# ------------------------------------------------------------------------------------------------------------ sidecar


def _read_sidecar(item: CaptionItem, pictures: list[bytes]) -> list[str]:
    path, mark, query = item.location.partition("?") if is_url(item.location) else (item.location, "", "")
    stem = path[: -len(os.path.splitext(path)[1]) or None]
    for suffix in (".json", ".txt"):
        where = stem + suffix + mark + query
        if is_url(where) or os.path.lexists(where):
            try:
                content = read_small(where, max_bytes=LARGEST)
            except FileNotFoundError:
                continue
            except (BadVideo, OSError) as error:
                raise _NoCaption(f"{suffix} beside the video: {error}") from None
            if not is_url(where) and not _is_beside(where):
                raise _NoCaption(f"{suffix} beside the video: is a link that leads out of its folder")
            return _captions_in(content, suffix)
    return []


def _is_beside(path: str) -> bool:
    folder = os.path.realpath(os.path.dirname(path))
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


def _captions_in(content: bytes, suffix: str) -> list[str]:
    try:
        text = content.decode("utf-8-sig")
        if suffix == ".txt":
            return _lines(text)
        captions = json.loads(text)
        captions = captions.get("captions", captions.get("caption"))
        captions = [captions] if isinstance(captions, str) else captions
        "".join(captions).encode()  # half a surrogate pair could be written nowhere
        return [caption.strip() for caption in captions if caption.strip()]
    except (ValueError, TypeError, AttributeError, RecursionError):
        wanted = "is not UTF-8" if suffix == ".txt" else 'is not JSON with "captions": [texts] or "caption": text'
        raise _NoCaption(f"{suffix} beside the video: {wanted}") from None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


# ------------------------------------------------------------------------------------------------------------ command


class _Command:
    """Runs a program per clip, without a shell."""

    def __init__(self, settings: CaptionConfig, stop: threading.Event) -> None:
        program = shutil.which(settings.command[0])
        if program is None:
            raise UserError(f"caption.command={settings.command[0]}: no such program; mend its name or install it.")
        self.command = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), program, *settings.command[1:]]
        self.seconds = settings.timeout_seconds
        self._stop, self._lock = stop, threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()

    def __call__(self, item: CaptionItem, pictures: list[bytes]) -> list[str]:
        with tempfile.TemporaryDirectory(prefix="caption-", ignore_cleanup_errors=True) as name:
            folder = Path(name) / "clip"
            folder.mkdir()
            for i, picture in enumerate(pictures):
                (folder / f"frame{i:03d}.jpg").write_bytes(picture)
            (folder / "clip.json").write_text(json.dumps({"key": item.key, "source": item.name}))
            printed, said = Path(name) / "stdout", Path(name) / "stderr"
            status = self._run([*self.command, str(folder)], printed, said)
            if status is None:
                raise _NoCaption(f"the command takes longer than {self.seconds:g} seconds (caption.timeout_seconds)")
            if status != 0:
                how = f"ends with status {status}" if status > 0 else f"is killed by signal {-status}"
                raise _NoCaption(f"the command {how}: {_last_line(said)}")
            return self._captions(printed)

    def kill(self) -> None:
        """End everything that runs."""
        with self._lock:
            for process in self._running:
                _kill(process)

    def _run(self, command: list[str], printed: Path, said: Path) -> int | None:
        """Exit status; None if it took too long. What it prints goes to files, so no pipe can be held open."""
        with printed.open("wb") as out, said.open("wb") as err:
            with self._lock:
                if self._stop.is_set():
                    raise _Stopped
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
                self._running.add(process)
            try:
                return process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with self._lock:
                    self._running.discard(process)
                    _kill(process)  # what it left behind, too
                process.wait()
                if self._stop.is_set():
                    raise _Stopped

    def _captions(self, printed: Path) -> list[str]:
        with printed.open("rb") as file:
            content = file.read(LARGEST + 1)
        try:
            captions = _lines(content.decode())
        except ValueError:
            raise _NoCaption("the command prints what is not UTF-8") from None
        if not captions or len(content) > LARGEST:
            raise _NoCaption("the command prints no caption" if not captions else f"prints more than {LARGEST} bytes")
        return captions


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = _lines(file.read().decode(errors="replace"))
    return printable(lines[-1][:300]) if lines else "it says nothing"


# --------------------------------------------------------------------------------------------------------------- http


class _Endpoint:
    """Asks a server that speaks OpenAI's chat completions."""

    def __init__(self, settings: CaptionConfig, stop: threading.Event) -> None:
        self.settings, self._stop = settings, stop
        self.url = _checked(settings.url)
        self.shown = str(self.url.copy_with(userinfo=b"", query=None, fragment=None))
        self._key = os.environ.get(settings.key_env, "").strip() if settings.key_env else ""
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"caption.key_env={settings.key_env}: this variable holds no key; set it to the key alone.")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        timeout = httpx.Timeout(settings.timeout_seconds, connect=min(20.0, settings.timeout_seconds))
        limits = httpx.Limits(max_connections=settings.concurrency)
        self._client = httpx.Client(headers=headers, timeout=timeout, limits=limits)

    def __call__(self, item: CaptionItem, pictures: list[bytes]) -> list[str]:
        content: list[dict[str, Any]] = [{"type": "text", "text": self.settings.prompt}]
        for picture in pictures:
            url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        request = {"model": self.settings.model, "messages": [{"role": "user", "content": content}]}
        body = json.dumps(request).encode()
        # many servers refuse "n" above 1, so every caption is a request of its own
        return [self._ask(body) for _ in range(self.settings.count)]

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _ask(self, body: bytes) -> str:
        def attempt() -> str:
            try:
                return self._post(body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise _Unreachable(self._hidden(str(error) or "no answer")) from None
            except httpx.TimeoutException:
                raise Busy(f"no answer within {self.settings.timeout_seconds:g} seconds") from None
            except httpx.TransportError as error:
                raise Busy(self._hidden(str(error) or type(error).__name__)) from None

        try:
            return persist(attempt, self.settings.retries, self._pause)
        except _Unreachable as error:
            raise UserError(f"caption.url={self.shown}: cannot be reached ({error}); start the server.") from None
        except _Limited as error:
            raise UserError(
                f"caption.url={self.shown}: takes no more requests now ({error}); "
                "wait, or lower caption.concurrency, and call again."
            ) from None
        except Busy as error:
            raise _NoCaption(f"the server: {error}") from None

    def _post(self, body: bytes) -> str:
        """One attempt. Raises Busy if another may help."""
        end = time.monotonic() + self.settings.timeout_seconds
        answer = bytearray()
        with self._client.stream("POST", self.url, content=body) as response:
            for part in response.iter_bytes():
                answer += part
                if len(answer) > LARGEST or time.monotonic() > end:
                    raise Busy("the answer is too long" if len(answer) > LARGEST else "the answer takes too long")
        if response.status_code != 200:
            self._refuse(response, self._hidden(_message_in(bytes(answer)) or response.reason_phrase))
        return _caption_in(bytes(answer))

    def _refuse(self, response: httpx.Response, message: str) -> None:
        status = response.status_code
        reason = f"answers {status}: {message}"
        if status == 429:
            raise _Limited(reason, retry_after(response))
        if is_busy(status):
            raise Busy(reason, retry_after(response))
        if status in _OF_THE_CLIP:
            raise _NoCaption(f"the server {reason}")
        cures = {401: "caption.key_env", 403: "caption.key_env", 404: "caption.url and caption.model"}
        raise UserError(f"caption.url={self.shown}: {reason}; check {cures.get(status, 'caption.url')}.")

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped

    def _hidden(self, text: str) -> str:
        """Another's words on one line, without the key, which some servers repeat."""
        text = " ".join(text.split())
        return printable(text.replace(self._key, "***") if self._key else text)[:300]


class _Limited(Busy):
    """The server wants fewer requests."""


class _Unreachable(Busy):
    """There is no server."""


def _checked(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError("caption.url: needs an address such as http://localhost:8000/v1/chat/completions.")
    return url


def _caption_in(answer: bytes) -> str:
    try:
        message = json.loads(answer)["choices"][0]["message"]
        caption = (message.get("content") or "").strip()
        caption.encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Busy("answers with what is no chat completion") from None
    if not caption:
        raise Busy("answers with an empty caption")
    return caption


def _message_in(answer: bytes) -> str:
    """What a server says of an error: {"error": {"message": ...}}, or as it stands."""
    try:
        content = json.loads(answer)
        error = content.get("error", content)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        return str(message or content)
    except (ValueError, AttributeError, RecursionError):
        return answer[:1000].decode(errors="replace")
