"""Who am I among the processes of this job, and how do they find each other.

One process per GPU (or per CPU rank). Three ways lead here, tried in this order:

- `torchrun`: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set;
- plain Slurm, `srun python ...`: the step's own variables; the first host of the step is the meeting point;
- neither: one process alone, which needs no network at all.

`init_rank` makes the process group and sets the five variables above, because DeepSpeed looks for them even where a
process group already exists.
"""

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sora_lite.errors import UserError
from sora_lite.memory import keep_memory

# Below Linux's range of ephemeral ports (32768 and up), so that no outgoing connection sits on the meeting point.
FIRST_PORT = 10_000
PORTS = 19_997  # a prime: job ids that differ by a round number get different ports

Result = TypeVar("Result")


@dataclass(kw_only=True, frozen=True, slots=True)
class Place:
    """What the environment says about this process, before any process group exists.

    `rank` counts over all processes of the job, `local_rank` over those of this node.
    `launcher` is "torchrun", "slurm" or "single".
    """

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    launcher: str

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(
                f"{self.launcher} says rank {self.rank} of {self.world_size} processes: "
                "start all processes by one launcher, with none of its variables set by hand"
            )


@dataclass(kw_only=True, frozen=True, slots=True)
class Rank:
    """This process in its job, once the process group exists. Every method is a collective: all ranks must call it."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    launcher: str

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that logs and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the ranks, element by element, as a new tensor of the same shape on the same device."""
        return self.sum(values) / self.world_size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, element by element, as a new tensor of the same shape on the same device."""
        total = values.detach().to(self.device, copy=True)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.to(values.device)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in order of rank, on every rank. It travels as JSON, so it is made of JSON's types."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        if self.world_size == 1:
            return [json.loads(data.cpu().numpy().tobytes())]
        size = torch.tensor([data.numel()], device=self.device)
        sizes = [torch.zeros_like(size) for _ in range(self.world_size)]
        dist.all_gather(sizes, size)
        lengths = [int(one) for one in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return [json.loads(part[:n].cpu().numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]

    def together(self, work: Callable[[], Result]) -> Result:
        """Do `work` (which holds no collective) on this rank, wait for the others, and return its result.

        Raises:
            Exception: on every rank if `work` failed on any, so that none goes on alone: there the error itself,
                elsewhere a UserError or RuntimeError that tells of it.
        """
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - raised again below, after the others know
            failure = error
        told = failure and [isinstance(failure, UserError), type(failure).__name__, str(failure)]
        failed = [(rank, one) for rank, one in enumerate(self.gather(told)) if one is not None]
        if failure is not None:
            raise failure
        for rank, (mendable, kind, message) in failed:
            raise UserError(message) if mendable else RuntimeError(f"rank {rank} failed: {kind}: {message}")
        return result

    def main_first(self, work: Callable[[], Result], *, patience: float = 30.0) -> Result:
        """Do `work` (which holds no collective) on rank 0, then on the others, and return each rank's result.

        What rank 0 does may take longer than a process group lets its members wait: they meet every `patience` seconds.
        Raises as `together` does.
        """
        if self.world_size == 1:
            return work()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(work) if self.is_main else None
            while not self.gather(first is None or bool(wait([first], patience).done))[0]:
                pass
        self.together(lambda: first.result() if first else None)
        return self.together(lambda: first.result() if first else work())


def _integer(environment: Mapping[str, str], name: str) -> int:
    """A whole number from the environment."""
    value = environment.get(name)
    if value is None or not value.isdecimal():
        shown = "not set" if value is None else f"{value!r}, not a whole number"
        raise UserError(f"environment variable {name} is {shown}: start the processes by torchrun or srun")
    return int(value)


def _slurm_port(environment: Mapping[str, str]) -> int:
    """A port that all tasks of a step agree on and that other jobs on the node are unlikely to share."""
    # The whole id counts, not its last digits: ids of one day differ in a few digits, and steps run side by side.
    job, step = _integer(environment, "SLURM_JOB_ID"), _integer(environment, "SLURM_STEP_ID")
    return FIRST_PORT + (job + 7919 * step) % PORTS


def _first_host(nodes: str) -> str:
    """First host name of a Slurm node list such as `gpu[01-03,07]`."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"cannot expand Slurm's node list {nodes!r} ({error}): "
            "make `scontrol` reachable on the nodes, or set MASTER_ADDR to the first node's name"
        ) from error
    return done.stdout.split()[0]


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Read rank, world size and meeting point from `environment`; makes no connection.

    Inside Slurm the variables of the *step* count: a batch script that starts Python without `srun` is one process,
    whatever the job asked for. MASTER_ADDR and MASTER_PORT, where set, override the meeting point.

    Raises UserError where the variables are incomplete.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Place(
            rank=_integer(environment, "RANK"),
            world_size=_integer(environment, "WORLD_SIZE"),
            local_rank=_integer(environment, "LOCAL_RANK"),
            master_addr=environment.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_integer(environment, "MASTER_PORT"),
            launcher="torchrun",
        )
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        return Place(
            rank=_integer(environment, "SLURM_PROCID"),
            world_size=_integer(environment, tasks),
            local_rank=_integer(environment, "SLURM_LOCALID"),
            master_addr=environment.get("MASTER_ADDR") or _first_host(nodes),
            master_port=(
                _integer(environment, "MASTER_PORT") if "MASTER_PORT" in environment else _slurm_port(environment)
            ),
            launcher="slurm",
        )
    return Place(rank=0, world_size=1, local_rank=0, master_addr="127.0.0.1", master_port=FIRST_PORT, launcher="single")


