"""`launch.py PARENT PROGRAM ARGUMENT ...` becomes PROGRAM, which then dies with the process PARENT that started it.

A worker may be killed at any time, and then nobody is left to end what it started. A worker's limit of memory, on the
other hand, is meant for decoding, and is lifted for the program. It is run as a file of its own: in a process with
threads, nothing but a new program is safe between fork and exec.
"""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Arrange what the module says, and become the program."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that wanted this is gone")
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
