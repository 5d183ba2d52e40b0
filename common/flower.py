"""All private touches of flwr 1.41 in one file: environment, app bundle, Control API, guards of its executables.

flwr is imported inside the functions. `tests/common/test_flower.py` fails when flwr moves one of the names used here.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import logging
import os
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rin.common.errors import CODES, RefusedError, RinError, StateError
from rin.common.log import chain_of, frames_of
from rin.common.supervise import die_with_parent

STUB: Final = Path(__file__).parent / "fab"
CLIENT_APP: Final = "rin.client.app"  # loaded by name at the site: common never imports client
LOOPBACK: Final = "127.0.0.1,localhost"
SHA256_ENV: Final = "RIN_FAB_SHA256"
IDLE_S: Final = 0.8  # seconds between two questions of an idle SuperNode; one costs SuperLink about 5 ms of CPU
SUPERNODE: Final = (sys.executable, "-c", "from rin.common.flower import run_supernode; run_supernode()")
REASON: Final = "rin:"  # what a guarded error's reason begins with; one of CODES follows

# Every command that a SuperExec may be told to start. Only one of them is ours at each end; the others are refused.
COMMANDS: Final = (
    "flwr-agentapp",
    "flwr-clientapp",
    "flwr-connector",
    "flwr-model",
    "flwr-serverapp",
    "flwr-simulation",
)


def child_env(home: Path, extra_path: list[Path]) -> dict[str, str]:
    """Environment of every child that holds flwr.

    No telemetry, no update check, no installs; inherited FLWR_ variables are dropped, since some of them open ports or
    send data. `extra_path` comes before the interpreter's directory: SuperExec starts executables by bare name.
    Loopback never goes through a proxy (httpx does not exempt it by itself).
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    path = [str(folder) for folder in extra_path] + [str(Path(sys.executable).parent), env.get("PATH", os.defpath)]
    no_proxy = _no_proxy()
    return env | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
    }


def _no_proxy() -> str:
    """What NO_PROXY is, with loopback added."""
    before = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    return before if before.endswith(LOOPBACK) else ",".join(filter(None, (before, LOOPBACK)))


def stub_fab() -> tuple[bytes, str]:
    """The app bundle of this release and its hex SHA-256; the same bytes wherever the release is installed."""
    from flwr.cli.build import build_fab_from_disk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # flwr asks pathspec for a pattern by its old name
        fab = build_fab_from_disk(STUB)
    return fab, hashlib.sha256(fab).hexdigest()


def write_executables(folder: Path, *, allowed: dict[str, str]) -> Path:
    """Write one executable for each of `COMMANDS` into `folder`: a guard for those in `allowed`, else a refusal.

    Args:
        allowed: command name to the function of this module that runs it, e.g. {"flwr-clientapp":
            "run_guarded_clientapp"}.

    Returns:
        `folder`, to be put first on PATH.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for command in COMMANDS:
        function = allowed.get(command, "refuse_task")
        path = folder / command
        path.write_text(
            f"#!/bin/sh\nexec '{sys.executable}' -c 'from rin.common.flower import {function}; {function}()' \"$@\"\n"
        )
        path.chmod(0o700)
    return folder


def refuse_task() -> None:
    """What every task type runs that is not ours: nothing (threat: a run that asks for an AgentApp)."""
    sys.exit("rin runs no task of this type")


# --- guards ----------------------------------------------------------------------------------------------------------


def _checked_fab(content: bytes) -> None:
    """Raise RefusedError unless the SHA-256 of `content` is on the list in RIN_FAB_SHA256; no list, no bundle."""
    allowed = set(filter(None, os.environ.get(SHA256_ENV, "").split(",")))
    if hashlib.sha256(content).hexdigest() not in allowed:
        raise RefusedError("policy", "the app bundle is not the one of this release")


class _Outcome:
    """The only word about a failure that a guarded process sends: one of CODES."""

    def __init__(self) -> None:
        self.code = "internal"

    def note(self, error: BaseException) -> None:
        if isinstance(error, RinError) and error.code in CODES:
            self.code = error.code


class _Scrub(logging.Filter):
    """Flower logs whole tracebacks; keep class names and frames, drop messages."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            names, frames = chain_of(record.exc_info[1]), frames_of(record.exc_info[2])
            record.msg, record.args = "an exception: %s at %s", (" from ".join(names), " ".join(frames[-3:]))
        record.exc_info = record.exc_text = record.stack_info = None
        return True


