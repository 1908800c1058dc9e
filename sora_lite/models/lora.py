"""Low-rank adapters of a model's linear layers (LoRA, Hu et al., arXiv 2106.09685), by peft and in its files.

An adapter adds alpha / rank * B A x to what a layer makes of x, with A rank x in and B out x rank. B starts at zero, so
the model starts as it was; afterwards W + alpha / rank * B A is a layer that does the same without an adapter.

FOLDER/
  adapter_config.json          peft's settings
  adapter_model.safetensors    A and B of each layer, fp32
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sora_lite.errors import UserError

Tensors = Mapping[str, Tensor]
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def linear_layers(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of the linear layers that any of the patterns (`*` for anything) matches, in the model's order.

    Raises:
        ValueError: a pattern matches none.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"{pattern} is no linear layer of this model; there are {', '.join(_kinds(layers))}")
    return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _kinds(layers: list[str]) -> list[str]:
    """The layers with * for the number of the block, each once."""
    return list(dict.fromkeys(re.sub(r"\bblocks\.\d+\.", "blocks.*.", name) for name in layers))


@dataclass(kw_only=True, slots=True, frozen=True)
class Adapters:
    """Adapters of one rank and scale alpha / rank on the named linear layers."""

    rank: int
    alpha: float
    layers: list[str]

    def inject(self, model: nn.Module) -> None:
        """Add new adapters to a model in place, drawn by torch's generator, and freeze all else.

        A layer becomes one of peft's: `LAYER.base_layer` with the frozen weights, and `LAYER.lora_A.default.weight` and
        `LAYER.lora_B.default.weight`.

        Raises:
            UserError: peft is not installed.
        """
        _peft().inject_adapter_in_model(self._config(), model)

    def merge(self, base: Tensors, trained: Tensors) -> dict[str, Tensor]:
        """The state dict of a model without adapters that does the same.

        Args:
            base: state dict of the model before `inject`.
            trained: A and B of every layer, as a model has them after `inject`.
        """
        changed = {f"{layer}.weight": pair for layer, pair in self.pairs(trained).items()}
        return {**base, **{name: torch.addmm(base[name], b, a) for name, (a, b) in changed.items()}}

    def write(self, folder: Path, trained: Tensors, base: str) -> None:
        """Write `trained` as `peft.PeftModel.from_pretrained` reads it. base: where the base lies, for people.

        Raises:
            UserError: peft is not installed.
        """
        config = self._config()
        config.base_model_name_or_path, config.inference_mode = base, True
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).unlink(missing_ok=True)  # it comes last: a folder that has one is whole
        names = [f"{layer}.lora_{side}" for layer in self.layers for side in "AB"]
        weights = {f"base_model.model.{name}.weight": trained[f"{name}.default.weight"].contiguous() for name in names}
        save_file(weights, folder / _WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(folder))

    @classmethod
    def read(cls, folder: Path) -> tuple["Adapters", dict[str, Tensor]]:
        """What `write` wrote: adapters and `trained`.

        Raises:
            UserError: the folder holds none, or they are damaged.
        """
        try:
            settings = json.loads((folder / _CONFIG).read_text())
            stored = load_file(folder / _WEIGHTS)
            names = {name: name.removeprefix("base_model.model.").removesuffix(".weight") for name in stored}
            layers = list(dict.fromkeys(name.rpartition(".lora_")[0] for name in names.values()))
            adapters = cls(rank=settings["r"], alpha=settings["lora_alpha"], layers=layers)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder}: holds no adapters that can be read ({error}); export the run again") from error
        return adapters, {f"{names[name]}.default.weight": tensor for name, tensor in stored.items()}

    def pairs(self, trained: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each layer such that B A is what the adapter adds to its weight: the scale is in B."""
        found = {}
        for layer in self.layers:
            a, b = (trained[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            found[layer] = a, b * (self.alpha / self.rank)
        return found

    def _config(self):  # type: ignore[no-untyped-def]  # a class of peft, which is imported where it is needed
        # As one expression, since peft matches the names of a list with the ends of names, too.
        targets = "|".join(re.escape(layer) for layer in self.layers)
        return _peft().LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets, bias="none")


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"lora.rank: adapters need peft, which cannot be imported ({error}); `pip install 'sora_lite[lora]'`"
        ) from error
    return peft
