"""The login node of the testbed, as the tests of this folder see it."""

import os
import signal
import subprocess
import time
from pathlib import Path


class Cluster:
    """The login node of a running testbed.

    Args:
        process_id: any process in the cluster's namespaces, as seen from outside.
    """

    def __init__(self, process_id: int) -> None:
        self.process_id = process_id

    def run(self, argv: list[str], *, cwd: Path, check: bool = True) -> str:
        """Run a command on the login node and return its standard output; `check` makes a failure an error."""
        enter = ["nsenter", "--all", f"--target={self.process_id}", "env", f"--chdir={cwd}"]
        done = subprocess.run([*enter, *argv], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
        assert not check or done.returncode == 0, f"{argv} failed with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, argv: list[str], *, cwd: Path, log: Path) -> subprocess.Popen:
        """Begin a command on the login node; what it prints goes to a file."""
        enter = ["nsenter", "--all", f"--target={self.process_id}", "env", f"--chdir={cwd}"]
        with log.open("w") as file:
            return subprocess.Popen([*enter, *argv], stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def interrupt(self, process: subprocess.Popen) -> int:
        """Press Ctrl-C on a command of `start`; return its exit status."""
        # `nsenter` waits outside for its one child, the command.
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGINT)
        return process.wait(timeout=20)

    def power_off(self, node: str) -> None:
        """End everything on a node at once, and tell Slurm, which else would notice only after minutes."""
        self.run(["bash", "-c", f"kill -KILL $(cat /etc/slurm/run/{node}.pid)"], cwd=Path("/"))
        self.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=off"], cwd=Path("/"))

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows about a job, by the field names of `scontrol show job`."""
        text = self.run(["scontrol", "--oneliner", "show", "job", job_id], cwd=Path("/"))
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait(self, job_id: str, log: Path, *, seconds: float) -> None:
        """Wait until a job has completed; fail with the end of its log if it ends otherwise or takes longer."""
        deadline = time.monotonic() + seconds
        while (state := self.job(job_id)["JobState"]) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            if time.monotonic() > deadline:
                self.run(["scancel", job_id], cwd=Path("/"))
                break
            time.sleep(0.3)
        tail = log.read_text()[-4000:] if log.exists() else "(no log)"
        assert state == "COMPLETED", f"job {job_id} is {state} after at most {seconds} s; its log ends:\n{tail}"
