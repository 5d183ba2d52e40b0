"""`rin-server run`: the supervisor of the coordinator's processes; it follows the run directory, which is the truth.

Gateway, SuperLink and SuperExec are children; the rounds are a Flower run that is submitted again from the directory
whenever it ends before the plan does. No torch here.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from rin.common import keys
from rin.common import log as logs
from rin.common.errors import ConfigError, StateError
from rin.common.events import Event, Events, read_events
from rin.common.files import lock, read_json, write_json
from rin.common.flower import Control, child_env, stub_fab
from rin.common.plan import PROTOCOL, Plan, read_plan
from rin.common.supervise import BACKOFF, Child, Report, Supervisor, noted_alive, stop_on_signals
from rin.server import superlink
from rin.server.members import members
from rin.server.record import last_record
from rin.server.rundir import RunDir

log = logging.getLogger(__name__)

TICK: Final = 0.25  # seconds between two looks at children, members and events
LOOK: Final = 1.0  # seconds between two questions to the SuperLink
RECONCILE: Final = 5.0  # seconds between two comparisons with the members; a changed members.json is seen at once
REMIND: Final = 60.0  # seconds after which the sites that are away are named again
FRUITLESS: Final = 4  # runs in a row that end without one new event before the coordinator gives up

# Event to the line that an operator sees for it; a kind that is not here is shown nowhere.
LINES: Final[dict[str, str]] = {
    "member-admitted": "{site} is admitted",
    "member-revoked": "{site} is revoked",
    "site-online": "{site} is online",
    "site-away": "{site} is away",
    "run-resumed": "going on with round {round}",
    "round-opened": "round {round}: asked {sites}",
    "sites-awaited": "round {round}: waiting for {sites}",
    "receipt": "round {round}: update of {site} received",
    "site-failed": "round {round}: {site} failed with {code}",
    "scores-ignored": "round {round}: validation figures of {site} are ignored: {reason}",
    "round-closed": "round {round}: closed after {seconds:.0f} s",
    "round-failed": "round {round}: failed: {reason}",
    "rounds-stopped": "{reason}; next: {step}",
}
BAD: Final = frozenset({"round-failed", "rounds-stopped"})  # the run ends here; a person must act


def line_of(event: Event) -> str | None:
    """What an operator sees of `event`, None for nothing."""
    fields = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in event.fields.items()
    }
    try:
        return LINES[event.kind].format(**fields) if event.kind in LINES else None
    except (KeyError, ValueError):
        return event.kind


def run_coordinator(
    run: RunDir,
    *,
    host: str,
    port: int | None,
    tap: Path | None = None,
    follow: Callable[[Event], None] | None = None,
) -> int:
    """Run the plan's rounds in `run` until the last one is closed; may be stopped and started again at any moment.

    Args:
        host, port: where the gateway listens; no port means that of the run's address.
        tap: file to which the gateway appends what sites send.
        follow: called with each event of the run, as it appears; without it lines go to stderr.

    Returns:
        0 when the last round is closed, 1 when a round failed, 130 or 143 when it was stopped.

    Raises:
        StateError: another coordinator works here, or the directory is not that of a run.
        ConfigError: the port is taken, or the plan is wrong.
    """
    plan, facts = read_plan(run.plan)[0], read_json(run.facts)
    if plan.model.start and not (run.start.exists() or run.checkpoint(0).exists()):
        raise ConfigError(
            f"the plan starts from weights {plan.model.start}, which are not in {run.root}",
            step="pass --weights FILE, naming the file that they came from",
        )
    port = port or urlsplit(str(facts["address"])).port or 443
    logs.setup(run.log / "coordinator.jsonl")
    with lock(run.lock, holder="rin-server run"):
        if finished(run, plan):
            log.info("all %d rounds are closed; nothing is left to do", plan.training.rounds)
            return 0
        _check_port(host, port)
        _warn_of_expiry(run)
        facts["epoch"] = int(facts.get("epoch", 0)) + 1
        write_json(run.facts, facts)
        coordinator = _Coordinator(run, plan, facts["epoch"], host, port, tap, follow or _show)
        stop_on_signals(coordinator.stop)
        return coordinator.main()


def finished(run: RunDir, plan: Plan) -> bool:
    """Whether the plan's last round is closed."""
    last = last_record(run)
    return last is not None and last.state == "closed" and last.round >= plan.last_round


