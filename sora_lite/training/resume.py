"""What must agree when a run goes on from a checkpoint, what may change, and how a change is declared.

A checkpoint records the configuration, fingerprints of what its paths lead to, and the state of the data: the seed, the
hash of the order, and the changes that were declared (the global step is the checkpoint's own). `go_on` compares them
with the present ones. What RULES let change, changes. Any other difference is refused, by name, with the setting that
says "I mean it": `run.accept`. What was accepted becomes an entry of the state, so later starts need no further word.

Where an accepted change alters the order (more data, other weights, other buckets), the steps before stay what they
were, and a new order begins at the step of the checkpoint: a function of seed, that step and the present data alone.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from sora_lite.data.index import Index
from sora_lite.data.order import Order
from sora_lite.errors import UserError


class Rule(Enum):
    """What a start may do with a setting of the run that it goes on with."""

    free = "change it"
    content = "change it, if what it leads to is the same"
    kept = "change it by run.accept"


_FREE, _CONTENT, _KEPT = Rule

RULES: dict[str, tuple[Rule, str]] = {
    "run.name": (_FREE, "names the folder, which may be moved"),
    "run.root": (_FREE, "names the folder, which may be moved"),
    "run.seed": (_KEPT, "every draw and the order follow from it"),
    "run.steps": (_FREE, "a run may be made longer or shorter"),
    "run.accept": (_FREE, "says what else may change"),
    "run.log_every": (_FREE, "only looks on"),
    "run.save_every": (_FREE, "a checkpoint changes nothing"),
    "run.keep_last": (_FREE, "a checkpoint changes nothing"),
    "run.keep_every": (_FREE, "a checkpoint changes nothing"),
    "run.save_in_background": (_FREE, "a checkpoint changes nothing"),
    "run.on_failed_save": (_FREE, "a checkpoint changes nothing"),
    "run.on_damage": (_FREE, "a checkpoint changes nothing"),
    "run.take_over": (_FREE, "only says who trains"),
    "run.validate_every": (_FREE, "only looks on"),
    "run.validation_samples": (_FREE, "only looks on"),
    "run.sample_every": (_FREE, "only looks on"),
    "run.check_every": (_FREE, "only looks on"),
    "run.watchdog_seconds": (_FREE, "only ends a run"),
    "run.deterministic": (_FREE, "chooses kernels of the same function"),
    "guard": (_FREE, "people change it when a run meets bad numbers"),
    "data.shards": (_CONTENT, "compared by the shards' checksums"),
    "data.sets.shards": (_CONTENT, "compared by the shards' checksums"),
    "data.latents": (_CONTENT, "compared by the shards' checksums"),
    "data.sets.latents": (_CONTENT, "compared by the shards' checksums"),
    "data.text": (_CONTENT, "compared by the shards' checksums"),
    "data.sets.text": (_CONTENT, "compared by the shards' checksums"),
    "data.sets.weight": (_KEPT, "decides the order"),
    "data.image_ratio": (_KEPT, "decides the order"),
    "data.cache": (_FREE, "follows from the shards"),
    "data.shard_cache": (_FREE, "only where remote shards are kept"),
    "data.shard_cache_gb": (_FREE, "only speed"),
    "data.io_timeout": (_FREE, "only how long a failing read is tried"),
    "data.io_retries": (_FREE, "only how long a failing read is tried"),
    "data.worker_timeout": (_FREE, "only when a worker is started anew"),
    "data.fps": (_KEPT, "decides what the model sees, and which clips are long enough"),
    "data.buckets": (_KEPT, "decides what the model sees, and the order"),
    "data.batch_tokens": (_KEPT, "decides the batches"),
    "data.batch_by": (_KEPT, "decides the batches"),
    "data.divisor": (_KEPT, "decides the batches"),
    "data.block_shards": (_KEPT, "decides the order"),
    "data.flip": (_KEPT, "decides what the model sees"),
    "data.decoder": (_KEPT, "colours differ in their last bits"),
    "data.workers": (_FREE, "what a step holds does not depend on it"),
    "data.cache_mb": (_FREE, "only memory and speed"),
    "data.max_bad_fraction": (_FREE, "only ends a run"),
    "optim.lr": (_FREE, "people lower it by hand"),
    "optim.warmup_steps": (_FREE, "part of the schedule"),
    "optim.schedule": (_FREE, "part of the schedule"),
    "init_from": (_CONTENT, "the base of adapters is compared by its SHA-256; others that go on do not look there"),
    "optim.final_lr": (_FREE, "part of the schedule"),
    "optim.betas": (_KEPT, "the moments in the checkpoint were made with it"),
    "optim.eps": (_KEPT, "the update's meaning"),
    "optim.weight_decay": (_KEPT, "the update's meaning"),
    "optim.clip": (_KEPT, "the update's meaning"),
    "optim.ema_decay": (_KEPT, "the average in the checkpoint was made with it"),
    "optim.ema_on_cpu": (_FREE, "only memory and speed"),
    "parallel.zero_stage": (_FREE, "checkpoints fit every stage"),
    "parallel.accumulation": (_FREE, "what a step holds does not depend on it"),
    "parallel.activation_checkpointing": (_FREE, "only memory and speed"),
    "parallel.compile": (_FREE, "only speed, and the order of some sums"),
    "parallel.precision": (_KEPT, "rounds otherwise"),
    "parallel.offload": (_FREE, "only memory and speed"),
    "parallel.threads": (_FREE, "only speed"),
    "logging": (_FREE, "only looks on"),
    "slurm": (_FREE, "where it runs; what a step holds does not depend on the number of ranks"),
    "vae_from": (_CONTENT, "compared by the VAE's fingerprint"),
    "text_from": (_CONTENT, "compared by the text encoder's fingerprint"),
    "pooled_from": (_CONTENT, "compared by the text encoder's fingerprint"),
    "model": (_KEPT, "the weights in the checkpoint are for it"),
    "diffusion": (_KEPT, "what is trained"),
    "frames": (_KEPT, "what is trained"),
    "lora": (_KEPT, "the weights in the checkpoint are for it"),
    "vae": (_KEPT, "the weights in the checkpoint are for it"),
    "loss": (_KEPT, "what is trained"),
}
"""Setting, or node of settings: what a start may do with it, and why. Each setting falls under one entry."""


_SHAPES = ("model", "vae", "lora")
"""Settings that may decide which weights there are."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Change:
    """What was accepted at one start of a run.

    step: from which step on. what: a line for each difference. ended_order: SHA-256 of the order that held before this
    step, where a new one begins there; None where the order went on.
    """

    step: int
    what: list[str]
    ended_order: str | None


