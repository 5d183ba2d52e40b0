"""One site's steps in several processes: torch's DistributedDataParallel, with a slice of each batch for every rank."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the one base of all of them; torch has no public name for it
from torch.nn.parallel import DistributedDataParallel

from rin.common.heads import TINY, Loss

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]

TIMEOUT: Final = dt.timedelta(minutes=10)  # the first step of a rank may wait for another's slow disk


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `size` that train one network; every method is called by all of them alike.

    Every rank makes the whole logical batch and takes its slice: a batch is a function of its step, so the slices
    together are exactly the batch of a single process, mixing within the batch included. A rank's loss is weighted with
    what its slice counts in the batch, so the averaged gradient is the batch's, however uneven the slices are.
    """

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes what there is to write."""
        return self.rank == 0

    def slices(self, batches: Batches) -> Batches:
        """This rank's part of every batch; slices differ by one image at most."""

        def own(first: int) -> Iterator[tuple[Tensor, Tensor]]:
            for inputs, targets in batches(first):
                place = slice(len(inputs) * self.rank // self.size, len(inputs) * (self.rank + 1) // self.size)
                yield inputs[place], targets[place]

        return own

    def wrapped(self, module: nn.Module) -> nn.Module:
        """`module` with gradients averaged over the ranks; its norms are `synchronised` or hold no statistics."""
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def loss(self, loss: Loss, count: Callable[[Tensor], Tensor]) -> Loss:
        """The loss of the whole batch as a value; as a gradient, this rank's part of it.

        Args:
            loss: a mean over this rank's slice.
            count: what that mean is taken over, from the targets.
        """

        def value(outputs: Tensor, targets: Tensor) -> Tensor:
            own, counted = loss(outputs, targets), count(targets).double()
            sums = self.summed(torch.stack([own.detach().double() * counted, counted]))
            all_counted = sums[1].clamp(min=TINY)
            part = own * (counted / all_counted * self.size).to(own.dtype)  # gradients are divided by the size
            whole = (sums[0] / all_counted).to(own.dtype)
            return part + (whole - part).detach()

        return value

    def summed(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place."""
        dist.all_reduce(values)
        return values


@contextlib.contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that torchrun started, and leave them at the end; after an error, end the process.

    Args:
        device: `cuda`, one GPU a process, or `cpu`.

    Yields:
        This process among them, and its device.
    """
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local)
        own = torch.device("cuda", local)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=own)
    else:
        own = torch.device("cpu")
        dist.init_process_group("gloo", timeout=TIMEOUT)
    yield Ranks(dist.get_rank(), dist.get_world_size()), own
    dist.destroy_process_group()  # not after an error: it would wait for the others


class SyncBatchNormThen(nn.SyncBatchNorm):
    """Batch norm over all ranks in the place of `norm`, then the modules that were fused into that, as timm does."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        for name, module in norm.named_children():
            self.add_module(name, module)
        self.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input, through the fused modules in their order; any shape (b, channels, ...)."""
        x = super().forward(input)
        for module in self.children():
            x = module(x)
        return x


def synchronised(module: nn.Module) -> nn.Module:
    """`module` with batch norms that take their statistics over all ranks, in place; torch has them for GPUs only.

    torch's own `convert_sync_batchnorm` would lose the activations that timm fuses into its norms.
    """
    if isinstance(module, _BatchNorm):
        return SyncBatchNormThen(module)
    for name, child in list(module.named_children()):
        setattr(module, name, synchronised(child))
    return module
