"""The login node of the testbed, as the tests of this folder see it."""

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
