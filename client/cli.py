"""rin-client: join a consortium, accept a plan, ingest the archive, run the agent or train alone, look at the state."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rin.client import ledger_cli
from rin.client.options import HomeOption, JsonOption, SiteOption, home_of
from rin.common.errors import ConfigError, RefusedError
from rin.common.supervise import stop_on_signals
from rin.common.terminal import confirm, progress_printer, run_app, version_option

if TYPE_CHECKING:
    from rin.client.ingest.report import IngestReport
    from rin.common.audit import Check

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

app.add_typer(ledger_cli.app, name="ledger")


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=version_option, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """The agent at one imaging site."""


@app.command()
def join(
    invite: Annotated[Path, typer.Argument(help="SITE.invite from the coordinator.")],
    home: HomeOption = None,
    site: SiteOption = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="The invite's fingerprint, as the coordinator read it out by phone.")
    ] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Make new keys for a site that has joined before.")] = False,
) -> None:
    """Make this site's keys and write SITE.join to send back."""
    from rin.client import join as joining

    shown = joining.invite_fingerprint(invite)
    if fingerprint is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                "nobody is here to compare fingerprints",
                step="ask the coordinator by phone and pass --fingerprint; the invite's own is not proof",
            )
        typer.echo(f"fingerprint of the invite: {shown}")
        confirm("Does the coordinator read out the same one by phone?", yes=False)
        fingerprint = shown
    target = joining.join(home_of(home), invite, site=site, fingerprint=fingerprint, renew=renew)
    typer.echo(f"wrote {target}")
    typer.echo(f"fingerprint of this site: {joining.join_fingerprint(target)}")
    typer.echo("next: send the file to the coordinator, read the fingerprint out by phone, then edit site.toml:")
    typer.echo(f"      {home_of(home).site_toml}")


@app.command()
def accept(
    plan: Annotated[Path, typer.Argument(help="plan.toml, or the SITE.invite that holds it.")],
    home: HomeOption = None,
    by: Annotated[str | None, typer.Option(help="Who agrees, for the record at the site.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree without being asked.")] = False,
) -> None:
    """A person at the site agrees to a plan; the trainer refuses every other one."""
    from rin.client import join as joining

    data = joining.plan_bytes(plan)
    for key, value in joining.plan_summary(data):
        typer.echo(f"  {key:<22}{value}")
    confirm("Agree to this plan for this site?", yes=yes)
    name = by or typer.prompt("Your name, for the record")
    digest = joining.accept(home_of(home), data, by=name)
    typer.echo(f"accepted plan {digest}")


@app.command()
def ingest(
    home: HomeOption = None,
    site: SiteOption = None,
    root: Annotated[
        list[Path] | None, typer.Option("--root", help="An archive folder; may be given again.", show_default=False)
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV: which image carries which local label.")] = None,
    mapping: Annotated[Path | None, typer.Option(help="CSV: local label to RadImageNet label.")] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="`dicom` (default), or `radimagenet`: the published PNG folders.", show_default=False),
    ] = None,
    csv: Annotated[
        list[Path] | None,
        typer.Option(
            "--csv", help="Layout radimagenet: a list of the published split; again for each.", show_default=False
        ),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove the images whose files are gone, from catalog and cache.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON line.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show path and reason of every refused file, on this terminal only.")
    ] = False,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Write a PNG of ingested images for a human to look at (patient data!).")
    ] = None,
) -> None:
    """Read the archive into catalog and cache; what is known is skipped, so it may be stopped at any time."""
    from rin.client import site as sites
    from rin.client.ingest import pipeline, sheet

    here = home_of(home)
    settings = sites.read_site(here) if here.site_toml.is_file() else None
    if settings is not None and site is not None and site != settings.site:
        raise ConfigError(f"this home belongs to site {settings.site}, not {site}", step="check --home and --site")
    name = site or (settings.site if settings else None)
    roots = root or list(settings.archive.roots if settings else ())
    if name is None or not roots:
        raise ConfigError("no site name or no archive folder", step="pass --site and --root, or fill site.toml")
    if explain:
        for path, reason in pipeline.explain(here, roots):
            typer.echo(f"{reason}\t{path}")
        return
    show = progress_printer("ingest, files")
    report = pipeline.ingest(
        here,
        site=name,
        roots=roots,
        labels=labels or (settings.archive.labels if settings else None),
        mapping=mapping or (settings.archive.mapping if settings else None),
        layout=layout or (settings.archive.layout if settings else "dicom"),
        csv=csv or list(settings.archive.csv if settings else ()),
        prune=prune,
        warn=_warn,
        progress=lambda state: show(state.done, state.total if state.stage == "read" else 0),
    )
    if contact_sheet is not None:
        sheet.contact_sheet(here, contact_sheet)
    if as_json:
        typer.echo(json.dumps(report.as_json(), sort_keys=True))
    else:
        _print_report(report, contact_sheet)
    if settings is None:
        typer.echo(f"next: write {here.site_toml}, which `rin-client train` and `start` need:", err=True)
        typer.echo("      site, [labels] and [device]; deploy/site.example.toml explains every key", err=True)


def _warn(text: str) -> None:
    typer.secho(f"WARNING: {text}", err=True, fg="red" if sys.stderr.isatty() else None)


