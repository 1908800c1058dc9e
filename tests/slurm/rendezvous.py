"""One task of a job: find the others, add up, say who it is. Run by test_cluster.py through the real batch script."""

import json
import os
import socket
import sys
from pathlib import Path

import torch

from sora_lite.parallel.env import init_rank, shutdown

rank = init_rank("cpu")
total = rank.sum(torch.tensor([2.0**rank.rank]))  # a sum that tells which ranks took part
facts = {
    "rank": rank.rank,
    "world_size": rank.world_size,
    "local_rank": rank.local_rank,
    "launcher": rank.launcher,
    "host": socket.gethostname(),
    "master": os.environ["MASTER_ADDR"],
    "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    "threads": os.environ["OMP_NUM_THREADS"],
    "total": total.item(),
}
(Path(sys.argv[1]) / f"{rank.rank}.json").write_text(json.dumps(facts))
shutdown()
