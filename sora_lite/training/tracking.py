"""The record of a run, `metrics.jsonl`, and its view in Weights & Biases.

W&B is fed by a thread of its own: that its server is away, slow or refuses the key neither stops nor slows training.
"""

import contextlib
import json
import math
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sora_lite.config import LoggingConfig, WandbMode
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.training.lines import Lines

QUEUED = 10_000
"""Lines that wait for W&B at most; what comes on top of them is counted and left out of the view."""
PATIENCE_SECONDS = 30.0
"""How long the end of a run waits for W&B."""


class Tracker:
    """Writes metrics of one run. Made on rank 0 only.

    A run that goes on from step n first drops what a killed attempt had written of later steps, because they come
    again; so steps in the record only ever rise.

    Args:
        run: the run's folder.
        resume_step: step of the checkpoint that is gone on from, 0 for a new run.
        wandb_id: of the earlier attempts, None for a new run.
        config: shown in W&B.
    """

    def __init__(
        self, run: Path, logging: LoggingConfig, *, resume_step: int, wandb_id: str | None, config: dict[str, Any]
    ) -> None:
        self._path = run / RECORD
        self._lines = Lines(self._path)
        self.rewind(resume_step)
        self._view = None
        if logging.wandb is not WandbMode.disabled:
            self._view = _WandbView(run, logging, wandb_id or secrets.token_hex(4), config)
        self.wandb_id: str | None = self._view.id if self._view else None

    def rewind(self, step: int) -> None:
        """Drop what the record holds of steps after `step`."""
        self._lines.close()
        kept = [line for line in read_record(self._path) if line["step"] <= step]
        temporary = self._path.with_name(f"{RECORD}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self._path)
        self._lines = Lines(self._path)
        self._lines.add(())  # open from now on: who is taken for dead and lives writes into a file that was replaced

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write one line. Values are numbers or short texts."""
        # JSON knows no NaN: what is not finite is null in the record.
        finite = {name: v if not isinstance(v, float) or math.isfinite(v) else None for name, v in values.items()}
        self._lines.add([json.dumps({"step": step, **finite})])
        if self._view:
            self._view.put(lambda wandb_run: wandb_run.log(values, step=step))

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Show a picture in W&B; its file in the run folder is the record."""

        def show(wandb_run: Any) -> None:
            import wandb

            wandb_run.log({name: wandb.Image(str(path))}, step=step)

        if self._view:
            self._view.put(show)

    def finish(self) -> None:
        """Flush and close both."""
        self._lines.close()
        if self._view:
            self._view.finish()


class _WandbView:
    """A run in W&B, written by a thread."""

    def __init__(self, run: Path, logging: LoggingConfig, wandb_id: str, config: dict[str, Any]) -> None:
        self.id = wandb_id
        """The same in all attempts of a run."""
        self._run, self._logging, self._config = run, logging, config
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(QUEUED)
        self._lost = 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def put(self, action: Callable[[Any], None]) -> None:
        """Have `action(wandb_run)` called, later; never waits."""
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            self._lost += 1

    def finish(self) -> None:
        """Wait for the thread, but not for ever."""
        with contextlib.suppress(queue.Full):  # then the thread is stuck, as the next line finds out
            self._queue.put(None, timeout=PATIENCE_SECONDS)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive() or self._lost:
            tqdm.write(
                f"W&B did not take everything within {PATIENCE_SECONDS:.0f} s ({self._lost} lines left out); "
                f"{self._run / RECORD} has it all, and `wandb sync {self._run}/wandb/*run-*` sends what W&B has of it"
            )

    def _work(self) -> None:
        import wandb

        try:
            mode = self._logging.wandb
            if mode is WandbMode.auto:
                mode = WandbMode.online if wandb.login(prompt=False) else WandbMode.offline
            try:
                wandb_run = self._start(mode)
            except wandb.Error as error:
                if mode is WandbMode.offline:
                    raise
                reason = " ".join(str(error).split())[:200] or type(error).__name__  # a server may answer with a page
                tqdm.write(f"W&B is not to be had ({reason}); its view of this attempt stays in {self._run}/wandb")
                wandb.teardown()  # else it holds the run's id to be in use
                wandb_run = self._start(WandbMode.offline)
            while (action := self._queue.get()) is not None:
                action(wandb_run)
            wandb_run.finish()
        except Exception as error:  # noqa: BLE001 - a view may fail in any way; it is said, and the run goes on
            tqdm.write(f"W&B failed ({type(error).__name__}: {error}); {self._run / RECORD} goes on")

    def _start(self, mode: WandbMode) -> Any:
        import wandb

        return wandb.init(
            project=self._logging.project,
            name=self._run.name,
            id=self.id,
            resume="allow",
            dir=self._run,
            mode=mode.value,  # type: ignore[arg-type]
            config=self._config,
            settings=wandb.Settings(
                silent=True, console="off", x_disable_stats=True, init_timeout=PATIENCE_SECONDS / 2
            ),
        )
