"""The record of a run, `metrics.jsonl`, and its view in Weights & Biases."""

import json
import math
from pathlib import Path
from typing import Any

from sora_lite.config import LoggingConfig, WandbMode
from sora_lite.evaluation.record import RECORD, read_record


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
        kept = [line for line in read_record(run / RECORD) if line["step"] <= resume_step]
        temporary = run / f"{RECORD}.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(run / RECORD)
        self._file = (run / RECORD).open("a")
        self._wandb = _start_wandb(run, logging, wandb_id, config)
        self.wandb_id: str | None = self._wandb.id if self._wandb else None

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write one line. Values are numbers or short texts."""
        # JSON knows no NaN: what is not finite is null in the record.
        finite = {name: v if not isinstance(v, float) or math.isfinite(v) else None for name, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._wandb:
            self._wandb.log(values, step=step)

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Show a picture in W&B; its file in the run folder is the record."""
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def finish(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._wandb:
            self._wandb.finish()


def _start_wandb(run: Path, logging: LoggingConfig, wandb_id: str | None, config: dict[str, Any]) -> Any:
    mode = logging.wandb
    if mode is WandbMode.disabled:
        return None
    import wandb

    if mode is WandbMode.auto:
        mode = WandbMode.online if wandb.login(prompt=False) else WandbMode.offline
    return wandb.init(
        project=logging.project,
        name=run.name,
        id=wandb_id,
        resume="allow",
        dir=run,
        mode=mode.value,  # type: ignore[arg-type]
        config=config,
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )
