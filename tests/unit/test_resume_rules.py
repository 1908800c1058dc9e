"""What a run that goes on compares with its checkpoint, what it refuses, and what a declared change does."""

import json
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from sora_lite.config import BucketRule, DataConfig, RunConfig, SetRule, TrainConfig
from sora_lite.data.buckets import Row, assign
from sora_lite.data.index import COLUMNS, Index, Origin
from sora_lite.data.order import Order
from sora_lite.errors import UserError
from sora_lite.training.resume import Change, Facts, go_on

PATH = Path("runs/trial/checkpoints/step_00000040")
CLIPS = Origin(content="clips", config_hash="", encoding={})


@dataclass
class Run:
    """A configuration and the samples that its data sets hold: for each, the samples of its shards."""

    config: TrainConfig
    sets: list[list[int]]
    vae: str = "a" * 64
    gone: int = 0
    salt: str = ""

    @property
    def index(self) -> Index:
        sizes = [size for one in self.sets for size in one]
        shard = np.repeat(np.arange(len(sizes)), sizes)[self.gone :]
        columns = {name: np.ones(len(shard), kind) for name, kind in COLUMNS.items()}
        columns |= {"shard": shard.astype(np.int32), "frames": np.full(len(shard), 17, np.int32)}
        names = [f"{self.salt}{number}-{place}" for number, one in enumerate(self.sets) for place in range(len(one))]
        return Index(
            shard_paths=[Path(name) for name in names], shard_bytes=[0] * len(names),
            shard_sha256=names, set_shards=[len(one) for one in self.sets],
            counts=[], origins=[CLIPS for _ in self.sets], removed=["x"] * self.gone, by_key=np.arange(1), **columns,
        )  # fmt: skip

    @property
    def order(self) -> Order:
        index = self.index
        columns = {"keys": index.keys, "frames": index.frames, "height": index.height, "width": index.width}
        buckets = assign([Row(shape=(17, 8, 8), keep=1.0, batch=8)], **columns, own_fps=index.fps, shard=index.shard)
        weights = [row.weight for row in self.config.data.sets if row.weight is not None] or None
        return Order(
            buckets, seed=self.config.run.seed, block_shards=2, set_shards=index.set_shards, weights=weights
        )  # fmt: skip

    @property
    def facts(self) -> Facts:
        config: Any = OmegaConf.to_container(OmegaConf.structured(self.config), enum_to_str=True)
        return Facts.of(config, "dit", {"vae_from": self.vae}, self.index, self.order)

    def accepting(self, *names: str) -> "Run":
        run = deepcopy(self)
        run.config.run.accept = list(names)
        return run


def trial(**changes: Any) -> Run:
    """A run over two data sets; changes are settings, `__` for the dot."""
    config = TrainConfig(
        run=RunConfig(name="trial"),
        data=DataConfig(
            shards=None,
            sets=[SetRule(shards="a", weight=3.0), SetRule(shards="b", weight=1.0)],
            buckets=[BucketRule(resolution=[8, 8], frames=17, batch=8)],
        ),
        vae_from="vae",
    )
    for name, value in changes.items():
        node, _, key = name.rpartition("__")
        setattr(getattr(config, node) if node else config, key, value)
    return Run(config, [[20, 30], [10]])


def saved(run: Run, changes: list[Change] | None = None) -> dict[str, Any]:
    facts = run.facts
    facts.data.changes = changes or []
    return json.loads(json.dumps(asdict(facts)))


def resume(before: dict[str, Any], now: Run, step: int = 40) -> list[Change]:
    return go_on(PATH, step, before, now.facts, now.index, now.config.run.accept)


def refusal(before: Run, now: Run) -> str:
    with pytest.raises(UserError) as caught:
        resume(saved(before), now)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(PATH)) and "run.name another name" in text
    return text


def test_what_is_free_changes_without_a_word() -> None:
    now = trial(run__steps=9, optim__lr=1.0, parallel__zero_stage=3, parallel__accumulation=2, data__workers=7)
    now.config.slurm.nodes, now.config.logging.project, now.config.vae_from = 9, "other", "elsewhere/vae"
    now.config.data.sets[0].shards = "moved/here"
    assert resume(saved(trial()), now) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data__fps": 8.0}, "data.fps was null, is 8.0"),
        ({"optim__betas": [0.9, 0.99]}, "optim.betas was [0.9, 0.95], is [0.9, 0.99]"),
        ({"model__width": 96}, "model.width was 384, is 96"),
        ({"model__text": None}, "model.text.width was 128, is null"),
        ({"run__seed": 1}, "run.seed was 0, is 1"),
        (
            {"data__buckets": [BucketRule(resolution=[8, 8], frames=17, batch=8, keep=0.5)]},
            "data.buckets[0].keep was 1.0",
        ),
    ],
)
def test_other_settings_are_refused_by_name_and_accepted_by_name(changes: dict[str, Any], text: str) -> None:
    now = trial(**changes)
    error = refusal(trial(), now)
    assert text in error
    names = error.partition("run.accept=[")[2].partition("]")[0].split(",")
    (change,) = resume(saved(trial()), now.accepting(*names))
    assert change.step == 40 and text in "; ".join(change.what)
    # Only what alters the order begins a new one.
    assert (change.ended_order is not None) == (now.order.fingerprint() != trial().order.fingerprint())
    # A whole node may be named; another one does not help.
    assert resume(saved(trial()), now.accepting(names[0].partition(".")[0]))
    with pytest.raises(UserError, match=r"run\.accept=\[optim\.eps,"):
        resume(saved(trial()), now.accepting("optim.eps"))


