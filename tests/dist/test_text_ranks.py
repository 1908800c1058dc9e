"""Training on text features of real encoders: the same losses on one rank and two, made beforehand or on the way."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from dist_ranks import run_ranks
from text_folders import save_clip, save_t5, with_captions
from tiny_inputs import Tiny

from data_tools.cli import main as sora_data
from sora_lite.cli.compose import compose
from sora_lite.cli.train import train
from sora_lite.config import TrainConfig
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.generation.export import Contract, write
from sora_lite.models.dit import VideoDiT
from sora_lite.parallel.env import Rank

pytestmark = pytest.mark.dist

READS = ["model.text=null", "model.text_features=16", "model.text_tokens=16"]
KINDS = {"t5": READS, "clip": [*READS, "model.pooled_features=16", "model.text_attention=joint"]}
SAVE = {"t5": save_t5, "clip": save_clip}


def train_each(rank: Rank, configs: dict[str, TrainConfig]) -> dict[str, list[float]]:
    """The losses, in training and validation, of several runs."""
    found = {}
    for name, config in configs.items():
        train(config, rank)
        rank.barrier()
        lines = read_record(Path(config.run.root) / config.run.name / RECORD)
        found[name] = [line[key] for line in lines for key in ("loss", "val_loss") if key in line]
    return found


def awake(config: TrainConfig, folder: Path) -> Path:
    """An export of a model that hears its text from the first step on: at the start of training it would be gated off."""
    torch.manual_seed(0)
    architecture = {"channels": 4, **asdict(config.model)}
    model = VideoDiT(**architecture)
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    contract: dict[str, Any] = {"run": "awake", "step": 0, "weights": "raw", "clip": [17, 32, 32], "fps": 0.0}
    write(folder, Contract(kind="dit", architecture=architecture, vae_fingerprint=None, **contract), model.state_dict())
    return folder


@pytest.fixture(scope="module")
def losses(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[float]]]:
    """Of each kind and way on one rank and on two."""
    root = tmp_path_factory.mktemp("text")
    clips = with_captions(tiny.shards, root / "shards")
    overrides = {}
    for kind, reads in KINDS.items():
        encoder, other = SAVE[kind](root / kind), SAVE[kind](root / f"{kind}_other", seed=1)
        words = ["encode", str(clips), str(root / f"{kind}_text"), "max_tokens=16", "workers=0"]
        assert sora_data([*words, f"text_from={encoder}"]) == 0
        common = ["experiment=tiny", f"data.shards={clips}", f"vae_from={tiny.vae}", "run.steps=3", *reads]
        common += [f"pooled_from={encoder}"] if kind == "clip" else []
        start = awake(compose("train", [*common, f"text_from={encoder}"]), root / f"{kind}_start")
        common += [f"init_from={start}", "parallel.threads=1", "logging.peak_tflops=1", "optim.lr=1e-4"]
        overrides |= {
            f"{kind} on the way": [*common, f"text_from={encoder}"],
            f"{kind} beforehand": [*common, f"text_from={encoder}", f"data.text={root / f'{kind}_text'}"],
            f"{kind} another encoder": [*common, f"text_from={other}"],
        }
    found = {}
    for world in (1, 2):
        place = root / f"ranks_{world}"
        names = {name: f"run.name={name.replace(' ', '_')}" for name in overrides}
        configs = {
            name: compose("train", [*words, names[name], f"run.root={place}"])
            for name, words in overrides.items()
            if world == 1 or "another" not in name
        }
        found[world] = run_ranks(world, train_each, place, configs)[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_losses_depend_on_neither_ranks_nor_when_text_was_encoded(
    kind: str, losses: dict[int, dict[str, list[float]]]
) -> None:
    expected = losses[1][f"{kind} on the way"]
    assert len(expected) >= 4
    for world in (1, 2):
        for way in ("on the way", "beforehand"):
            assert losses[world][f"{kind} {way}"] == pytest.approx(expected, rel=1e-6), (world, way)
    away = [abs(a - b) for a, b in zip(losses[1][f"{kind} another encoder"], expected, strict=True)]
    assert min(away) > 1e-4  # what the encoder says is heard
