"""Child processes of a supervisor: started, watched, restarted, stopped; nothing is left when the supervisor dies.

A child leads its own session, and the kernel kills it when its parent dies (PR_SET_PDEATHSIG, prctl(2)). That reaches
children only. Grandchildren that are ours ask for the same with `die_with_parent`; Flower's look for their parent every
0.2 s. What outlives even that is found by its pid file at the next start.

Linux only. `Supervisor` must be used from one thread that lives as long as its children: the kernel's death signal
belongs to the thread that made the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from rin.common.files import write_atomic

log = logging.getLogger(__name__)

BACKOFF: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds before the next start
HEALTHY: Final = 60.0  # seconds after which an earlier death is forgotten
GRACE: Final = 10.0  # seconds between SIGTERM and SIGKILL
MAX_LOG: Final = 16 << 20  # bytes of a child's log before it is turned over; one old file is kept
TAIL: Final = 16 << 10  # bytes of a log's end that a diagnosis looks at

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent dies; leave at once if `parent` has died already."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a line in a child's log means: `line` says it with the next step, `wait` is the least pause in seconds."""

    pattern: str
    line: str
    wait: float = 0.0


_PORT_TAKEN = Diagnosis(
    r"address already in use|Errno 98", "its port is taken: stop the program that holds it, or choose another --port"
)
_DISK_FULL = Diagnosis(r"No space left on device|Errno 28", "the disk is full: free some space", 30.0)

# Kind of child to what its log may say; the first that fits is taken. Texts are those of flwr 1.41, httpx and OpenSSL.
DIAGNOSES: Final[dict[str, tuple[Diagnosis, ...]]] = {
    "supernode": (
        Diagnosis(
            r"certificate is not yet valid|certificate has expired",
            "the coordinator's certificate is not valid now: compare this machine's clock with the coordinator's",
            30.0,
        ),
        Diagnosis(
            r"[Hh]ostname mismatch|IP address mismatch",
            "the coordinator's certificate names another address: ask for an invite with the address in use",
            60.0,
        ),
        Diagnosis(
            r"CERTIFICATE_VERIFY_FAILED",
            "the coordinator's certificate is not signed by the invite's CA: compare fingerprints by phone, join again",
            60.0,
        ),
        Diagnosis(
            r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|UNEXPECTED_EOF_WHILE_READING|Server disconnected",
            "the coordinator's port does not speak TLS: check address and port, and any proxy between",
            30.0,
        ),
        # The same key is refused too while the coordinator believes the node online, up to 60 s after a hard stop.
        Diagnosis(
            r"\[code: 2004\]",
            "the coordinator does not know this site's key, or still holds its last connection: wait a minute, "
            "else ask whether `rin-server admit` was run",
            60.0,
        ),
        # The coordinator keeps connections in memory: after its restart each SuperNode is told so and starts anew.
        Diagnosis(
            r"401 Unauthorized",
            "the coordinator no longer knows this connection: it has been restarted, or the site was revoked, or this "
            "machine's clock is off by more than a few seconds",
        ),
        Diagnosis(
            r"Name or service not known|failure in name resolution|Connection refused|Connection attempt failed",
            "the coordinator does not answer: check address, firewall and proxy; rin keeps trying",
        ),
        _PORT_TAKEN,
        _DISK_FULL,
    ),
    "superlink": (
        Diagnosis(r"DATABASE_SCHEMA_MISMATCH|Exit Code: 105", "Flower's state is of another release: remove RUN/state"),
        Diagnosis(r"KEY_VALUES_MISMATCH|PEM lib|NO_CERTIFICATE", "server certificate and key do not fit each other"),
        _PORT_TAKEN,
        _DISK_FULL,
    ),
    "gateway": (
        _PORT_TAKEN,
        Diagnosis(r"Permission denied|Errno 13", "its port may not be opened by this user: choose one above 1023"),
        Diagnosis(r"KEY_VALUES_MISMATCH|PEM lib|NO_CERTIFICATE", "server certificate and key do not fit each other"),
        _DISK_FULL,
    ),
    "trainer": (
        Diagnosis(
            r"CUDA out of memory|OutOfMemoryError", "the device is out of memory: lower batch-size or memory-gib"
        ),
        _DISK_FULL,
    ),
}