@dataclass(kw_only=True, slots=True, frozen=True)
class DataSet:
    """The samples of one data set, or of its first shards: SHA-256 is over the shards' checksums, in order."""

    shards: int
    samples: int
    sha256: str

    @classmethod
    def of(cls, index: Index, number: int, shards: int | None = None) -> "DataSet":
        """Data set `number` of an index, or so many of its shards (at most as many as it has)."""
        first = sum(index.set_shards[:number])
        last = first + min(index.set_shards[number], index.set_shards[number] if shards is None else shards)
        low, high = index.shard.searchsorted([first, last])
        sums = "\n".join(index.shard_sha256[first:last])
        return cls(shards=last - first, samples=int(high - low), sha256=hashlib.sha256(sums.encode()).hexdigest())


@dataclass(kw_only=True, slots=True)
class DataState:
    """Which order a run follows. With the global step it says which samples come next.

    seed: of the run. order: SHA-256 of the order and of the samples that it is over. sets: the data sets.
    changes: what was declared so far, oldest first.
    """

    seed: int
    order: str
    sets: list[DataSet]
    changes: list[Change] = field(default_factory=list)

    @property
    def first_step(self) -> int:
        """The step at which the present order began: 0, or that of the last change of the order."""
        return max((change.step for change in self.changes if change.ended_order is not None), default=0)


@dataclass(kw_only=True, slots=True)
class Facts:
    """What a checkpoint says of its run besides the weights; `asdict` of it is JSON.

    kind: name of the objective. config: the whole configuration. inputs: fingerprints of what paths lead to, by the
    setting's name. data: the state of the data.
    """

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    data: DataState

    @classmethod
    def of(cls, config: dict[str, Any], kind: str, inputs: dict[str, str], index: Index, order: Order) -> "Facts":
        """The facts of a run that starts now. config: as plain values, as JSON has them."""
        both = f"{order.fingerprint()} {index.fingerprint()}"
        return cls(
            kind=kind,
            config=config,
            inputs=inputs,
            data=DataState(
                seed=config["run"]["seed"],
                order=hashlib.sha256(both.encode()).hexdigest(),
                sets=[DataSet.of(index, number) for number in range(len(index.set_shards))],
            ),
        )


