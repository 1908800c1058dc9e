"""A real Slurm cluster of two nodes for the tests of this folder; see testbed.sh."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from testbed import Cluster

TESTBED = Path(__file__).with_name("testbed.sh")
CANNOT_RUN = 77  # exit status of testbed.sh where no Slurm can run
_why_not: list[str] = []


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes that all tests share."""
    with running_cluster() as shared:
        yield shared


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """Two idle nodes that one test may break."""
    with running_cluster() as own:
        yield own


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Nodes that live in namespaces of their own and die when the testbed's standard input closes, which the kernel
    sees to even if this process is killed."""
    if sys.platform != "linux" or shutil.which("bash") is None:
        _skip("it needs Linux with bash")
    testbed = subprocess.Popen(
        ["bash", TESTBED, "2", "bash", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that Ctrl-C leaves it to the clean-up below
    )
    assert testbed.stdin and testbed.stdout and testbed.stderr
    try:
        if testbed.stdout.readline() != "ready\n":
            complaint = testbed.stderr.read().strip()
            if testbed.wait(timeout=10) == CANNOT_RUN:
                _skip(complaint)
            pytest.fail(f"the testbed did not start: {complaint}")
        # `unshare` waits outside for its one child, the init of the cluster.
        children = Path(f"/proc/{testbed.pid}/task/{testbed.pid}/children").read_text().split()
        yield Cluster(int(children[0]))
    finally:
        testbed.stdin.close()
        try:
            testbed.wait(timeout=10)
        except subprocess.TimeoutExpired:
            testbed.kill()
            testbed.wait()
        testbed.stdout.close()
        testbed.stderr.close()


def _skip(reason: str) -> None:
    _why_not.append(reason)
    pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud that Slurm was not tested: a skip alone is one letter in a row of dots."""
    if _why_not:
        terminalreporter.section("SLURM WAS NOT TESTED", red=True)
        terminalreporter.line(_why_not[0])
        terminalreporter.line("Run `make test-slurm` as root on Debian.")
