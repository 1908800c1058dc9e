"""What a record says of the training itself: alike for a run that was stopped and one that never was."""

from pathlib import Path

from sora_lite.evaluation.record import read_record

COSTS = {
    *("clips_per_s", "tokens_per_s", "tflops_per_device", "mfu", "data_wait", "decode_seconds", "worker_restarts"),
    *("bytes_read", "bytes_fetched", "cache_hits", "cache_misses", "io_retries"),
}
"""The entries of a record that tell how fast it went and what reading cost, and so differ from attempt to attempt."""


def what_was_trained(record: Path) -> list[dict]:
    """All lines of a record without `COSTS`."""
    return [{name: value for name, value in line.items() if name not in COSTS} for line in read_record(record)]
