"""Real Flower processes: what a hostile coordinator, or another account on the coordinator's machine, gets to run."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rin.common import keys
from rin.common.flower import SHA256_ENV, Control, child_env, node_key, stub_fab, write_executables
from rin.common.supervise import Child, Supervisor
from rin.server import consortium, members, superlink
from rin.server.rundir import RunDir

CANARY = "PatientID 12345 at /data/x.dcm"
BIN = Path(sys.executable).parent

# A hostile SuperLink: stock, but it tells the site that the run of this one bundle is an AgentApp's.
HOSTILE_LINK = """
import flwr.superlink.servicer.fleet.fleet_handlers as handlers
from flwr.superlink.cli import flower_superlink
plain = handlers.run_to_proto
def hostile(run):
    proto = plain(run)
    if run.fab_id == "evil/agentish":
        proto.primary_task_type = "flwr-agentapp"
    return proto
handlers.run_to_proto = hostile
flower_superlink()
"""
SERVER_APP = """
import json, os, time
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    open(os.environ["EVIL_DIR"] + "/server-ran-NAME", "w").close()
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    content = RecordDict({"rin": ConfigRecord({"x": 1})})
    ids = list(grid.push_messages([Message(content, nodes[0], MessageType.TRAIN)]))
    end = time.time() + 60
    while time.time() < end and not (replies := list(grid.pull_messages(ids))):
        time.sleep(0.2)
    reply = replies[0]
    facts = {"code": reply.error.code, "reason": reply.error.reason} if reply.has_error() else {"content": True}
    path = os.environ["EVIL_DIR"] + "/reply-NAME.json"
    json.dump(facts, open(path + ".part", "w"))
    os.rename(path + ".part", path)
"""
CLIENT_APP = """
import os
from flwr.clientapp import ClientApp
open(os.environ["EVIL_DIR"] + "/client-ran", "w").close()
app = ClientApp()
"""


def fab(folder: Path, name: str, *, client: str, files: dict[str, str]) -> bytes:
    """A bundle of a hostile coordinator, named `evil/<name>`."""
    from flwr.cli.build import build_fab_from_disk

    folder.mkdir()
    text = (Path(superlink.__file__).parents[1] / "common" / "fab" / "pyproject.toml").read_text()
    text = text.replace('"rin-stub"', f'"{name}"').replace('publisher = "rin"', 'publisher = "evil"')
    text = text.replace("rin.server.app:app", f"evil_{name}:app").replace("rin.client.app:app", client)
    (folder / "pyproject.toml").write_text(text)
    shutil.copy(Path(superlink.__file__).parents[1] / "common" / "fab" / "LICENSE", folder / "LICENSE")
    for path, content in files.items():
        (folder / path).write_text(content.replace("NAME", name))
    with pytest.warns(DeprecationWarning):
        return build_fab_from_disk(folder)


def until(condition: Callable[[], Any], supervisor: Supervisor, seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "timed out"
        supervisor.poll()
        time.sleep(0.1)
    return value


@dataclass
class Place:
    """One SuperLink under test. `folder` holds what hostile code would leave behind."""

    run: RunDir
    folder: Path
    port: int
    supervisor: Supervisor
    control: Control

    def wait(self, name: str) -> dict[str, Any]:
        path = self.folder / f"reply-{name}.json"
        until(path.exists, self.supervisor)
        return json.loads(path.read_text())


def make_run(folder: Path) -> RunDir:
    run = RunDir(folder / "run")
    consortium.init(run, plan=None, address="https://localhost:8443")
    return run


def connect(run: RunDir, port: int, supervisor: Supervisor) -> Control:
    until(lambda: superlink.healthy(port, run.ca / "ca.crt"), supervisor)
    return Control(superlink.address(port), run.ca / "ca.crt")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A hostile coordinator, and one site that is started as rin-client starts it."""
    folder = tmp_path_factory.mktemp("hostile")
    run, port = make_run(folder), superlink.free_port()
    tls = [str(run.ca / name) for name in ("ca.crt", "server.crt", "server.key")]
    link = (sys.executable, "-c", HOSTILE_LINK, "--host", "127.0.0.1", "--port", str(port), "--ssl-ca-certfile", tls[0])
    link = (*link, "--ssl-certfile", tls[1], "--ssl-keyfile", tls[2], "--enable-supernode-auth")
    env = child_env(folder / "flower", []) | {"EVIL_DIR": str(folder)}
    with Supervisor(folder / "pids") as supervisor:
        supervisor.start(Child("superlink", link, folder / "superlink.log", env, grace=2.0))
        control = connect(run, port, supervisor)
        start_site(folder, run, port, supervisor, control)
        yield Place(run, folder, port, supervisor, control)
        control.close()


