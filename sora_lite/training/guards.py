"""Which updates are made: none from numbers that are not finite, none from spikes beyond k sigma of a window.

Every rank is told the same losses and norms, so every rank decides alike, without a word to the others.
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from sora_lite.config import GuardConfig, SpikeAction


class UpdateGuard:
    """Judges each update against the losses and gradient norms of the last `window` updates that were made.

    A spike is a value above mean + sigma * standard deviation of a full window. Its state is part of a checkpoint, so
    that a run that goes on decides as one that was never stopped.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._left_out: list[int] = []

    def limit(self, loss: float) -> float:
        """Largest gradient norm at which the update may be made, for the loss of the global batch; -1 for none."""
        return -1.0 if not loss <= self._bound(self._losses) else self._bound(self._norms)

    def judge(self, step: int, loss: float, norm: float) -> str:
        """Why the update of `step` was left out, given the norm of its gradients; "" if it was made."""
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the gradient norm is {norm}"
        elif loss > (bound := self._bound(self._losses)):
            reason = f"the loss {loss:.4g} is a spike above {bound:.4g}"
        elif norm > (bound := self._bound(self._norms)):
            reason = f"the gradient norm {norm:.4g} is a spike above {bound:.4g}"
        else:
            self._losses.append(loss)
            self._norms.append(norm)
            return ""
        self._left_out = [one for one in self._left_out if one > step - self.config.window] + [step]
        return reason

    @property
    def exhausted(self) -> bool:
        """Whether so many updates were left out lately that the run should stop."""
        return len(self._left_out) > self.config.max_skips

    def _bound(self, values: Iterable[float]) -> float:
        """Above it a value is a spike."""
        known = np.array(values)
        if self.config.spikes is SpikeAction.ignore or len(known) < self.config.window:
            return math.inf
        return float(known.mean() + self.config.sigma * known.std())

    def state(self) -> dict[str, Any]:
        """As JSON, exactly."""
        return {"losses": list(self._losses), "norms": list(self._norms), "left_out": self._left_out}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        for values, name in ((self._losses, "losses"), (self._norms, "norms")):
            values.clear()
            values.extend(state[name])
        self._left_out = list(state["left_out"])