def is_open(run: RunDir) -> bool:
    """Whether a round has begun and is not closed."""
    last = last_record(run)
    return last is not None and last.state != "closed"


def _show(event: Event) -> None:
    if line := line_of(event):
        (log.error if event.kind in BAD else log.info)("%s", line)


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror})",
            step="stop the program that holds the port, or choose another --host and --port",
        ) from None


def _warn_of_expiry(run: RunDir) -> None:
    days = keys.days_left((run.ca / "server.crt").read_bytes())
    if days < 0:
        raise StateError("the server certificate has expired", step="run `rin-server renew`")
    if days < keys.WARN_DAYS:
        log.warning("the server certificate ends in %d days; run `rin-server renew`", days)


@dataclass(slots=True)
class _Coordinator:
    """One start. All times are of `time.monotonic`."""

    run: RunDir
    plan: Plan
    epoch: int
    host: str
    port: int
    tap: Path | None
    follow: Callable[[Event], None]
    upstream: int = field(default_factory=superlink.free_port)
    fab: bytes = b""
    control: Control | None = None  # None while the SuperLink is not up, or no longer the one that we knew
    stopped: int = 0  # the signal that asked for the end
    flower_run: int | None = None
    submitted: bool = False
    fruitless: int = 0
    submit_at: float = 0.0
    offset: int = 0  # in events.jsonl
    failed: bool = False  # an event of `BAD` came since this start
    members_seen: float = 0.0  # mtime of members.json
    next_look: float = 0.0
    next_reconcile: float = 0.0
    next_reminder: float = 0.0
    known: frozenset[str] | None = None  # members at the last look
    online: frozenset[str] = frozenset()

    @property
    def events(self) -> Events:
        return Events(self.run.log / "events.jsonl")

    def stop(self, number: int) -> None:
        self.stopped = number

    def main(self) -> int:
        """The loop."""
        self.fab, sha256 = stub_fab()
        self.offset = self.events.path.stat().st_size if self.events.path.exists() else 0
        self.events.add("coordinator-started", epoch=self.epoch)
        with Supervisor(self.run.state / "pids", report=self.on_report) as supervisor:
            for child in superlink.children(self.run, self.upstream, sha256):
                supervisor.start(child)
            code = None
            while code is None:
                supervisor.poll()
                self.look(supervisor)
                self.drain()
                code = self.verdict()
                if code is None:
                    time.sleep(TICK)
            self.drain()
        self.events.add("coordinator-stopped")
        return code

    def verdict(self) -> int | None:
        """The exit code once there is one."""
        if self.stopped:
            log.info("stopped; the same command goes on from here")
            return 128 + self.stopped
        if self.failed and self.flower_run is None:
            return 1
        if self.fruitless >= FRUITLESS:
            log.error("the rounds end again and again before they begin; read %s", "serverapp.jsonl in the run's log")
            return 1
        if self.flower_run is None and finished(self.run, self.plan):
            log.info("all %d rounds are closed", self.plan.training.rounds)
            return 0
        return None

    def on_report(self, report: Report) -> None:
        """A child started or ended. A new SuperLink knows nothing: nodes and run are given to it again."""
        if report.state == "ended":
            self.events.add("process", name=report.name, state="ended", line=report.line)
            again = f"started again in {report.wait:.0f} s"
            log.warning("%s ended (%s), %s. %s", report.name, report.returncode, again, report.line)
        if report.name == "superlink" and self.control is not None:
            self.control.close()
            self.control, self.flower_run = None, None

    def look(self, supervisor: Supervisor) -> None:
        """Compare the SuperLink with the directory, at its own pace."""
        now = time.monotonic()
        changed = self.run.members.stat().st_mtime_ns != self.members_seen
        if now < self.next_look and not changed:
            return
        self.next_look = now + LOOK
        if self.control is None and not self.connect():
            return
        try:
            if changed or now >= self.next_reconcile:
                self.reconcile(now)
            if "gateway" not in supervisor:
                supervisor.start(self.gateway())
            self.look_at_run(now, supervisor)
        except StateError as error:
            log.warning("%s", error.message)  # the SuperLink is going down; the supervisor sees to it

    def connect(self) -> bool:
        ca = self.run.ca / "ca.crt"
        if not superlink.healthy(self.upstream, ca):
            return False
        self.control = Control(superlink.address(self.upstream), ca)
        self.next_reconcile, self.submit_at = 0.0, 0.0
        return True

    def reconcile(self, now: float) -> None:
        """Take in who was admitted, throw out who was revoked, say who is online."""
        assert self.control is not None
        seen = self.run.members.stat().st_mtime_ns
        done = superlink.reconcile(self.run, self.control)
        there = frozenset(members(self.run))
        known = there if self.known is None else self.known
        self.tell("member-admitted", there - known)
        self.tell("member-revoked", known - there)
        self.tell("site-online", done - self.online)
        self.tell("site-away", self.online - done)
        self.known = there
        self.members_seen, self.online, self.next_reconcile = seen, done, now + RECONCILE
        self.remind(now)

    def tell(self, kind: str, sites: frozenset[str]) -> None:
        for site in sorted(sites):
            self.events.add(kind, site=site)

    def remind(self, now: float) -> None:
        away = sorted(set(members(self.run)) - self.online)
        strangers = sorted(set(self.plan.sites) - set(members(self.run)))
        if (away or strangers) and now >= self.next_reminder:
            self.next_reminder = now + REMIND
            if away:
                log.info("not connected: %s", ", ".join(away))
            if strangers:
                log.info("in the plan but not admitted: %s", ", ".join(strangers))
                if not self.due():
                    log.warning("a round needs %d members; admit with `rin-server admit`", self.plan.limits.quorum)

    def look_at_run(self, now: float, supervisor: Supervisor) -> None:
        """Submit the rounds, or notice that they ended."""
        assert self.control is not None
        if self.flower_run is None:
            if now >= self.submit_at and self.due():
                if self.submitted:
                    supervisor.restart("superexec")  # with it ends a ServerApp that Flower has given up but still runs
                superlink.serverapp_file(self.run).unlink(missing_ok=True)
                self.submitted = True
                self.flower_run = self.control.start_run(self.fab, {"protocol": PROTOCOL, "epoch": self.epoch})
                self.events.add("flower-run", state="submitted")
        elif self.control.run_status(self.flower_run).finished or self.serverapp_died():
            with contextlib.suppress(StateError):
                self.control.stop_run(self.flower_run)
            self.flower_run = None
            self.submit_at = now + BACKOFF[min(self.fruitless, len(BACKOFF) - 1)]
            self.fruitless += 1
            self.drain()
            if self.due():
                log.warning("the rounds' process ended before the plan did; it is started again")
                self.events.add("flower-run", state="ended")

    def serverapp_died(self) -> bool:
        """Whether the ServerApp of this submission has begun and is gone."""
        path = superlink.serverapp_file(self.run)
        return path.exists() and not noted_alive(path)

    def due(self) -> bool:
        """Whether the rounds can go on: they are not over, and a new round would find enough members."""
        if self.failed or finished(self.run, self.plan):
            return False
        there = set(self.plan.sites) & set(members(self.run))
        return len(there) >= self.plan.limits.quorum or is_open(self.run)

    def drain(self) -> None:
        """Show the events that are new."""
        found, self.offset = read_events(self.events.path, self.offset)
        for event in found:
            self.follow(event)
            if event.kind in ("round-opened", "receipt", "round-closed"):
                self.fruitless = 0
            self.failed |= event.kind in BAD

    def gateway(self) -> Child:
        """The only public listener; it starts once the SuperLink knows the members, so that no site is turned away."""
        argv = [sys.executable, "-m", "rin.server.gateway", "--run", str(self.run.root), "--host", self.host]
        argv += ["--port", str(self.port), "--upstream-port", str(self.upstream)]
        argv += ["--tap", str(self.tap)] if self.tap else []
        env = child_env(self.run.state / "flower", []) | {"MALLOC_ARENA_MAX": "1"}  # flat memory: docs/adr/0005
        return Child("gateway", tuple(argv), self.run.log / "gateway.log", env, grace=5.0)
