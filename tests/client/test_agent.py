"""The agent with its real children: kept apart, restarted, and gone when it is gone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rin.client import agent, confine
from rin.client.home import Home
from rin.client.status import status
from rin.common import keys
from rin.common.errors import StateError
from rin.common.files import write_json
from tests.client.tlsserver import Door, front_door

if TYPE_CHECKING:
    from tests.client.conftest import SmallSite

    Make = Callable[..., SmallSite]

SECRET = "patients"


class Agent:
    """`rin-client start` as a process; its lines as they come."""

    def __init__(self, home: Home, *options: str, socket: Path) -> None:
        self.home, self.log = home, home.root / "agent.out"
        command = [sys.executable, "-m", "rin.client.cli", "start", "--home", str(home.root), *options]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=os.environ | {"RIN_SOCKET": str(socket)}, start_new_session=True
            )

    def lines(self) -> str:
        return self.log.read_text()

    def until(self, what: Callable[[], Any], seconds: float = 60.0) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            assert self.process.poll() is None, self.lines()
            time.sleep(0.1)
        raise AssertionError(self.lines())

    def says(self, text: str, seconds: float = 60.0) -> None:
        self.until(lambda: text in self.lines(), seconds)

    def children(self) -> list[int]:
        """Every process below the agent."""
        found, todo = list[int](), [self.process.pid]
        while todo:
            pid = todo.pop()
            with contextlib.suppress(OSError):
                below = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
                found, todo = found + below, todo + below
        return found

    def child(self, word: str) -> int:
        """The process of the agent whose command line holds `word`, once it runs its program."""
        return self.until(lambda: next((pid for pid in self.children() if word in command_of(pid)), 0))

    def end(self) -> float:
        """SIGTERM; seconds until it was gone."""
        began = time.monotonic()
        self.process.terminate()
        assert self.process.wait(30) == 0, self.lines()
        return time.monotonic() - began


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return "" if b"rin.client.confine" in words else b" ".join(words).decode()
    return ""


def alive(pids: list[int]) -> list[int]:
    """Those that still run; a zombie does not."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found += [pid] if state != "Z" else []
    return found


def gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pids)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    with front_door(tmp_path / "coordinator") as found:
        yield found


@pytest.fixture
def home(small_site: Make, door: Door, tmp_path: Path) -> Home:
    """A home that has joined, with an archive."""
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "image.dcm").write_text(SECRET)
    found = small_site(patients=0, site=f'[archive]\nroots = ["{archive}"]\n').home
    keys.save_private(found.net / "node.key", keys.make_node_key())
    shutil.copyfile(door.ca, found.net / "ca.crt")
    write_json(found.net / "coordinator.json", {"address": door.address, "site": "siteA"})
    return found


@pytest.fixture
def running(home: Home, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    started: list[Agent] = []

    def run(*options: str) -> Agent:
        started.append(Agent(home, *options, socket=tmp_path / "t.sock"))
        return started[-1]

    yield run
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
        assert gone(each.children(), 10)


def test_a_home_that_has_not_joined_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StateError) as caught:
        agent.start(Home(tmp_path), only="agent")
    assert "join" in caught.value.step


def test_both_halves_are_kept_apart_by_the_kernel(running: Callable[..., Agent], home: Home, tmp_path: Path) -> None:
    if not confine.works(no_network=True, hide=[home.root]):
        pytest.skip("this kernel gives no namespaces to this user")
    site = running()
    site.says("patient files hidden")
    trainer, node = site.child("rin.client.airlock"), site.child("run_supernode")
    executor = site.child("flower-superexec")
    here = Path("/proc/self/ns/net").readlink()
    assert Path(f"/proc/{trainer}/ns/net").readlink() != here
    assert Path(f"/proc/{node}/ns/net").readlink() == here
    for pid in (node, executor):
        assert list(Path(f"/proc/{pid}/root{home.root}/vault").iterdir()) == []
        assert list(Path(f"/proc/{pid}/root{tmp_path}/archive").iterdir()) == []
        assert Path(f"/proc/{pid}/root{home.inbox}").is_dir()
    assert "OPENSSH" in Path(f"/proc/{node}/root{home.net}/node.key").read_text()
    assert Path(f"/proc/{executor}/root{home.net}/node.key").read_text() == ""
    facts = status(home)
    assert (facts["agent"], facts["airlock"], facts["coordinator"]["connected"]) == ("running", "enforced", False)
    assert site.end() < 15
    assert status(home)["agent"] == "stopped"
    assert [line for line in site.lines().splitlines() if "Traceback" in line] == []


