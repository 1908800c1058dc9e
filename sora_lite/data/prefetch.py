"""Remote shards that come next in the order, fetched into the cache before a worker asks for them."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import ForkProcess

from sora_lite.data.remote import ReadCounts
from sora_lite.data.shard_cache import RemoteShard, ShardCache
from sora_lite.data.workers import begin, end
from sora_lite.errors import UserError

STREAMS = 4
"""Shards that are fetched at a time."""
_FORK = multiprocessing.get_context("fork")


class Prefetcher:
    """A process that walks the order ahead of training, and holds in the cache what it has found until it is used.

    It looks as far ahead as half of the cache lasts. Nothing depends on it: what it has not brought (or could not), a
    worker fetches itself, and says why if it cannot. If it dies it is started anew.

    Args:
        cache: where shards are kept.
        shards_of: the remote shards that a step reads here.
    """

    def __init__(self, cache: ShardCache, shards_of: Callable[[int], list[RemoteShard]]) -> None:
        self._cache, self._shards_of = cache, shards_of
        self._position = _FORK.RawValue("q", 0)
        self._counts = _FORK.RawArray("q", 2)
        self._process: ForkProcess | None = None

    @contextmanager
    def running(self, start: int, stop: int) -> Iterator[None]:
        """Work on the steps start, ..., stop - 1 meanwhile."""
        self._position.value = start
        self._stop = stop
        try:
            self.go_on(start)
            yield
        finally:
            if self._process is not None:
                end(self._process)
                self._process = None

    def go_on(self, step: int) -> bool:
        """Tell that training is at a step. Returns whether the process had died and was started anew."""
        self._position.value = step
        if self._process is not None and self._process.is_alive():
            return False
        died = self._process is not None and self._process.exitcode != 0
        if died or self._process is None:
            self._process = begin(self._walk, os.getpid())
        return died

    def take(self) -> ReadCounts:
        """What fetching cost since this was last asked."""
        fetched, retries = self._counts
        self._counts[0] -= fetched
        self._counts[1] -= retries
        return ReadCounts(bytes_fetched=fetched, io_retries=retries)

    def _walk(self, parent: int) -> None:
        budget = self._cache.limit_bytes // 2
        held: dict[RemoteShard, int | None] = {}
        needed: dict[RemoteShard, int] = {}  # the last step seen to read it
        step = self._position.value
        with ThreadPoolExecutor(STREAMS) as pool:
            while step < self._stop and os.getppid() == parent:
                for shard in [one for one, last in needed.items() if last < self._position.value]:
                    del needed[shard]
                    if (descriptor := held.pop(shard)) is not None:
                        os.close(descriptor)
                step = max(step, self._position.value)
                shards = self._shards_of(step)
                missing = [shard for shard in shards if held.get(shard) is None]
                room = budget - sum(shard.size for shard in held)
                if step > self._position.value and sum(shard.size for shard in missing) > room:
                    time.sleep(0.1)
                    continue
                try:
                    held |= dict(zip(missing, pool.map(self._hold, missing), strict=True))
                except UserError:
                    return  # the worker that needs it says so
                needed |= dict.fromkeys(shards, step)
                step += 1
            while self._position.value < self._stop and os.getppid() == parent:
                time.sleep(0.5)  # what is held stays until the last step

    def _hold(self, shard: RemoteShard) -> int | None:
        """A descriptor of a shard in the cache; None if there is no room."""
        counts = ReadCounts()
        try:
            return self._cache.hold(*shard, counts, force=False)
        finally:
            self._counts[0] += counts.bytes_fetched
            self._counts[1] += counts.io_retries
