"""A web server of a folder that does wrong what servers do wrong, each as often as it is told."""

import contextlib
import http.server
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


class BadServer(http.server.ThreadingHTTPServer):
    """Serves FOLDER at `url`. faults: name -> what goes wrong with its next answers, one after another.

    500, drop (breaks off in the middle), stall (falls silent in the middle), wrong (a flipped byte), long (never ends).
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.every_fault: list[str] = []
        """What goes wrong with the next answers for whatever file."""
        self.asked: Counter[str] = Counter()
        self.sent = 0
        self.ranges = True
        self.closing = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self, name: str) -> str:
        with self.lock:
            self.asked[name] += 1
            for planned in (self.faults.get(name), self.every_fault):
                if planned:
                    return planned.pop(0)
            return ""

    def handle_error(self, *_: object) -> None:
        pass  # those who were cut off complain


class _Handler(http.server.BaseHTTPRequestHandler):
    server: BadServer

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        fault, path = self.server.next_fault(name), self.server.folder / name
        if fault == "500":
            self.send_error(500)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        whole, start = len(content), 0
        if self.server.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            content = content[start:]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        else:
            self.send_response(200)
        if fault == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault != "long":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.send(content[: len(content) // 2])
        if fault == "stall":
            self.server.closing.wait(60)
        if fault in ("stall", "drop"):
            return
        self.send(content[len(content) // 2 :])
        while fault == "long" and not self.server.closing.is_set():
            self.send(content)

    def send(self, part: bytes) -> None:
        self.wfile.write(part)
        self.wfile.flush()
        self.server.sent += len(part)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[BadServer]:
    """A server in a thread of this process."""
    with BadServer(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