def _scrub_flower_log() -> None:
    """Put the filter on flwr's logger and its handlers, and on Python's own way of showing an uncaught exception."""
    logger = logging.getLogger("flwr")
    logger.addFilter(_Scrub())
    for handler in logger.handlers:
        handler.addFilter(_Scrub())
    sys.excepthook = lambda kind, error, trace: print(f"uncaught {kind.__qualname__}", file=sys.stderr)  # noqa: T201


def _parent_pid(argv: list[str]) -> int | None:
    """The value of Flower's --parent-pid, so that a parent which died before us is noticed."""
    with_value = dict(itertools.pairwise(argv))
    value = with_value.get("--parent-pid", "")
    return int(value) if value.isdecimal() else None


def _refuse_installs(*args: Any, **kwargs: Any) -> Path:
    raise RefusedError("policy", "no package is installed at run time")


def guard_clientapp(module: Any, outcome: _Outcome) -> None:
    """Replace in Flower's `run_clientapp` module what would run foreign code or send an exception's text.

    - `install_from_fab`: compares the bundle's hash and unpacks nothing;
    - `get_load_client_app_fn`: gives the installed app, whatever ids the server sends;
    - `install_app_dependencies`: refuses;
    - `Error`: the reason is `rin:` and one of our codes;
    - `push_task_output`: sends the same in place of the details.
    """
    error, push = module.Error, module.push_task_output

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception as caught:
                outcome.note(caught)
                raise

        return noted

    def load(fab_id: str, fab_version: str, fab_hash: str) -> Callable[..., Any]:
        return noting(importlib.import_module(CLIENT_APP).app)

    module.install_from_fab = noting(lambda content, *args, **kwargs: _checked_fab(content))
    module.get_load_client_app_fn = lambda *args, **kwargs: noting(load)
    module.install_app_dependencies = noting(_refuse_installs)
    module.Error = lambda code, reason=None: error(code=code, reason=REASON + outcome.code)
    module.push_task_output = lambda client, context, sub_status, details: push(
        client=client, context=context, sub_status=sub_status, details=REASON + outcome.code if details else ""
    )


def _spare(module: str, name: str) -> None:
    """Do not import `module`, whose package takes `name` from it and needs it for another command only.

    Flower starts a ClientApp for every message; without its SuperNode's imports (SQLAlchemy and more) that costs 0.57
    instead of 0.96 CPU-seconds and 88 instead of 121 MB.
    """
    spared = types.ModuleType(module)
    setattr(spared, name, None)
    sys.modules.setdefault(module, spared)


def run_guarded_clientapp() -> None:
    """The `flwr-clientapp` of a site: runs the installed ClientApp and no other; fails closed without RIN_FAB_SHA256.

    Takes Flower's arguments from `sys.argv`. Dies with its SuperExec.
    """
    die_with_parent(_parent_pid(sys.argv))
    _spare("flwr.supernode.cli.flower_supernode", "flower_supernode")
    from flwr.supernode.cli import flwr_clientapp

    guard_clientapp(importlib.import_module("flwr.supernode.runtime.run_clientapp"), _Outcome())
    _scrub_flower_log()
    flwr_clientapp()


class _Impatient:
    """The module `time` for Flower's SuperNode: sleeps are cut to `IDLE_S`."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def sleep(self, seconds: float) -> None:
        self._real.sleep(min(seconds, IDLE_S))


def hurry_supernode(module: Any) -> None:
    """Let Flower's SuperNode loop ask for messages every `IDLE_S` and not every 3 s: half the wall time of a round."""
    module.time = _Impatient(module.time)


def run_supernode() -> None:
    """The stock `flower-supernode`, with a shorter pause between two questions; arguments from `sys.argv`."""
    from flwr.supernode.cli import flower_supernode

    hurry_supernode(importlib.import_module("flwr.supernode.start_client_internal"))
    try:
        flower_supernode()
    except KeyboardInterrupt:
        # How it ends where the coordinator no longer knows it. Its other threads may wait for ever, and the process
        # with them; the supervisor starts another only once it is gone.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def guard_serverapp(module: Any) -> None:
    """Replace in Flower's `run_serverapp` module the installation of bundles and of packages (threat T11: every local
    account can submit a run on loopback)."""
    install = module.install_from_fab

    def checked(content: bytes, *args: Any, **kwargs: Any) -> Any:
        _checked_fab(content)
        return install(content, *args, **kwargs)

    module.install_from_fab = checked
    module.install_app_dependencies = _refuse_installs


