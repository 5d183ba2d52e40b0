"""The weights that a run starts from: out of a file of any layout, into the run directory and, by digest, the plan."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from rin.common.backbones import Network
from rin.common.errors import ConfigError
from rin.common.files import sha256_file
from rin.common.formats import start_of, weights_of
from rin.common.guard import Verdict
from rin.common.plan import Plan, parse_plan
from rin.common.terminal import run_app
from rin.common.weights import layout_of, save
from rin.server.rundir import RunDir
from rin.server.weightfiles import open_weights

TABLE: Final = re.compile(r"^\[model\][^\n]*\n(?:(?!\[)[^\n]*(?:\n|\Z))*", re.MULTILINE)
KEY: Final = re.compile(r'^(\s*start\s*=\s*)(?:"[^"\n]*"|\'[^\'\n]*\')', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins.

    Attributes:
        plan: the plan file's bytes, which name `digest`.
        network: the network before round 1.
        digest: hex SHA-256 of its tensor bytes in the layout of the wire.
        source: layout and SHA-256 of the file that the weights came from, and what of it was used.
        verdict: of the guard.
        notes: what was dropped or assumed, in words.
    """

    plan: bytes
    network: Network
    digest: str
    source: dict[str, Any]
    verdict: Verdict
    notes: tuple[str, ...]


def prepare(plan: bytes, path: Path, *, normalisation: str | None = None) -> Start:
    """The start of a run of `plan` from the weight file at `path`: its backbone, and its head where it is one of rin's.

    Any other head is drawn from the plan's seed.

    Args:
        plan: a plan file's bytes; its `model.start` may be absent, empty, or the digest that comes out.
        normalisation: what a file that does not say so was trained with.

    Raises:
        ConfigError: the plan is of another network, or names other weights.
        RefusedError: the file cannot be used; see `rin.common.formats.read`.
    """
    parsed = parse_plan(plan)
    weights, verdict = open_weights(path, normalisation=normalisation)
    network = start_of(parsed.model, parsed.training.seed, weights, path.name)
    digest = weights_of(network).digest()
    if parsed.model.start not in ("", digest):
        raise ConfigError(
            f"the plan starts from weights {parsed.model.start}, {path.name} gives {digest}",
            step="name the file, and the normalisation, that the plan was made with",
        )
    head = "its own" if weights.head else f"random, of seed {parsed.training.seed}"
    source = {"layout": weights.layout, "file": sha256_file(path), "head": head}
    return Start(with_start(plan, parsed, digest), network, digest, source, verdict, weights.notes)


def with_start(data: bytes, plan: Plan, digest: str) -> bytes:
    """The plan file with `start` in its table `[model]`, and not a byte changed besides.

    Raises:
        ConfigError: the file is written in a way in which the place for the key is not plain.
    """
    if plan.model.start == digest:
        return data
    text, line = data.decode(), f'start = "{digest}"'
    table = TABLE.search(text)
    if table is None:
        new = f"{text.rstrip()}\n\n[model]\n{line}\n"
    elif KEY.search(table[0]):
        new = text.replace(table[0], KEY.sub(rf'\g<1>"{digest}"', table[0], count=1), 1)
    else:
        header = table[0].split("\n", 1)[0]
        new = text.replace(table[0], f"{header}\n{line}\n{table[0].split(chr(10), 1)[1]}", 1)
    wanted = plan.model_copy(update={"model": plan.model.model_copy(update={"start": digest})})
    try:
        good = parse_plan(new.encode()) == wanted
    except ConfigError:
        good = False
    if not good:
        raise ConfigError("plan.toml has no plain table [model] to write into", step=f"add {line} to it yourself")
    return new.encode()


def write(run: RunDir, start: Start) -> None:
    """Put the weights where the first round looks for them."""
    model = start.network.model
    facts = {
        "backbone": model.backbone,
        "norm": model.norm,
        "image_size": model.image_size,
        "normalisation": model.normalisation,
        "source": start.source,
        "weights": start.digest,
    }
    save(run.start, start.network, layout_of(start.network), facts=facts)


def place(run: RunDir, path: Path, *, normalisation: str | None = None) -> Start:
    """For a run that has not begun: the weights that its plan names, from the file at `path`.

    Raises:
        ConfigError: the plan starts from random weights, or from others.
    """
    data = run.plan.read_bytes()
    if not parse_plan(data).model.start:
        raise ConfigError(
            f"{run.plan} starts from random weights",
            step="make a new run with `rin-server init --plan PLAN --weights FILE`, so that sites see what they accept",
        )
    start = prepare(data, path, normalisation=normalisation)
    write(run, start)
    return start


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def _main(
    run: Annotated[Path, typer.Option("--run")],
    weights: Annotated[Path, typer.Option("--weights")],
    normalisation: Annotated[str | None, typer.Option("--normalisation")] = None,
) -> None:
    """`place` in a process of its own: the coordinator's supervisor stays without torch."""
    for note in place(RunDir(run), weights, normalisation=normalisation).notes:
        typer.echo(f"{weights.name}: {note}")


if __name__ == "__main__":
    run_app(app)
