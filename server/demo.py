"""`rin-server demo`: three phantom hospitals and a coordinator on this machine, through the commands a user types."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import IO, Any, Final

from rich.console import Console

from rin.common.errors import StateError
from rin.common.events import Event, read_events
from rin.common.files import read_json, write_atomic, write_json
from rin.common.plan import parse_plan
from rin.common.terminal import progress_printer
from rin.server import canaries
from rin.server.rundir import RunDir
from rin.server.scanners import SITES

STOP_WAIT_S: Final = 30.0

# Event of the run to the line that the demo shows for it.
LINES: Final[dict[str, str]] = {
    "round-opened": "round {round}: asked {sites}",
    "receipt": "round {round}: update of {site} received",
    "site-failed": "round {round}: {site} failed with {code}, asked again",
    "sites-awaited": "round {round}: waiting for {sites}",
    "round-closed": "round {round}: closed after {seconds:.0f} s",
    "round-failed": "round {round}: failed: {reason}",
}


@dataclass
class Demo:
    """One demo in one folder; every step may be stopped and taken up again."""

    out: Path
    seed: int
    console: Console = field(default_factory=lambda: Console(stderr=True, markup=False, highlight=False))
    begun: float = field(default_factory=time.monotonic)

    @property
    def run(self) -> RunDir:
        return RunDir(self.out / "coordinator")

    @property
    def tap(self) -> Path:
        return self.out / "tap.bin"

    def home(self, site: str) -> Path:
        return self.out / "sites" / site

    def archive(self, site: str) -> Path:
        return self.out / "archives" / site

    def say(self, text: str) -> None:
        """One line of progress with the seconds since the start."""
        self.console.print(f"[{time.monotonic() - self.begun:4.0f} s] {text}", soft_wrap=True)


def demo(out: Path, *, seed: int) -> int:
    """Run the whole demo in `out`.

    Returns:
        0 when the rounds, the benchmark and the canary search all ended well.

    Raises:
        StateError: `out` holds something else, or a command of the demo failed.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "archives").is_dir():
        raise StateError(f"{out} is not empty", step="give --out an empty folder")
    this = Demo(out, seed)
    _write_archives(this)
    _set_up(this)
    ingested = {site: _ingest(this, site) for site in SITES}
    _rounds(this)
    search = _search(this, ingested)
    _bench(this, ingested, search)
    this.say(f"done: {out / 'report' / 'index.html'}")
    return 0 if search["found"] == 0 and search["unaccounted"] == 0 else 1


def _write_archives(this: Demo) -> None:
    """The three hospitals' archives; the same seed gives the same bytes."""
    from rin.server.archive import write_archive

    missing = [site for site in SITES if not (this.out / "archives" / f"{site}.canaries.json").is_file()]
    if not missing:
        return
    this.say(f"drawing the DICOM archives of {', '.join(missing)}")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = {site: pool.submit(write_archive, site, this.out / "archives", seed=this.seed) for site in missing}
        for site, job in jobs.items():
            job.result()
            this.say(f"{site}: archive written")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _set_up(this: Demo) -> None:
    """init, invite, join, site.toml, accept, admit: as a consortium does it, by command."""
    text = resources.files("rin.server").joinpath("demo_plan.toml").read_bytes()
    if not this.run.facts.is_file():
        plan = this.out / "plan.toml"
        write_atomic(plan, text.replace(b"seed = 0", f"seed = {this.seed}".encode()))
        _command(this, "server", "init", "--run", this.run.root, "--plan", plan, "--address", _address())
    members = set(read_json(this.run.members).get("members", {}))
    for site in SITES:
        if site not in members:
            _join(this, site)
            this.say(f"{site}: joined and admitted")


def _address() -> str:
    return f"https://localhost:{_free_port()}"


def _join(this: Demo, site: str) -> None:
    """One site's way into the consortium; the two fingerprints stand for the two phone calls."""
    home, run = this.home(site), this.run.root
    shown = _command(this, "server", "invite", site, "--run", run)
    invite = this.run.invites / f"{site}.invite"
    renew = ["--renew"] if (home / "net" / "node.key").exists() else []
    joined = _command(this, "client", "join", invite, "--home", home, "--fingerprint", _fingerprint(shown), *renew)
    address = read_json(this.run.facts)["address"]
    write_atomic(home / "vault" / "site.toml", _site_toml(this, site, address).encode(), mode=0o600)
    _command(this, "client", "accept", this.run.plan, "--home", home, "--by", "demo", "--yes")
    join = next(line.removeprefix("wrote ") for line in joined.splitlines() if line.startswith("wrote "))
    _command(this, "server", "admit", join, "--fingerprint", _fingerprint(joined), "--run", run)


