"""The coordinator killed at every step of a round: the weights are those of an undisturbed run, to the bit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rin.common.backbones import BACKBONES
from rin.common.errors import StateError
from rin.common.wire import Request
from rin.server import checkpoints, receipts, rounds, tickets
from tests.simulator import TINY, final, quicken, record_of, rewrite, small

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


class Killed(BaseException):
    """As good as kill -9: nothing between here and the top catches it."""


# Every step that leaves a trace on disk: module, name.
STEPS = [
    (rounds, "write_record"),
    (tickets, "issue"),
    (tickets, "close"),
    (rounds, "advance"),
    (checkpoints, "write_round"),
    (checkpoints, "prune"),
    (receipts, "drop"),
]


def killing(monkeypatch: pytest.MonkeyPatch, chosen: Callable[[str, int], bool], *, after: bool) -> None:
    """Raise before or after the steps that `chosen` picks, by name and by a count over all of them."""
    count = 0

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **keys: Any) -> Any:
            nonlocal count
            count += 1
            at = count
            if chosen(name, at) and not after:
                raise Killed(name)
            result = real(*args, **keys)
            if chosen(name, at):
                raise Killed(name)
            return result

        return step

    for module, name in STEPS:
        monkeypatch.setattr(module, name, wrap(name, getattr(module, name)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "resnet18", TINY)
        patch.setattr(rounds, "PORT_S", 0.01)
        made = small(tmp_path_factory.mktemp("calm"), strategy={"name": "fedadam", "server_learning_rate": 0.01})
        made.go()
        return final(made)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_step_the_weights_are_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: str, after: bool
) -> None:
    made = small(tmp_path, strategy={"name": "fedadam", "server_learning_rate": 0.01})
    died: list[str] = []
    for start in range(60):
        with monkeypatch.context() as patch:
            killing(patch, lambda name, at, limit=start % 9 + 4: at == limit, after=after)
            try:
                made.go()
                break
            except Killed as death:
                died.append(str(death))
    assert final(made) == undisturbed
    assert len(died) > 4
    assert len(set(died)) >= 4, died


@pytest.mark.parametrize("step", ["close", "advance", "write_round", "prune"])
@pytest.mark.parametrize("after", [False, True])
def test_killed_in_each_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: str, step: str, after: bool
) -> None:
    made = small(tmp_path, strategy={"name": "fedadam", "server_learning_rate": 0.01})
    with monkeypatch.context() as patch:
        killing(patch, lambda name, at: name == step, after=after)
        with pytest.raises(Killed, match=step):
            made.go()
    port = made.go()
    assert final(made) == undisturbed
    if step != "prune":
        assert {number for _, number in port.pushed} == {2}, "a whole round's receipts were asked for again"


def test_kill_nine_of_the_process_in_the_middle(tmp_path: Path, undisturbed: str) -> None:
    made = small(tmp_path, strategy={"name": "fedadam", "server_learning_rate": 0.01})
    command = [sys.executable, "-m", "tests.simulator", str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + 120
        while not list(made.run.receipts(1).glob("*.json")):
            assert child.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = record_of(made, 1)
    assert before.state == "open"
    made.go()
    assert final(made) == undisturbed


def test_an_edited_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small(tmp_path)
    with monkeypatch.context() as patch:
        killing(patch, lambda name, at: name == "advance", after=False)
        with pytest.raises(Killed):
            made.go()
    made.run.plan.write_bytes(made.run.plan.read_bytes() + b"# another thought\n")
    with pytest.raises(StateError, match="edited"):
        made.go()


def test_an_open_round_keeps_its_receipts_and_asks_only_missing_sites(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1})

    def stop(request: Request) -> None:
        if request.site == "siteC":
            raise Killed

    with pytest.raises(Killed):
        made.go(made.port(before=stop))
    assert sorted(record_of(made, 1).receipts) == ["siteA", "siteB"]
    port = made.go()
    assert port.pushed == [("siteC", 1)]


def test_a_frozen_receipt_that_changed_on_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small(tmp_path, training={"rounds": 1})
    with monkeypatch.context() as patch:
        killing(patch, lambda name, at: name == "advance", after=False)
        with pytest.raises(Killed):
            made.go()
    path = made.run.receipts(1) / "siteB.safetensors"
    path.chmod(0o600)
    rewrite(path, lambda flat: flat.__setitem__(3, 7.0))
    with pytest.raises(StateError, match="siteB"):
        made.go()
    assert record_of(made, 1).state == "frozen"
