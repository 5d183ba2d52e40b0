"""Each patient's own gradient, of several patients by one forward and one backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.overrides import TorchFunctionMode

from rin.common.heads import Loss

Bag = tuple[Tensor, Tensor]  # one patient's inputs and targets in a step, on the device
CLOSE: Final = {True: 0.05, False: 1e-3}  # of the norm, between two ways to compute a gradient: in bf16 and in float32


class UnfitError(Exception):
    """Some parameter is not used by the layers known here alone."""


def gradients(
    module: nn.Module, loss: Loss, parameters: Sequence[Tensor], bags: Sequence[Bag], *, rows: int, half: bool
) -> list[list[Tensor]]:
    """The gradient of each patient's loss by `parameters`, a list a patient.

    Each patient gets leaves of its own, which share the memory of the parameters, and autograd tells them apart. What
    uses a parameter otherwise than as the layers of `LAYERS` do leaves a gradient on the parameter itself.

    Args:
        rows: images of the forward, at least those of `bags`; empty ones are added. Always the same number, as the
            guarantee needs: kernels round in another way for another number, and one patient more would then change
            what all others add to the sum.
        half: bf16 autocast; the gradients of convolutions and linear layers then come as they are computed, in bf16.

    Raises:
        UnfitError: as said; take one patient after another.
    """
    sizes = [len(inputs) for inputs, _ in bags]
    first = bags[0][0]
    images = first.new_zeros(rows, *first.shape[1:])  # of one layout in memory, as that chooses kernels too
    images[: sum(sizes)] = torch.cat([inputs for inputs, _ in bags])
    leaves = _Leaves(parameters, sizes, rows - sum(sizes), half)
    with leaves, torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        outputs = module(images).split(leaves.sizes)
        losses = [loss(one, targets) for one, (_, targets) in zip(outputs, bags, strict=False)]
        # Empty rows count for nothing, but go all the way back: without them the others would be laid out otherwise.
        value = torch.stack([*losses, *(0.0 * rest.sum() for rest in outputs[len(bags) :])]).sum()
    found = torch.autograd.grad(value, [*parameters, *leaves.all()], allow_unused=True)
    if any(gradient is not None for gradient in found[: len(parameters)]):
        raise UnfitError
    own = zip(*[iter(found[len(parameters) :])] * len(bags), strict=True)  # by parameter, then by patient
    each = [
        [torch.zeros_like(parameter) if gradient is None else gradient for gradient in of_patients]
        for parameter, of_patients in zip(parameters, own, strict=True)
    ]
    return [list(one) for one in zip(*each, strict=True)]


def separable(module: nn.Module, parameters: Sequence[Tensor], inputs: Tensor, *, half: bool) -> bool:
    """Whether `gradients` gives each of `inputs` the right gradient, with the same bits in every place and company.

    Args:
        inputs: (b, ...) made-up images, b being the `rows` to come.
    """
    bags = [(one[None], one) for one in inputs]

    def go(chosen: Sequence[Bag]) -> list[list[Tensor]]:
        return gradients(module, _energy, parameters, chosen, rows=len(inputs), half=half)

    training = module.training
    module.eval()  # random layers draw something else in each place
    try:
        once, again, alone = go(bags), go(bags[::-1])[::-1], go(bags[:1])
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=half):
            value = _energy(module(inputs[:1]), inputs)
        plain = torch.autograd.grad(value, parameters, materialize_grads=True)
    except UnfitError:
        return False
    finally:
        module.train(training)
    pairs = [*zip(once, again, strict=True), (once[0], alone[0])]
    same = all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))
    away = sum((a.double() - b.double()).square().sum() for a, b in zip(once[0], plain, strict=True))
    return same and bool(away <= CLOSE[half] ** 2 * sum(b.double().square().sum() for b in plain))


def _energy(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs.float().square().mean()


class _Leaves(TorchFunctionMode):
    """Within it, the layers of `LAYERS` use for each patient's rows a leaf of that patient's own."""

    def __init__(self, parameters: Sequence[Tensor], sizes: Sequence[int], empty: int, half: bool) -> None:
        super().__init__()
        self.sizes, self._patients, self._half = [*sizes, empty] if empty else [*sizes], len(sizes), half
        self._leaves: dict[Tensor, list[Tensor]] = {p: [] for p in parameters}

    def all(self) -> list[Tensor]:
        """The leaves, by parameter, then by patient."""
        return [leaf for parameter in self._leaves for leaf in self.of(parameter)[: self._patients]]

    def of(self, parameter: Tensor) -> list[Tensor]:
        """A leaf for each patient, and what the empty rows use; matrices in bf16 where they are multiplied in that."""
        leaves = self._leaves[parameter]
        if not leaves:
            value = parameter.detach()
            value = value.to(torch.bfloat16) if self._half and value.dim() > 1 else value
            leaves += [value.detach().requires_grad_(i < self._patients) for i in range(len(self.sizes))]
        return leaves

    def knows(self, value: object) -> bool:
        """Whether `value` is one of the parameters."""
        return isinstance(value, Tensor) and value in self._leaves

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        layer = LAYERS.get(func)
        given = (*args, *kwargs.values())
        if layer is None or len(args[0]) != sum(self.sizes) or not any(map(self.knows, given)):
            return func(*args, **kwargs)
        return layer(self, func, args, kwargs)

    def rows(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """`func` of each patient's rows with its leaves."""

        def mine(value: Any, number: int) -> Any:
            return self.of(value)[number] if self.knows(value) else value

        return torch.cat(
            [
                func(part, *(mine(a, i) for a in args[1:]), **{name: mine(a, i) for name, a in kwargs.items()})
                for i, part in enumerate(args[0].split(self.sizes))
            ]
        )

    def convolution(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """All rows at once, where `_Convolution` can."""
        given: list[Any] = [*args, *(None,) * 7]
        x, weight, bias, stride, padding, dilation, groups = given[:7]
        if kwargs or bias is not None or groups != 1 or isinstance(padding, str) or not self.knows(weight):
            return self.rows(func, args, kwargs)
        leaves = self.of(weight)
        return _Convolution.apply(x.to(leaves[0].dtype), self.sizes, (stride, padding, dilation), *leaves)


LAYERS: Final = {
    F.conv2d: _Leaves.convolution,
    F.linear: _Leaves.rows,
    F.group_norm: _Leaves.rows,
    F.layer_norm: _Leaves.rows,
}

Geometry = tuple[Any, Any, Any]  # stride, padding, dilation: two numbers each, as `nn.Conv2d` passes them


class _Convolution(torch.autograd.Function):
    """All patients' rows by weights of the same values: one forward, one gradient of the rows, many of the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], geometry: Geometry, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights[0])
        ctx.sizes, ctx.geometry = sizes, geometry
        return F.conv2d(x, weights[0], None, *geometry)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (x, weight), (gradient,) = ctx.saved_tensors, outputs
        rows = conv2d_input(x.shape, weight, gradient, *ctx.geometry) if ctx.needs_input_grad[0] else None
        parts = zip(x.split(ctx.sizes), gradient.split(ctx.sizes), ctx.needs_input_grad[3:], strict=True)
        return (
            rows,
            None,
            None,
            *(_by_weight(part, weight, out, ctx.geometry) if asked else None for part, out, asked in parts),
        )


def _by_weight(x: Tensor, weight: Tensor, gradient: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of a convolution by its weight.

    As one product of matrices where that is faster: of few places and many weights the library's own kernel spends most
    of its time on putting weights into other orders.
    """
    (down, across), padding, dilation = geometry
    height, width = weight.shape[2:]
    places = gradient.shape[0] * gradient.shape[2] * gradient.shape[3]
    if tuple(dilation) != (1, 1) or (height * width > 1 and 2 * places > weight[0].numel()):
        return conv2d_weight(x, weight.shape, gradient, *geometry)
    last = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    patches = last.unfold(1, height, down).unfold(2, width, across)  # (b, h, w, i, kh, kw)
    matrix = patches.permute(0, 1, 2, 4, 5, 3).reshape(places, -1)
    product = gradient.permute(0, 2, 3, 1).reshape(places, -1).t() @ matrix
    return product.view(len(weight), height, width, -1).permute(0, 3, 1, 2)
