"""The gradient of a batch in as few parts as fit into the device's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from rin.common.errors import device_fault, kernels_stuck
from rin.common.heads import Loss

log = logging.getLogger(__name__)

Count = Callable[[Tensor], Tensor | int]  # what the mean of a loss is taken over, from the targets: `len` is images


class Gradients:
    """Leaves the gradients of a batch's mean loss in the parameters of `module`.

    A batch that does not fit is cut in two, four and so on, which is kept for the batches that follow. Their sum is the
    gradient of the whole batch, except for batch norms: those see the statistics of their part.

    Args:
        forward: `module` or what computes the same with its parameters.
        loss: from outputs and targets to a mean.
        count: what that mean is taken over; None: no batch is cut.
        sums: what `loss` changes in place.

    Attributes:
        parts: int64 scalar on the CPU, how many parts a batch is cut into; part of a snapshot.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[Tensor], Tensor],
        loss: Loss,
        count: Count | None,
        sums: Iterable[Tensor],
        *,
        device: torch.device,
        half: bool,
    ) -> None:
        self.parts = torch.ones((), dtype=torch.long)
        self._module, self._forward, self._loss, self._count = module, forward, loss, count
        self._device, self._half = device, half
        self._touched = [*module.buffers(), *sums]  # what an attempt changes beside the gradients

    def __call__(self, inputs: Tensor, targets: Tensor, seed: int) -> Tensor:
        """Mean loss of the batch, without its graph; random layers draw from `seed`.

        Raises:
            MemoryError: not even single images fit, and `parts` is 1 again; or only another process can go on, with
                `parts` as it is now. What the attempts changed is as it was.
        """
        before = [value.clone() for value in self._touched]
        # Made before the graph of the batch, so older than all of it: see `_release`.
        oldest = torch.zeros((), device=self._device, requires_grad=True) * 1.0
        while True:
            try:
                torch.manual_seed(seed)
                return self._sum(inputs, targets)
            except (RuntimeError, MemoryError) as error:
                if device_fault(error) != "memory":
                    raise
                stuck = kernels_stuck(error)
            # Only outside the handler are the frames of the attempt gone, and what they hold.
            self._release(oldest)
            with torch.no_grad():
                for value, old in zip(self._touched, before, strict=True):
                    value.copy_(old)
            if self._count is None or 2 * self.parts > len(inputs):
                self.parts.fill_(1)
                raise MemoryError("not even single images fit")
            self.parts *= 2
            log.warning("a batch does not fit into memory: from here on in %d parts", self.parts)
            if stuck:
                raise MemoryError("only another process can go on")

    def _sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self._module.zero_grad(set_to_none=True)
        parts = int(self.parts)
        if parts == 1 or self._count is None:
            return self._part(inputs, targets, None)
        whole = self._count(targets)
        cut = zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True)
        return torch.stack([self._part(x, y, self._count(y) / whole) for x, y in cut]).sum()

    def _part(self, inputs: Tensor, targets: Tensor, share: Tensor | float | None) -> Tensor:
        """Adds the gradient of `share` of the part's mean loss; None is all of it."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            value = self._loss(self._forward(inputs), targets)
        if share is not None:
            value = value * share
        value.backward()
        return value.detach()

    def _release(self, oldest: Tensor) -> None:
        """Give back what a failed attempt holds.

        Autograd's queue keeps the graph of a backward pass that failed until the queue is worked off. That goes newest
        node first and ends with the pass at hand, so that pass has to be of a node older than the graph.
        """
        self._module.zero_grad(set_to_none=True)
        oldest.backward(retain_graph=True)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
