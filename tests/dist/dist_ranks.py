"""Run a function on several ranks: real processes that talk over gloo.

They are forked from one server process that has imported torch and DeepSpeed once, so a rank is fresh, yet starts in
well under a second.
"""

import gc
import json
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # read when the server imports DeepSpeed
os.environ.setdefault("OMP_NUM_THREADS", "1")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "sora_lite.training.restore",
        "sora_lite.training.engine",
        "deepspeed",
        # What DeepSpeed imports later, when an engine is made: 3 seconds a rank.
        "torch._dynamo",
        "torch._inductor.compile_fx",
        # Adapters: 3 more seconds.
        "peft",
    ]
)


def run_ranks(world_size: int, work: Callable[..., Any], folder: Path, *args: Any, timeout: float = 200) -> list[Any]:
    """`work(rank, *args)` on `world_size` ranks; what each returned (JSON's types), in order of rank."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = [folder / f"result-{os.urandom(4).hex()}-{rank}.json" for rank in range(world_size)]
    processes = [
        _context.Process(target=_rank_main, args=(rank, world_size, port, work, args, results[rank]), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    try:
        # A rank that fails ends the test at once; the others would wait for it until the collective times out.
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            if time.monotonic() > end:
                raise TimeoutError(f"{work.__name__} on {world_size} ranks took more than {timeout} s")
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.is_alive():
                process.join(5 if not any(p.exitcode for p in processes) else 0.5)
            if process.is_alive():
                process.kill()
            process.join()
    answers = [json.loads(path.read_text()) if path.exists() else {"error": "died"} for path in results]
    errors = [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(answers) if "error" in answer]
    assert not errors, "\n".join(errors)
    return [answer["value"] for answer in answers]


def _rank_main(rank: int, world_size: int, port: int, work: Callable[..., Any], args: tuple, result: Path) -> None:
    from sora_lite.parallel.env import init_rank, shutdown

    gc.freeze()  # DeepSpeed collects garbage while it makes an engine; all that was imported need not be looked at
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        answer = {"value": work(init_rank("cpu", threads=1), *args)}
        shutdown()
    except BaseException:
        result.write_text(json.dumps({"error": traceback.format_exc()}))
        raise
    result.write_text(json.dumps(answer))
