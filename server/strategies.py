"""From the mean update to the next global weights: a torch optimizer on the parameters, one table of strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from rin.common.errors import RefusedError, StateError
from rin.common.layout import Layout
from rin.common.plan import Strategy
from rin.common.weights import read_state, write_state
from rin.server.aggregate import HEAD, Block

# Each row makes the optimizer whose gradient is minus the mean update. With SGD at rate 1 that is FedAvg (McMahan et
# al. 2017); with momentum FedAvgM (Hsu et al. 2019); FedAdam with the paper's tau of 1e-3 and betas (Reddi et al.
# 2021). FedProx (Li et al. 2020) differs at the sites only.
STRATEGIES: Final[dict[str, Callable[[list[nn.Parameter], Strategy], Optimizer]]] = {
    "fedavg": lambda parameters, plan: SGD(parameters, lr=plan.server_learning_rate, foreach=False),
    "fedavgm": lambda parameters, plan: SGD(
        parameters, lr=plan.server_learning_rate, momentum=plan.server_momentum, foreach=False
    ),
    "fedadam": lambda parameters, plan: Adam(
        parameters, lr=plan.server_learning_rate, betas=(0.9, 0.99), eps=1e-3, foreach=False
    ),
    "fedprox": lambda parameters, plan: SGD(parameters, lr=plan.server_learning_rate, foreach=False),
}


def advance(
    weights: npt.NDArray[np.float32],
    blocks: Iterable[Block],
    layout: Layout,
    strategy: Strategy,
    *,
    frozen: npt.NDArray[np.int64],
    before: Path | None,
    after: Path,
) -> None:
    """One step of the server, in place.

    Parameters take the optimizer's step; float buffers get the mean added (Adam on a running variance makes it
    negative); head rows in `frozen` end as they began, whatever momentum says.

    Args:
        weights: float32 (layout.data_bytes / 4,), the global weights in file order.
        blocks: the mean update, every element once.
        before: the optimizer's state after the last round; None in the first.
        after: where its new state goes.

    Raises:
        StateError: `before` is missing or damaged.
    """
    gradient = np.zeros_like(weights)
    for block in blocks:
        first = block.tensor.offset // 4 + block.start
        place = slice(first, first + len(block.mean))
        if block.tensor.kind == "parameter":
            gradient[place] = -block.mean
        else:
            weights[place] = weights[place] + block.mean
    saved = [(view, view[frozen].copy()) for view in _head_views(weights, layout)]
    names, parameters = [], []
    for tensor in layout.tensors:
        if tensor.kind == "parameter":
            place = slice(tensor.offset // 4, (tensor.offset + tensor.nbytes) // 4)
            parameter = nn.Parameter(torch.from_numpy(weights[place]))
            parameter.grad = torch.from_numpy(gradient[place])
            names.append(tensor.name)
            parameters.append(parameter)
    optimizer = STRATEGIES[strategy.name](parameters, strategy)
    if before is not None:
        load_state(optimizer, names, before)
    optimizer.step()
    for view, rows in saved:
        view[frozen] = rows
    save_state(optimizer, names, after)


def _head_views(weights: npt.NDArray[np.float32], layout: Layout) -> list[npt.NDArray[np.float32]]:
    """The head's tensors as views (n_rows, ...) into `weights`."""
    return [
        weights[t.offset // 4 : (t.offset + t.nbytes) // 4].reshape(t.shape)
        for t in layout.tensors
        if t.name.startswith(HEAD)
    ]


def save_state(optimizer: Optimizer, names: list[str], path: Path) -> None:
    """Write the optimizer's tensors to `path` as safetensors named `<parameter>/<key>`, atomically."""
    state = optimizer.state_dict()["state"]
    tensors = {
        f"{names[index]}/{key}": value
        for index, values in state.items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    write_state(path, tensors, {})


def load_state(optimizer: Optimizer, names: list[str], path: Path) -> None:
    """Inverse of `save_state`.

    Raises:
        StateError: the file is missing or damaged.
    """
    state: dict[int, dict[str, Any]] = {}
    try:
        for key, value in read_state(path)[1].items():
            name, _, field = key.rpartition("/")
            state.setdefault(names.index(name), {})[field] = value
    except (RefusedError, ValueError):
        raise StateError(
            f"{path.name} is missing or damaged", step="restore the run directory from a backup, or start a new run"
        ) from None
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
