"""Frozen text encoders against transformers itself, from folders that the tests save: tiny, random, no network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_folders import PROMPTS, save_clip, save_t5
from transformers import AutoTokenizer

from sora_lite.errors import UserError
from sora_lite.models.pretrained import FrozenTextEncoder

SAVE = {"t5": save_t5, "umt5": lambda folder: save_t5(folder, umt5=True), "clip": save_clip}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("text")
    return {name: save(root / name) for name, save in SAVE.items()}


@pytest.mark.parametrize("kind", SAVE)
def test_features_are_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    encoder = FrozenTextEncoder(folders[kind], max_tokens=16)
    together = encoder(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        tokens = encoder._tokenizer(prompt, return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            expected = encoder.model(**{name: tokens[name] for name in ("input_ids", "attention_mask")})
        count = tokens["input_ids"].shape[1]
        assert together.mask[i].sum() == count and together.mask[i, :count].all()
        torch.testing.assert_close(together.features[i, :count], expected.last_hidden_state[0], atol=1e-5, rtol=1e-5)
        assert not together.features[i, count:].any()
        if kind == "clip":
            torch.testing.assert_close(together.pooled[i], expected.pooler_output[0], atol=1e-5, rtol=1e-5)
    assert (together.pooled is not None) == (kind == "clip")
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder([" ".join(["dog"] * 40)]).features.shape[1] == 16


def test_the_fingerprint_changes_with_weights_tokenizer_and_length(folders: dict[str, Path], tmp_path: Path) -> None:
    first = FrozenTextEncoder(folders["t5"], max_tokens=16).fingerprint()
    copy = Path(shutil.copytree(folders["t5"], tmp_path / "copy"))
    assert FrozenTextEncoder(copy, max_tokens=16).fingerprint() == first
    assert FrozenTextEncoder(copy, max_tokens=8).fingerprint() != first
    encoder = FrozenTextEncoder(copy, max_tokens=16)
    for name in ("model.safetensors", "tokenizer.json"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole + b" ")
        assert encoder.fingerprint() != first
        (copy / name).write_bytes(whole)


def test_what_is_no_such_folder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        FrozenTextEncoder(tmp_path / "none", max_tokens=16)
    with pytest.raises(UserError, match="is no text encoder"):
        FrozenTextEncoder(tmp_path, max_tokens=16)
    pickled = Path(shutil.copytree(folders["t5"], tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="is no text encoder"):
        FrozenTextEncoder(pickled, max_tokens=16)
    poor = Path(shutil.copytree(folders["t5"], tmp_path / "poor"))
    weights = load_file(poor / "model.safetensors")
    lost = next(name for name in weights if name.endswith("SelfAttention.k.weight"))
    save_file(
        {name: one for name, one in weights.items() if name != lost}, poor / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=f"its weights lack {lost}"):
        FrozenTextEncoder(poor, max_tokens=16)
    (poor / "model.safetensors").write_bytes((folders["t5"] / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(UserError, match="is no text encoder"):
        FrozenTextEncoder(poor, max_tokens=16)
    for kind, says in (("pad", "no token for padding"), ("words", "knows no word"), ("more", "has 15 tokens, its w")):
        silent = Path(shutil.copytree(folders["t5"], tmp_path / kind))
        tokenizer = AutoTokenizer.from_pretrained(silent)
        if kind == "words":
            (silent / "tokenizer.json").unlink()
            (silent / "tokenizer_config.json").unlink()
        elif kind == "more":
            tokenizer.add_tokens("new")
            tokenizer.save_pretrained(silent)
        else:
            config = json.loads((silent / "tokenizer_config.json").read_text())
            (silent / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
        with pytest.raises(UserError, match=says):
            FrozenTextEncoder(silent, max_tokens=16)
    foreign = Path(shutil.copytree(folders["t5"], tmp_path / "foreign"))
    words = (foreign / "tokenizer.json").read_text().replace('"the"', '"der"').replace('"a"', '"ein"')
    (foreign / "tokenizer.json").write_text(words)
    FrozenTextEncoder(foreign, max_tokens=16)
    other = Path(shutil.copytree(folders["t5"], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text()) | {"model_type": "bert"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds a bert"):
        FrozenTextEncoder(other, max_tokens=16)
