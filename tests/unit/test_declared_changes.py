"""Runs whose data and shares change on the way, by random chains of declared changes: what a step holds is a function
of the seed, the step at which the present order began, and the present data."""

import json
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_lite.data.buckets import Row, assign
from sora_lite.data.index import COLUMNS, Index, Origin
from sora_lite.data.order import Order, rank_positions
from sora_lite.errors import UserError
from sora_lite.training.resume import Facts, go_on

SEED = 11
PATH = Path("runs/trial/checkpoints/step_1")
ACCEPT = ["data.sets.shards", "data.sets.weight", "data.image_ratio", "data.buckets"]


@dataclass(kw_only=True)
class Present:
    """What a start of a run finds: the sizes of each data set's shards, and how they are mixed.

    Of every three samples in a shard the first is a still.
    """

    sets: list[list[int]]
    weights: list[float]
    ratio: float | None
    batch: int

    def index(self) -> Index:
        shards = [(number, place, size) for number, one in enumerate(self.sets) for place, size in enumerate(one)]
        names = [f"{number}-{place}-{size}" for number, place, size in shards]
        shard = np.repeat(np.arange(len(shards)), [size for _, _, size in shards])
        keys = [f"{number}.{place}.{i}" for number, place, size in shards for i in range(size)]
        columns: dict[str, Any] = {name: np.ones(len(shard), kind) for name, kind in COLUMNS.items()}
        columns |= {"shard": shard.astype(np.int32), "keys": np.array(keys, dtype="S")}
        inside = np.concatenate([np.arange(size) for _, _, size in shards])
        columns["frames"] = np.where(inside % 3 == 0, 1, 17).astype(np.int32)
        return Index(
            shard_paths=[Path(name) for name in names], shard_sha256=names, shard_bytes=[0] * len(names),
            set_shards=[len(one) for one in self.sets], counts=[],
            origins=[Origin(content="clips", config_hash="", encoding={})] * len(self.sets), removed=[],
            by_key=np.arange(1), **columns,
        )  # fmt: skip

    def order(self) -> Order:
        index = self.index()
        rows = [Row(shape=(17, 8, 8), keep=1.0, batch=self.batch), Row(shape=(1, 8, 8), keep=1.0, batch=8)]
        columns = {"keys": index.keys, "frames": index.frames, "height": index.height, "width": index.width}
        buckets = assign(rows, **columns, own_fps=index.fps, shard=index.shard)
        return Order(
            buckets, seed=SEED, block_shards=2, set_shards=index.set_shards, weights=self.weights,
            image_ratio=self.ratio,
        )  # fmt: skip

    def facts(self) -> Facts:
        sets = [{"shards": str(number), "weight": weight} for number, weight in enumerate(self.weights)]
        buckets = [{"frames": 1, "batch": 8}, {"frames": 17, "batch": self.batch}]
        data = {"shards": None, "sets": sets, "image_ratio": self.ratio, "buckets": buckets}
        return Facts.of({"run": {"seed": SEED}, "data": data}, "dit", {}, self.index(), self.order())


def keys(present: Present, order: Order, step: int) -> list[str]:
    index, (micro,) = present.index(), order.step(step)
    return [index.key(int(sample)) for sample in micro.samples]


sizes = st.lists(st.integers(3, 9), min_size=1, max_size=3)
weights = st.sampled_from([0.5, 1.0, 2.0, 7.0])
ratios = st.none() | st.sampled_from([0.2, 0.5])


@st.composite
def starts(draw: st.DrawFn) -> Present:
    sets = draw(st.lists(sizes, min_size=1, max_size=3))
    some = draw(st.lists(weights, min_size=len(sets), max_size=len(sets)))
    return Present(sets=sets, weights=some, ratio=draw(ratios), batch=draw(st.sampled_from([4, 8])))


@st.composite
def changed(draw: st.DrawFn, before: Present) -> Present:
    """What comes next: one or more changes, or none."""
    now = deepcopy(before)
    for what in draw(st.lists(st.sampled_from(["shards", "set", "weight", "ratio", "batch"]), max_size=3, unique=True)):
        match what:
            case "shards":
                now.sets[draw(st.integers(0, len(now.sets) - 1))] += draw(sizes)
            case "set":
                now.sets, now.weights = [*now.sets, draw(sizes)], [*now.weights, draw(weights)]
            case "weight":
                now.weights[draw(st.integers(0, len(now.weights) - 1))] = draw(weights)
            case "ratio":
                now.ratio = draw(ratios)
            case "batch":
                now.batch = draw(st.sampled_from([4, 8, 16]))
    return now


