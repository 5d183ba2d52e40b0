"""The private names of flwr that rin touches, and the guards: this file fails when flwr moves one of them."""

import importlib
import inspect
import logging
import os
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rin.common import flower
from rin.common.errors import RefusedError, StateError

CANARY = "PatientID 12345 at /data/x.dcm"


# --- environment, bundle, executables


def test_child_env_closes_the_ways_out_and_keeps_the_path_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_FLEET_API", "1")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    env = flower.child_env(tmp_path / "flower", [tmp_path / "bin"])
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["FLWR_HOME"] == str(tmp_path / "flower")
    assert "FLWR_INTERNAL_GRPC_FLEET_API" not in env
    assert env["NO_PROXY"] == env["no_proxy"] == "example.org,127.0.0.1,localhost"
    assert env["PYTHONPATH"] == "/somewhere"
    assert env["PATH"].split(os.pathsep)[:2] == [str(tmp_path / "bin"), str(Path(sys.executable).parent)]


def test_the_environment_switches_are_the_names_that_flwr_reads() -> None:
    constant = importlib.import_module("flwr.common.constant")
    superexec = importlib.import_module("flwr.supercore.superexec.run_superexec")
    update = importlib.import_module("flwr.supercore.update_check")
    assert constant.FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION == "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
    assert superexec._TASK_POLL_INTERVAL_ENV == "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
    assert update.FLWR_DISABLE_UPDATE_CHECK == "FLWR_DISABLE_UPDATE_CHECK"
    assert constant.FLWR_HOME == "FLWR_HOME"
    assert 'os.getenv("FLWR_TELEMETRY_ENABLED"' in inspect.getsource(
        importlib.import_module("flwr.supercore.telemetry")
    )


def test_the_stub_is_small_holds_no_code_and_is_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fab, digest = flower.stub_fab()
    names = zipfile.ZipFile(BytesIO(fab)).namelist()
    assert sorted(names) == [".info/CONTENT", "LICENSE", "pyproject.toml"]
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        (copy / name).write_bytes((flower.STUB / name).read_bytes())
    monkeypatch.setattr(flower, "STUB", copy)
    assert flower.stub_fab() == (fab, digest)
    text = zipfile.ZipFile(BytesIO(fab)).read("pyproject.toml").decode()
    assert "rin.server.app:app" in text and "rin.client.app:app" in text
    assert "run-dir" not in text


