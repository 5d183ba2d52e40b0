"""rin-server: set up a consortium, run its rounds, score checkpoints, show a whole consortium on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rin.common.errors import ConfigError
from rin.common.terminal import progress_printer, run_app, version_option
from rin.server.rundir import RunDir

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

RunOption = Annotated[Path, typer.Option("--run", envvar="RIN_RUN", help="The run's directory.")]
HERE = Path("rin-run")


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=version_option, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """The coordinator of a consortium."""


def _run(run: Path) -> RunDir:
    return RunDir(run.expanduser().resolve())


@app.command()
def init(
    run: RunOption = HERE,
    plan: Annotated[Path | None, typer.Option(help="The plan; without it a template is written to edit.")] = None,
    address: Annotated[
        str, typer.Option(help="How sites reach the gateway: https://host:port.")
    ] = "https://localhost:8443",
) -> None:
    """Make a run directory: plan, certificate authority, server key."""
    from rin.server import consortium

    here = _run(run)
    consortium.init(here, plan=plan.read_bytes() if plan else None, address=address)
    typer.echo(f"wrote {here.root}")
    typer.echo(f"next: read {here.plan}, then `rin-server invite SITE` for each site;")
    typer.echo(f"      take {here.ca / 'ca.key'} offline (it is needed again only for `rin-server renew`)")


@app.command()
def invite(
    site: Annotated[str, typer.Argument(help="A site of the plan.")],
    run: RunOption = HERE,
) -> None:
    """Write SITE.invite: address, CA and plan, no secret. The site confirms its fingerprint by phone."""
    from rin.server import consortium

    path, fingerprint = consortium.invite(_run(run), site)
    typer.echo(f"wrote {path}")
    typer.echo(f"fingerprint, to read out by phone: {fingerprint}")


@app.command()
def admit(
    join: Annotated[Path, typer.Argument(help="SITE.join from the site.")],
    fingerprint: Annotated[str, typer.Option(help="The site's fingerprint, as its operator read it out by phone.")],
    run: RunOption = HERE,
) -> None:
    """Register a site's keys; a running coordinator takes it in at once."""
    from rin.server import consortium

    member = consortium.admit(_run(run), join, fingerprint=fingerprint)
    typer.echo(f"admitted {member.site}")


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="A member.")],
    run: RunOption = HERE,
) -> None:
    """Take a site's rights away: its key, its tickets, its receipts that have not been counted."""
    from rin.server import consortium

    consortium.revoke(_run(run), site)
    typer.echo(f"revoked {site}; weights that already count its updates stay as they are")


@app.command()
def renew(run: RunOption = HERE) -> None:
    """Make a new server certificate; needs ca/ca.key back in its place for the moment."""
    from rin.server import consortium

    typer.echo(f"the new server certificate ends on {consortium.renew(_run(run)):%Y-%m-%d}; restart `rin-server run`")


@app.command("run")
def run_rounds(
    run: RunOption = HERE,
    plan: Annotated[Path | None, typer.Option(help="Refuse to start unless this is the run's plan.")] = None,
    host: Annotated[str, typer.Option(help="Where the gateway listens.")] = "0.0.0.0",
    port: Annotated[
        int | None, typer.Option(help="Default: the port of the run's address.", show_default=False)
    ] = None,
    tap: Annotated[
        Path | None, typer.Option(help="Append every byte that sites send to this file: a proof for a privacy officer.")
    ] = None,
) -> None:
    """Run the plan's rounds. Stop it at any time: the same command goes on where it was."""
    from rin.server import run as coordinator

    here = _run(run)
    if plan is not None and here.plan.is_file() and plan.read_bytes() != here.plan.read_bytes():
        raise ConfigError(
            f"{plan} is not the plan of {here.root}", step="a started run keeps its plan; use a new --run"
        )
    raise typer.Exit(coordinator.run_coordinator(here, host=host, port=port, tap=tap))


@app.command()
def status(
    run: RunOption = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Who is a member, how far the rounds are, what was refused."""
    from rin.server import status as overview

    facts = overview.status(_run(run))
    if as_json:
        typer.echo(json.dumps(facts, sort_keys=True))
    else:
        overview.print_status(facts)


@app.command()
def bench(
    weights: Annotated[list[Path], typer.Argument(help="Checkpoints to score.")],
    out: Annotated[Path, typer.Option(help="Where summary.json and report/index.html go.")],
    task: Annotated[list[str] | None, typer.Option("--task", help="A task by name; may be given again.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option("--images", help="A folder class/image.png as a task; may be given again.")
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Show this run's learning curve too.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Fine-tunings a task and start.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the device's CPU.")] = 1,
) -> None:
    """Score checkpoints on tasks: fine-tuned from the checkpoint and from random weights, same recipe and seeds."""
    from rin.server.bench import run as bench_run
    from rin.server.bench.tasks import image_folder_task, named_tasks

    tasks = [*named_tasks(task or []), *(image_folder_task(folder) for folder in images or [])]
    if not tasks:
        raise ConfigError("no task", step="pass --task NAME or --images FOLDER; tasks: see docs/coordinator.md")
    summary = bench_run.bench(
        weights,
        tasks,
        out,
        run=_run(run) if run else None,
        seeds=seeds,
        threads=threads,
        progress=progress_printer("bench, fine-tunings"),
    )
    bench_run.print_summary(summary)
    typer.echo(f"report: {out / 'report' / 'index.html'}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="An empty folder, or one of an earlier demo that was stopped.")],
    seed: Annotated[int, typer.Option(help="Of the phantom patients and of the training.")] = 0,
) -> None:
    """A whole consortium on this machine: three phantom hospitals, five rounds over TLS, a benchmark, a report."""
    from rin.server import demo as phantom_consortium

    raise typer.Exit(phantom_consortium.demo(out.expanduser().resolve(), seed=seed))


def main() -> None:
    """Entry point of `rin-server`."""
    run_app(app)


if __name__ == "__main__":
    main()
