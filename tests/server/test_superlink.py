"""How the SuperLink and its SuperExec are started, and the reconciliation with the members."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from rin.common import keys
from rin.common.errors import StateError
from rin.common.flower import COMMANDS, Node, node_key
from rin.server import consortium, members, superlink
from rin.server.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    consortium.init(run, plan=None, address="https://localhost:8443")
    return run


class Registry:
    """A SuperLink's node list in memory."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.calls = 0

    def list_nodes(self) -> list[Node]:
        return list(self.nodes.values())

    def register_node(self, public_key: str, name: str) -> int:
        self.calls += 1
        self.nodes[self.calls] = Node(self.calls, node_key(public_key), name, "registered")
        return self.calls

    def unregister_node(self, node_id: int) -> None:
        self.calls += 1
        del self.nodes[node_id]


def admit(run: RunDir, site: str, signing: str) -> str:
    public = keys.node_public(keys.make_node_key())
    members.register(run, site, node_key=public, signing_key=signing * 64)
    return public


def test_the_superlink_is_loopback_tls_keyed_and_starts_nothing_itself(run: RunDir) -> None:
    link, superexec = superlink.children(run, 8123, "f" * 64)
    argv = list(link.argv)
    assert argv[0].endswith("flower-superlink")
    for flag, value in (
        ("--host", "127.0.0.1"),
        ("--port", "8123"),
        ("--isolation", "process"),
        ("--ssl-certfile", str(run.ca / "server.crt")),
        ("--ssl-keyfile", str(run.ca / "server.key")),
        ("--ssl-ca-certfile", str(run.ca / "ca.crt")),
    ):
        assert argv[argv.index(flag) + 1] == value
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(argv)
    assert not {"--insecure", "--database"} & set(argv)
    assert "--insecure" not in superexec.argv
    secret = Path(superexec.argv[superexec.argv.index("--superexec-auth-secret-file") + 1])
    assert argv[argv.index("--superexec-auth-secret-file") + 1] == str(secret)
    assert (len(secret.read_bytes()), secret.stat().st_mode & 0o777) == (32, 0o600)


def test_the_superexec_finds_our_executables_first(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_DATABASE", "/elsewhere")
    _, superexec = superlink.children(run, 8123, "f" * 64)
    assert superexec.env is not None
    first = Path(superexec.env["PATH"].split(os.pathsep)[0])
    assert {path.name for path in first.iterdir()} == set(COMMANDS)
    assert "run_guarded_serverapp" in (first / "flwr-serverapp").read_text()
    for command in set(COMMANDS) - {"flwr-serverapp"}:
        assert "refuse_task" in (first / command).read_text()
    assert superexec.env["RIN_FAB_SHA256"] == "f" * 64
    assert superexec.env["RIN_RUN"] == str(run.root)
    assert superexec.env["FLWR_HOME"] == str(run.state / "flower")
    assert "FLWR_DATABASE" not in superexec.env


def test_every_start_has_its_own_secret(run: RunDir) -> None:
    secrets = set()
    for _ in range(2):
        superlink.children(run, 8123, "f" * 64)
        secrets.add((run.state / "flower" / "superexec.secret").read_bytes())
    assert len(secrets) == 2


@pytest.mark.parametrize("program", ["flower-superlink", "flower-superexec"])
def test_flower_still_takes_every_flag_that_is_passed(run: RunDir, program: str) -> None:
    link, superexec = superlink.children(run, 8123, "f" * 64)
    child = link if program == "flower-superlink" else superexec
    done = subprocess.run(
        [child.argv[0], "--help"], env=dict(child.env or {}), capture_output=True, text=True, check=True
    )
    assert [flag for flag in child.argv if flag.startswith("--") and flag not in done.stdout] == []


def test_reconcile_registers_unregisters_and_follows_a_new_key(run: RunDir) -> None:
    registry = Registry()
    admit(run, "siteA", "a")
    old = admit(run, "siteB", "b")
    assert superlink.reconcile(run, registry) == frozenset()
    before = superlink.read_nodes(run)
    assert set(before) == {"siteA", "siteB"}
    calls = registry.calls
    superlink.reconcile(run, registry)
    assert registry.calls == calls

    new = admit(run, "siteB", "c")
    registry.nodes[before["siteA"]] = replace(registry.nodes[before["siteA"]], status="online")
    assert superlink.reconcile(run, registry) == {"siteA"}
    assert superlink.read_nodes(run)["siteA"] == before["siteA"]
    assert superlink.read_nodes(run)["siteB"] != before["siteB"]
    keys_now = {node.public_key for node in registry.list_nodes()}
    assert node_key(new) in keys_now
    assert node_key(old) not in keys_now

    members.strike(run, "siteA")
    superlink.reconcile(run, registry)
    assert set(superlink.read_nodes(run)) == {"siteB"}
    assert len(registry.nodes) == 1


def test_a_node_with_a_members_name_and_another_key_is_thrown_out(run: RunDir) -> None:
    registry = Registry()
    stranger = registry.register_node(keys.node_public(keys.make_node_key()), "siteA")
    admit(run, "siteA", "a")
    superlink.reconcile(run, registry)
    assert stranger not in registry.nodes
    assert stranger not in superlink.read_nodes(run).values()


def test_nothing_healthy_answers_on_a_free_port(run: RunDir) -> None:
    assert not superlink.healthy(superlink.free_port(), run.ca / "ca.crt")
    assert superlink.read_nodes(run) == {}
    run.members.unlink()
    with pytest.raises(StateError):
        superlink.reconcile(run, Registry())