def test_every_task_command_of_flwr_has_an_executable_of_ours(tmp_path: Path) -> None:
    constant = importlib.import_module("flwr.supercore.constant")
    assert set(flower.COMMANDS) == set(constant.TASK_TYPE_TO_COMMAND.values())
    folder = flower.write_executables(tmp_path / "bin", allowed={"flwr-clientapp": "run_guarded_clientapp"})
    assert {p.name for p in folder.iterdir()} == set(flower.COMMANDS)
    for command in set(flower.COMMANDS) - {"flwr-clientapp"}:
        done = subprocess.run([folder / command, "--token", "x"], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "no task of this type" in done.stderr
    done = subprocess.run([folder / "flwr-clientapp", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--runtime-api-address" in done.stdout
    assert "--parent-pid" in done.stdout


# --- the guards


def test_run_clientapp_still_has_what_the_guard_replaces() -> None:
    module = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    source = inspect.getsource(module.run_clientapp)
    for call in (
        "install_from_fab(fab.content",
        "install_app_dependencies(",
        "get_load_client_app_fn(",
        "Error(code=e_code, reason=reason)",
        "push_task_output(\n            client=client,\n            context=context,\n"
        "            sub_status=sub_status,\n            details=details,",
        "run.fab_id, run.fab_version, fab.hash_str",
    ):
        assert call in source, call
    names = ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn", "Error", "push_task_output")
    assert all(callable(getattr(module, name)) for name in names)
    assert list(inspect.signature(module.push_task_output).parameters) == ["client", "context", "sub_status", "details"]
    # An exception's text leaves by these two ways only.
    assert source.count("reason") == 6
    assert callable(importlib.import_module("flwr.supernode.cli").flwr_clientapp)


def test_run_serverapp_still_has_what_the_guard_replaces() -> None:
    module = importlib.import_module("flwr.superlink.runtime.run_serverapp")
    source = inspect.getsource(module.run_serverapp)
    assert "install_from_fab(fab.content" in source
    assert "install_app_dependencies(" in source
    assert callable(importlib.import_module("flwr.superlink.cli").flwr_serverapp)


def guarded(app: Any = None) -> tuple[SimpleNamespace, list[dict[str, Any]]]:
    pushed: list[dict[str, Any]] = []
    error = importlib.import_module("flwr.app").Error
    module = SimpleNamespace(
        Error=error,
        push_task_output=lambda **kwargs: pushed.append(kwargs),
        install_from_fab=None,
        get_load_client_app_fn=None,
        install_app_dependencies=None,
    )
    flower.guard_clientapp(module, flower._Outcome())
    return module, pushed


def test_the_supernode_still_sleeps_through_the_module_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("flwr.supernode.start_client_internal")

    source = inspect.getsource(module)
    assert "import time\n" in source
    assert "time.sleep(3)" in source
    slept: list[float] = []
    monkeypatch.setattr(module, "time", module.time)
    monkeypatch.setattr(time, "sleep", slept.append)
    flower.hurry_supernode(module)
    module.time.sleep(3)
    module.time.sleep(0.1)
    assert slept == [flower.IDLE_S, 0.1]
    assert module.time.monotonic() <= time.monotonic()


def test_an_interrupted_supernode_ends_whatever_its_other_threads_do() -> None:
    code = (
        "import threading\n"
        "from flwr.supernode import cli\n"
        "from rin.common.flower import run_supernode\n"
        "def interrupted():\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    raise KeyboardInterrupt\n"
        "cli.flower_supernode = interrupted\n"
        "run_supernode()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "KeyboardInterrupt" in ended.stderr


def test_a_foreign_bundle_is_refused_and_an_empty_list_refuses_all(monkeypatch: pytest.MonkeyPatch) -> None:
    fab, digest = flower.stub_fab()
    module, _ = guarded()
    for listed in ("", "0" * 64, ","):
        monkeypatch.setenv(flower.SHA256_ENV, listed)
        with pytest.raises(RefusedError):
            module.install_from_fab(fab, skip_prompt=True)
    monkeypatch.delenv(flower.SHA256_ENV)
    with pytest.raises(RefusedError):
        module.install_from_fab(fab, skip_prompt=True)
    assert module.Error(code=2, reason=CANARY).reason == "rin:policy"
    monkeypatch.setenv(flower.SHA256_ENV, f"{'0' * 64},{digest}")
    module.install_from_fab(fab, skip_prompt=True)
    with pytest.raises(RefusedError):
        module.install_from_fab(fab + b"x", skip_prompt=True)


def test_the_loader_gives_the_installed_app_and_no_exception_text_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    def app(message: Any, context: Any) -> Any:
        if message == "ours":
            raise StateError(CANARY, code="disk-full")
        raise ValueError(CANARY)

    monkeypatch.setitem(sys.modules, flower.CLIENT_APP, SimpleNamespace(app=app))  # type: ignore[arg-type]
    for message, code in (("ours", "disk-full"), ("foreign", "internal")):
        module, pushed = guarded()
        load = module.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
        loaded = load("evil/app", "9.9", "f" * 64)
        with pytest.raises((StateError, ValueError)):
            loaded(message=message, context=None)
        sent = module.Error(code=2, reason=f"<class 'ValueError'>:<'{CANARY}'>")
        module.push_task_output(client=1, context=2, sub_status="failed", details=CANARY)
        module.push_task_output(client=1, context=2, sub_status="completed", details="")
        assert (sent.code, sent.reason) == (2, f"rin:{code}")
        assert [p["details"] for p in pushed] == [f"rin:{code}", ""]
    with pytest.raises(RefusedError):
        module.install_app_dependencies("x", launch_id="t")


def test_the_serverapp_guard_installs_our_bundle_only(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[bytes] = []
    module = SimpleNamespace(
        install_from_fab=lambda content, skip_prompt: installed.append(content), install_app_dependencies=None
    )
    flower.guard_serverapp(module)
    fab, digest = flower.stub_fab()
    monkeypatch.setenv(flower.SHA256_ENV, digest)
    module.install_from_fab(fab, skip_prompt=True)
    with pytest.raises(RefusedError):
        module.install_from_fab(b"evil", skip_prompt=True)
    assert installed == [fab]


def test_flower_log_loses_exception_texts(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import logging; from flwr.supercore import log; from rin.common import flower; flower._scrub_flower_log()\n"
        f"try: raise ValueError({CANARY!r})\n"
        "except ValueError as e: log(logging.ERROR, '%s raised an exception', 'ClientApp', exc_info=e)\n"
        f"raise KeyError({CANARY!r})"
    )
    env = flower.child_env(Path("/nonexistent"), [])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert "an exception: ValueError at <string>:2" in done.stderr + done.stdout
    assert "uncaught KeyError" in done.stderr
    assert CANARY not in done.stderr + done.stdout
    assert logging.getLogger("flwr").filters == []  # only in the child


@pytest.mark.parametrize(
    ("reason", "code"),
    [("rin:policy", "policy"), ("rin:internal", "internal"), ("rin:made-up", ""), (CANARY, ""), (None, "")],
)
def test_only_our_codes_are_read_from_a_reason(reason: str | None, code: str) -> None:
    assert flower.code_of_reason(reason) == code


# --- Control


def test_the_control_client_still_has_the_methods_and_fields() -> None:
    client = importlib.import_module("flwr.supercore.control").ControlHttpClient
    for method in ("RegisterNode", "UnregisterNode", "ListNodes", "StartRun", "ListRuns", "StopRun"):
        assert callable(getattr(client, method))
    parameters = list(inspect.signature(client.from_server_address).parameters)
    assert parameters[:4] == ["server_address", "insecure", "root_certificates", "interceptors"]
    pb = importlib.import_module("flwr.proto.control_pb2")
    pb.RegisterNodeRequest(public_key=b"x", name="s")
    pb.UnregisterNodeRequest(node_id=1)
    pb.StopRunRequest(run_id=1)
    pb.ListRunsRequest(run_id=1)
    assert {"nodes_info"} <= set(pb.ListNodesResponse.DESCRIPTOR.fields_by_name)
    assert {"run_dict"} <= set(pb.ListRunsResponse.DESCRIPTOR.fields_by_name)
    assert {"run_id"} <= set(pb.StartRunResponse.DESCRIPTOR.fields_by_name)
    node = importlib.import_module("flwr.proto.node_pb2").NodeInfo.DESCRIPTOR.fields_by_name
    assert {"node_id", "public_key", "name", "status"} <= set(node)
    status = importlib.import_module("flwr.common.constant").Status
    sub = importlib.import_module("flwr.common.constant").SubStatus
    assert (status.FINISHED, sub.COMPLETED, sub.FAILED, sub.STOPPED) == ("finished", "completed", "failed", "stopped")


def test_a_node_key_must_be_elliptic() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    def line(key: Any) -> str:
        return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    assert flower.node_key(line(ec.generate_private_key(ec.SECP384R1()))).startswith(b"-----BEGIN PUBLIC KEY")
    with pytest.raises(StateError):
        flower.node_key(line(ed25519.Ed25519PrivateKey.generate()))


def test_a_superlink_that_does_not_answer_is_a_clear_error(tmp_path: Path) -> None:
    import certifi

    control = flower.Control("127.0.0.1:9", Path(certifi.where()))
    with pytest.raises(StateError, match="ConnectError"):
        control.list_nodes()
    control.close()
