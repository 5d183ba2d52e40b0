"""`rin-client start`: the supervisor of a site. It keeps trainer and Flower apart and running; no torch here."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from rin.client import confine
from rin.client.home import Home
from rin.client.preflight import preflight
from rin.client.rendezvous import socket_path
from rin.client.site import read_site
from rin.common import keys
from rin.common.errors import RinError, StateError
from rin.common.events import Event, Events, read_events
from rin.common.files import lock, read_json, write_atomic, write_json
from rin.common.flower import SHA256_ENV, SUPERNODE, child_env, write_executables
from rin.common.supervise import BACKOFF, Child, Report, Supervisor, stop_on_signals

log = logging.getLogger(__name__)
Half = Literal["trainer", "agent"]

TICK: Final = 0.25  # seconds
CONTACT: Final = 60.0  # seconds between two signs of life from the coordinator
CONNECTED: Final = b"SuperNode ID"  # what a SuperNode of flwr 1.41 logs once the coordinator has taken its key
PORT_TAKEN: Final = "port is taken"  # in the line of a Report

# Event to the line that the operator sees for it.
LINES: Final[dict[str, str]] = {
    "training": "round {round}: step {step} of {steps}",
    "update-ready": "round {round}: update ready",
    "update-sent": "round {round}: update sent",
    "request-refused": "round {round}: refused ({code})",
}


def say(text: str) -> None:
    """One line with the time on stdout, at once, also where stdout is a file."""
    sys.stdout.write(f"{datetime.now():%H:%M:%S} {text}\n")
    sys.stdout.flush()


def start(home: Home, *, only: str | None = None, on_line: Callable[[str], None] = say) -> int:
    """Keep the site's processes running until SIGTERM or SIGINT; the coordinator may be away for any time.

    Args:
        only: `trainer` or `agent`, one half of the airlock, for two users under systemd.
        on_line: called with every line for the operator.

    Raises:
        StateError: the home has not joined, or another agent works in it.
        ConfigError: site.toml is wrong.
    """
    halves: tuple[Half, ...] = ("trainer", "agent")
    if only is not None:
        halves = ("trainer",) if only == "trainer" else ("agent",)
    stopped: list[int] = []
    stop_on_signals(stopped.append)
    with contextlib.ExitStack() as stack:
        if "agent" in halves:
            if not (home.net / "coordinator.json").exists():
                raise StateError("this home has not joined a consortium", step="run `rin-client join INVITE`")
            stack.enter_context(lock(home.net / "agent.lock", holder="rin-client"))
        if "trainer" in halves:  # each half has its lock: they may be two users
            stack.enter_context(lock(home.vault_log / "agent.lock", holder="rin-client"))
        site = _Site(home, halves, on_line)
        pids = (home.net if "agent" in halves else home.vault_log) / "pids"
        site.supervisor = stack.enter_context(Supervisor(pids, report=site.report))
        site.begin()
        while not stopped:
            site.tick()
            time.sleep(TICK)
        on_line("stopping")
        site.stopping = True
    return 0


@dataclass(slots=True)
class _Probe:
    """One look at the coordinator in a thread of its own, so that a dead network does not hold up the supervisor."""

    address: str
    ca: Path
    proxy: str | None
    fab: str = ""
    warnings: list[str] = field(default_factory=list)
    error: RinError | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="probe", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.fab = self.fab or _fab_digest()
            self.warnings = preflight(self.address, self.ca, self.proxy)
        except RinError as error:
            self.error = error
        except Exception as error:  # a thread's edge; the supervisor goes on
            log.error("preflight", exc_info=error)
            self.error = StateError(f"the coordinator cannot be looked at ({type(error).__name__})")


class _Site:
    """The state of a running agent."""

    def __init__(self, home: Home, halves: tuple[Half, ...], on_line: Callable[[str], None]) -> None:
        self.home, self.halves, self.on_line = home, halves, on_line
        self.supervisor: Supervisor
        self.stopping = False
        self.socket = socket_path(home)
        self._said: dict[str, str] = {}
        self._probe: _Probe | None = None
        self._next_probe, self._failures, self._fab = 0.0, 0, ""
        self._renew_port = self._renew_executor = False
        self._started, self._connected, self._log_from = False, False, 0
        self._facts: dict[str, Any] = {"pid": os.getpid(), "connected": False, "coordinator": "", "last_contact": None}
        self._events = Events(home.net / "log" / "events.jsonl") if "agent" in halves else None
        logs = [folder / "events.jsonl" for folder in (home.vault_log, home.net / "log")]
        self._followed = {path: path.stat().st_size if _readable(path) else 0 for path in logs}

    # --- starting -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the trainer, and begin to look for the coordinator."""
        if "trainer" in self.halves:
            self._start_trainer()
        if "agent" in self.halves:
            self.place = _place(self.home)
            self._look()

    def _start_trainer(self) -> None:
        read_site(self.home)  # its faults belong on this terminal, not into a log
        command = [sys.executable, "-m", "rin.client.airlock", "--home", str(self.home.root)]
        confined = confine.works(no_network=True)
        env = os.environ | {"RIN_HOME": str(self.home.root), "RIN_SOCKET": str(self.socket)}
        argv = confine.argv(command, no_network=True) if confined else command
        enforced = confined or all(name == "lo" for _, name in socket.if_nameindex())
        write_json(self.home.vault_log / "airlock.json", {"trainer": enforced}, mode=0o640)
        self._say("trainer", f"trainer: {'no network' if enforced else 'network is open: this kernel confines nobody'}")
        self.supervisor.start(Child("trainer", tuple(argv), self.home.vault_log / "trainer.out", env, grace=5.0))

    def _start_flower(self) -> None:
        """SuperNode and SuperExec on a fresh port, which only they share: TLS and a secret of this start."""
        place, runtime = urlsplit(self.place["address"]), _runtime_files(self.home)
        address = f"127.0.0.1:{_free_port()}"
        secret = ("--isolation", "process", "--superexec-auth-secret-file", str(runtime / "secret"))
        node = (
            *(*SUPERNODE, "--superlink", f"{place.hostname}:{place.port or 443}"),
            *("--root-certificates", str(self.home.net / "ca.crt")),
            *("--auth-supernode-private-key", str(self.home.net / "node.key")),
            *("--host", "127.0.0.1", "--port", address.partition(":")[2], *secret),
            *("--ssl-certfile", str(runtime / "server.crt"), "--ssl-keyfile", str(runtime / "server.key")),
            *("--ssl-ca-certfile", str(runtime / "ca.crt")),
        )
        executor = (
            *(_program("flower-superexec"), "--runtime-api-address", address, "--parent-pid", str(os.getpid())),
            *("--root-certificates", str(runtime / "ca.crt"), *secret[2:]),
        )
        bin_dir = write_executables(self.home.net / "bin", allowed={"flwr-clientapp": "run_guarded_clientapp"})
        env = child_env(self.home.net / "flower", [bin_dir]) | {
            "RIN_HOME": str(self.home.root),
            "RIN_SOCKET": str(self.socket),
            SHA256_ENV: self._fab,
        }
        if proxy := self.place.get("proxy"):
            env |= {"HTTPS_PROXY": proxy, "https_proxy": proxy}
        logs = self.home.net / "log"
        (self.home.net / "flower").mkdir(mode=0o700, exist_ok=True)
        self._log_from = _size(logs / "supernode.log")
        hidden, enforced = self._hidden()
        own = [self.home.net / "node.key"] if hidden else []  # the ClientApp needs no key at all
        self.supervisor.start(
            Child("supernode", _argv(node, hidden), logs / "supernode.log", env, cwd=self.home.net, grace=5.0)
        )
        self.supervisor.start(
            Child("superexec", _argv(executor, hidden + own), logs / "superexec.log", env, cwd=self.home.net, grace=3.0)
        )
        self._facts["files_hidden"], self._started = enforced, True
        self._say("files", f"network side: {'patient files hidden' if enforced else 'patient files are readable'}")

    def _hidden(self) -> tuple[list[Path], bool]:
        """What to hide from the network side, and whether it is out of reach then."""
        vault = self.home.root / "vault"
        if not os.access(vault, os.R_OK | os.X_OK):
            return [], True  # another user's
        archive = read_site(self.home).archive
        wanted = [vault, *archive.roots, *(path for path in (archive.labels, archive.mapping) if path)]
        needed = [self.home.net, self.home.inbox, self.home.outbox, self.socket, Path(sys.prefix), Path(__file__)]
        hidden = [p for p in wanted if p.exists() and not any(_inside(need, p) for need in needed)]
        if not confine.works(hide=hidden):
            return [], False
        return hidden, len(hidden) == sum(path.exists() for path in wanted)

    # --- running ------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Notice what has changed and do what is due."""
        self.supervisor.poll()
        self._follow()
        if "agent" not in self.halves:
            return
        if self._renew_port:
            self._renew_port = self._renew_executor = False
            self.supervisor.stop("supernode", "superexec")
            self._start_flower()
        if self._renew_executor:
            self._renew_executor = False
            self.supervisor.restart("superexec")
        if self._probe is not None and not self._probe.thread.is_alive():
            self._found(self._probe)
            self._probe = None
        if self._probe is None and time.monotonic() >= self._next_probe:
            self._look()
        node_log = self.home.net / "log" / "supernode.log"
        if self._started and not self._connected and CONNECTED in _from(node_log, self._log_from):
            self._connected = True
            self._say("coordinator", self._link())
            self._write()

    def _link(self) -> str:
        return f"connected to {self.place['address']}" if self._connected else "the coordinator answers"

    def _look(self) -> None:
        self._next_probe = float("inf")
        ca, proxy = self.home.net / "ca.crt", self.place.get("proxy")
        self._probe = _Probe(self.place["address"], ca, proxy, self._fab)

    def _found(self, probe: _Probe) -> None:
        """Start Flower once the coordinator can be reached; say what is wrong until then, and whenever it goes away."""
        self._fab = probe.fab
        for index, warning in enumerate(probe.warnings):
            self._say(f"warning {index}", f"warning: {warning}")
        if probe.error is None:
            self._failures, pause = 0, CONTACT
            self._facts["last_contact"] = datetime.now(UTC).isoformat(timespec="seconds")
            self._say("coordinator", self._link())
            if not self._started:
                self._start_flower()
        else:
            pause = BACKOFF[min(self._failures, len(BACKOFF) - 1)]
            self._failures += 1
            step = f"; next: {probe.error.step}" if probe.error.step else ""
            self._say("coordinator", f"{probe.error.message}{step}")
        self._next_probe = time.monotonic() + pause
        self._write()

    def report(self, report: Report) -> None:
        """A child started or ended."""
        if self._events is not None:
            self._events.add("process", name=report.name, state=report.state, line=report.line)
        if report.state == "started" and report.name == "supernode":
            # What runs beside it holds a connection and tasks of the one before, which the new one does not know.
            self._renew_executor = "superexec" in self.supervisor
        if report.state != "ended" or self.stopping:
            return
        if report.name == "supernode":
            self._connected, self._log_from = False, _size(self.home.net / "log" / "supernode.log")
            self._renew_port = PORT_TAKEN in report.line
        why = f": {report.line}" if report.line else ""
        self.on_line(f"{report.name} ended{why}; it starts again in {report.wait:.0f} s")
        self._write()

    def _follow(self) -> None:
        for path, offset in self._followed.items():
            if _readable(path):
                events, self._followed[path] = read_events(path, offset)
                for event in events:
                    self._show(event)

    def _show(self, event: Event) -> None:
        if event.kind in LINES:
            line = LINES[event.kind].format(**event.fields)
            if event.kind == "request-refused":
                line += _why(self.home)
            self.on_line(line)

    def _say(self, topic: str, line: str) -> None:
        """Say a line unless it was the last one about its topic."""
        if topic == "coordinator":
            self._facts["coordinator"] = line
        if self._said.get(topic) != line:
            self._said[topic] = line
            self.on_line(line)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            write_json(self.home.net / "agent.json", self._facts | {"connected": self._connected})