def go_on(
    path: Path, step: int, saved: dict[str, Any], now: Facts, index: Index, accepted: Sequence[str]
) -> list[Change]:
    """The declared changes of a run that goes on from a checkpoint: those in it and, if any, one from this step on.

    Args:
        path: the checkpoint, for messages.
        step: its global step.
        saved: facts as it holds them.
        now: the present facts.
        index: the present samples.
        accepted: as `run.accept`.

    Raises:
        UserError: something differs that is neither free nor accepted; or `run.accept` names no setting.
    """
    if saved["kind"] != now.kind:
        raise UserError(
            f"{path}: holds another kind of model ({saved['kind']}, not {now.kind}); give run.name another name"
        )
    _check_names(accepted, [saved["config"], now.config])
    differences = [
        *_settings(saved["config"], now.config),
        *_inputs(saved["inputs"], now.inputs),
        *_samples([DataSet(**one) for one in saved["data"]["sets"]], index, now.config["data"]["shards"] is None),
    ]
    order = saved["data"]["order"]
    if order != now.data.order and not differences:
        differences.append(("data", "data: the samples come in another order, as another version of sora_lite has it"))
    refused = [(key, text) for key, text in differences if not any(_covers(one, key) for one in accepted)]
    if refused:
        names = ",".join(dict.fromkeys([*accepted, *(key for key, _ in refused)]))
        fits = " where the weights still fit" if any(_covers(one, key) for one in _SHAPES for key, _ in refused) else ""
        raise UserError(
            f"{path}: was made with other settings: {'; '.join(text for _, text in refused)}; give the old ones to go "
            f"on, 'run.accept=[{names}]' to change them from step {step} on{fits}, or give run.name another name"
        )
    changes = [Change(**one) for one in saved["data"]["changes"]]
    if differences:
        what, ended = [text for _, text in differences], order if order != now.data.order else None
        changes.append(Change(step=step, what=what, ended_order=ended))
    return changes


def rule_of(name: str) -> Rule:
    """The rule of a setting, named without numbers of rows."""
    (rule,) = {rule for key, (rule, _) in RULES.items() if _covers(key, name)}
    return rule


def _covers(node: str, name: str) -> bool:
    return name == node or name.startswith(f"{node}.")


def _check_names(accepted: Sequence[str], configs: Sequence[dict[str, Any]]) -> None:
    """Raise UserError for a name in `run.accept` that is no setting."""
    known = {*RULES, *(_plain(name) for config in configs for name, _ in _leaves(config, ""))}
    for name in accepted:
        if not any(_covers(name, one) for one in known):
            raise UserError(f"run.accept: {name} is no setting; name those that the error lists, such as data.fps")


def _plain(name: str) -> str:
    """A setting's name without numbers of rows."""
    return re.sub(r"\[\d+\]", "", name)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of all settings below a node; rows are numbered. An empty list counts as no setting."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{number}]")
    elif value not in (None, []):
        yield name, value


def _settings(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, what differs) of the settings that are not free to change."""
    was, is_now = dict(_leaves(saved, "")), dict(_leaves(now, ""))
    for name in dict.fromkeys([*is_now, *was]):
        one, other = was.get(name), is_now.get(name)
        if one != other and rule_of(_plain(name)) is Rule.kept:
            yield _plain(name), f"{name} was {json.dumps(one)}, is {json.dumps(other)}"


def _inputs(saved: dict[str, str], now: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(name, what differs) of what paths lead to."""
    for name in dict.fromkeys([*now, *saved]):
        one, other = saved.get(name, "none"), now.get(name, "none")
        if one != other:
            yield name, f"{name} leads to another one (its fingerprint was {one[:16]}, is {other[:16]})"


def _samples(saved: list[DataSet], index: Index, in_rows: bool) -> Iterator[tuple[str, str]]:
    """(name, what differs) of the data sets. in_rows: whether they are given by data.sets."""
    for number in range(max(len(saved), len(index.set_shards))):
        name = f"data.sets[{number}].shards" if in_rows else "data.shards"
        if number >= len(index.set_shards):
            text = f"{name}: a data set with {saved[number].samples:,} samples is gone"
        elif number >= len(saved):
            text = f"{name}: is a new data set with {DataSet.of(index, number).samples:,} samples"
        else:
            what = _difference(saved[number], index, number)
            text = f"{name}: {what}" if what else ""
        if text:
            yield _plain(name), text


def _difference(was: DataSet, index: Index, number: int) -> str:
    """What became of a data set, empty for nothing."""
    whole, first = DataSet.of(index, number), DataSet.of(index, number, was.shards)
    if first.sha256 != was.sha256:
        return (
            f"leads to other shards ({was.samples:,} samples in {was.shards}, now {whole.samples:,} in {whole.shards})"
        )
    parts = []
    if first.samples != was.samples:
        parts.append(f"{was.samples - first.samples:,} samples were taken down")
    if whole.shards > was.shards:
        added = whole.samples - first.samples
        parts.append(f"{added:,} samples in {whole.shards - was.shards} shards were added to {was.samples:,}")
    return " and ".join(parts)
