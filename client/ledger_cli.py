"""rin-client ledger: what private training has cost the patients of this site, and whether the record is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rin.client.options import HomeOption, JsonOption, home_of
from rin.common.errors import ConfigError, StateError

if TYPE_CHECKING:
    from rin.common.ledger import Head, Ledger

app = typer.Typer(no_args_is_help=True, help="The site's privacy ledger: show it, verify it, keep its head elsewhere.")


def _ledger(home: Path | None) -> Ledger:
    from rin.client.ledger import site_ledger

    return site_ledger(home_of(home))


@app.command()
def show(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """What each run has spent, and the epsilon of all of them together."""
    facts = _facts(_ledger(home))
    if as_json:
        typer.echo(json.dumps(facts, sort_keys=True))
        return
    typer.echo(f"{'run':<10}{'rounds':>7}{'debits':>7}{'steps':>9}{'sigma':>8}{'rate':>10}{'epsilon alone':>15}")
    for row in facts["runs"]:
        typer.echo(
            f"{row['run'][:8]:<10}{row['rounds']:>7}{row['debits']:>7}{row['steps']:>9}{row['sigma']:>8.3g}"
            f"{row['rate']:>10.4g}{row['epsilon']:>15.3f}"
        )
    for word in facts["adopted"]:
        typer.echo(f"entry {word['number']}, {word['time']}: history adopted ({word['fault']}): {word['reason']}")
    if facts["runs"]:
        typer.echo(f"epsilon so far: {facts['epsilon']:.3f} at delta {facts['delta']:.3g}, for one patient, all runs")
    else:
        typer.echo("epsilon so far: 0, nothing was trained privately")
    typer.echo(f"head: {facts['head']}")


def _facts(ledger: Ledger) -> dict[str, Any]:
    from dataclasses import asdict

    from rin.client.ledger import by_run, epsilon_of
    from rin.common.ledger import Adopt, debits

    entries = ledger.entries()
    charged = debits(entries)
    runs = by_run(charged)
    delta = min((debit.delta for debit in charged), default=None)  # the strictest: it holds for all of them
    return {
        "head": str(entries[-1].head if entries else ledger.head),
        "population": ledger.population,
        "delta": delta,
        "epsilon": epsilon_of(runs, delta) if delta else 0.0,
        "runs": [asdict(run) | {"epsilon": epsilon_of([run], delta) if delta else 0.0} for run in runs],
        "adopted": [
            {"number": entry.number, "time": entry.time, **entry.payload.model_dump()}
            for entry in entries
            if isinstance(entry.payload, Adopt)
        ],
    }


@app.command()
def verify(
    home: HomeOption = None,
    anchor: Annotated[
        str | None,
        typer.Option(help="A head kept in a second place, COUNT:DIGEST or the file that holds it.", show_default=False),
    ] = None,
) -> None:
    """Check every line, the chain, the anchor, and with --anchor that no entry is gone since that head was kept."""
    ledger = _ledger(home)
    head = ledger.head
    if anchor is not None:
        _compare(ledger, _read_head(anchor))
    typer.echo(f"the ledger is whole: {head.count} {'entry' if head.count == 1 else 'entries'}")
    typer.echo(f"head: {head}")


def _read_head(text: str) -> Head:
    from rin.common.ledger import Head

    if ":" in text and not Path(text).exists():
        return Head.parse(text)
    try:
        return Head.parse(Path(text).read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{text} cannot be read", step="give COUNT:DIGEST, or a file that holds it") from None


def _compare(ledger: Ledger, kept: Head) -> None:
    if not ledger.contains(kept.count, kept.digest):
        raise StateError(
            f"the ledger does not hold entry {kept.count} as it was kept in the second place",
            step="an older copy or another ledger is in use: restore the newest",
            code="ledger",
        )


@app.command()
def anchor(
    home: HomeOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write it there; a file that holds an earlier head is compared first.", show_default=False),
    ] = None,
) -> None:
    """The ledger's head, COUNT:DIGEST: keep it in a second place, such as the privacy officer's log."""
    from rin.common.files import write_atomic

    ledger = _ledger(home)
    head = ledger.head
    if out is None:
        typer.echo(str(head))
        return
    if out.exists():
        _compare(ledger, _read_head(str(out)))
    try:
        write_atomic(out, f"{head}\n".encode())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}", step="choose another --out") from None
    typer.echo(f"wrote {out}")


@app.command()
def adopt(
    reason: Annotated[str, typer.Option(help="Why this history is right, in one line, with your name; it stays here.")],
    home: HomeOption = None,
) -> None:
    """A person takes the history as it is where the coordinator, the anchor or the chain says otherwise."""
    entry = _ledger(home).adopt(reason)
    typer.echo(f"adopted with entry {entry.number}; head: {entry.head}")
    typer.echo("what was spent and is no longer in the ledger is not counted: lower the epsilon ceiling by it")
