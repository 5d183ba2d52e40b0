"""The supervisor with real processes: restart, diagnosis, stop, and kill -9 of the supervisor itself."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rin.common import supervise
from rin.common.supervise import Child, Report, Supervisor, diagnose


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def sh(tmp_path: Path, name: str, script: str, **more: object) -> Child:
    return Child(name=name, argv=("/bin/sh", "-c", script), log=tmp_path / "log" / f"{name}.log", **more)  # type: ignore[arg-type]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_what_dies_is_started_again_later_and_later_until_it_is_healthy(tmp_path: Path) -> None:
    clock, reports = Clock(), list[Report]()
    with Supervisor(tmp_path / "pids", report=reports.append, clock=clock) as supervisor:
        supervisor.start(sh(tmp_path, "x", "sleep 60"))
        waits = []
        for _ in range(4):
            pid = supervisor.pid("x")
            assert pid
            os.kill(pid, signal.SIGKILL)
            until(lambda: not supervisor.alive("x"))
            supervisor.poll()
            waits.append(reports[-1].wait)
            assert reports[-1].returncode == -signal.SIGKILL
            clock.now += waits[-1] - 0.1
            supervisor.poll()
            assert not supervisor.alive("x")
            clock.now += 0.1
            supervisor.poll()
            assert supervisor.alive("x")
        clock.now += supervise.HEALTHY
        os.kill(supervisor.pid("x") or 0, signal.SIGKILL)
        until(lambda: not supervisor.alive("x"))
        supervisor.poll()
        assert [*waits, reports[-1].wait] == [1.0, 2.0, 4.0, 8.0, 1.0]


def test_stop_is_gentle_first_and_then_takes_the_whole_group(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "pids")
    supervisor.start(sh(tmp_path, "kind", "trap 'echo bye; exit 0' TERM; while :; do sleep 0.05; done"))
    supervisor.start(sh(tmp_path, "deaf", "trap '' TERM; sleep 77 & echo $!; while :; do sleep 1; done", grace=0.3))
    log = tmp_path / "log" / "deaf.log"
    until(lambda: log.exists() and log.read_text().strip() != "")
    grandchild = int(log.read_text())
    children = [supervisor.pid("kind") or 0, supervisor.pid("deaf") or 0]
    time.sleep(0.2)
    supervisor.stop()
    assert (tmp_path / "log" / "kind.log").read_text() == "bye\n"
    assert all(gone(pid) for pid in children)
    until(lambda: gone(grandchild))  # nobody waits for it: the kernel takes the moment that it takes
    assert not list((tmp_path / "pids").iterdir())
    assert not supervisor.alive("kind")


def test_a_death_is_explained_by_what_this_start_wrote(tmp_path: Path) -> None:
    reports = list[Report]()
    with Supervisor(tmp_path / "pids", report=reports.append) as supervisor:
        log = tmp_path / "log" / "supernode-a.log"
        log.parent.mkdir()
        log.write_text("CERTIFICATE_VERIFY_FAILED long ago\n")
        supervisor.start(sh(tmp_path, "supernode-a", "echo '[code: 2004] no'; exit 1", kind="supernode"))
        until(lambda: not supervisor.alive("supernode-a"))
        supervisor.poll()
    assert (reports[-1].state, reports[-1].returncode, reports[-1].wait) == ("ended", 1, 60.0)
    assert "rin-server admit" in reports[-1].line


@pytest.mark.parametrize(
    ("kind", "text", "word"),
    [
        ("supernode", "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate", "CA"),
        ("supernode", "CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate is not yet valid", "clock"),
        ("supernode", "CERTIFICATE_VERIFY_FAILED] Hostname mismatch, certificate is not valid for", "address"),
        ("supernode", "[SSL: WRONG_VERSION_NUMBER] wrong version number", "TLS"),
        ("supernode", "[code: 2004] Public key is not registered", "key"),
        ("supernode", "Client error '401 Unauthorized'", "clock"),
        ("gateway", "[Errno 98] error while attempting to bind on address: address already in use", "--port"),
        ("trainer", "OSError: [Errno 28] No space left on device", "disk"),
    ],
)
def test_every_diagnosis_says_the_next_step(kind: str, text: str, word: str) -> None:
    found = diagnose(kind, text)
    assert found is not None
    assert word in found.line


def test_no_diagnosis_is_made_up() -> None:
    assert diagnose("supernode", "all is well") is None
    assert diagnose("unknown", "Errno 98") is None


def test_a_program_that_is_not_there_is_reported_and_tried_again(tmp_path: Path) -> None:
    clock, reports = Clock(), list[Report]()
    with Supervisor(tmp_path / "pids", report=reports.append, clock=clock) as supervisor:
        supervisor.start(Child("x", (str(tmp_path / "none"),), tmp_path / "x.log"))
        assert reports[-1].state == "ended"
        assert "No such file" in reports[-1].line
        (tmp_path / "none").write_text("#!/bin/sh\nsleep 9\n")
        (tmp_path / "none").chmod(0o700)
        clock.now += 1
        supervisor.poll()
        assert supervisor.alive("x")


def test_a_long_log_is_turned_over_while_the_child_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "MAX_LOG", 1000)
    log = tmp_path / "log" / "x.log"
    with Supervisor(tmp_path / "pids") as supervisor:
        supervisor.start(sh(tmp_path, "x", "while :; do echo 0123456789; sleep 0.002; done"))
        until(lambda: log.stat().st_size > 1000)
        supervisor.poll()
        assert log.stat().st_size < 1000
        assert log.with_name("x.log.1").stat().st_size > 1000
        until(lambda: log.stat().st_size > 100)
        assert not log.read_bytes().startswith(b"\0")


PARENT = """
import sys, time
from pathlib import Path
from rin.common.supervise import Child, Supervisor
root = Path(sys.argv[1])
child = "import os, subprocess, sys, time; print(os.getpid(), flush=True); "
child += "subprocess.Popen([sys.executable, '-c', '''"
child += "import os, time; from rin.common.supervise import die_with_parent; die_with_parent(); "
child += "print(os.getpid(), flush=True); time.sleep(99)''']); time.sleep(99)"
supervisor = Supervisor(root / "pids")
supervisor.start(Child("x", (sys.executable, "-c", child), root / "x.log"))
time.sleep(99)
"""


def test_kill_9_of_the_supervisor_leaves_nothing(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)])
    log = tmp_path / "x.log"
    until(lambda: log.exists() and len(log.read_text().split()) == 2)
    pids = [int(word) for word in log.read_text().split()]
    assert not any(gone(pid) for pid in pids)
    parent.kill()
    parent.wait()
    until(lambda: all(gone(pid) for pid in pids), 5)


def test_the_next_start_ends_what_was_left_over_and_spares_a_stranger_with_the_same_pid(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    left = subprocess.Popen(["sleep", "99"], start_new_session=True)
    stranger = subprocess.Popen(["sleep", "99"], start_new_session=True)
    (pids / "a.pid").write_text(f"{left.pid} {supervise._start_time(left.pid)}\n")
    (pids / "b.pid").write_text(f"{stranger.pid} 1\n")
    (pids / "c.pid").write_text("nonsense")
    Supervisor(pids)
    assert left.wait(5) == -signal.SIGKILL
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    assert not list(pids.iterdir())


def test_a_noted_process_is_alive_until_it_dies_even_as_a_zombie(tmp_path: Path) -> None:
    path = tmp_path / "x.pid"
    assert not supervise.noted_alive(path)
    code = f"from rin.common.supervise import note_process; from pathlib import Path; note_process(Path({str(path)!r}))"
    child = subprocess.Popen([sys.executable, "-c", f"{code}; import time; time.sleep(99)"])
    until(path.exists)
    assert supervise.noted_alive(path)
    child.kill()  # and nobody waits for it
    until(lambda: not supervise.noted_alive(path), 5)
    child.wait()
    path.write_text(f"{os.getpid()} 1\n")
    assert not supervise.noted_alive(path)


@pytest.mark.parametrize(("nohup", "said"), [(False, "stop 1\n"), (True, "")])
def test_a_hangup_stops_unless_the_process_was_started_to_outlive_it(nohup: bool, said: str) -> None:
    code = (
        "import signal, time; from rin.common.supervise import stop_on_signals\n"
        f"signal.signal(signal.SIGHUP, signal.SIG_IGN if {nohup} else signal.SIG_DFL)\n"
        "stop_on_signals(lambda number: print('stop', number, flush=True))\n"
        "signal.raise_signal(signal.SIGHUP); time.sleep(0.1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == said