def diagnose(kind: str, tail: str) -> Diagnosis | None:
    """The first diagnosis of `kind` whose pattern occurs in `tail`, else None."""
    return next((d for d in DIAGNOSES.get(kind, ()) if re.search(d.pattern, tail)), None)


@dataclass(frozen=True, slots=True)
class Child:
    """What to run. `name` is unique in a supervisor; `kind` is a key of `DIAGNOSES`, else the name is taken."""

    name: str
    argv: tuple[str, ...]
    log: Path  # stdout and stderr, appended
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    kind: str = ""
    grace: float = GRACE


@dataclass(frozen=True, slots=True)
class Report:
    """One thing that happened to a child. `state`: started, ended. `line`: the next step where one is known."""

    name: str
    state: str
    returncode: int | None = None
    line: str = ""
    wait: float = 0.0  # seconds until it is started again


@dataclass(slots=True)
class _Slot:
    child: Child
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    due: float = 0.0  # monotonic time of the next start while it is down
    deaths: int = 0
    log_from: int = 0  # where this start's part of the log begins
    reports: list[Report] = field(default_factory=list)


class Supervisor:
    """Keeps children running. Call `poll` every second or less; `stop` or leaving the `with` block ends all.

    Args:
        pids: directory of the pid files; processes that an earlier supervisor left there are killed first.
        report: called with every `Report`.
        clock: seconds that only go up.
    """

    def __init__(
        self,
        pids: Path,
        *,
        report: Callable[[Report], None] = lambda report: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pids, self._report, self._clock = pids, report, clock
        self._slots: dict[str, _Slot] = {}
        pids.mkdir(parents=True, exist_ok=True)
        for path in pids.glob("*.pid"):
            _kill_leftover(path)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, child: Child) -> None:
        """Start `child` and keep it running from now on."""
        if child.name in self._slots:
            raise ValueError(f"{child.name} is supervised already")
        self._slots[child.name] = _Slot(child)
        self._spawn(self._slots[child.name])

    def poll(self) -> None:
        """Notice what has died, start what is due, turn over logs that have grown too long."""
        for slot in list(self._slots.values()):
            if slot.process is None:
                if self._clock() >= slot.due:
                    self._spawn(slot)
            elif slot.process.poll() is not None:
                self._died(slot)
            else:
                slot.log_from = _turn_over(slot.child.log, slot.log_from)

    def __contains__(self, name: str) -> bool:
        """Whether `name` is supervised, running or not."""
        return name in self._slots

    def alive(self, name: str) -> bool:
        """Whether the process of `name` runs now."""
        return self.pid(name) is not None

    def pid(self, name: str) -> int | None:
        """Process id of `name`, None while it is down."""
        slot = self._slots.get(name)
        process = slot.process if slot else None
        return process.pid if process and process.poll() is None else None

    def restart(self, name: str) -> None:
        """Stop `name` and start it again at once."""
        slot = self._slots[name]
        self._end([slot])
        self._spawn(slot)

    def stop(self, *names: str) -> None:
        """End the named children, or all: SIGTERM, their grace, SIGKILL to the whole group. They are forgotten."""
        wanted = names or tuple(self._slots)
        self._end([self._slots[name] for name in wanted])
        for name in wanted:
            del self._slots[name]

    def _spawn(self, slot: _Slot) -> None:
        child = slot.child
        child.log.parent.mkdir(parents=True, exist_ok=True)
        slot.log_from = _turn_over(child.log, child.log.stat().st_size if child.log.exists() else 0)
        parent = os.getpid()
        try:
            with child.log.open("ab") as out:
                slot.process = subprocess.Popen(
                    child.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=dict(child.env) if child.env is not None else None,
                    cwd=child.cwd,
                    start_new_session=True,
                    preexec_fn=lambda: die_with_parent(parent),  # only calls prctl and getppid: safe after fork
                )
        except OSError as error:
            self._down(slot, None, Diagnosis("", f"cannot be started: {os.strerror(error.errno or 0)}"))
            return
        slot.started = self._clock()
        write_atomic(self._pid_file(slot), f"{slot.process.pid} {_start_time(slot.process.pid)}\n".encode())
        self._report(Report(child.name, "started"))

    def _died(self, slot: _Slot) -> None:
        process = slot.process
        assert process is not None
        _kill_group(process.pid)  # what it started must not go on without it
        if self._clock() - slot.started >= HEALTHY:
            slot.deaths = 0
        self._pid_file(slot).unlink(missing_ok=True)
        self._down(slot, process.returncode, diagnose(slot.child.kind or slot.child.name, _tail(slot)))

    def _down(self, slot: _Slot, returncode: int | None, found: Diagnosis | None) -> None:
        pause = max(BACKOFF[min(slot.deaths, len(BACKOFF) - 1)], found.wait if found else 0.0)
        slot.process, slot.deaths, slot.due = None, slot.deaths + 1, self._clock() + pause
        self._report(Report(slot.child.name, "ended", returncode, found.line if found else "", pause))

    def _end(self, slots: list[_Slot]) -> None:
        running = [(slot, slot.process) for slot in slots if slot.process is not None]
        for _, process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        until = {slot.child.name: time.monotonic() + slot.child.grace for slot in slots}
        for slot, process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until[slot.child.name] - time.monotonic()))
            _kill_group(process.pid)
            process.wait()
            self._pid_file(slot).unlink(missing_ok=True)
            slot.process = None

    def _pid_file(self, slot: _Slot) -> Path:
        return self._pids / f"{slot.child.name}.pid"


