"""What jobs ask Slurm for."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class QueueConfig:
    """What every job asks Slurm for. Null leaves the site's default."""

    partition: str | None = None
    """Partition of the cluster."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    memory: str | None = None
    """Memory per node, such as 200G."""
    time: str = "24:00:00"
    """Time limit, as Slurm writes it."""
    constraint: str | None = None
    """Node features, such as h100."""
    python: str | None = None
    """Python interpreter on the nodes; null uses the one that submits (a shared file system)."""


@dataclass(kw_only=True, slots=True)
class SlurmConfig(QueueConfig):
    """What `sora-lite submit` asks Slurm for."""

    nodes: int = 1
    """Number of nodes."""
    tasks_per_node: int = 1
    """Processes per node: one per GPU."""
    gpus_per_node: int = 0
    """GPUs per node; 0 for CPU nodes."""
    cpus_per_task: int = 1
    """Cores per process; count the decoding workers in."""
