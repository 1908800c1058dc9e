"""The training loop, one for the VAE and the DiT.

run folder: RUN/
  config.yaml          the resolved configuration of the last attempt
  metrics.jsonl        the record
  events.jsonl         updates that were left out, and rollbacks, with the samples of their steps
  attempts/            who may change the run, and with what each attempt ran; see `training.lease`
  logs/                what each rank said
  watchdog/            signs of life of the ranks, and their stacks where they stopped
  checkpoints/         see `training.store`
  samples/             contact sheets
"""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from sora_lite.config import BaseTrainConfig, OnDamage, SpikeAction
from sora_lite.data.batch import ClipBatch
from sora_lite.data.compiled import open_buckets
from sora_lite.data.index import Index
from sora_lite.data.joined import Joined
from sora_lite.errors import Interrupted, UserError
from sora_lite.parallel.apply import apply_parallel
from sora_lite.parallel.env import Rank
from sora_lite.training.account import Account
from sora_lite.training.attempt import EVENTS, code_version, describe_attempt, event_line
from sora_lite.training.checkpoint import Saver
from sora_lite.training.data_record import DataRecord
from sora_lite.training.ema import EMA
from sora_lite.training.engine import Engine
from sora_lite.training.guards import UpdateGuard
from sora_lite.training.handover import Handover
from sora_lite.training.inputs import load_made, load_split, make_loader, make_rows
from sora_lite.training.lease import Held
from sora_lite.training.lines import Lines
from sora_lite.training.metrics import peak_flops
from sora_lite.training.objective import HeldOut, Objective
from sora_lite.training.optim import learning_rate
from sora_lite.training.replicas import ReplicaCheck
from sora_lite.training.restore import restore
from sora_lite.training.resume import Facts, go_on
from sora_lite.training.signals import StopFlag
from sora_lite.training.step import StepResult, train_step
from sora_lite.training.tracking import Tracker
from sora_lite.training.watchdog import Watchdog

STATISTICS_SAMPLES = 512
"""Training clips that `Objective.finish` sees."""


