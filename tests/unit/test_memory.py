"""Memory that is kept is not fetched from the kernel again."""

import platform
import subprocess
import sys

import pytest

LIBRARY, VERSION = platform.libc_ver()
KEEPS = LIBRARY == "glibc" and tuple(map(int, VERSION.split("."))) >= (2, 35)
WORK = """
import resource, torch
{before}
for turn in range(10):  # at first it must be fetched
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(16 * 2**20).add_(1)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


@pytest.mark.skipif(not KEEPS, reason="another C library, or one that always maps as much")
@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ("", False),
        ("from sora_lite.memory import keep_memory; keep_memory()", True),
        ("from sora_lite.parallel.env import init_rank; init_rank('cpu')", True),
    ],
    ids=["nothing", "keep_memory", "training"],
)
def test_pages_fetched_by_the_same_work_again(before: str, kept: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORK.format(before=before)], capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 16) is kept
