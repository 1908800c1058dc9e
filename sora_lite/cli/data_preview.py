"""`sora-lite data-preview`: exactly what training would see, from the loader that training uses.

Shapes: T frames, H W pixels.
"""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sora_lite.cli.train import check_buckets, describe
from sora_lite.config import DataPreviewConfig, PreviewFormat, VAEConfig
from sora_lite.data.batch import ClipBatch
from sora_lite.data.index import Index
from sora_lite.data.loader import ClipLoader, ClipReader
from sora_lite.data.shards import DamagedSample
from sora_lite.data.video import BadVideo
from sora_lite.errors import UserError
from sora_lite.evaluation.page import contact_sheet
from sora_lite.generation.export import load_vae
from sora_lite.generation.text import open_encoders
from sora_lite.models.vae import CausalVAE
from sora_lite.parallel.env import Rank
from sora_lite.training.inputs import load_made, load_split, make_loader
from sora_lite.training.objective_dit import DiTObjective

LOOK_AHEAD = 4096
"""Steps among which each bucket's first ones are looked for."""
COLUMNS = ("step", "key", "shard", "source", "start", "crop", "flip", "latent", "text", "label", "caption")


def main(config: DataPreviewConfig) -> None:
    """Print lines of JSON, or write contact sheets and a page, and print the table of buckets."""
    config = replace(config, data=replace(config.data, workers=0))  # many ranks in one process
    objective = build_objective(config)
    check_buckets(config, objective)
    index = load_split(config.data, "train", one_of(1))
    made = load_made(config.data, index, "train", objective, one_of(1))
    if config.preview.format is PreviewFormat.jsonl:
        config = replace(config, parallel=replace(config.parallel, accumulation=config.preview.accumulation))
        ranks = [one_of(config.preview.world_size, rank) for rank in range(config.preview.world_size)]
        for line in lines(config, [make_loader(config, index, objective, rank, **made) for rank in ranks]):
            print(json.dumps(line, ensure_ascii=False), flush=True)
        return
    config = replace(config, parallel=replace(config.parallel, accumulation=1))
    loader = make_loader(config, index, objective, one_of(1), **made)
    page = write_page(config, loader)
    print("\n".join(describe(config, loader)))
    print(f"{page}: open it in a browser")


def one_of(world_size: int, rank: int = 0) -> Rank:
    """A rank that has no others to talk to."""
    device = torch.device("cpu")
    return Rank(rank=rank, world_size=world_size, local_rank=rank, device=device, backend="none", launcher="none")


def build_objective(config: DataPreviewConfig) -> DiTObjective:
    """What decides the batches: the shapes of the DiT, on the named VAE or on one of the usual compression."""
    rank = one_of(1)
    vae = load_vae(Path(config.vae_from))[0] if config.vae_from else CausalVAE(**asdict(VAEConfig()))
    joins = any(config.data.text_folders)  # features that must be by the encoders; else these show nothing
    encoders = open_encoders(config, asdict(config.model), rank.device, {}) if joins else {}
    with torch.device("meta"):
        return DiTObjective(config.model, config.diffusion, vae, encoders, seed=config.run.seed, rank=rank)


@dataclass(kw_only=True, slots=True)
class Seen:
    """A clip that a step holds, and where it comes from."""

    frames: np.ndarray
    """uint8 T H W 3."""
    facts: dict[str, Any]
    """What is said of it, by COLUMNS and others."""


def lines(config: DataPreviewConfig, loaders: Sequence[ClipLoader]) -> Iterator[dict[str, Any]]:
    """A line for each step and rank, step by step. loaders: of all ranks."""
    start, stop = config.preview.start, config.preview.start + config.preview.steps
    index, order = loaders[0].index, loaders[0].order
    for step, batches in enumerate(zip(*(loader.steps(start, stop) for loader in loaders), strict=True), start):
        for rank, passes in enumerate(batches):
            bucket = order.buckets[passes[0].bucket]
            yield {
                "step": step,
                "rank": rank,
                "bucket": passes[0].bucket,
                "shape": list(bucket.shape),
                "fps": bucket.fps,
                "samples": [
                    {"pass": number, **facts} for number, batch in enumerate(passes) for facts in facts_of(batch, index)
                ],
                "bad": [asdict(one) for batch in passes for one in batch.bad],
            }


