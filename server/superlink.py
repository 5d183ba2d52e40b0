"""The coordinator's stock SuperLink and its SuperExec: how they are started, and who may connect to them.

The SuperLink listens on loopback with the run's server certificate and node authentication, keeps its state in memory
(the run directory is the truth) and starts nothing itself: the SuperExec is a child of ours, signs its requests with a
secret of this start, and finds executables of ours that run one bundle and one task type. See docs/adr/0003.
"""

from __future__ import annotations

import http.client
import os
import secrets
import socket
from pathlib import Path
from typing import Any, Final, Protocol

from rin.common.files import read_json, write_atomic, write_json
from rin.common.flower import SHA256_ENV, Node, child_env, node_key, write_executables
from rin.common.keys import client_context
from rin.common.supervise import Child
from rin.server.members import members
from rin.server.rundir import RunDir

RUN_ENV: Final = "RIN_RUN"  # tells the ServerApp its run directory; a Flower run configuration would reach every site


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def address(port: int) -> str:
    return f"127.0.0.1:{port}"


def children(run: RunDir, port: int, fab_sha256: str) -> tuple[Child, Child]:
    """The SuperLink on `port` and its SuperExec, which runs the bundle `fab_sha256` only. Writes what they need."""
    home = run.state / "flower"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret = home / "superexec.secret"
    write_atomic(secret, secrets.token_bytes(32), mode=0o600)
    executables = write_executables(home / "bin", allowed={"flwr-serverapp": "run_guarded_serverapp"})
    env = child_env(home, [executables]) | {SHA256_ENV: fab_sha256, RUN_ENV: str(run.root)}
    tls = {name: str(run.ca / name) for name in ("ca.crt", "server.crt", "server.key")}
    isolation = ("--superexec-auth-secret-file", str(secret))
    link = (
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-ca-certfile", tls["ca.crt"], "--ssl-certfile", tls["server.crt"], "--ssl-keyfile", tls["server.key"]),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--isolation", "process", *isolation),
    )
    superexec = (
        *("flower-superexec", "--runtime-api-address", address(port), "--root-certificates", tls["ca.crt"]),
        *("--parent-pid", str(os.getpid()), *isolation),
    )
    log = run.log
    return (
        Child("superlink", (_program(link[0], env), *link[1:]), log / "superlink.log", env, grace=3.0),
        Child("superexec", (_program(superexec[0], env), *superexec[1:]), log / "superexec.log", env, grace=3.0),
    )


def _program(name: str, env: dict[str, str]) -> str:
    """The path of Flower's own program beside our interpreter; PATH decides only where it is not there."""
    beside = Path(env["PATH"].split(os.pathsep)[1]) / name
    return str(beside) if beside.exists() else name


def healthy(port: int, ca: Path) -> bool:
    """Whether the SuperLink on `port` answers GET /health with a certificate that `ca` signed."""
    link = http.client.HTTPSConnection("127.0.0.1", port, timeout=1.0, context=client_context(ca))
    try:
        link.request("GET", "/health")
        return link.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        link.close()


class Registry(Protocol):
    """What `reconcile` needs of `rin.common.flower.Control`."""

    def list_nodes(self) -> list[Node]: ...
    def register_node(self, public_key: str, name: str) -> int: ...
    def unregister_node(self, node_id: int) -> None: ...


def reconcile(run: RunDir, control: Registry) -> frozenset[str]:
    """Make the SuperLink's list of nodes that of members.json, and write nodes.json {site: node id}.

    Nodes are matched by public key, never by name: a renewed key is a new node, and the old one is unregistered.

    Returns:
        The members whose node is connected now.

    Raises:
        StateError: members.json is damaged, or the SuperLink does not answer.
    """
    wanted = {node_key(member.node_key): member for member in members(run).values()}
    nodes: dict[str, int] = {}
    online = set[str]()
    for node in control.list_nodes():
        member = wanted.pop(node.public_key, None)
        if member is None:
            control.unregister_node(node.id)
            continue
        nodes[member.site] = node.id
        if node.status == "online":
            online.add(member.site)
    for member in wanted.values():
        nodes[member.site] = control.register_node(member.node_key, member.site)
    if read_nodes(run) != nodes:
        write_json(nodes_file(run), nodes)
    return frozenset(online)


def serverapp_file(run: RunDir) -> Path:
    """Where the ServerApp notes which process it is: Flower tells of its death only after 40 s."""
    return run.state / "serverapp.pid"


def nodes_file(run: RunDir) -> Path:
    return run.state / "nodes.json"


def read_nodes(run: RunDir) -> dict[str, int]:
    """Site to Flower node id; empty before the first `reconcile`."""
    if not nodes_file(run).exists():
        return {}
    value: Any = read_json(nodes_file(run))
    return {str(site): int(node) for site, node in value.items()}
