"""Checksums of what every rank holds: any bit that changes shows, wherever it lies."""

import pytest
import torch

from sora_lite.training import replicas
from sora_lite.training.replicas import checksum


@pytest.mark.parametrize("at_once", [7, 16, 2**24])
def test_any_flipped_bit_and_any_swap_shows(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """However many words are summed up at a time; the last bytes may be no whole word."""
    monkeypatch.setattr(replicas, "WORDS_AT_ONCE", at_once)
    torch.manual_seed(0)
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(33).bfloat16()}
    before = checksum(tensors)
    assert checksum({name: tensor.clone() for name, tensor in tensors.items()}) == before
    for name, tensor in tensors.items():
        raw = tensor.view(torch.uint8).flatten()
        for place in range(len(raw)):
            raw[place] ^= 1 << place % 8
            assert checksum(tensors) != before, (name, place)
            raw[place] ^= 1 << place % 8
    words = tensors["a"].flatten()
    for first, second in ((0, 1), (3, 20), (6, 7), (8, 34)):
        words[[first, second]] = words[[second, first]]
        assert checksum(tensors) != before
        words[[first, second]] = words[[second, first]]
    assert checksum(tensors) == before