class Trainer:
    """A run: everything that is built once, and the loop. First `resume`, then `run`; building changes no file.

    Args:
        config: checked configuration.
        objective: what is trained.
        rank: this process.

    Raises:
        UserError: the data, a checkpoint or the layout does not fit the configuration.
    """

    def __init__(self, config: BaseTrainConfig, objective: Objective, rank: Rank) -> None:
        self.config, self.objective, self.rank = config, objective, rank
        self.folder = Path(config.run.root) / config.run.name
        index = load_split(config.data, "train", rank)
        rank.main_first(lambda: open_buckets(index, make_rows(config.data, objective)))
        made = load_made(config.data, index, "train", objective, rank)
        self.loader = make_loader(config, index, objective, rank, **made)
        plain: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
        inputs = objective.inputs()
        inputs |= {config.data.key_of_all(what): one.fingerprint() for what, one in made.items() if one is not None}
        self.facts = Facts.of(plain, objective.name, inputs, index, self.loader.order)
        bucket = self.loader.order.buckets[0]
        micro = bucket.batch // rank.world_size // config.parallel.accumulation

        def held_out(index: Index, count: int, made: dict[str, Joined | None]) -> HeldOut:
            return HeldOut(
                index,
                count=count,
                shape=bucket.shape,
                fps=bucket.fps,
                rank=rank,
                batch=micro,
                **made,
            )

        validation = load_split(config.data, "validation", rank, required=False)
        self.validation = held_out(
            validation,
            config.run.validation_samples,
            load_made(config.data, validation, "validation", objective, rank),
        )
        self.statistics = held_out(index, STATISTICS_SAMPLES, made)
        apply_parallel(objective.module, config.parallel)
        self.engine = Engine(
            objective.module, optim=config.optim, parallel=config.parallel, rank=rank, global_batch=bucket.batch
        )
        optim = config.optim
        self.ema = EMA(self.engine, optim.ema_decay, on_cpu=optim.ema_on_cpu) if optim.ema_decay > 0 else None
        self.wandb_id: str | None = None
        self.tracker: Tracker | None = None
        self.events = Lines(self.folder / EVENTS)
        self.data = DataRecord(self.folder, config.data, self.loader, rank)
        self.guard = UpdateGuard(config.guard)
        self.left_out = self.rollbacks = 0
        self.jump = 0
        """Steps of data that rollbacks have passed over: step n trains on step n + jump of the order."""
        self.account = Account(objective, self.loader, rank)
        self.finished = False
        self.step = 0
        self.replicas = self._replicas(inputs)

    def _replicas(self, inputs: dict[str, str]) -> ReplicaCheck:
        """What all ranks start with, and what is frozen: whole on each, but for the module's own at ZeRO 3."""
        facts = {"configuration": self.config, "code": code_version(), "inputs": inputs}
        whole, own = self.objective.frozen(), self.engine.frozen()
        whole, parts = (whole, own) if self.engine.stage == 3 else (whole | own, {})
        return ReplicaCheck(self.rank, whole, parts, facts)

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Train to `run.steps`, from the newest checkpoint if there is one.

        Raises:
            Interrupted: a signal asked to stop; what was trained is saved.
        """
        run = self.config.run
        if self.step >= run.steps:
            if not self.finished:  # run.steps was lowered to where the run is, or below
                self._finish()
                self._save()
                self.saver.finish()
            self._say(f"{self.folder}: already trained to step {self.step}")
            return
        self.finished = False
        self._start_tracking()
        # Closed by an error too: its message then has a line of its own, and W&B keeps what it was told.
        with contextlib.ExitStack() as ending:
            self.stop = ending.enter_context(StopFlag())  # first: another signal must not cut off what follows either
            if self.tracker:
                ending.callback(self.tracker.finish)
            ending.callback(self.events.close)
            self.watchdog = ending.enter_context(
                Watchdog(
                    self.folder / "watchdog",
                    rank=self.rank.rank,
                    world_size=self.rank.world_size,
                    seconds=run.watchdog_seconds,
                )
            )
            # Validation and sampling may take longer than a step: each forward pass is progress.
            hook = self.engine.module.register_forward_pre_hook(lambda *_: self.watchdog.go_on())
            ending.callback(hook.remove)
            self.progress = ending.enter_context(
                tqdm(
                    total=run.steps,
                    initial=self.step,
                    desc=run.name,
                    unit="step",
                    disable=not self.rank.is_main,
                    mininterval=1,
                )
            )
            self.saver.waiting = lambda: self.watchdog.beat(f"step {self.step}: waiting for a checkpoint")
            while self.step < run.steps:
                self._train_until_rollback()
            self.saver.finish()
        self._say(f"{self.folder}: trained to step {self.step}")

    def _train_until_rollback(self) -> None:
        """Steps from the present one on, to the end or to a rollback; side jobs in their order after each."""
        run = self.config.run
        self.account.begin()
        batches = Handover(self.loader, self.step + self.jump, run.steps + self.jump, self.rank.device)
        while self.step < run.steps:
            self.watchdog.beat(f"step {self.step}: waiting for data")
            wait = time.perf_counter()
            micro_batches = batches.take()
            self.account.add_wait(time.perf_counter() - wait)
            self.watchdog.beat(f"step {self.step}: forward, backward, update")
            lr = learning_rate(self.step, self.config.optim, run.steps)
            result = train_step(
                self.objective,
                self.engine,
                self.ema,
                self.guard,
                micro_batches,
                self.step,
                lr,
                meanwhile=batches.ahead,
                stop=bool(self.stop.received) or self.lease.is_taken_over(),
            )
            if result.stopping:  # an attempt that another one took the run from saves nothing
                self.rank.together(self.lease.check)
            self.step += 1
            self.progress.update()
            self.saver.border()
            self._count(result, micro_batches)
            if result.left_out and self._rolls_back(result, micro_batches):
                return
            # A checkpoint ends a line of the record too: whoever goes on from it averages over the same steps.
            saves = self._saves() or result.stopping
            if self._due(run.log_every) or saves:
                self._log(lr, result.grad_norm)
            if self._due(run.validate_every):
                self.watchdog.beat(f"step {self.step}: validating")
                self._validate()
                self.account.restart()
            if self._due(run.sample_every):
                self.watchdog.beat(f"step {self.step}: drawing samples")
                self._sample()
                self.account.restart()
            if self._due(run.check_every) or saves:
                self.replicas.check(self.engine.replicated())
            if self.step == run.steps:
                self._finish()
            if saves:
                self.watchdog.beat(f"step {self.step}: saving")
                self._save()
                self.account.restart()
            if result.stopping and self.step < run.steps:
                self.saver.finish()
                raise Interrupted(f"{self.folder}: asked to stop by {self._stop_reason()}; saved at step {self.step}")

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.run.steps)

    def _saves(self) -> bool:
        # While a checkpoint is on its way to the disk, the one before it is what a kill leaves: two must fit in. Those
        # in between come on top of the multiples of `save_every`, which `keep_every` counts on.
        every = self.config.run.save_every
        return self._due(every) or (self.saver.background and self.step % every == every // 2)

    def _stop_reason(self) -> str:
        return ", ".join(sorted({one for one in self.rank.gather(self.stop.received) if one}))

    def _rolls_back(self, result: StepResult, batches: Sequence[ClipBatch]) -> bool:
        """Say that the update of the step before this one was left out, with its samples; go back where configured.

        Raises:
            UserError: on all ranks, if too many updates were left out or rolled back.
        """
        self.left_out += 1
        losses = [float(one.loss) for one in result.losses]
        known = [loss if math.isfinite(loss) else None for loss in losses]  # JSON has no NaN
        mine = {"losses": known, "keys": [batch.keys for batch in batches]}
        samples = self.rank.gather(mine)
        step, guard = self.step - 1, self.config.guard
        event = {"step": step, "data_step": step + self.jump, "left_out": result.left_out, "ranks": samples}
        bad = [n for n, one in enumerate(samples) if None in one["losses"]]
        whose = f" on rank {', '.join(map(str, bad))}" if bad else ""
        self._say(f"step {step}: update left out, {result.left_out}{whose}; samples in {self.folder / EVENTS}")
        if self.rank.is_main:
            self.events.add([event_line(event)])
        if self.guard.exhausted:
            raise UserError(
                f"guard.max_skips: more than {guard.max_skips} updates were left out within {guard.window} steps, the "
                f"last since {result.left_out}; {self.folder / EVENTS} names "
                "the samples; lower optim.lr, or leave bad data out"
            )
        finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        if guard.spikes is not SpikeAction.rollback or not finite:
            return False
        self.saver.settle()
        if self.saver.newest is None:
            return False
        self._roll_back(step + self.jump)
        return True

    def _roll_back(self, data_step: int) -> None:
        """Go back to the newest checkpoint, and on behind the data of `data_step`."""
        guard, rollbacks = self.config.guard, self.rollbacks + 1
        if rollbacks > guard.max_rollbacks:
            raise UserError(
                f"guard.max_rollbacks: a spike after {guard.max_rollbacks} rollbacks; {self.folder / EVENTS} names the "
                "samples of all of them; lower optim.lr, or leave bad data out"
            )
        self.step = self._restore()
        self.rollbacks, self.jump = rollbacks, data_step + 1 - self.step
        self._say(f"rolled back to step {self.step}; goes on with the data of step {data_step + 1}")
        if self.tracker:
            self.tracker.rewind(self.step)
        self.progress.n = self.step
        self._save()  # or an attempt that is killed now would meet the spike again

    def _count(self, result: StepResult, batches: Sequence[ClipBatch]) -> None:
        self.account.count(result.losses, batches)
        self.data.count(batches)
        for one in (one for batch in batches for one in batch.bad):
            self._say(f"{one.shard}: sample {one.key} replaced by {one.replaced_by}: {one.reason}", everyone=True)

    # ------------------------------------------------------------------------------------------------ side jobs

    def _log(self, lr: float, grad_norm: float) -> None:
        values = self.account.line(self._peak)
        values |= {"grad_norm": grad_norm, "lr": lr, "left_out": self.left_out}
        values |= self.data.line(self.step + self.jump)
        self.account.restart()
        if self.tracker:
            self.tracker.log(self.step, values)
        if "loss" in values:
            self.progress.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def _validate(self) -> None:
        if self.validation.count == 0:
            return
        with self.engine.swapped(self.ema):
            values = self.objective.validate(self.engine, self.validation)
        if self.tracker:
            self.tracker.log(self.step, values | {"flops": self.account.flops})

    def _sample(self) -> None:
        if self.validation.count == 0:
            return
        path = self.folder / "samples" / f"step_{self.step:08d}.png"
        with self.engine.swapped(self.ema):
            try:
                self.objective.sample(self.engine, self.validation, path)
            except OSError as error:  # rank 0's, when all is drawn
                self._say(f"warning: {path}: cannot be written ({error.strerror})")
                return
        if self.tracker:
            self.tracker.log_image(self.step, "samples", path)

    def _finish(self) -> None:
        with self.engine.swapped(self.ema):
            self.objective.finish(self.engine, self.statistics)
        self.finished = True

    # ------------------------------------------------------------------------------------------------ state

    def _save(self) -> None:
        extra = {
            "facts": asdict(self.facts),
            "objective": self.objective.state(),
            "wandb_id": self.rank.gather(self.tracker.wandb_id if self.tracker else self.wandb_id)[0],
            "finished": self.finished,
            "guard": {
                "updates": self.guard.state(),
                "left_out": self.left_out,
                "rollbacks": self.rollbacks,
                "jump": self.jump,
            },
            "flops": self.account.flops,
            "clip": list(self.loader.order.buckets[0].shape),
            "fps": self.loader.order.buckets[0].fps or 0.0,
        }
        self.saver.save(self.step, extra)

    def resume(self, lease: Held) -> None:
        """Go on from the newest good checkpoint, if there is one, and write down what this attempt runs with."""
        run = self.config.run
        self.lease = lease
        # First: no attempt that was taken for dead can move the pointer after this.
        self.saver = Saver(
            self.folder / "checkpoints",
            {self.objective.name: self.engine},
            {self.objective.name: self.ema},
            self.rank,
            keep_last=run.keep_last,
            keep_every=run.keep_every,
            background=run.save_in_background and run.save_every > 1,
            on_failure=run.on_failed_save,
            token=lease.token,
            fence=lease.check,
            say=self._say,
        )
        self.step = self._restore()
        if self.rank.is_main:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.structured(self.config), self.folder / "config.yaml")
            lease.note(describe_attempt(step=self.step, world_size=self.rank.world_size))

    def _restore(self) -> int:
        """Load the newest good checkpoint, if there is one. Returns the step that it was made at."""
        state = restore(
            self.saver,
            check=lambda path, state: self._agree(path, state["step"], state["extra"]["facts"]),
            fall_back=self.config.run.on_damage is OnDamage.fall_back,
        )
        if state is None:
            return 0
        self.loader.begin_order(self.facts.data.first_step)
        self.wandb_id = state["extra"]["wandb_id"]
        self.finished = state["extra"]["finished"]
        guard = state["extra"]["guard"]
        self.guard.load_state(guard["updates"])
        self.left_out, self.rollbacks = guard["left_out"], guard["rollbacks"]
        # In an order that begins here nothing was passed over.
        self.jump = guard["jump"] if state["step"] > self.facts.data.first_step else 0
        self.account.flops = state["extra"]["flops"]
        self._say(f"{self.folder}: goes on from step {state['step']}")
        return int(state["step"])

    def _agree(self, path: Path, step: int, saved: dict[str, Any]) -> None:
        before = len(saved["data"]["changes"])
        self.facts.data.changes = go_on(path, step, saved, self.facts, self.loader.index, self.config.run.accept)
        for change in self.facts.data.changes[before:]:
            self._say(f"run.accept: from step {step} on, {'; '.join(change.what)}")

    def _start_tracking(self) -> None:
        self._peak = peak_flops(self.rank.device, self.config.logging.peak_tflops)
        if self.rank.is_main:
            self.tracker = Tracker(
                self.folder,
                self.config.logging,
                resume_step=self.step,
                wandb_id=self.wandb_id,
                config=self.facts.config,
            )

    def _say(self, text: str, *, everyone: bool = False) -> None:
        if self.rank.is_main or everyone:
            tqdm.write(text)
