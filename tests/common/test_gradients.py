import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rin.common.errors import RefusedError, device_fault
from rin.common.fit import fit, settle
from rin.common.gradients import Gradients
from rin.common.heads import LOSSES, Single
from rin.common.recipe import Recipe
from rin.common.snapshots import Snapshots

CPU = torch.device("cpu")
ROWS, EXHAUSTIVE = (0, 2, 3), (2,)
TOO_MUCH = 2**50  # bytes: the allocator's own error


def net(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def batch(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.rand(n, 5, generator=generator) < 0.4
    labels[:, 0] |= ~labels[:, list(ROWS)].any(1)
    return torch.rand(n, 1, 9, 9, generator=generator), labels


class Hungry(nn.Module):
    """Asks for more memory than there is when it sees more than `fits` images, forwards or backwards."""

    def __init__(self, fits: int, *, backwards: bool) -> None:
        super().__init__()
        self.fits, self.backwards = fits, backwards
        self.tokens: list[weakref.ref[Token]] = []

    def forward(self, x: Tensor) -> Tensor:
        hungry = len(x) > self.fits
        if hungry and not self.backwards:
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        return _Pass.apply(x, hungry, self.tokens)  # type: ignore[no-any-return]


class Branches(nn.Module):
    """Two ways from `first` to the output; the second asks for too much when it goes back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Hungry(99, backwards=False), Hungry(0, backwards=True)
        self.stem, self.one, self.other = nn.Linear(81, 81), nn.Linear(81, 5), nn.Linear(81, 5)

    def forward(self, x: Tensor) -> Tensor:
        begun = self.first(self.stem(x.flatten(1)))
        return self.one(begun) + self.last(self.other(begun))


class Token:
    """Something that can be watched."""


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, hungry: bool, tokens: list[weakref.ref[Token]]) -> Tensor:
        ctx.hungry, ctx.token = hungry, Token()
        tokens.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.hungry:
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        return grad[0], None, None


def gradients(module: nn.Module, target: str = "single", sums: list[Tensor] | None = None) -> Gradients:
    loss = LOSSES[target](ROWS, EXHAUSTIVE)
    return Gradients(module, module, loss, loss.count, sums or [], device=CPU, half=False)


def grads(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("target", ["single", "multi"])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up_to_the_whole_batch(target: str, parts: int) -> None:
    whole, cut = (net(nn.GroupNorm(2, 8)).eval() for _ in range(2))  # no dropout: it draws anew for every part
    taken = gradients(cut, target)
    taken.parts.fill_(parts)
    one, other = gradients(whole, target)(*batch(), 3), taken(*batch(), 3)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grads(whole), grads(cut), rtol=1e-6, atol=1e-7)
    naive = [gradients(whole, target)(x, y, 3) for x, y in zip(*(t.tensor_split(parts) for t in batch()), strict=True)]
    assert abs(torch.stack(naive).mean() - one) > 1e-4  # the parts are not alike


@pytest.mark.parametrize("backwards", [False, True])
def test_a_batch_that_does_not_fit_is_taken_in_parts_as_if_from_the_start(backwards: bool) -> None:
    found = []
    for fits, parts in ((2, 1), (99, 4)):
        module, seen = net(nn.BatchNorm2d(8)), torch.zeros((), dtype=torch.long)
        module.insert(2, Hungry(fits, backwards=backwards))
        loss = LOSSES["single"](ROWS, ())

        def counting(logits: Tensor, labels: Tensor, seen: Tensor = seen, loss: Any = loss) -> Tensor:
            seen += len(labels)
            return loss(logits, labels)

        taken = Gradients(module, module, counting, loss.count, [seen], device=CPU, half=False)
        taken.parts.fill_(parts)
        values = [taken(*batch(), seed) for seed in (3, 4)]
        assert taken.parts == 4 and seen == 14
        found.append([*values, *grads(module), *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_does_not_fit_at_all_leaves_nothing_behind() -> None:
    module = Branches()
    with pytest.raises(MemoryError):
        gradients(module)(*batch(), 0)
    assert len(module.first.tokens) == 3  # the whole, halves, quarters: of seven images
    assert all(token() is None for token in module.first.tokens)  # the graphs are gone
    assert not grads(module)


def test_fit_says_memory_and_the_process_goes_on() -> None:
    module = net(nn.BatchNorm2d(8))

    def run(extra: nn.Module) -> float:
        both = nn.Sequential(module, extra)
        recipe = Recipe(steps=2, learning_rate=0.1)
        return fit(both, lambda first: [batch()] * 2, LOSSES["single"](ROWS, ()), recipe, device=CPU, key=("x",))

    with pytest.raises(RefusedError) as caught:
        run(Hungry(0, backwards=True))
    assert caught.value.code == "memory" and caught.value.step
    assert run(nn.Identity()) > 0


def _allocate() -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def _lost() -> None:
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


def _compiled() -> None:
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    torch.compile(broken, backend="eager", fullgraph=True)(torch.zeros(1))


def _shapes() -> None:
    torch.mm(torch.zeros(2, 2), torch.zeros(3, 3))


@pytest.mark.parametrize("fails,code", [(_allocate, "memory"), (_lost, "device"), (_compiled, "device"), (_shapes, "")])
def test_a_fault_of_the_device_has_a_code(fails: Callable[[], None], code: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        fails()
    assert device_fault(caught.value) == code
    assert device_fault(MemoryError()) == "memory"
    assert device_fault(ValueError("out of memory")) == ""


MADE_AGAIN = 75  # exit code: the library found memory all the same
STUCK = """
import resource
import sys
from pathlib import Path

import torch
from rin.common.errors import RefusedError
from rin.common.fit import settle
from tests.common.test_gradients import CPU, begun, stretch

settle(CPU, 1)
module = begun()
image, weight = torch.zeros(2, 4, 9, 9), torch.zeros(4, 4, 3, 3)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used - 2**20, resource.RLIM_INFINITY))
try:
    torch.nn.functional.conv2d(image, weight)
except RuntimeError:
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    stretch(module, Path(sys.argv[1]))
except RefusedError as error:
    assert error.code == "memory", error.code
else:
    raise SystemExit(MADE_AGAIN)
""".replace("MADE_AGAIN", str(MADE_AGAIN))


def begun() -> nn.Sequential:
    return net(nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def stretch(module: nn.Module, path: Path | None) -> float:
    recipe, goal = Recipe(steps=2, learning_rate=0.1), Single(ROWS)
    snapshots = Snapshots(path, "one") if path else None
    batches = [batch(8)] * 2
    return fit(module, lambda at: batches[at:], goal, recipe, device=CPU, key=("x",), snapshots=snapshots)


def test_another_process_goes_on_with_the_parts_that_were_found(tmp_path: Path) -> None:
    settle(CPU, 1)
    command = [sys.executable, "-c", STUCK, str(tmp_path / "kept")]
    # Whether the library runs out of memory in the one wrong moment, finds some after all, or crashes: pages decide.
    for _ in range(6):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (MADE_AGAIN, -signal.SIGSEGV):
            break
        (tmp_path / "kept").unlink(missing_ok=True)
    else:
        pytest.skip("in six processes none came into the state that this test is about")
    assert done.returncode == 0, done.stderr
    found = []
    for path in (tmp_path / "kept", None):
        module = begun()
        stretch(module, path)
        found.append(module.state_dict())
    whole, halves = found[1], found[0]
    assert not torch.equal(whole["1.running_mean"], halves["1.running_mean"])  # of parts
    assert int(halves["1.num_batches_tracked"]) == 4 and int(whole["1.num_batches_tracked"]) == 2
