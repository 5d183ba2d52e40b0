"""rin-client ledger: what private training has cost the patients of this site, and whether the record is whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rin.client.options import HomeOption, JsonOption, home_of
from rin.common.errors import ConfigError, StateError

if TYPE_CHECKING:
    from rin.client.site import Policy
    from rin.common.ledger import Head, Ledger, LedgerError

app = typer.Typer(no_args_is_help=True, help="The site's privacy ledger: show it, verify it, keep its head elsewhere.")


def _ledger(home: Path | None) -> Ledger:
    from rin.client.ledger import site_ledger

    return site_ledger(home_of(home))


def _policy(home: Path | None) -> Policy | None:
    """What site.toml says now; None where it says nothing: the ledger is shown without it."""
    from rin.client.site import read_site

    try:
        return read_site(home_of(home)).policy
    except (ConfigError, OSError):
        return None


@app.command()
def show(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """What each run has spent, and the epsilon of all of them together."""
    facts = _facts(_ledger(home), _policy(home))
    if as_json:
        typer.echo(json.dumps(facts, sort_keys=True))
        return
    typer.echo(f"{'run':<10}{'rounds':>7}{'debits':>7}{'steps':>9}{'sigma':>8}{'rate':>10}{'epsilon alone':>15}")
    for row in facts["runs"]:
        typer.echo(
            f"{row['run'][:8]:<10}{row['rounds']:>7}{row['debits']:>7}{row['steps']:>9}{row['sigma']:>8.3g}"
            f"{row['rate']:>10.4g}{_up(row['epsilon']):>15}"
        )
    for word in facts["adopted"]:
        typer.echo(f"entry {word['number']}, {word['time']}: history adopted ({word['fault']}): {word['reason']}")
    if facts["runs"]:
        typer.echo(f"epsilon so far: {_up(facts['epsilon'])} at delta {facts['delta']:g}, for one patient, all runs")
    else:
        typer.echo("epsilon so far: 0, nothing was trained privately")
    typer.echo(_ceiling(facts))
    typer.echo(f"head: {facts['head']}")


def _up(epsilon: float) -> str:
    """Epsilon as it may be said: rounded up, as in the claim."""
    return f"{math.ceil(epsilon * 1000) / 1000:.3f}"


def _ceiling(facts: dict[str, Any]) -> str:
    """What the site allows now, and what is spent at the delta that it is counted at."""
    policy = facts["policy"]
    if policy is None:
        return "ceiling: not known, site.toml is missing or wrong"
    spent = ""
    if facts["runs"] and policy["delta"] != facts["delta"]:
        spent = f", where epsilon so far is {_up(policy['epsilon'])}"
    return f"ceiling: {policy['ceiling']:g} at delta {policy['delta']:g}{spent}"


def _facts(ledger: Ledger, policy: Policy | None) -> dict[str, Any]:
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
        "policy": policy
        and {"ceiling": policy.epsilon, "delta": policy.delta, "epsilon": epsilon_of(runs, policy.delta)},
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
    as_json: JsonOption = False,
) -> None:
    """Check every line, the chain, the anchor, and with --anchor that no entry is gone since that head was kept."""
    kept = None if anchor is None else _read_head(anchor)
    try:
        ledger = _ledger(home)
        head = ledger.head
        if kept is not None:
            _compare(ledger, kept)
    except StateError as error:
        if as_json:  # and the exit code says it too
            typer.echo(json.dumps({"whole": False, "fault": error.message, "next": error.step}, sort_keys=True))
        raise
    if as_json:
        facts = {"whole": True, "entries": head.count, "head": str(head), "compared": kept and str(kept)}
        typer.echo(json.dumps(facts, sort_keys=True))
        return
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
    ledger = _ledger(home)
    fault = _fault(ledger)
    entry = ledger.adopt(reason)
    typer.echo(f"adopted with entry {entry.number}; head: {entry.head}")
    if fault is not None:
        typer.echo(f"it was adopted although {fault.message}")
    if fault is not None and fault.fault == "edited":
        typer.echo(
            "the lines named there and all after them cannot be trusted: numbers that can be read are counted as they "
            "are written, lines that cannot be read are not counted; where in doubt, lower policy.epsilon in site.toml"
        )
    typer.echo("what was spent and is no longer in the ledger is not counted: lower the epsilon ceiling by it")


def _fault(ledger: Ledger) -> LedgerError | None:
    from rin.common.ledger import LedgerError

    try:
        ledger.entries()
    except LedgerError as error:
        return error
    return None