def test_all_differences_are_named_at_once() -> None:
    now = trial(data__fps=8.0, data__flip=True)
    now.config.data.sets[1].weight, now.vae = 2.0, "b" * 64
    error = refusal(trial(), now)
    assert "data.sets[1].weight was 1.0, is 2.0" in error and "vae_from leads to another one" in error
    assert "'run.accept=[data.sets.weight,data.fps,data.flip,vae_from]' to change them from step 40 on" in error


@pytest.mark.parametrize(
    ("sets", "gone", "text"),
    [
        ([[20, 30, 5, 5], [10]], 0, "data.sets[0].shards: 10 samples in 2 shards were added to 50"),
        ([[20, 30], [10, 4]], 0, "data.sets[1].shards: 4 samples in 1 shards were added to 10"),
        ([[20, 30, 5], [10]], 2, "2 samples were taken down and 5 samples in 1 shards were added to 50"),
        ([[20], [10]], 0, "data.sets[0].shards: leads to other shards (50 samples in 2, now 20 in 1)"),
    ],
)
def test_data_that_changed(sets: list[list[int]], gone: int, text: str) -> None:
    now = replace(trial(), sets=sets, gone=gone)
    error = refusal(trial(), now)
    assert text in error and "run.accept=[data.sets.shards]" in error
    (change,) = resume(saved(trial()), now.accepting("data.sets.shards"))
    assert text in change.what[0] and change.ended_order == trial().facts.data.order


def test_data_sets_that_come_and_go() -> None:
    now = trial(data__sets=[SetRule(shards=name, weight=1.0) for name in "abc"])
    now.sets = [*now.sets, [7]]
    error = refusal(trial(), now)
    assert "data.sets[2].shards: is a new data set with 7 samples" in error and "data.sets[2].weight was null" in error
    now = trial(data__sets=[SetRule(shards="a", weight=3.0)])
    now.sets = now.sets[:1]
    assert "data.sets[1].shards: a data set with 10 samples is gone" in refusal(trial(), now)
    assert "data.sets[0].shards: leads to other shards" in refusal(trial(), replace(trial(), salt="z"))


def test_a_change_is_said_once_and_stays() -> None:
    """The steps before keep their order, the new one begins at its step, and later starts need no further word."""
    now = trial()
    now.config.data.sets[1].weight = 2.0
    changes = resume(saved(trial()), now.accepting("data.sets.weight"))
    assert resume(saved(now, changes), now, step=60) == changes
    more = replace(now, sets=[[20, 30], [10, 4]]).accepting("data")
    both = resume(saved(now, changes), more, step=60)
    assert [change.step for change in both] == [40, 60]
    facts = more.facts
    facts.data.changes = both
    assert facts.data.first_step == 60 and both[0].ended_order != both[1].ended_order
    # What does not alter the order leaves its beginning.
    calm = trial(optim__clip=0.5)
    calm.config.data.sets[1].weight = 2.0
    third = resume(saved(now, changes), calm.accepting("optim.clip"), step=50)
    facts.data.changes = third
    assert facts.data.first_step == 40 and third[1].ended_order is None


def test_an_order_that_only_the_program_changed() -> None:
    before = saved(trial())
    before["data"]["order"] = "0" * 64
    with pytest.raises(UserError, match="another version of sora_lite has it"):
        resume(before, trial())
    assert resume(before, trial().accepting("data"))[0].ended_order == "0" * 64


def test_another_kind_is_never_accepted() -> None:
    before = saved(trial())
    before["kind"] = "vae"
    with pytest.raises(UserError, match="another kind of model"):
        resume(before, trial().accepting("run", "data", "model"))


@pytest.mark.parametrize("name", ["data.wieght", "weight", "data.sets[0].weight", ""])
def test_a_mistyped_acceptance(name: str) -> None:
    with pytest.raises(UserError, match=r"run\.accept: .* is no setting"):
        resume(saved(trial()), trial().accepting(name))


def test_an_order_that_begins_later() -> None:
    """It depends on its first step and nothing before, and counts from there."""
    order = trial().order
    late = order.beginning_at(40)
    assert late.fingerprint() == order.fingerprint()
    assert late.step(41)[0].samples.tolist() == order.beginning_at(40).step(41)[0].samples.tolist()
    assert [late.step(s)[0].samples.tolist() for s in range(40, 44)] != [
        order.step(s)[0].samples.tolist() for s in range(4)
    ]
    assert late.passes(47) == order.passes(7)
    with pytest.raises(ValueError, match="begins at 40"):
        late.step(39)