class Chain:
    """A run over several starts, as a trainer makes it: its state is what a checkpoint holds, as JSON."""

    def __init__(self, present: Present) -> None:
        self.present, self.step, self.state = present, 0, json.dumps(asdict(present.facts()))
        self.seen: list[list[str]] = []
        self.began = 0

    def go_on(self, present: Present, accept: list[str]) -> None:
        """Start again at the present step. Raises UserError where the change is not accepted."""
        facts = present.facts()
        facts.data.changes = go_on(PATH, self.step, json.loads(self.state), facts, present.index(), accept)
        self.present, self.state, self.began = present, json.dumps(asdict(facts)), facts.data.first_step

    def train(self, steps: int) -> None:
        order = self.present.order().beginning_at(self.began)
        self.seen += [keys(self.present, order, step) for step in range(self.step, self.step + steps)]
        self.step += steps


@settings(deadline=None, max_examples=60)
@given(first=starts(), data=st.data())
def test_a_chain_of_changes_is_a_function_of_seed_first_step_and_present_data(first: Present, data: Any) -> None:
    run, began, parts = Chain(first), 0, []
    for _ in range(data.draw(st.integers(1, 4))):
        run.train(data.draw(st.integers(0, 9)))
        parts.append((began, run.step, run.present))
        now = data.draw(changed(run.present))
        before, seen, altered = run.state, deepcopy(run.seen), now.facts().data.order != run.present.facts().data.order
        if now != run.present:
            with pytest.raises(UserError, match=rf"run\.accept=.* to change them from step {run.step} on"):
                run.go_on(now, [])
            assert run.state == before
        run.go_on(now, ACCEPT)
        began = run.step if altered else began
        assert run.began == began and run.seen == seen
        changes = json.loads(run.state)["data"]["changes"]
        assert len(changes) == len(json.loads(before)["data"]["changes"]) + (now != parts[-1][2])
        run.go_on(now, [])  # stopped and started again: nothing further is to be said, and nothing changes
        assert run.began == began and json.loads(run.state)["data"]["changes"] == changes
    run.train(6)
    parts.append((began, run.step, run.present))
    start = 0
    for began, stop, present in parts:
        # An uninterrupted run that had this data from `began` on, which knows nothing of what came before.
        order = present.order().beginning_at(began)
        assert [keys(present, order, step) for step in range(start, stop)] == run.seen[start:stop]
        start = stop
    assert start == run.step == len(run.seen)


@settings(deadline=None, max_examples=30)
@given(first=starts(), steps=st.integers(1, 20), data=st.data())
def test_after_a_change_each_sample_comes_once_a_pass_and_ranks_share_it_out(
    first: Present, steps: int, data: Any
) -> None:
    run = Chain(first)
    run.train(steps)
    now = data.draw(changed(first))
    run.go_on(replace(now, ratio=None), ACCEPT)
    order = run.present.order().beginning_at(run.began)
    for step in range(steps, steps + 12):
        (micro,) = order.step(step)
        batch = len(micro.samples)
        world = data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if batch % n == 0]))
        places = [rank_positions(batch, rank=rank, world_size=world, accumulation=1)[0] for rank in range(world)]
        assert np.concatenate(places).tolist() == list(range(batch))
    if run.began == steps:
        # Within a bucket and a data set all of the present samples, added ones too, come before any comes again.
        counts: dict[int, int] = {}
        for step in range(steps, steps + 60):
            for sample in order.step(step)[0].samples.tolist():
                counts[sample] = counts.get(sample, 0) + 1
        sets = run.present.index().set_of(np.arange(len(run.present.index())))
        for bucket in order.buckets:
            for number in range(len(run.present.sets)):
                members = [counts.get(int(one), 0) for one in bucket.samples if sets[one] == number]
                assert not members or max(members) - min(members) <= 1