def _fingerprint(output: str) -> str:
    """What a command printed after `fingerprint ...: `."""
    return next(line.split(": ", 1)[1] for line in output.splitlines() if line.startswith("fingerprint"))


def _site_toml(this: Demo, site: str, address: str) -> str:
    archive = this.archive(site)
    return f"""# A phantom hospital of `rin-server demo`.
site = "{site}"

[archive]
roots = ["{archive / "dicom"}"]
labels = "{archive / "labels.csv"}"
mapping = "{archive / "mapping.csv"}"

[labels]
declared = {json.dumps(list(SITES[site].labels))}

[device]
name = "cpu"
threads = 1

[coordinator]
address = "{address}"

[policy]
privacy = "none"                    # no patient stands behind these images
none-agreed-by = "rin-server demo"
none-agreed-on = "2026-11-23"
metrics = ["loss", "top1", "top5", "images"]
min-sites = 2
"""


def _argv(side: str, *args: str | Path) -> list[str]:
    return [sys.executable, "-m", f"rin.{side}.cli", *map(str, args)]


def _command(this: Demo, side: str, *args: str | Path) -> str:
    """Run one command of rin to its end; its output.

    Raises:
        StateError: it failed; the error shows its last lines.
    """
    done = subprocess.run(_argv(side, *args), capture_output=True, text=True, check=False)
    if done.returncode:
        raise StateError(
            f"`rin-{side} {args[0]}` ended with {done.returncode}: {done.stderr.strip()[-500:]}",
            step=f"look at the folder {this.out}, or start over in an empty one",
        )
    return done.stdout


def _ingest(this: Demo, site: str) -> dict[str, Any]:
    """Ingest one archive with the site's own command; its JSON report. Known files are skipped the second time."""
    kept = this.out / "ingest" / f"{site}.json"
    if kept.is_file():
        return read_json(kept)
    this.say(f"{site}: ingest")
    with subprocess.Popen(
        _argv("client", "ingest", "--home", this.home(site), "--json"), stdout=subprocess.PIPE, text=True
    ) as process:
        output, _ = process.communicate()
    if process.returncode:
        raise StateError(f"ingest of {site} ended with {process.returncode}", step="see the error above")
    report = json.loads(output.splitlines()[-1])
    refused = sum(report["refused"].values())
    this.say(f"{site}: {report['files']} files, {report['accepted']} images accepted, {refused} refused")
    write_json(kept, report)
    return report


def _rounds(this: Demo) -> None:
    """The coordinator and three agents as processes, until the last round is closed; then nothing is left running."""
    rounds = parse_plan(this.run.plan.read_bytes()).training.rounds
    if this.run.checkpoint(rounds).is_file():
        return
    this.say(f"starting the coordinator and {len(SITES)} sites, {rounds} rounds over TLS")
    with contextlib.ExitStack() as stack:
        coordinator = stack.enter_context(
            _process(
                this, "coordinator", "server", "run", "--run", this.run.root, "--host", "127.0.0.1", "--tap", this.tap
            )
        )
        agents = {
            site: stack.enter_context(_process(this, site, "client", "start", "--home", this.home(site)))
            for site in SITES
        }
        _follow(this, coordinator, agents)
    if coordinator.returncode or not this.run.checkpoint(rounds).is_file():
        raise StateError("the rounds did not end", step=f"read {this.out / 'log' / 'coordinator.log'}")