def test_killed_hard_it_leaves_nothing_and_starts_again(running: Callable[..., Agent]) -> None:
    first = running()
    first.child("run_supernode")
    first.child("rin.client.airlock")
    left = first.children()
    first.process.kill()
    first.process.wait()
    assert len(left) >= 3
    assert gone(left, 10)
    second = running()
    second.says("trainer:")
    second.child("rin.client.airlock")


def test_what_dies_is_started_again(running: Callable[..., Agent], home: Home) -> None:
    site = running("--only", "trainer")
    before = site.child("rin.client.airlock")
    os.kill(before, signal.SIGKILL)
    site.says("trainer ended; it starts again in 1 s")
    assert site.child("rin.client.airlock") != before
    assert not (home.net / "pids").exists()  # that half is another user's


def test_what_runs_beside_a_supernode_is_started_again_with_it(running: Callable[..., Agent]) -> None:
    site = running("--only", "agent")
    node, executor = site.child("run_supernode"), site.child("flower-superexec")
    os.kill(node, signal.SIGKILL)
    site.says("supernode ended")
    site.until(lambda: executor not in site.children())
    assert site.child("flower-superexec") != executor
    assert site.child("run_supernode") != node
    assert "superexec ended" not in site.lines()  # it was ended on purpose, so nobody is alarmed


def test_the_coordinator_may_be_away_for_any_time(running: Callable[..., Agent], door: Door) -> None:
    door.status = 502
    site = running("--only", "agent")
    site.says("the coordinator behind it does not (502); next: ")
    assert "run_supernode" not in "".join(map(command_of, site.children()))
    door.status = 200
    site.says("the coordinator answers")
    site.child("run_supernode")


def test_a_coordinator_that_refuses_is_told_in_one_line(running: Callable[..., Agent], home: Home, door: Door) -> None:
    other, _ = keys.make_ca("somebody else")
    (home.net / "ca.crt").write_bytes(other)
    site = running("--only", "agent")
    site.says("another CA than the invite's; next: ")
    assert site.lines().count("another CA") == 1


@pytest.mark.parametrize("half", ["agent", "trainer"])
def test_a_second_agent_of_a_home_says_so_and_disturbs_nothing(running: Callable[..., Agent], half: str) -> None:
    first = running("--only", half)
    first.child("run_supernode" if half == "agent" else "rin.client.airlock")
    below = first.children()
    second = running("--only", half)
    assert second.process.wait(30) == 1
    assert "another rin-client already works" in second.lines()
    assert alive(below) == below


def test_the_agent_half_neither_reads_nor_needs_the_vault(running: Callable[..., Agent], home: Home) -> None:
    shutil.rmtree(home.root / "vault")
    site = running("--only", "agent")
    site.says("patient files hidden")
    site.child("run_supernode")


def test_site_toml_decides_on_proxy_and_address(home: Home, door: Door) -> None:
    text = home.site_toml.read_text() + '[coordinator]\naddress = "https://other.example:1"\nproxy = "http://p:3128"\n'
    home.site_toml.write_text(text)
    place = agent._place(home)
    assert place == json.loads((home.net / "coordinator.json").read_bytes())
    assert place == {"address": "https://other.example:1", "proxy": "http://p:3128", "site": "siteA"}


def test_an_archive_around_the_home_cannot_be_hidden_and_that_is_said(
    small_site: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIN_SOCKET", str(tmp_path / "t.sock"))
    found = small_site(patients=0, site=f'[archive]\nroots = ["{tmp_path}"]\n').home
    hidden, enforced = agent._Site(found, ("agent",), print)._hidden()
    assert tmp_path not in hidden
    assert not enforced
