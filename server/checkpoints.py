"""The global weights of every round: as sites fetch them, and as people keep them, with what they are and come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rin.common.backbones import Network, initial
from rin.common.checkpoint import facts_of
from rin.common.errors import StateError
from rin.common.files import read_json, write_json
from rin.common.layout import Layout, file_digest
from rin.common.plan import Plan
from rin.common.weights import layout_of, read_facts, read_into, save, write_tensors
from rin.server.rundir import RunDir


def begin(run: RunDir, plan: Plan, plan_digest: str) -> Layout:
    """The layout of the plan's network; at the first start also layout.json, the initial weights and checkpoint 0.

    Raises:
        StateError: the run was begun with another plan.
    """
    start = run.checkpoint(0)
    if start.exists():
        if read_facts(start).get("plan") != plan_digest:
            raise StateError(
                f"{run.plan} was edited after the run began",
                step="put the old plan back, or start a new run with the new one",
            )
        return Layout.from_json(read_json(run.layout))
    network = _first_network(run, plan)
    layout = layout_of(network)
    write_json(run.layout, layout.to_json())
    part = run.weights / "initial"
    digest = save(part, network, layout)
    part.replace(run.weights_file(digest))
    facts = facts_of(plan, plan_digest=plan_digest, round=0, updates={})
    save(start, network, layout, facts={**facts, "weights": digest})
    return layout


def _first_network(run: RunDir, plan: Plan) -> Network:
    """Random weights of the plan's seed, or the weights that it names.

    Raises:
        StateError: the weights are not here, or others are.
    """
    network = initial(plan.model, plan.training.seed)
    if plan.model.start:
        if not run.start.exists() or file_digest(run.start) != plan.model.start:
            raise StateError(
                f"the plan starts from weights {plan.model.start}, which are not in {run.root}",
                step="start with `rin-server run --weights FILE`, naming the file that they came from",
            )
        read_into(network, run.start)
    return network


def digest_of(run: RunDir, number: int) -> str:
    """The digest of the tensor bytes of checkpoint `number`, as it says itself."""
    return str(read_facts(run.checkpoint(number))["weights"])


def read_flat(path: Path, layout: Layout, digest: str) -> npt.NDArray[np.float32]:
    """The tensors of the wire file at `path` as one float32 array in file order.

    Raises:
        StateError: the file is not what its digest says.
    """
    flat = np.fromfile(path, "<f4", offset=len(layout.header())) if path.exists() else np.empty(0, np.float32)
    if hashlib.sha256(flat.data).hexdigest() != digest:
        raise StateError(f"{path} is missing or damaged", step="restore it from a backup of the run directory")
    return flat


def write_round(run: RunDir, number: int, flat: npt.NDArray[np.float32], layout: Layout, facts: dict[str, Any]) -> str:
    """Publish the weights after round `number`, for the sites and as a checkpoint; repeating it changes nothing.

    Returns:
        The digest of the tensor bytes.
    """
    digest = hashlib.sha256(flat.data).hexdigest()
    write_tensors(run.weights_file(digest), layout, _tensors(flat, layout))
    write_tensors(run.checkpoint(number), layout, _tensors(flat, layout), facts={**facts, "weights": digest})
    return digest


def _tensors(flat: npt.NDArray[np.float32], layout: Layout) -> Iterator[npt.NDArray[np.float32]]:
    return (flat[t.offset // 4 : (t.offset + t.nbytes) // 4] for t in layout.tensors)


def prune(run: RunDir, newest: int, *, keep: int) -> None:
    """Delete the checkpoints before the `keep` rounds that precede `newest`, but never the start; and old weights."""
    for path in run.checkpoints.glob("round-*.safetensors"):
        if 0 < int(path.stem.removeprefix("round-")) < newest - keep:
            path.unlink()
    current = run.weights_file(digest_of(run, newest))
    for path in run.weights.glob("*.safetensors"):
        if path != current:
            path.unlink()