def run_guarded_serverapp() -> None:
    """The `flwr-serverapp` of a coordinator: runs the bundle of RIN_FAB_SHA256, no other; dies with its SuperExec."""
    die_with_parent(_parent_pid(sys.argv))
    _spare("flwr.superlink.cli.flower_superlink", "flower_superlink")
    from flwr.superlink.cli import flwr_serverapp

    guard_serverapp(importlib.import_module("flwr.superlink.runtime.run_serverapp"))
    _scrub_flower_log()
    flwr_serverapp()


def code_of_reason(reason: str | None) -> str:
    """Our code in a guarded error's reason; "" if there is none, so that no foreign text is read."""
    match = re.fullmatch(rf"{REASON}([a-z-]+)", reason or "")
    return match[1] if match and match[1] in CODES else ""


# --- control ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Node:
    """One registered SuperNode. `status`: registered, online, offline (unregistered ones are not listed)."""

    id: int
    public_key: bytes  # PEM as Flower stores it
    name: str
    status: str


@dataclass(frozen=True, slots=True)
class RunStatus:
    """`status`: pending, starting, running, finished; `sub_status`: completed, failed, stopped. No details are kept."""

    status: str
    sub_status: str

    @property
    def finished(self) -> bool:
        return self.status == "finished"


def node_key(public_key: str) -> bytes:
    """What Flower stores of an OpenSSH public key line (`ecdsa-sha2-nistp384 ...`)."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    key = load_ssh_public_key(public_key.encode())
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise StateError("a node key must be an elliptic-curve key", step="let the site run `rin-client join` again")
    return public_key_to_bytes(key)


class Control:
    """The coordinator's hand on its own SuperLink, over TLS on loopback.

    Args:
        address: `127.0.0.1:PORT`.
        ca: PEM file of the run's CA.

    Every method raises StateError when the SuperLink does not answer or says no.
    """

    def __init__(self, address: str, ca: Path) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        os.environ["NO_PROXY"] = os.environ["no_proxy"] = _no_proxy()  # httpx sends even loopback to a proxy
        self._client = ControlHttpClient.from_server_address(
            address, False, ca.read_bytes(), interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
        )

    def register_node(self, public_key: str, name: str) -> int:
        """Register an OpenSSH public key under `name`; returns Flower's node id."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        return self._call("RegisterNode", RegisterNodeRequest(public_key=node_key(public_key), name=name)).node_id

    def unregister_node(self, node_id: int) -> None:
        """Forget a node: its key opens nothing any more."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._call("UnregisterNode", UnregisterNodeRequest(node_id=node_id))

    def list_nodes(self) -> list[Node]:
        """All registered nodes."""
        from flwr.proto.control_pb2 import ListNodesRequest

        rows = self._call("ListNodes", ListNodesRequest()).nodes_info
        return [Node(row.node_id, row.public_key, row.name, row.status) for row in rows if row.status != "unregistered"]

    def start_run(self, fab: bytes, config: dict[str, str | int | float | bool]) -> int:
        """Submit a run of `fab`; returns Flower's run id."""
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        bundle = Fab(hashlib.sha256(fab).hexdigest(), fab, {})
        answer = self._call(
            "StartRun", StartRunRequest(fab=fab_to_proto(bundle), override_config=user_config_to_proto(config))
        )
        if not answer.HasField("run_id"):
            raise StateError("Flower did not take the run", step="look into RUN/log/superlink.log")
        return answer.run_id

    def run_status(self, run_id: int) -> RunStatus:
        """How the run is; one that Flower no longer knows is finished and failed."""
        from flwr.proto.control_pb2 import ListRunsRequest

        runs = self._call("ListRuns", ListRunsRequest(run_id=run_id)).run_dict
        if run_id not in runs:
            return RunStatus("finished", "failed")
        return RunStatus(runs[run_id].status.status, runs[run_id].status.sub_status)

    def stop_run(self, run_id: int) -> None:
        """Stop the run; its messages are no longer delivered."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._call("StopRun", StopRunRequest(run_id=run_id))

    def close(self) -> None:
        self._client.close()

    def _call(self, method: str, request: Any) -> Any:
        import httpx

        try:
            return getattr(self._client, method)(request)
        except httpx.HTTPStatusError as error:
            raise StateError(
                f"Flower's Control API refused {method} ({error.response.status_code})",
                step="look into RUN/log/superlink.log",
            ) from None
        except (httpx.HTTPError, ValueError) as error:
            raise StateError(
                f"Flower's Control API does not answer ({type(error).__name__})", step="look into RUN/log/superlink.log"
            ) from None
