"""The airlock: the trainer behind its socket, as a process, killed and asked again."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rin.client.airlock import Stub, serve
from rin.client.home import Home
from rin.client.trainer import Done, Progress, State, Trainer
from rin.common import snapshots
from rin.common.errors import RefusedError
from rin.common.labels import label_set_digest
from rin.common.wire import Request

if TYPE_CHECKING:
    from tests.client.conftest import SmallSite

    Make = Callable[..., SmallSite]


class Slow(Trainer):
    """A trainer whose work takes until it is told to end: only what the airlock sees of one."""

    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self.runs, self.go_on = list[int](), threading.Event()

    def train(
        self, request: Request, plan: bytes, progress: Callable[[Progress], None], cancelled: Callable[[], str]
    ) -> Done:
        self.runs.append(request.round)
        progress(Progress(1, 2))
        while not self.go_on.wait(0.01):
            if code := cancelled():
                raise RefusedError(code)
        return Done(request.id, "d" * 64)


class Call:
    """One `Stub.train` in a thread; `code` or `done` afterwards."""

    def __init__(self, path: Path, request: Request, plan: bytes = b"plan", timeout: float = 30.0) -> None:
        self.code, self.done, self.seen = "", None, list[Progress]()
        self._arguments = (path, request, plan, timeout)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        path, request, plan, timeout = self._arguments
        with Stub(path) as stub:
            try:
                self.done = stub.train(request, plan, self.seen.append, timeout=timeout)
            except RefusedError as error:
                self.code = error.code

    def join(self) -> Call:
        self.thread.join(120)
        assert not self.thread.is_alive()
        return self

    def wait_for_news(self) -> None:
        until = time.monotonic() + 10
        while not self.seen and time.monotonic() < until:
            time.sleep(0.01)
        assert self.seen


@pytest.fixture
def slow(small_site: Make, tmp_path: Path) -> Iterator[tuple[Slow, Path, SmallSite]]:
    site = small_site(patients=0)
    trainer, path = Slow(site.home), tmp_path / "t.sock"
    server = serve(trainer, path)
    yield trainer, path, site
    trainer.go_on.set()
    server.stop(grace=None).wait()


def test_hello_says_who_is_there(slow: tuple[Slow, Path, SmallSite]) -> None:
    _, path, _ = slow
    with Stub(path) as stub:
        state = stub.hello()
    assert (state.protocol, state.site, state.label_set) == (1, "siteA", label_set_digest())
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_the_same_request_attaches_and_losing_a_stream_cancels_nothing(slow: tuple[Slow, Path, SmallSite]) -> None:
    trainer, path, site = slow
    lost = Call(path, site.request(), timeout=1.0).join()
    assert (lost.code, lost.seen[-1]) == ("trainer-away", Progress(1, 2))
    again, too = Call(path, site.request(deadline_s=500.0)), Call(path, site.request())
    again.wait_for_news()
    too.wait_for_news()
    trainer.go_on.set()
    assert again.join().done == too.join().done == Done(site.request().id, "d" * 64)
    assert trainer.runs == [1]


def test_another_request_has_to_wait_but_a_newer_round_takes_over(slow: tuple[Slow, Path, SmallSite]) -> None:
    trainer, path, site = slow
    first = Call(path, site.request(2))
    first.wait_for_news()
    assert Call(path, site.request(1)).join().code == "trainer-away"
    assert Call(path, site.request(3, run="cd" * 16)).join().code == "trainer-away"
    newer = Call(path, site.request(3))
    assert first.join().code == "cancelled"
    newer.wait_for_news()
    trainer.go_on.set()
    assert newer.join().done is not None
    assert trainer.runs == [2, 3]


def test_cancel_names_its_request(slow: tuple[Slow, Path, SmallSite]) -> None:
    _, path, site = slow
    call = Call(path, site.request())
    call.wait_for_news()
    with Stub(path) as stub:
        assert not stub.cancel("0" * 64)
        assert stub.cancel(site.request().id)
        assert call.join().code == "cancelled"
        assert not stub.cancel(site.request().id)


def test_the_deadline_is_a_duration_from_the_receipt(slow: tuple[Slow, Path, SmallSite]) -> None:
    _, path, site = slow
    began = time.monotonic()
    assert Call(path, site.request(deadline_s=1.0)).join().code == "deadline"
    assert 0.9 < time.monotonic() - began < 5


def test_a_repeated_request_may_bring_a_later_deadline(slow: tuple[Slow, Path, SmallSite]) -> None:
    trainer, path, site = slow
    first = Call(path, site.request(deadline_s=1.0))
    first.wait_for_news()
    Call(path, site.request(deadline_s=60.0), timeout=2.0).join()
    trainer.go_on.set()
    assert first.join().done is not None


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 100, b'{"protocol": 1}'])
def test_what_is_no_request_is_refused(slow: tuple[Slow, Path, SmallSite], data: bytes) -> None:
    from rin.client import trainer_pb2 as pb

    trainer, path, _ = slow
    with Stub(path) as stub:
        events = list(stub._stub.Train(pb.TrainRequest(request=data, plan=b"")))
    assert [event.refused for event in events] == [pb.Refused(code="bad-request")]
    assert trainer.runs == []


def test_a_message_beyond_the_limit_never_reaches_the_trainer(slow: tuple[Slow, Path, SmallSite]) -> None:
    trainer, path, site = slow
    assert Call(path, site.request(), plan=b"x" * (1 << 20)).join().code == "trainer-away"
    assert trainer.runs == []


def test_a_fault_without_a_code_is_internal(small_site: Make, tmp_path: Path) -> None:
    class Broken(Slow):
        def train(self, *_: object) -> Done:  # type: ignore[override]
            raise RefusedError("no such code")

    site = small_site(patients=0)
    server = serve(Broken(site.home), tmp_path / "t.sock")
    assert Call(tmp_path / "t.sock", site.request()).join().code == "internal"
    server.stop(grace=None).wait()


def test_nobody_there_is_trainer_away(tmp_path: Path) -> None:
    with Stub(tmp_path / "t.sock") as stub, pytest.raises(RefusedError) as caught:
        stub.hello(timeout=1.0)
    assert caught.value.code == "trainer-away"


# --- the real process -------------------------------------------------------------------------------------------


def spawn(home: Home, path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rin.client.airlock", "--home", str(home.root)]
    return subprocess.Popen(command, env=os.environ | {"RIN_SOCKET": str(path)}, stderr=subprocess.DEVNULL)


def hello(path: Path) -> State:
    with Stub(path) as stub:
        for _ in range(200):
            try:
                return stub.hello(timeout=5.0)
            except RefusedError:
                time.sleep(0.1)
    raise AssertionError("the trainer does not answer")


def test_killed_in_its_middle_it_gives_the_same_update(small_site: Make, tmp_path: Path) -> None:
    site = small_site(steps=16)
    path = tmp_path / "t.sock"
    began = time.monotonic()
    process = spawn(site.home, path)
    try:
        hello(path)
        ready = time.monotonic() - began
        call = Call(path, site.request(), site.plan_bytes, timeout=120.0)
        while not any(progress.step for progress in call.seen) and call.thread.is_alive():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert call.join().code == "trainer-away"
        assert not (site.home.outbox / f"{site.request().id}.json").exists()
        process = spawn(site.home, path)
        hello(path)
        done = Call(path, site.request(), site.plan_bytes, timeout=120.0).join().done
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert not path.exists()
    assert ready < 10  # without waiting for torch
    undisturbed = small_site(steps=16, name="undisturbed")
    request, plan = undisturbed.request(), undisturbed.plan_bytes
    assert Trainer(undisturbed.home).train(request, plan, lambda _: None, lambda: "") == done


def test_cancel_takes_effect_at_once_and_the_same_request_goes_on(
    small_site: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    caplog.set_level(logging.INFO)
    site, other, path = small_site(steps=12), small_site(steps=12, name="undisturbed"), tmp_path / "t.sock"
    server = serve(Trainer(site.home), path)
    call = Call(path, site.request(), site.plan_bytes, timeout=300.0)
    while not (call.seen and call.seen[-1].step >= 3) and call.thread.is_alive():
        time.sleep(0.01)
    with Stub(path) as stub:
        began = time.monotonic()
        assert stub.cancel(site.request().id)
        assert call.join().code == "cancelled"
        took = time.monotonic() - began
    again = Call(path, site.request(), site.plan_bytes, timeout=300.0).join()
    server.stop(grace=None).wait()
    resumed = [record.getMessage() for record in caplog.records if record.name == snapshots.__name__]
    assert len(resumed) == 1
    assert int(resumed[0].split()[-1]) >= 3
    assert again.done == Trainer(other.home).train(other.request(), other.plan_bytes, lambda _: None, lambda: "")
    print(f"cancelled after {took:.2f} s")
    assert took < 2  # a step of this plan takes a tenth of a second, and its snapshot as long


LOST = """
import sys, time
from pathlib import Path
from rin.client.airlock import serve
from rin.client.home import Home
from rin.client.trainer import Trainer
from rin.common.errors import RefusedError

class Lost(Trainer):
    def train(self, *_):
        self.lost = True
        raise RefusedError("device")

server = serve(Lost(Home(Path(sys.argv[1]))), Path(sys.argv[2]))
time.sleep(60)
"""


def test_a_trainer_whose_device_is_lost_says_so_and_makes_room_for_another(small_site: Make, tmp_path: Path) -> None:
    site, path = small_site(patients=0), tmp_path / "t.sock"
    process = subprocess.Popen([sys.executable, "-c", LOST, str(site.home.root), str(path)])
    try:
        hello(path)
        assert Call(path, site.request()).join().code == "device"
        assert process.wait(10) == 1
    finally:
        process.kill()
        process.wait()


def test_a_second_trainer_of_a_home_says_so(small_site: Make, tmp_path: Path) -> None:
    site = small_site(patients=0)
    process = spawn(site.home, tmp_path / "t.sock")
    try:
        hello(tmp_path / "t.sock")
        other = spawn(site.home, tmp_path / "u.sock")
        assert other.wait(30) == 1
        hello(tmp_path / "t.sock")
    finally:
        process.terminate()
        process.wait()
