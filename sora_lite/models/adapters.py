"""Open weights: the layouts in which others publish models that `VideoDiT` can be, to our names and back.

| layout | files of |
|---|---|
| `paper` | Peebles & Xie's code (github.com/facebookresearch/DiT) |
| `dit` | diffusers' DiTTransformer2DModel |
| `latte` | diffusers' LatteTransformer3DModel |
| `wan` | diffusers' WanTransformer3DModel, the text-to-video models |

A layout is a table of entries: a tensor of ours, and the tensor or tensors of theirs that hold the same numbers.
`to_ours` and `to_theirs` walk through it, so what is exported and imported again is the same, bit for bit. Where the
numbers lie:

- Patches: theirs are kernels D C (p) q r of a convolution, ours a matrix D (p q r C). The outputs are alike: (p q r C).
- Queries, keys and values: theirs are three matrices (in the paper one, in this order), ours is one.
- The learned variance is the second half of the channels in all of them.
- diffusers' DiT keeps a copy of the time and label embeddings in every block; they must be equal.
- RoPE pairs neighbouring channels in all of them.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sora_lite.models.dit import VideoDiT
from sora_lite.models.positions import sincos

Tensors = Mapping[str, Tensor]
Pair = tuple[Tensor, Tensor]
"""A and B of a low-rank adapter, which adds B A to the weight of a layer."""
Form = Literal["same", "joined", "copies", "row", "kernel"]


@dataclass(kw_only=True, slots=True, frozen=True)
class Entry:
    """`ours` holds what `theirs` hold.

    form: "same"; "joined" along the first axis; equal "copies"; a "row" 1 n D of a table n D; a "kernel" of this size.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form = "same"
    kernel: tuple[int, ...] = ()

    def read(self, found: list[Tensor]) -> Tensor:
        """Theirs to ours.

        Raises:
            ValueError: copies differ, or patches are of another size.
        """
        if self.form == "joined":
            return torch.cat(found)
        if self.form == "row":
            return found[0].squeeze(0)
        if self.form == "kernel":
            if found[0].shape[2:] != self.kernel:
                raise ValueError(f"{self.theirs[0]} has patches of {list(found[0].shape[2:])}, not {list(self.kernel)}")
            return found[0].movedim(1, -1).flatten(1)
        if any(not torch.equal(found[0], other) for other in found[1:]):
            raise ValueError(f"{self.theirs[0]} differs from its copies in the other blocks, which a DiT has in common")
        return found[0]

    def write(self, tensor: Tensor) -> list[Tensor]:
        """Ours to theirs."""
        if self.form == "joined":
            return list(tensor.chunk(len(self.theirs)))
        if self.form == "row":
            return [tensor.unsqueeze(0)]
        if self.form == "kernel":
            return [tensor.unflatten(1, (*self.kernel, -1)).movedim(-1, 1)]
        return [tensor] * len(self.theirs)


def to_ours(entries: list[Entry], theirs: Tensors) -> dict[str, Tensor]:
    """A state dict of `VideoDiT`. Queries, keys and values without biases get such of zeros.

    Raises:
        ValueError: tensors are missing or left over, copies differ, or patches are of another size.
    """
    wanted = [name for entry in entries for name in entry.theirs]
    layers = [name.removesuffix(".weight") for name in theirs if re.search(r"\.to_[qkv]\.weight$", name)]
    theirs = {f"{name}.bias": theirs[f"{name}.weight"].new_zeros(len(theirs[f"{name}.weight"])) for name in layers} | {
        **theirs
    }
    missing, unknown = sorted(set(wanted) - theirs.keys()), sorted(theirs.keys() - set(wanted))
    if missing or unknown:
        what = f"lack {missing[0]}" if missing else f"have {unknown[0]}, which this layout does not know"
        raise ValueError(f"the weights {what} (missing {len(missing)}, unknown {len(unknown)})")
    return {entry.ours: entry.read([theirs[name] for name in entry.theirs]).contiguous() for entry in entries}


def to_theirs(entries: list[Entry], ours: Tensors) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    return {
        name: tensor.contiguous()
        for entry in entries
        for name, tensor in zip(entry.theirs, entry.write(ours[entry.ours]), strict=True)
    }


