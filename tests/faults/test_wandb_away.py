"""W&B's server refuses, knows no such key, or never answers: no step is lost, and the run ends well."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from real_runs import Ranks
from test_faults import STEPS, losses, settings
from tiny_inputs import Tiny

from sora_lite.training import tracking

pytestmark = pytest.mark.dist


@contextmanager
def refusing() -> Iterator[int]:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


@contextmanager
def answering(status: int, seconds: float = 0.0) -> Iterator[int]:
    """A server that answers everything with an error, after a while."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            time.sleep(seconds)
            self.send_error(status)

        do_GET = do_POST

        def log_message(self, *args: object) -> None:
            asked.append(self.path)

    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
        assert asked, "W&B was never asked"


@contextmanager
def silent() -> Iterator[int]:
    """A server that takes connections and never answers."""
    taken: list[socket.socket] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def accept() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        assert taken, "W&B was never asked"
    for one in taken:
        one.close()


def with_server(rank: int, port: int) -> None:
    tracking.PATIENCE_SECONDS = 20.0  # the test need not wait as long as a run would
    os.environ.update(WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY="0" * 40)


def test_training_neither_waits_nor_stops(tmp_path: Path, tiny: Tiny) -> None:
    """All at once, since most of the time is W&B's own waiting at the end of a run."""
    servers = {"refuses": refusing(), "key": answering(401), "busy": answering(503, 2.0), "silent": silent()}
    with contextlib.ExitStack() as stack:
        runs = {}
        for name, server in servers.items():
            argv = settings(tiny, tmp_path / name, "logging.wandb=online")
            runs[name] = Ranks(tmp_path / f"ranks-{name}", 1, argv, with_server, stack.enter_context(server))
        for name, ranks in runs.items():
            assert ranks.end(100) == [0], ranks.log
            assert list(losses(tmp_path / name)) == list(range(1, STEPS + 1))
            assert "W&B is not to be had" in ranks.log
            assert "trained to step 12" in ranks.log
            (view,) = (tmp_path / name / "run/wandb").glob("offline-run-*/run-*.wandb")
            assert view.stat().st_size > 100 * STEPS, "what the server did not take is kept"