def _kill_group(leader: int) -> None:
    """SIGKILL to all that is left of the group that `leader` began."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _start_time(pid: int) -> str:
    """When `pid` began, in clock ticks since boot; with the pid it names a process for good (proc(5), fields 3 and 22).

    Empty if it is gone, or a zombie whose parent does not care.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def note_process(path: Path) -> None:
    """Write into `path` which process this is, for `noted_alive`."""
    write_atomic(path, f"{os.getpid()} {_start_time(os.getpid())}\n".encode())


def noted_alive(path: Path) -> bool:
    """Whether the process that `path` names still runs; a later one with the same pid is another process."""
    try:
        pid, started = path.read_text().split()
    except (OSError, ValueError):
        return False
    return bool(started) and started == _start_time(int(pid))


def _kill_leftover(path: Path) -> None:
    """Kill the group that the pid file `path` names, if it is still that process."""
    with contextlib.suppress(OSError, ValueError):
        pid, started = path.read_text().split()
        if started == _start_time(int(pid)):
            log.warning("ending %s, left over from an earlier start", path.stem)
            _kill_group(int(pid))
    path.unlink(missing_ok=True)


def _turn_over(path: Path, log_from: int) -> int:
    """Move a log beyond `MAX_LOG` to `<name>.1`. The child holds it open for appending, so it is copied and emptied."""
    try:
        if path.stat().st_size < MAX_LOG:
            return log_from
        shutil.copyfile(path, path.with_name(path.name + ".1"))
        os.truncate(path, 0)
    except OSError:
        return log_from
    return 0


def _tail(slot: _Slot) -> str:
    """The end of what the child wrote since its last start."""
    try:
        with slot.child.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(min(slot.log_from, size), size - TAIL))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def stop_on_signals(stop: Callable[[int], Any]) -> None:
    """Call `stop(signal number)` on SIGTERM, SIGINT and SIGHUP (not under nohup); a second SIGINT acts as ever."""

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        stop(number)

    hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    for number in (signal.SIGTERM, signal.SIGINT, *hangup):
        signal.signal(number, handle)
