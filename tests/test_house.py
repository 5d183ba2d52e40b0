"""The rules of the house that a linter cannot say: floors, shipped packages, light command lines."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rin.common.labels

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"common": {"common"}, "client": {"client", "common"}, "server": {"server", "common"}}
TENSOR = {
    "formats",
    "guard",
    "keylayouts",
    "statedict",
    "backbones",
    "batches",
    "heads",
    "fit",
    "gradients",
    "private",
    "bags",
    "accountant",
    "augment",
    "ema",
    "recipe",
    "evaluate",
    "weights",
    "metrics",
    "snapshots",
    "freeze",
    "norms",
    "parallel",
    "checkpoint",
}
HEAVY = {"torch", "torchvision", "timm", "flwr", "opacus"}
# One adapter per dependency: who may import it anywhere in the file.
ADAPTERS = {
    "flwr": {"common/flower.py", "server/app.py", "client/app.py"},
    "grpc": {"client/airlock.py", "client/trainer_pb2_grpc.py"},
    "opacus": {"common/accountant.py", "common/private.py"},
    "timm": {"common/backbones.py"},
    "onnx": {"server/onnxfile.py"},
    "onnxruntime": {"server/onnxfile.py"},
}
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that `path` imports, `from rin import client` as `rin.client`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_floors_only_import_what_lies_below_them(path: Path) -> None:
    allowed = FLOORS[path.relative_to(ROOT).parts[0]]
    used = {name.split(".")[1] for name in imported(path) if name.startswith("rin.")}
    assert used <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "common").glob("*.py")), ids=lambda path: path.stem)
def test_paper_never_imports_tensor(path: Path) -> None:
    if path.stem in TENSOR:
        return
    names = imported(path, top_level_only=True)
    assert not {name for name in names if name.split(".")[0] in HEAVY}
    assert not {name for name in imported(path) if name.startswith("rin.common.") and name.split(".")[2] in TENSOR}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_dependency_lives_behind_its_adapter(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    used = {module.split(".")[0] for module in imported(path)}
    assert not {module for module, files in ADAPTERS.items() if module in used and name not in files}


def test_every_package_on_disk_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    mapping = project["tool"]["setuptools"]["package-dir"]
    on_disk = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES if path.name == "__init__.py"}
    holding_code = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES}
    assert on_disk == holding_code == set(mapping.values())
    assert set(project["tool"]["setuptools"]["packages"]) == set(mapping)


@pytest.mark.parametrize("module", ["rin.client.cli", "rin.server.cli", "rin.client.agent", "rin.server.run"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {sorted(HEAVY)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["client", "server"])
def test_help_costs_less_than_half_a_second_of_cpu(command: str) -> None:
    code = (
        f"import resource, subprocess, sys; subprocess.run([sys.executable, '-m', 'rin.{command}.cli', '--help'], "
        "check=True, stdout=subprocess.DEVNULL); usage = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(usage.ru_utime + usage.ru_stime)"
    )
    # The cheapest of three: a loaded machine can only make a run look dearer.
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )
    assert seconds < 0.5


def test_this_checkout_is_what_is_tested() -> None:
    assert Path(rin.common.labels.__file__).resolve().is_relative_to(ROOT)
