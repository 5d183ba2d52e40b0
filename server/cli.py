"""rin-server: set up a consortium, run its rounds, score checkpoints, show a whole consortium on one machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rin.common.errors import ConfigError
from rin.common.plan import read_plan
from rin.common.terminal import progress_printer, run_app, version_option
from rin.server.rundir import RunDir

if TYPE_CHECKING:
    from rin.common.guard import Verdict

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

RunOption = Annotated[Path, typer.Option("--run", envvar="RIN_RUN", help="The run's directory.")]
NormalisationOption = Annotated[
    str | None,
    typer.Option(
        help="symmetric or imagenet, for a file that does not say. Default: as files of its layout were trained.",
        show_default=False,
    ),
]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(help="Pixels a side, for a file that does not say. Default: the backbone's own.", show_default=False),
]
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
    weights: Annotated[
        Path | None, typer.Option(help="Start from this weight file, of any layout; the plan gets its digest.")
    ] = None,
    normalisation: NormalisationOption = None,
) -> None:
    """Make a run directory: plan, certificate authority, server key."""
    from rin.server import consortium

    here = _run(run)
    data = read_plan(plan)[1] if plan else None
    if weights is None:
        consortium.init(here, plan=data, address=address)
    else:
        if data is None:
            raise ConfigError("--weights needs the plan that they are for", step="pass --plan too")
        from rin.server import start

        begin = start.prepare(data, weights, normalisation=normalisation)
        consortium.init(here, plan=begin.plan, address=address)
        start.write(here, begin)
        _print_notes(weights, begin.notes, begin.verdict)
        typer.echo(f"the run starts from weights {begin.digest}, as {here.plan} now says")
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
    weights: Annotated[
        Path | None,
        typer.Option(help="The file of the plan's model.start; needed before round 1 only."),
    ] = None,
    normalisation: NormalisationOption = None,
) -> None:
    """Run the plan's rounds. Stop it at any time: the same command goes on where it was."""
    from rin.server import run as coordinator

    here = _run(run)
    if weights is not None and not here.checkpoint(0).exists():
        _place(here, weights, normalisation)
    if plan is not None and here.plan.is_file() and read_plan(plan)[1] != here.plan.read_bytes():
        raise ConfigError(
            f"{plan} is not the plan of {here.root}", step="a started run keeps its plan; use a new --run"
        )
    raise typer.Exit(coordinator.run_coordinator(here, host=host, port=port, tap=tap))


def _place(run: RunDir, weights: Path, normalisation: str | None) -> None:
    """Take the start's weights in, in a process of its own: torch would stay in this one for the whole run."""
    command = [sys.executable, "-m", "rin.server.start", "--run", str(run.root), "--weights", str(weights)]
    command += ["--normalisation", normalisation] if normalisation else []
    if code := subprocess.run(command, check=False).returncode:
        raise typer.Exit(code)


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
    weights: Annotated[list[Path], typer.Argument(help="Weight files to score, of any layout.")],
    out: Annotated[Path, typer.Option(help="Where summary.json and report/index.html go.")],
    task: Annotated[list[str] | None, typer.Option("--task", help="A task by name; may be given again.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option("--images", help="A folder class/image.png as a task; may be given again.")
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Show this run's learning curve too.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Fine-tunings a task and start.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the device's CPU.")] = 1,
    normalisation: NormalisationOption = None,
    image_size: ImageSizeOption = None,
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
        normalisation=normalisation,
        image_size=image_size,
        progress=progress_printer("bench, fine-tunings"),
    )
    bench_run.print_summary(summary)
    typer.echo(f"report: {out / 'report' / 'index.html'}")


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="A new folder for the files and their card, README.md.")],
    weights: Annotated[
        Path | None, typer.Argument(help="A weight file of any layout. Default: the run's newest checkpoint.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="safetensors (default), torchvision, radimagenet or onnx; may be given again."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", envvar="RIN_RUN", help="The run that made the weights, for the card.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option("--bench", help="summary.json of a benchmark of these weights, for the card.")
    ] = None,
    licence: Annotated[str, typer.Option(help="For the card, e.g. CC-BY-4.0.")] = "",
    name: Annotated[str | None, typer.Option(help="Of the files. Default: backbone and round.")] = None,
    normalisation: NormalisationOption = None,
    image_size: ImageSizeOption = None,
) -> None:
    """Write weights as files that others load, each read back and compared, with a model card."""
    from rin.server import export as exporting

    here = _run(run) if run else None
    if weights is None and here is None:
        raise ConfigError("no weights", step="name a weight file, or a run with --run")
    path = weights or exporting.newest(here)  # type: ignore[arg-type]  # one of the two is there
    done = exporting.export(
        path,
        out.expanduser().absolute(),
        formats=formats or ["safetensors"],
        run=here,
        summary=summary,
        name=name,
        licence=licence,
        normalisation=normalisation,
        image_size=image_size,
    )
    _print_notes(path, done.notes, done.verdict)
    for file in done.files:
        typer.echo(f"{file.sha256}  {out / file.name}")
    typer.echo(f"card: {out / exporting.CARD}")


def _print_notes(weights: Path, notes: Sequence[str], verdict: Verdict) -> None:
    for note in [*notes, *([] if verdict.warning else [verdict.words])]:  # a warning was logged where it was found
        typer.echo(f"{weights.name}: {note}")


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
