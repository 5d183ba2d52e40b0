"""The baseline of the overhead benchmark: stock Flower FedAvg with the same network, TLS and node keys.

Everything is as the documentation of Flower 1.41 shows it for PyTorch: ResNet50's state_dict as an ArrayRecord, the
FedAvg strategy, SuperLink with its in-memory state, one SuperNode a site, a ClientApp that loads the weights, takes one
step (as rin's sites do) and answers with its state_dict. Evaluation is off; the server-side hook that Flower calls
after each round only writes the time down.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx

from rin.common import flower, keys
from tests.benchmarks import meter

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "stock"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41.0,<1.42"]

[tool.flwr.app]
publisher = "benchmark"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "stock_app:server"
clientapp = "stock_client:client"

[tool.flwr.app.config]
rounds = 1
sites = 1
marks = ""
"""

SERVER = """
import time
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()


@server.main()
def main(grid, context):
    from torchvision.models import resnet50

    sites = context.run_config["sites"]
    before = [0.0]

    def mark(number, arrays):
        # Every round changes the weights, unless the clients failed.
        weights = arrays["conv1.weight"].numpy().sum()
        assert number == 0 or weights != before[0], "the clients failed"
        before[0] = weights
        with open(context.run_config["marks"], "a") as file:
            file.write(f"{number} {time.time()}\\n")
        return MetricRecord({"round": number})

    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=sites,
        min_evaluate_nodes=0,
        min_available_nodes=sites,
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(resnet50(weights=None, num_classes=165).state_dict()),
        num_rounds=context.run_config["rounds"],
        evaluate_fn=mark,
    )
"""

CLIENT = """
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torchvision.models import resnet50

client = ClientApp()


@client.train()
def train(message, context):
    torch.set_num_threads(1)
    network = resnet50(weights=None, num_classes=165)
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    loss = torch.nn.functional.cross_entropy(network(torch.rand(8, 3, 32, 32)), torch.arange(8))
    loss.backward()
    optimizer.step()
    content = {"arrays": ArrayRecord(network.state_dict()), "metrics": MetricRecord({"num-examples": 8})}
    return Message(content=RecordDict(content), reply_to=message)
"""


@contextlib.contextmanager
def _child(argv: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as file:
        process = subprocess.Popen(argv, env=env, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _write(folder: Path, sites: int) -> None:
    app = folder / "app"
    app.mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "LICENSE").write_text("none\n")
    (app / "stock_app.py").write_text(SERVER)
    (app / "stock_client.py").write_text(CLIENT)
    ca, ca_key = keys.make_ca("benchmark")
    certificate, key = keys.make_server_certificate(ca, ca_key, [])
    for name, data in {"ca.crt": ca, "server.crt": certificate, "server.key": key}.items():
        (folder / name).write_bytes(data)
    for site in range(sites):
        private = keys.make_node_key()
        (folder / f"site{site}.key").write_bytes(private)
        (folder / f"site{site}.pub").write_text(keys.node_public(private))


def _wait_healthy(port: int, ca: Path) -> None:
    context = keys.client_context(ca)
    for _ in range(600):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"https://127.0.0.1:{port}/health", verify=context, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("SuperLink does not answer")


def _fab(folder: Path) -> bytes:
    from flwr.cli.build import build_fab_from_disk

    sys.path.insert(0, str(folder))  # flwr looks the components up before it builds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_fab_from_disk(folder)


def run(folder: Path, *, sites: int, rounds: int, ports: list[int]) -> list[tuple[float, float]]:
    """Run stock Flower in the empty `folder`.

    Args:
        ports: one for the SuperLink and one for each SuperNode.

    Returns:
        (wall seconds, CPU seconds of all processes) of each round but the first.
    """
    _write(folder, sites)
    marks = folder / "marks.txt"
    env = flower.child_env(folder / "flower", [])
    # As it ships: Flower's own poll interval, not the one that rin sets.
    env.pop("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", None)
    bin_dir = Path(sys.executable).parent
    with contextlib.ExitStack() as stack:
        superlink = [str(bin_dir / "flower-superlink"), "--host", "127.0.0.1", "--port", str(ports[0])]
        superlink += ["--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.crt")]
        superlink += ["--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth"]
        superlink += ["--disable-runtime-dependency-installation"]
        stack.enter_context(_child(superlink, env, folder / "superlink.log"))
        _wait_healthy(ports[0], folder / "ca.crt")
        control = flower.Control(f"127.0.0.1:{ports[0]}", folder / "ca.crt")
        for site in range(sites):
            control.register_node((folder / f"site{site}.pub").read_text(), f"site{site}")
            node = [str(bin_dir / "flower-supernode"), "--superlink", f"127.0.0.1:{ports[0]}"]
            node += ["--root-certificates", str(folder / "ca.crt"), "--host", "127.0.0.1"]
            node += ["--auth-supernode-private-key", str(folder / f"site{site}.key"), "--port", str(ports[1 + site])]
            home = env | {"FLWR_HOME": str(folder / f"site{site}")}
            stack.enter_context(_child(node, home, folder / f"site{site}.log"))
        run_id = control.start_run(_fab(folder / "app"), {"rounds": rounds, "sites": sites, "marks": str(marks)})
        return _follow(control, run_id, marks, rounds)


def _follow(control: flower.Control, run_id: int, marks: Path, rounds: int) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    while len(points) <= rounds:  # round 0 is Flower's call before the first round
        lines = marks.read_text().splitlines() if marks.exists() else []
        if len(lines) > len(points):
            points.append((float(lines[len(points)].split()[1]), meter.cpu_seconds()))
        elif control.run_status(run_id).finished:
            break
        time.sleep(0.2 if os.getloadavg()[0] < 8 else 0.5)
    if len(points) <= rounds:
        raise RuntimeError(f"stock Flower ended after {len(points) - 1} rounds")
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(points[1:])]
