import json
import resource
from pathlib import Path

import pytest
import torch

from sora_lite.config import LoggingConfig, WandbMode
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.parallel.env import Rank
from sora_lite.training.metrics import Means, count_flops, peak_flops
from sora_lite.training.tracking import Tracker

ALONE = Rank(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), backend="gloo", launcher="single")


def track(run: Path, resume_step: int, mode: WandbMode = WandbMode.disabled) -> Tracker:
    return Tracker(run, LoggingConfig(wandb=mode), resume_step=resume_step, wandb_id=None, config={})


def test_a_resumed_record_drops_what_comes_again(tmp_path: Path) -> None:
    first = track(tmp_path, 0)
    for step in range(1, 6):
        first.log(step, {"loss": 1 / step})
    first.finish()
    with (tmp_path / RECORD).open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [line["step"] for line in read_record(tmp_path / RECORD)] == [1, 2, 3, 4, 5]
    second = track(tmp_path, 3)
    second.log(4, {"loss": 0.5})
    second.finish()
    lines = [json.loads(line) for line in (tmp_path / RECORD).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] == 0.5


def test_lines_that_a_disk_does_not_take_come_when_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker = track(tmp_path, 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))  # in the middle of a line
        for step in range(1, 20):
            tracker.log(step, {"loss": 1 / step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert 0 < len(read_record(tmp_path / RECORD)) < 5
    tracker.log(20, {"loss": 0.0})
    tracker.finish()
    assert [line["step"] for line in read_record(tmp_path / RECORD)] == list(range(1, 21))
    assert capsys.readouterr().out.count("cannot be written (File too large)") == 1


def test_wandb_is_offline_without_a_key(tmp_path: Path) -> None:
    tracker = track(tmp_path, 0, WandbMode.auto)
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    assert tracker.wandb_id
    assert [path for path in (tmp_path / "wandb").glob("offline-run-*") if path.name.endswith(tracker.wandb_id)]


def test_means_are_weighted_and_ignore_empty_ones() -> None:
    means = Means(ALONE)
    means.add("a", 1.0)
    means.add("a", torch.tensor(4.0), 2.0)
    means.add("nothing", torch.tensor(float("nan")), torch.tensor(0.0))
    assert means.read() == {"a": 3.0}
    assert means.read() == {}


def test_flops_of_a_product_and_of_attention() -> None:
    with torch.device("meta"):
        a, b, q = torch.empty(3, 5), torch.empty(5, 7), torch.empty(2, 4, 6, 8)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    # scores and weighted sum: two products of 6 x 6 x 8 for each of 8 heads
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 8 * 2 * 6 * 6 * 8
    assert peak_flops(torch.device("cpu"), 3.0) == 3e12
    assert peak_flops(torch.device("cpu"), None) > 1e9