def facts_of(batch: ClipBatch, index: Index) -> list[dict[str, Any]]:
    """What is said of each sample of a batch. Crops are left, top, right, bottom in pixels of the source; latent, text:
    whether the sample comes as a latent, and its caption as features, that were made beforehand."""
    featured = [False] * len(batch.keys) if batch.text_mask is None else batch.text_mask.any(1).tolist()
    return [
        {
            "position": int(batch.positions[i]),
            "key": batch.keys[i],
            "shard": index.shard_paths[int(index.shard[sample])].name,
            "start": batch.views[i].start,
            "crop": [round(side, 3) for side in batch.views[i].crop],
            "flip": batch.views[i].flip,
            "latent": bool(batch.is_latent[i]),
            "text": featured[i],
            "label": int(batch.labels[i]),
            "caption": batch.captions[i],
        }
        for i, sample in enumerate(batch.samples.tolist())
    ]


def write_page(config: DataPreviewConfig, loader: ClipLoader) -> Path:
    """Write a contact sheet of each bucket's first clips, and a page with them and a table of what they show."""
    out = Path(config.preview.out)
    out.mkdir(parents=True, exist_ok=True)
    body = ["<h1>What training sees</h1>", *(f"<p>{html.escape(line)}</p>" for line in describe(config, loader))]
    for number, bucket in enumerate(loader.order.buckets):
        seen = first_clips(config, loader, number)
        name = f"bucket_{number}.png"
        captions = [f"{one.facts['key']}: {one.facts['caption']}" for one in seen]
        contact_sheet([one.frames for one in seen], captions).save(out / name)
        title = "{} frames of {}x{}{}".format(*bucket.shape, f" at {bucket.fps:g} fps" if bucket.fps else "")
        rows = ["<tr>" + "".join(f"<th>{column}</th>" for column in COLUMNS) + "</tr>"]
        for one in seen:
            rows.append("<tr>" + "".join(f"<td>{html.escape(str(one.facts[name]))}</td>" for name in COLUMNS) + "</tr>")
        body += [f"<h2>{html.escape(title)}</h2>", f'<img src="{name}" alt="">', "<table>", *rows, "</table>"]
    page = out / "index.html"
    page.write_text(PAGE.format(body="\n".join(body)), encoding="utf-8")
    return page


def first_clips(config: DataPreviewConfig, loader: ClipLoader, bucket: int) -> list[Seen]:
    """Up to `preview.clips` clips of the first steps of a bucket, from `preview.start` on.

    Of a latent, the clip that it was made of is shown. Raises UserError if that cannot be read.
    """
    preview, index, found = config.preview, loader.index, []
    for step in range(preview.start, preview.start + LOOK_AHEAD):
        if loader.order.step(step)[0].bucket != bucket:
            continue
        ((batch,),) = loader.steps(step, step + 1)
        videos = iter(batch.video)
        for i, facts in enumerate(facts_of(batch, index)):
            sample = int(batch.samples[i])
            source = f"{index.frames[sample]} frames of {index.height[sample]}x{index.width[sample]}"
            facts |= {"step": step, "source": f"{source} at {index.fps[sample]:g} fps"}
            shown = clip_of(loader, bucket, sample) if facts["latent"] else next(videos).permute(1, 2, 3, 0).numpy()
            found.append(Seen(frames=shown, facts=facts))
        if len(found) >= preview.clips:
            break
    return found[: preview.clips]


def clip_of(loader: ClipLoader, bucket: int, sample: int) -> np.ndarray:
    """The clip that a latent was made of: uint8 T H W 3."""
    row = loader.order.buckets[bucket]
    try:
        return ClipReader(loader.index, cache_bytes=0).read(sample, row.shape, row.fps).frames
    except (DamagedSample, BadVideo) as error:
        key = loader.index.key(sample)
        raise UserError(f"{key}: the clip of this latent cannot be shown ({error}); run `sora-data verify`") from None


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>What training sees</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; background: #18181b; color: #d4d4d8; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; font-size: 13px; }}
td, th {{ border-bottom: 1px solid #3f3f46; padding: .3rem .7rem; text-align: left; vertical-align: top; }}
</style>
{body}
"""