def _print_report(report: IngestReport, drawn: Path | None) -> None:
    from rin.client.ingest.report import FACTS

    typer.echo(f"{report.files} files, {report.accepted} images accepted, {report.seconds:.1f} s")
    for title, counts in (("refused", report.refused), ("labels", report.labels), ("unmapped", report.unmapped)):
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            typer.echo(f"  {title:<9}{count:>8}  {name}")
    for name, count in report.facts.items():
        if count:
            typer.echo(f"  {'note':<9}{count:>8}  {FACTS[name]}")
    if report.pruned:
        typer.echo(f"  {'pruned':<9}{report.pruned:>8}  images whose files are gone")
    if report.to_erase:
        typer.echo(f"  {'waiting':<9}{report.to_erase:>8}  removed images: their pixels stay while training reads them")
        typer.echo("next: run the same command again when no round is trained: it erases those pixels")
    if gone := report.gone.as_text():
        _warn(gone)
    if report.warning:
        _warn(report.warning)
    if report.refused:
        typer.echo("next: `rin-client ingest --explain` shows the paths behind the reasons, on this terminal only")
    if drawn is not None:
        typer.echo(f"contact sheet: {drawn} (images of patients: delete it when you have looked)")


@app.command()
def train(
    plan: Annotated[
        Path, typer.Option("--plan", help="plan.toml: network, rounds, schedule; it need not name the site.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", file_okay=False, help="Folder for checkpoints and figures; the same one goes on there."),
    ],
    home: HomeOption = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights to start from, in any layout. Default: random.", show_default=False)
    ] = None,
    normalisation: Annotated[
        str | None, typer.Option(help="What those were trained with, where the file does not say.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a round.")] = False,
) -> None:
    """Train at this site alone: no coordinator, no keys, no network. It may be stopped at any time."""
    from rin.client import confine
    from rin.common.plan import read_plan

    data, here = read_plan(plan)[1], home_of(home)
    out, weights = out.expanduser().resolve(), weights.expanduser().resolve() if weights else None
    try:
        confine.enter(no_network=True, hide=())  # before anything is imported that starts threads
        typer.echo("no network: the kernel holds this process apart", err=True)
    except OSError:
        typer.echo("network is open: this kernel confines nobody", err=True)
    from rin.client import alone

    def tell(figures: dict[str, Any]) -> None:
        typer.echo(json.dumps(figures, sort_keys=True) if as_json else _round_line(figures))

    stopped: list[int] = []
    stop_on_signals(stopped.append)
    try:
        last = alone.train(
            here,
            data,
            out,
            weights=weights,
            normalisation=normalisation,
            progress=progress_printer("train, steps"),
            cancelled=lambda: "cancelled" if stopped else "",
            on_round=tell,
        )
    except RefusedError as error:
        if error.code != "cancelled":
            raise
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"wrote {last}", err=as_json)
    typer.echo("these weights come from patients' images: who may have them is for people to decide", err=True)


def _round_line(figures: dict[str, Any]) -> str:
    parts = [f"round {figures['round']}"]
    for name in ("training", "validation"):
        if found := figures.get(name):
            parts.append(f"{name} " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    if "epsilon" in figures:
        parts.append(f"epsilon {figures['epsilon']} at delta {figures['delta']:g}, all that the ledger holds")
    return "; ".join(parts)


@app.command()
def start(
    home: HomeOption = None,
    site: SiteOption = None,
    only: Annotated[
        str | None, typer.Option(help="`trainer` or `agent`: one half of the airlock, for systemd.", show_default=False)
    ] = None,
) -> None:
    """Run the agent until it is stopped: it waits for rounds, trains, and sends updates."""
    from rin.client import agent
    from rin.client.site import read_site

    if only not in (None, "trainer", "agent"):
        raise ConfigError(f"--only wants trainer or agent, got {only!r}", step="leave it out to run both")
    here = home_of(home)
    if only != "agent":  # the agent cannot read the vault, and must not need to
        name = read_site(here).site
        if site is not None and site != name:
            raise ConfigError(f"this home belongs to site {name}, not {site}", step="check --home and --site")
    raise typer.Exit(agent.start(here, only=only))


@app.command()
def status(
    home: HomeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What this site is doing: agent, trainer, last round, last contact, catalog."""
    from rin.client import status as overview

    facts = overview.status(home_of(home))
    if as_json:
        typer.echo(json.dumps(facts, sort_keys=True))
        return
    for line in _lines(facts):
        typer.echo(line)


@app.command()
def audit(as_json: JsonOption = False) -> None:
    """Check that private training does what its statement says: made-up patients, no archive, half a minute."""
    from dataclasses import asdict

    from rin.client import audit as auditor

    if as_json:
        found = auditor.checks(lambda check: None)
        typer.echo(json.dumps([asdict(check) | {"passed": check.passed} for check in found]))
    else:
        found = auditor.checks(lambda check: typer.echo(f"{'ok' if check.passed else 'FAILED':<8}{_said(check)}"))
    if not all(check.passed for check in found):
        typer.echo("a check failed: do not train privately with this installation, and report it", err=True)
        raise typer.Exit(1)


def _said(check: Check) -> str:
    return f"{check.name:<20}{check.value:>10.4g} of at most {check.threshold:<10.4g}{check.words}"


def _lines(facts: dict[str, Any], indent: str = "") -> Iterable[str]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key:<{max(1, 24 - len(indent))}}{'-' if value is None else value}"


def main() -> None:
    """Entry point of `rin-client`."""
    run_app(app)


if __name__ == "__main__":
    main()
