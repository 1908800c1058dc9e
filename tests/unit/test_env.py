"""Rank and meeting point from torchrun's variables, from Slurm's, and from nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sora_lite.errors import UserError
from sora_lite.parallel.env import find_place, init_rank, shutdown

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8",  # of the job; the step has fewer
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_NODELIST": "gpu[01-09]",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the one command of Slurm that is asked."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu[03-04]" ] || exit 1\necho gpu03\necho gpu04\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_torchrun() -> None:
    place = find_place({**TORCHRUN, **SLURM})  # torchrun under srun: torchrun knows better
    assert (place.rank, place.world_size, place.local_rank, place.launcher) == (3, 4, 1, "torchrun")
    assert (place.master_addr, place.master_port) == ("node1", 29500)


def test_slurm(scontrol: None) -> None:
    place = find_place(SLURM)
    assert (place.rank, place.world_size, place.local_rank, place.launcher) == (2, 4, 0, "slurm")
    assert place.master_addr == "gpu03"
    assert find_place({**SLURM, "MASTER_ADDR": "ib-gpu03", "MASTER_PORT": "4000"}).master_addr == "ib-gpu03"
    assert find_place({**SLURM, "MASTER_PORT": "4000"}).master_port == 4000


def test_slurm_ports_differ_between_jobs_and_steps(scontrol: None) -> None:
    ids = [(job, step) for job in ("123456", "123457", "133456", "223456") for step in ("0", "1")]
    ports = [find_place({**SLURM, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).master_port for job, step in ids]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 32768 for port in ports)


def test_no_launcher() -> None:
    assert find_place({}).launcher == "single"
    batch_script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    place = find_place({**batch_script, "SLURM_PROCID": "0"})  # python in the batch script itself, without srun
    assert (place.rank, place.world_size, place.launcher) == (0, 1, "single")


def test_incomplete_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="LOCAL_RANK is not set"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"):
        find_place({**TORCHRUN, "WORLD_SIZE": "two"})
    with pytest.raises(UserError, match="rank 3 of 2 processes"):
        find_place({**TORCHRUN, "WORLD_SIZE": "2"})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        find_place(SLURM)


def test_one_process_alone() -> None:
    before = dict(os.environ)
    rank = init_rank("cpu")
    try:
        assert (rank.rank, rank.world_size, rank.is_main, rank.device.type) == (0, 1, True, "cpu")
        assert rank.gather({"a": [1, "ä"]}) == [{"a": [1, "ä"]}]
        assert rank.mean(torch.tensor([2.0])).tolist() == [2.0]
        assert rank.together(lambda: 5) == 5 and rank.main_first(lambda: 6) == 6
        rank.barrier()
        with pytest.raises(RuntimeError, match="already joined"):
            init_rank("cpu")
    finally:
        shutdown()
    shutdown()  # nothing to leave: no harm
    assert dict(os.environ) == before
    with pytest.raises(UserError, match="unknown"):
        init_rank("tpu")


@pytest.mark.dist
def test_no_contact_is_one_clear_line() -> None:
    """A port that something else holds."""
    code = (
        "import socket, os\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "os.environ.update(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1',"
        " MASTER_PORT=str(s.getsockname()[1]))\n"
        "from sora_lite.errors import UserError\n"
        "from sora_lite.parallel.env import init_rank\n"
        "try:\n    init_rank('cpu')\n"
        "except UserError as error:\n    print('UserError:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "rank 0 of 2 cannot meet the others at 127.0.0.1:" in done.stdout
    assert "MASTER_PORT" in done.stdout
