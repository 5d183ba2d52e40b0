"""A stretch of training on disk: module, optimizer and sums after a step, so that kill -9 costs a minute and no bit."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from rin.common.errors import RefusedError
from rin.common.weights import read_state, write_state

log = logging.getLogger(__name__)

EVERY: Final = 60.0  # seconds between two snapshots
SHARE: Final = 0.02  # of the time, at most, goes into writing them


@dataclass(frozen=True, slots=True)
class Held:
    """What changes from step to step; everything else is a function of the step. `sums` are changed in place."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    sums: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, on the device; the module's integer buffers too."""
        found = {f"module/{name}": value for name, value in self.module.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer/{number}/{key}": v for key, v in values.items() if isinstance(v, Tensor)}
        return found | {f"sums/{name}": value for name, value in self.sums.items()}

    @torch.no_grad()
    def restore(self, found: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`, in place.

        Raises:
            KeyError, RuntimeError: `found` is of something else.
        """
        for name, value in [(f"module/{k}", v) for k, v in self.module.state_dict().items()] + [
            (f"sums/{k}", v) for k, v in self.sums.items()
        ]:
            value.copy_(found[name])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in found.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                number, _, key = rest.partition("/")
                like = parameters[int(number)]
                # The kernels want the parameter's memory format.
                same = torch.empty_like(like, dtype=value.dtype) if value.shape == like.shape else value.clone()
                state.setdefault(int(number), {})[key] = same.copy_(value)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


class Snapshots:
    """One file that is replaced now and then. `name` says whose it is: a file of another name is not taken up.

    Args:
        every: seconds between two snapshots, `EVERY` if None; 0 writes one after each step, whatever that costs.
        writes: false where another process, which trains the same, writes them.
    """

    def __init__(self, path: Path, name: str, *, every: float | None = None, writes: bool = True) -> None:
        self._path, self._name, self._writes = path, name, writes
        self._every = EVERY if every is None else every
        self._next = time.monotonic() + self._every

    def resume(self, held: Held) -> int:
        """Bring `held` to the last snapshot and return its step; without a usable one, 0 and nothing changed."""
        try:
            facts, tensors = read_state(self._path)
        except RefusedError:
            return 0
        if facts.get("name") != self._name or not tensors.keys() >= held.tensors().keys():
            return 0
        held.restore(tensors)
        log.info("training goes on after step %d", facts["step"])
        return int(facts["step"])

    def after(self, step: int, held: Held) -> None:
        """Called after every step; writes when it is time. A full disk costs the snapshot, not the round."""
        begun = time.monotonic()
        if begun < self._next:
            return
        self.keep(step, held)
        done = time.monotonic()
        self._next = done + max(self._every, (done - begun) / SHARE) if self._every else 0.0

    def keep(self, step: int, held: Held) -> None:
        """Write now what is held after `step` steps."""
        if self._writes:
            with contextlib.suppress(OSError):
                write_state(self._path, held.tensors(), {"name": self._name, "step": step})

    def remove(self) -> None:
        """The stretch is over."""
        self._path.unlink(missing_ok=True)