def start_site(folder: Path, run: RunDir, port: int, supervisor: Supervisor, control: Control) -> None:
    private, local = keys.make_node_key(), superlink.free_port()
    keys.save_private(folder / "node.key", private)
    control.register_node(keys.node_public(private), "siteA")
    keys.save_private(folder / "secret", os.urandom(32))
    guards = write_executables(folder / "bin", allowed={"flwr-clientapp": "run_guarded_clientapp"})
    env = child_env(folder / "site-flower", [guards]) | {SHA256_ENV: stub_fab()[1], "EVIL_DIR": str(folder)}
    env |= {"RIN_HOME": str(folder / "no-home")}
    secret = ("--superexec-auth-secret-file", str(folder / "secret"))
    node = (str(BIN / "flower-supernode"), "--superlink", f"localhost:{port}", "--root-certificates")
    node = (*node, str(run.ca / "ca.crt"), "--auth-supernode-private-key", str(folder / "node.key"))
    node = (*node, "--host", "127.0.0.1", "--port", str(local), "--isolation", "process", *secret)
    executor = (str(BIN / "flower-superexec"), "--runtime-api-address", f"127.0.0.1:{local}", "--insecure", *secret)
    supervisor.start(Child("supernode", node, folder / "supernode.log", env, grace=2.0))
    supervisor.start(Child("superexec", executor, folder / "superexec.log", env, grace=2.0))


def start(place: Place, bundle: bytes) -> int:
    return place.control.start_run(bundle, {"protocol": 1, "epoch": 0})


def test_a_foreign_bundle_does_not_run_at_the_site_and_its_refusal_is_a_code(hostile: Place, tmp_path: Path) -> None:
    files = {"evil_foreign.py": SERVER_APP, "evil_client.py": CLIENT_APP}
    start(hostile, fab(tmp_path / "app", "foreign", client="evil_client:app", files=files))
    assert hostile.wait("foreign") == {"code": 2, "reason": "rin:policy"}
    assert not (hostile.folder / "client-ran").exists()
    assert not list((hostile.folder / "site-flower").rglob("evil_client.py"))  # not even unpacked


def test_an_agentapp_does_not_run_at_the_site(hostile: Place, tmp_path: Path) -> None:
    files = {"evil_agentish.py": SERVER_APP, "evil_client.py": CLIENT_APP}
    run_id = start(hostile, fab(tmp_path / "app", "agentish", client="evil_client:app", files=files))
    log = hostile.folder / "superexec.log"
    until(lambda: "rin runs no task of this type" in log.read_text(), hostile.supervisor)
    assert not (hostile.folder / "client-ran").exists()
    hostile.control.stop_run(run_id)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The coordinator's own SuperLink and SuperExec."""
    folder = tmp_path_factory.mktemp("ours")
    run, port = make_run(folder), superlink.free_port()
    os.environ["EVIL_DIR"] = str(folder)
    with Supervisor(folder / "pids") as supervisor:
        for child in superlink.children(run, port, stub_fab()[1]):
            supervisor.start(child)
        control = connect(run, port, supervisor)
        yield Place(run, folder, port, supervisor, control)
        control.close()
    del os.environ["EVIL_DIR"]


def test_another_account_on_the_machine_cannot_take_a_task_without_the_secret(ours: Place) -> None:
    import httpx
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    client = RuntimeHttpClient.from_server_address(
        superlink.address(ours.port),
        False,
        (ours.run.ca / "ca.crt").read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
    )
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
    client.close()
    secret = ours.run.state / "flower" / "superexec.secret"
    assert secret.stat().st_mode & 0o777 == 0o600


def test_a_run_that_another_account_submits_does_not_run_on_the_coordinator(ours: Place, tmp_path: Path) -> None:
    files = {"evil_foreign.py": SERVER_APP}
    run_id = start(ours, fab(tmp_path / "app", "foreign", client="rin.client.app:app", files=files))
    until(lambda: ours.control.run_status(run_id).finished, ours.supervisor)
    assert ours.control.run_status(run_id).sub_status == "failed"
    assert not (ours.folder / "server-ran-foreign").exists()


def test_members_and_nodes_are_reconciled(ours: Place) -> None:
    public = [keys.node_public(keys.make_node_key()) for _ in range(3)]
    stranger = ours.control.register_node(public[2], "siteA")
    members.register(ours.run, "siteA", node_key=public[0], signing_key="a" * 64)
    assert superlink.reconcile(ours.run, ours.control) == frozenset()
    first = superlink.read_nodes(ours.run)
    assert set(first) == {"siteA"}
    assert first["siteA"] != stranger
    members.register(ours.run, "siteB", node_key=public[1], signing_key="b" * 64)
    members.strike(ours.run, "siteA")
    superlink.reconcile(ours.run, ours.control)
    assert set(superlink.read_nodes(ours.run)) == {"siteB"}
    assert [node.public_key for node in ours.control.list_nodes()] == [node_key(public[1])]
    assert not list(ours.run.state.rglob("*.sqlite"))  # tickets in messages are never on disk
