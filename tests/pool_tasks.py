"""What the workers of tests/unit/test_pool.py do; they import it by name."""

import ctypes
import os
import signal
import time
from typing import Any

from data_tools.pool import beat
from sora_lite.errors import UserError


def work(task: dict[str, Any]) -> list[dict[str, Any]]:
    match task["do"]:
        case "square":
            return [{"n": task["n"] ** 2, "pid": os.getpid()}]
        case "crash":
            ctypes.string_at(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "hang":
            time.sleep(60)
        case "slowly":
            for _ in range(30):
                time.sleep(0.1)
                beat()
        case "raise":
            raise ValueError("of this\nkind")
        case "wrong":
            raise UserError("key: wrong")
        case "eat":
            return [{"n": len(bytearray(2**30))}]
        case "wait":
            time.sleep(0.3)
    return [{"n": -1}]