# --- small things -----------------------------------------------------------------------------------------------


def _place(home: Home) -> dict[str, Any]:
    """coordinator.json, with what site.toml says on top where this user may read it."""
    place: dict[str, Any] = read_json(home.net / "coordinator.json")
    if not _readable(home.site_toml):
        return place
    here = read_site(home).coordinator
    wanted = place | {"address": here.address or place["address"], "proxy": here.proxy}
    if wanted != place:
        write_json(home.net / "coordinator.json", wanted)
    return wanted


def _why(home: Home) -> str:
    """The operator's text of the last refusal, where this user may read it."""
    path = home.root / "vault" / "status.json"
    facts = read_json(path) if _readable(path) else {}
    text, step = facts.get("text", ""), facts.get("step_next", "")
    return "".join(part for part in (f": {text}" if text else "", f"; next: {step}" if step else ""))


def _runtime_files(home: Home) -> Path:
    """Certificate, key and secret of the port between SuperNode and SuperExec, new at each start (threat T11)."""
    folder = home.net / "runtime"
    ca, ca_key = keys.make_ca("rin runtime of this site")
    certificate, key = keys.make_server_certificate(ca, ca_key, [])
    write_atomic(folder / "ca.crt", ca)
    write_atomic(folder / "server.crt", certificate)
    keys.save_private(folder / "server.key", key)
    keys.save_private(folder / "secret", secrets.token_bytes(32))
    return folder


def _fab_digest() -> str:
    """SHA-256 of this release's app bundle, from a process of its own: the supervisor does not import flwr."""
    code = "from rin.common.flower import stub_fab; print(stub_fab()[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StateError("flwr cannot be imported", step="install the release of rin again")
    return done.stdout.split()[-1]


def _argv(command: tuple[str, ...], hidden: list[Path]) -> tuple[str, ...]:
    return tuple(confine.argv(command, hide=hidden)) if hidden else command


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _readable(path: Path) -> bool:
    return os.access(path, os.R_OK)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _from(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(1 << 20)
    except OSError:
        return b""


def status(home: Home) -> dict[str, Any]:
    """What `rin-client status` shows; see `rin.client.status`."""
    from rin.client.status import status as facts

    return facts(home)
