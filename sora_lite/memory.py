"""How a process keeps its memory."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_memory() -> None:
    """Let the C library reuse what is freed, where it would give it back.

    What the same work needs again and again, such as a clip or what a layer keeps for the backward pass, would be
    mapped anew and zeroed by the kernel each time. The price: a process stays as large as it ever was, and a little
    larger where sizes change.
    """
    with contextlib.suppress(AttributeError):  # another C library than glibc
        libc = ctypes.CDLL(None)
        # Before version 2.35 it knows no more than 32 MiB.
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30) or libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