def lora_to_theirs(entries: list[Entry], pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """Low-rank adapters of our linear layers as those of theirs, by layer, which add the same to the same numbers."""
    found: dict[str, Pair] = {}
    for entry in entries:
        layer = entry.ours.removesuffix(".weight")
        if layer not in pairs:
            continue
        a, b = pairs[layer]  # rank x in, out x rank
        if entry.form == "kernel":  # a convolution to `rank` channels, and one of a single cell from there
            split = [(entry.write(a)[0], b.reshape(*b.shape, *(1 for _ in entry.kernel)))]
        else:  # what is joined lies along the outputs
            split = [(a, part) for part in entry.write(b)]
        found |= {name.removesuffix(".weight"): pair for name, pair in zip(entry.theirs, split, strict=True)}
    return found


def _layer(ours: str, *theirs: str, form: Form = "same") -> list[Entry]:
    """Weight and bias of a linear layer."""
    return [
        Entry(ours=f"{ours}.{part}", theirs=tuple(f"{name}.{part}" for name in theirs), form=form)
        for part in ("weight", "bias")
    ]


def _patches(theirs: str, kernel: tuple[int, ...]) -> list[Entry]:
    return [
        Entry(ours="embed.weight", theirs=(f"{theirs}.weight",), form="kernel", kernel=kernel),
        Entry(ours="embed.bias", theirs=(f"{theirs}.bias",)),
    ]


def _attention(ours: str, theirs: str) -> list[Entry]:
    """Self-attention of diffusers."""
    qkv = _layer(f"{ours}.qkv", *(f"{theirs}.to_{one}" for one in "qkv"), form="joined")
    return [*qkv, *_layer(f"{ours}.out", f"{theirs}.to_out.0")]


def _cross(ours: str, theirs: str) -> list[Entry]:
    """Cross-attention of diffusers."""
    kv = _layer(f"{ours}.kv", f"{theirs}.to_k", f"{theirs}.to_v", form="joined")
    return [*_layer(f"{ours}.q", f"{theirs}.to_q"), *kv, *_layer(f"{ours}.out", f"{theirs}.to_out.0")]


def _mlp(ours: str, first: str, second: str) -> list[Entry]:
    return [*_layer(f"{ours}.0", first), *_layer(f"{ours}.2", second)]


# ---------------------------------------------------------------------------------------------------- layouts


def paper_entries(architecture: Mapping[str, Any]) -> list[Entry]:
    """Of `paper`, without its table of positions, which is no weight."""
    _, q, r = architecture["patch"]
    entries = [
        *_patches("x_embedder.proj", (q, r)),
        *_mlp("embed_time.mlp", "t_embedder.mlp.0", "t_embedder.mlp.2"),
        Entry(ours="embed_label.weight", theirs=("y_embedder.embedding_table.weight",)),
        *_layer("final.modulation.linear", "final_layer.adaLN_modulation.1"),
        *_layer("final.out", "final_layer.linear"),
    ]
    for number in range(architecture["depth"]):
        block = f"blocks.{number}"
        entries += [
            *_layer(f"{block}.attention.qkv", f"{block}.attn.qkv"),
            *_layer(f"{block}.attention.out", f"{block}.attn.proj"),
            *_mlp(f"{block}.mlp", f"{block}.mlp.fc1", f"{block}.mlp.fc2"),
            *_layer(f"{block}.modulation.linear", f"{block}.adaLN_modulation.1"),
        ]
    return entries


def dit_entries(architecture: Mapping[str, Any]) -> list[Entry]:
    """Of `dit`."""
    _, q, r = architecture["patch"]
    depth = range(architecture["depth"])
    embedders = [f"transformer_blocks.{number}.norm1.emb" for number in depth]
    labels = tuple(f"{name}.class_embedder.embedding_table.weight" for name in embedders)
    entries = [
        *_patches("pos_embed.proj", (q, r)),
        *_layer("embed_time.mlp.0", *(f"{name}.timestep_embedder.linear_1" for name in embedders), form="copies"),
        *_layer("embed_time.mlp.2", *(f"{name}.timestep_embedder.linear_2" for name in embedders), form="copies"),
        Entry(ours="embed_label.weight", theirs=labels, form="copies"),
        *_layer("final.modulation.linear", "proj_out_1"),
        *_layer("final.out", "proj_out_2"),
    ]
    for number in depth:
        ours, theirs = f"blocks.{number}", f"transformer_blocks.{number}"
        entries += [
            *_attention(f"{ours}.attention", f"{theirs}.attn1"),
            *_mlp(f"{ours}.mlp", f"{theirs}.ff.net.0.proj", f"{theirs}.ff.net.2"),
            *_layer(f"{ours}.modulation.linear", f"{theirs}.norm1.linear"),
        ]
    return entries


def latte_entries(architecture: Mapping[str, Any]) -> list[Entry]:
    """Of `latte`. Our blocks alternate: two of ours, within frames and along time, are one of either list of theirs."""
    _, q, r = architecture["patch"]
    embedder = "adaln_single.emb.timestep_embedder"
    entries = [
        *_patches("pos_embed.proj", (q, r)),
        *_mlp("embed_time.mlp", f"{embedder}.linear_1", f"{embedder}.linear_2"),
        *_layer("modulation.linear", "adaln_single.linear"),
        *_mlp("text.mlp", "caption_projection.linear_1", "caption_projection.linear_2"),
        Entry(ours="final.modulation.scale_shift_table", theirs=("scale_shift_table",)),
        *_layer("final.out", "proj_out"),
    ]
    for number in range(architecture["depth"]):
        ours = f"blocks.{number}"
        kind = "temporal_transformer_blocks" if number % 2 else "transformer_blocks"
        theirs = f"{kind}.{number // 2}"
        entries += [
            *_attention(f"{ours}.attention", f"{theirs}.attn1"),
            *(_cross(f"{ours}.cross", f"{theirs}.attn2") if number % 2 == 0 else []),
            *_mlp(f"{ours}.mlp", f"{theirs}.ff.net.0.proj", f"{theirs}.ff.net.2"),
            Entry(ours=f"{ours}.modulation.scale_shift_table", theirs=(f"{theirs}.scale_shift_table",)),
        ]
    return entries


def wan_entries(architecture: Mapping[str, Any]) -> list[Entry]:
    """Of `wan`."""
    embedder = "condition_embedder"
    entries = [
        *_patches("patch_embedding", tuple(architecture["patch"])),
        *_mlp("embed_time.mlp", f"{embedder}.time_embedder.linear_1", f"{embedder}.time_embedder.linear_2"),
        *_layer("modulation.linear", f"{embedder}.time_proj"),
        *_mlp("text.mlp", f"{embedder}.text_embedder.linear_1", f"{embedder}.text_embedder.linear_2"),
        Entry(ours="final.modulation.scale_shift_table", theirs=("scale_shift_table",), form="row"),
        *_layer("final.out", "proj_out"),
    ]
    for number in range(architecture["depth"]):
        block = f"blocks.{number}"
        norms = [("attention", "attn1"), ("cross", "attn2")]
        table = f"{block}.scale_shift_table"
        entries += [
            *_attention(f"{block}.attention", f"{block}.attn1"),
            *_cross(f"{block}.cross", f"{block}.attn2"),
            *(
                Entry(ours=f"{block}.{ours}.{norm}.norm.weight", theirs=(f"{block}.{theirs}.{norm}.weight",))
                for ours, theirs in norms
                for norm in ("norm_q", "norm_k")
            ),
            *(_layer(f"{block}.norm_text", f"{block}.norm2") if architecture["cross_norm"] else []),
            *_mlp(f"{block}.mlp", f"{block}.ffn.net.0.proj", f"{block}.ffn.net.2"),
            Entry(ours=f"{block}.modulation.scale_shift_table", theirs=(table,), form="row"),
        ]
    return entries


ENTRIES: dict[str, Callable[[Mapping[str, Any]], list[Entry]]] = {
    "paper": paper_entries,
    "dit": dit_entries,
    "latte": latte_entries,
    "wan": wan_entries,
}


# ---------------------------------------------------------------------------------------------------- architectures

_PLAIN = {
    name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    for name, parameter in inspect.signature(VideoDiT).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
"""`VideoDiT`'s own defaults."""
_PAPER = _PLAIN | {"positions": "sincos", "qk_norm": "none", "gelu": "tanh"}
_LATTE = _PAPER | {"attention": "factorised", "modulation": "shared", "cross_norm": False}
_WAN = _PLAIN | {"qk_norm": "full", "modulation": "shared", "gelu": "tanh", "pad_text": True}
PAPER_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Heads of the paper's sizes, by width: its files do not tell."""
CLASSES = {"dit": "DiTTransformer2DModel", "latte": "LatteTransformer3DModel", "wan": "WanTransformer3DModel"}
"""diffusers' class of each layout."""


def paper_architecture(theirs: Tensors, heads: int | None = None) -> dict[str, Any]:
    """Arguments of `VideoDiT` for weights of the paper's code, from their shapes.

    Raises:
        ValueError: they are of no DiT, or of a size for which `heads` must be given.
    """
    try:
        width, channels, patch, _ = theirs["x_embedder.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in theirs if name.startswith("blocks."))
        features, classes = len(theirs["final_layer.linear.bias"]), len(theirs["y_embedder.embedding_table.weight"]) - 1
        hidden = len(theirs["blocks.0.mlp.fc1.bias"])
    except KeyError as error:
        raise ValueError(f"the weights lack {error}: they are not those of the paper's DiT") from error
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"the weights have other names or shapes than those of the paper's DiT ({error})") from error
    heads = heads or PAPER_HEADS.get(width)
    if heads is None or width % heads:
        raise ValueError(f"the number of heads of a DiT of width {width} is not " + (f"{heads}" if heads else "known"))
    return _PAPER | {
        "channels": channels, "width": width, "depth": depth, "heads": heads, "mlp_ratio": hidden / width,
        "patch": [1, patch, patch], "num_classes": classes, "learn_variance": features == 2 * channels * patch**2,
    }  # fmt: skip


def check_positions(table: Tensor, width: int) -> None:
    """Raise ValueError if a published table of positions (1 N D, a square of tokens) is not ours."""
    side = round(table.shape[1] ** 0.5) if table.ndim == 3 else 0
    ours, _ = sincos((1, side, side), width, torch.device("cpu"))
    if side == 0 or table.shape != (1, *ours.shape) or not torch.allclose(table[0], ours.to(table.dtype), atol=1e-5):
        raise ValueError("pos_embed is not the fixed sines and cosines of the paper")


def _agree(config: Mapping[str, Any], **expected: Any) -> None:
    """Raise ValueError where a configuration says something that `VideoDiT` cannot be."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key}={config[key]!r} is not supported, only {value!r}")


_COUNTS = ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels")
"""Settings of all of diffusers' models that are positive whole numbers."""
_COUNTS_OF = {
    "dit": ("patch_size", "sample_size", "num_embeds_ada_norm"),
    "latte": ("patch_size", "sample_size", "video_length", "caption_channels"),
    "wan": ("text_dim", "ffn_dim"),
}
"""The like of each layout."""


def _check_count(key: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{key}={value!r} is no positive whole number")


def architecture_of(layout: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `VideoDiT` for a diffusers `config.json`.

    Raises:
        ValueError: the model is none that `VideoDiT` can be.
    """
    for key in (*_COUNTS, *_COUNTS_OF[layout]):
        _check_count(key, config[key])
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    channels = config["in_channels"]
    common = {"channels": channels, "width": heads * head, "heads": heads, "depth": config["num_layers"]}
    if layout == "wan":
        _agree(
            config, out_channels=channels, qk_norm="rms_norm_across_heads", freq_dim=256, eps=1e-6, image_dim=None,
            added_kv_proj_dim=None, pos_embed_seq_len=None,
        )  # fmt: skip
        patch = config["patch_size"]
        if not isinstance(patch, list | tuple) or len(patch) != 3:
            raise ValueError(f"patch_size={patch!r} is not [frames, height, width]")
        for part in patch:
            _check_count("patch_size", part)
        return _WAN | common | {
            "mlp_ratio": config["ffn_dim"] / (heads * head), "patch": list(patch),
            "text_features": config["text_dim"], "cross_norm": config["cross_attn_norm"],
        }  # fmt: skip
    patch = config["patch_size"]
    out = config.get("out_channels") or channels
    _agree(config, activation_fn="gelu-approximate", norm_elementwise_affine=False, dropout=0.0)
    if not config.get("norm_eps", 1e-6) <= 1e-5:  # diffusers' default, 1e-5, changes outputs by some millionths
        raise ValueError(f"norm_eps={config['norm_eps']} is not supported, only 1e-6 and, as nearly the same, 1e-5")
    if out not in (channels, 2 * channels):
        raise ValueError(f"out_channels={out} is neither {channels} nor, with a variance, {2 * channels}")
    common |= {"patch": [1, patch, patch], "learn_variance": out == 2 * channels}
    if layout == "dit":
        _agree(config, norm_type="ada_norm_zero", upcast_attention=False)
        return _PAPER | common | {"num_classes": config["num_embeds_ada_norm"], "time_frequencies": 127}
    _agree(config, norm_type="ada_norm_single", cross_attention_dim=heads * head)
    if config["sample_size"] >= 128:
        raise ValueError(f"sample_size={config['sample_size']} interpolates positions, only below 128 they are fixed")
    return _LATTE | common | {"depth": 2 * config["num_layers"], "text_features": config["caption_channels"]}


def config_of(layout: str, architecture: Mapping[str, Any], latent: tuple[int, int, int]) -> dict[str, Any]:
    """The diffusers `config.json` of a model that is used on latents of (T, H, W).

    Raises:
        ValueError: a model of that layout cannot be this one.
    """
    given = _PLAIN | dict(architecture)
    channels, patch = given["channels"], given["patch"]
    config = {
        "_class_name": CLASSES[layout], "num_attention_heads": given["heads"],
        "attention_head_dim": given["width"] // given["heads"], "in_channels": channels,
        "out_channels": (2 if given["learn_variance"] else 1) * channels, "num_layers": given["depth"],
    }  # fmt: skip
    if layout == "wan":
        config |= {
            "patch_size": list(patch), "text_dim": given["text_features"], "freq_dim": 256, "eps": 1e-6,
            "ffn_dim": round(given["width"] * given["mlp_ratio"]), "cross_attn_norm": given["cross_norm"],
            "qk_norm": "rms_norm_across_heads", "image_dim": None, "added_kv_proj_dim": None,
        }  # fmt: skip
    else:
        if latent[1] != latent[2]:
            raise ValueError(f"{CLASSES[layout]} is of squares, and the clips are of {latent[1]} x {latent[2]} cells")
        config |= {
            "patch_size": patch[1], "sample_size": latent[1], "activation_fn": "gelu-approximate",
            "attention_bias": True, "norm_elementwise_affine": False, "norm_eps": 1e-6,
        }  # fmt: skip
    if layout == "dit":
        if latent[0] != 1:
            raise ValueError(f"{CLASSES[layout]} is of stills, and the clips have {latent[0]} latent frames")
        config |= {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": given["num_classes"]}
    if layout == "latte":
        config |= {
            "norm_type": "ada_norm_single", "num_layers": given["depth"] // 2, "cross_attention_dim": given["width"],
            "caption_channels": given["text_features"], "video_length": latent[0],
        }  # fmt: skip
    lost = {
        key: value
        for key, value in architecture_of(layout, config).items()
        if value != given[key]
        and not (key == "mlp_ratio" and round(given["width"] * value) == round(given["width"] * given[key]))
        and not (key == "rope_theta" and given["positions"] == "sincos")
        and not (key == "text_tokens" and not given["pad_text"])  # how texts are cut is no part of such a model
    }
    if lost:
        key, value = next(iter(lost.items()))
        raise ValueError(f"{CLASSES[layout]} has {key}={value}, this model {given[key]}")
    return config