def init_rank(device: str = "auto", threads: int | None = None) -> Rank:
    """Join the process group of this job.

    Args:
        device: "auto" (this process's GPU if there is one, else the CPU), "cpu" or "cuda".
        threads: CPU threads for torch in this process; None leaves torch's own choice.

    Raises:
        UserError: incomplete variables, no GPU where one was asked for, or no contact with the other processes.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} is unknown: use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU: check the driver, or use device auto")
    if dist.is_initialized():
        raise RuntimeError("this process has already joined a process group: call shutdown() first")
    place = find_place()
    if threads is not None:
        torch.set_num_threads(threads)
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda and place.launcher == "torchrun" and place.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"{place.local_rank + 1} or more processes on a machine with {torch.cuda.device_count()} GPUs: start one "
            "per GPU, or hide the GPUs by CUDA_VISIBLE_DEVICES= to train on CPUs"
        )
    # Where Slurm shows each task its own GPU alone, every task's GPU has index 0.
    index = place.local_rank % torch.cuda.device_count() if use_cuda else place.local_rank
    if use_cuda:
        torch.cuda.set_device(index)
    else:
        keep_memory()  # a step on the CPU needs as much as the one before
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(index),
        MASTER_ADDR=place.master_addr,
        MASTER_PORT=str(place.master_port),
    )
    backend = "nccl" if use_cuda else "gloo"
    _connect(place, backend)
    return Rank(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        device=torch.device("cuda", index) if use_cuda else torch.device("cpu"),
        backend=backend,
        launcher=place.launcher,
    )


def local_device() -> torch.device:
    """Where a single process computes: its GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _connect(place: Place, backend: str) -> None:
    """Make the default process group."""
    if place.world_size == 1:
        # A store in memory: no port that could be taken, no host name that must resolve.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        dist.init_process_group(backend, init_method="env://", rank=place.rank, world_size=place.world_size)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {place.rank} of {place.world_size} cannot meet the others at "
            f"{place.master_addr}:{place.master_port} ({reason}): check that all processes run and that the "
            "port is free and open between the nodes, or choose another by MASTER_PORT"
        ) from error


def shutdown() -> None:
    """Leave the process group, if there is one, and forget the variables that `init_rank` set for a single process."""
    if dist.is_initialized():
        alone = dist.get_world_size() == 1
        dist.destroy_process_group()
        if alone:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name, None)
