"""What holds for every test: one thread a process, and no way to an account of the person who runs them."""

import os
from pathlib import Path

import pytest

# Before torch is imported anywhere. Two ranks with a thread each are what two cores can carry, and sums do not
# change with the machine's core count.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A W&B key of the person who runs the tests must not send their runs anywhere.
os.environ.pop("WANDB_API_KEY", None)
os.environ["NETRC"] = os.devnull
os.environ["WANDB_SILENT"] = "true"

# Left-overs of a surrounding job would make a test believe that it is one of its ranks.
for name in list(os.environ):
    if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        del os.environ[name]


@pytest.fixture(scope="session")
def checkout() -> Path:
    """Root of the checkout under test."""
    return Path(__file__).resolve().parents[1]
