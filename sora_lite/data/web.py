"""HTTP as data needs it: asked again when the other side wants patience or falls silent, never when it says no."""

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import IO, TypeVar

import httpx

from sora_lite.data.video import BadVideo

Answer = TypeVar("Answer")

LONGEST_WAIT = 600.0
"""Seconds. A server that asks for more patience than this is not waited for."""
SLOWEST = 1 << 20
"""Bytes that must come within the time-out of a stream; less is a stall, however steadily it drips."""


class Busy(Exception):
    """Worth another try. The message is the reason; seconds: how long the server asks to wait, if it does."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


def persist(ask: Callable[[], Answer], retries: int, pause: Callable[[float], object]) -> Answer:
    """The answer of `ask`, which is called up to 1 + retries times while it raises Busy; the last Busy is raised on.

    Between two tries passes what the server asks for, or about 1, 2, 4 ... up to 60 seconds, each time a different
    part of it, so that many who were sent away do not return at once.
    """
    for attempt in range(retries):
        try:
            return ask()
        except Busy as busy:
            pause(pause_seconds(busy, attempt))
    return ask()


def pause_seconds(busy: Busy, attempt: int) -> float:
    """How long to wait after the try number `attempt`, from 0; raises `busy` where that is asking too much."""
    if busy.seconds is None:
        least = min(60.0, 2.0**attempt) / 2
        return least + random.uniform(0, least)
    if busy.seconds > LONGEST_WAIT:
        raise busy
    return busy.seconds * random.uniform(1, 1.1)


def is_busy(status: int) -> bool:
    """Whether a status speaks of the server's moment, not of the request."""
    return status in (408, 425, 429) or status >= 500


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the header Retry-After asks for; None if it is absent or unreadable."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d*)?", text):
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def download(url: str, file: IO[bytes], max_bytes: int, beat: Callable[[], None]) -> None:
    """Write what the URL gives into an open file. Raises OSError if it cannot be had, BadVideo beyond max_bytes.

    beat: called for every part that arrives, and while waiting for another try.
    """

    def attempt() -> None:
        file.seek(0)
        file.truncate()
        with _client().stream("GET", url, headers={"Accept-Encoding": "identity"}) as response:
            _check(response)
            for part in response.iter_raw(1 << 20):
                beat()
                file.write(part)
                if file.tell() > max_bytes:
                    raise BadVideo(f"is larger than {max_bytes} bytes")

    _persist(attempt, beat)


def stream(url: str, start: int, timeout: float) -> Iterator[bytes]:
    """What a URL gives from byte `start` on, in parts as they come. One try.

    timeout: seconds of silence, and seconds in which SLOWEST bytes must come.
    Raises Busy where another try is worth it, OSError where it is not.
    """
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with _client().stream("GET", url, headers=headers, timeout=timeout) as response:
            if response.status_code == 416:
                raise Busy(f"the server has no bytes after the first {start}")
            _check(response)
            skip = 0 if response.headers.get("Content-Range", "").startswith(f"bytes {start}-") else start
            arrived, mark = 0, time.monotonic()
            for part in response.iter_raw():
                arrived += len(part)
                if arrived >= SLOWEST:
                    arrived, mark = 0, time.monotonic()
                elif time.monotonic() - mark > timeout:
                    raise Busy(f"the server sent {arrived} bytes in {timeout:g} seconds")
                if rest := part[skip:]:
                    yield rest
                skip = max(0, skip - len(part))
    except httpx.TransportError as error:
        raise Busy(str(error) or type(error).__name__) from None
    except (httpx.InvalidURL, httpx.TooManyRedirects) as error:
        raise OSError(str(error)) from None


def version_of(url: str, beat: Callable[[], None]) -> str:
    """Size and ETag (or date) that the server names for a URL: another version, another text. Raises OSError."""

    def attempt() -> str:
        response = _client().head(url)
        if response.status_code >= 400:  # signed URLs allow GET alone
            with _client().stream("GET", url, headers={"Accept-Encoding": "identity"}) as response:
                _check(response)
        headers = response.headers
        return f"{headers.get('Content-Length')}-{headers.get('ETag') or headers.get('Last-Modified')}"

    return _persist(attempt, beat)


def _persist(attempt: Callable[[], Answer], beat: Callable[[], None]) -> Answer:
    """`persist` with what a network does wrong as Busy at first, and as OSError in the end."""

    def pause(seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            beat()
            time.sleep(min(1.0, left))

    def ask() -> Answer:
        beat()
        try:
            return attempt()
        except httpx.TransportError as error:
            raise Busy(str(error) or type(error).__name__) from None

    try:
        return persist(ask, retries=4, pause=pause)
    except (Busy, httpx.InvalidURL, httpx.TooManyRedirects) as error:
        raise OSError(str(error)) from None


def _check(response: httpx.Response) -> None:
    status = response.status_code
    if status < 400:
        return
    reason = f"the server answers {status} {response.reason_phrase}".strip()
    if is_busy(status):
        raise Busy(reason, retry_after(response))
    raise FileNotFoundError(reason) if status in (404, 410) else OSError(reason)


def _client() -> httpx.Client:
    return _client_of(os.getpid())


@cache
def _client_of(process: int) -> httpx.Client:
    """The client of one process: its connections must not be shared with those that are forked from it.

    Below the time after which a worker counts as stalled, but no limit to how long a download takes in all.
    """
    return httpx.Client(timeout=httpx.Timeout(30.0), follow_redirects=True)
