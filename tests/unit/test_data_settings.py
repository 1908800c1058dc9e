"""Settings of `sora-data` that cannot be are refused by name, whichever verb they are given to."""

import pytest

from data_tools.cli import main
from data_tools.compose import parse
from data_tools.config import BucketsConfig, DataConfig, IndexConfig
from data_tools.encode import EncodeConfig
from sora_lite.errors import UserError


@pytest.mark.parametrize(("schema", "given"), [(DataConfig, []), (EncodeConfig, ["text_from=t5"]), (IndexConfig, [])])
@pytest.mark.parametrize("word", ["workers=-1", "stall_seconds=0", "memory_mb=1"])
def test_workers_that_cannot_be(schema: type, given: list[str], word: str) -> None:
    parse(schema, [*given, "workers=0"])
    with pytest.raises(UserError, match=f"^{word.split('=')[0]}=[-.0-9]+: must be"):
        parse(schema, [*given, word])


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        (DataConfig, "slurm.tasks=0"),
        (DataConfig, "split.clip_frames=16"),
        (DataConfig, "pack.preset=quick"),
        (DataConfig, "filter.rules=[{score: motion}]"),
        (IndexConfig, "validation_fraction=1"),
        (BucketsConfig, "lengths=0"),
        (BucketsConfig, "fps=0"),
        (BucketsConfig, "sides=[0]"),
    ],
)
def test_values_that_cannot_be(schema: type, word: str) -> None:
    with pytest.raises(UserError, match=word.partition("=")[0].replace("[", r"\[")):
        parse(schema, [word])


@pytest.mark.parametrize("schema", [DataConfig, IndexConfig, BucketsConfig])
def test_a_mistyped_key_names_the_nearest(schema: type) -> None:
    key = {DataConfig: "pack.crf", IndexConfig: "source_field", BucketsConfig: "multiple"}[schema]
    with pytest.raises(UserError, match=f"nearest is {key}"):
        parse(schema, [f"{key}x=1"])


def test_encode_says_that_it_reads_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", "https://host/shards", "out", "text_from=t5"]) == 2
    assert "https://host/shards: encode reads and writes local folders" in capsys.readouterr().err