@contextlib.contextmanager
def _process(this: Demo, name: str, side: str, *args: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A long-running command with its output in OUT/log; stopped on the way out."""
    log = this.out / "log" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = _spawn(_argv(side, *args), file)
        try:
            yield process
        finally:
            _stop(process)


def _spawn(argv: list[str], file: IO[bytes]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches the demo, which stops its children in order.
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _follow(this: Demo, coordinator: subprocess.Popen[bytes], agents: dict[str, subprocess.Popen[bytes]]) -> None:
    """Show the run's events, and the sites' steps between them, until the coordinator ends."""
    log = this.run.log / "events.jsonl"
    offset = log.stat().st_size if log.is_file() else 0
    show = progress_printer("  training, steps of all sites")
    while coordinator.poll() is None:
        events, offset = read_events(log, offset)
        for event in events:
            _show(this, event)
        for site, agent in agents.items():
            if agent.poll() is not None:
                raise StateError(
                    f"the agent of {site} ended with {agent.returncode}", step=f"read {this.out / 'log'}/{site}.log"
                )
        done, total = _steps(this)
        if done < total:
            show(done, total)
        time.sleep(0.5)
    for event in read_events(log, offset)[0]:
        _show(this, event)


def _steps(this: Demo) -> tuple[int, int]:
    """Optimizer steps done and all steps of the sites that train at this moment."""
    states = [state for site in SITES if (state := _status(this.home(site))).get("state") == "training"]
    return sum(state.get("step", 0) for state in states), sum(state.get("steps", 0) for state in states)


def _status(home: Path) -> dict[str, Any]:
    try:
        return json.loads((home / "vault" / "status.json").read_bytes())
    except (OSError, ValueError):
        return {}


def _show(this: Demo, event: Event) -> None:
    if event.kind in LINES:
        fields = {k: ", ".join(v) if isinstance(v, list) else v for k, v in event.fields.items()}
        this.say(LINES[event.kind].format(**fields))


def _search(this: Demo, ingested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Look for every canary in what left the sites, on the coordinator's disk and in all logs; account for damage."""
    kept = this.out / "privacy.json"
    if not kept.is_file() or this.tap.is_file():
        places = [this.tap, this.run.root, this.out / "log", *(this.home(site) / "net" for site in SITES)]
        places += [this.home(site) / "vault" / "log" for site in SITES]
        places += [this.home(site) / "vault" / name for site in SITES for name in ("egress.jsonl", "status.json")]
        found = canaries.search(places, canaries.read(this.out / "archives"))
        damage = {site: _unaccounted(this, site) for site in SITES}
        write_json(
            kept,
            {
                "canaries": found.canaries,
                "bytes_searched": found.searched,
                "found": len(found.hits),
                "places": sorted({hit.place.relative_to(this.out).as_posix() for hit in found.hits}),
                "damaged": {site: total for site, (total, _) in damage.items()},
                "unaccounted": sum(lost for _, lost in damage.values()),
            },
        )
        this.tap.unlink(missing_ok=True)  # as large as all updates together
    facts = read_json(kept)
    this.say(
        f"{facts['canaries']} PHI canaries searched in {facts['bytes_searched'] / 1e6:.0f} MB that left a site or was "
        f"logged: {facts['found']} found; damaged files without a reason: {facts['unaccounted']}"
    )
    return facts


def _unaccounted(this: Demo, site: str) -> tuple[int, int]:
    """Damaged files of the site's archive, and how many of them its catalog gives no reason for."""
    damaged = read_json(this.out / "archives" / f"{site}.canaries.json")["damaged_files"]
    explained = _command(this, "client", "ingest", "--home", this.home(site), "--explain")
    paths = {line.split("\t", 1)[1] for line in explained.splitlines() if "\t" in line}
    lost = [name for name in damaged if str(this.archive(site) / name) not in paths]
    return len(damaged), len(lost)


def _bench(this: Demo, ingested: dict[str, dict[str, Any]], search: dict[str, Any]) -> None:
    """Score the last checkpoint, write report and summary, show the table."""
    from rin.server.bench import run as bench_run
    from rin.server.bench.tasks import named_tasks

    plan = parse_plan(this.run.plan.read_bytes())
    this.say(f"benchmark: {', '.join(plan.bench.tasks)}")
    summary = bench_run.bench(
        [this.run.checkpoint(plan.training.rounds)],
        named_tasks(list(plan.bench.tasks)),
        this.out,
        run=this.run,
        seeds=plan.bench.seeds,
        threads=os.cpu_count() or 1,
        progress=progress_printer("  benchmark, fine-tunings"),
        sites=ingested,
        privacy=search,
    )
    bench_run.print_summary(summary)
    shutil.rmtree(this.out / "ingest", ignore_errors=True)
