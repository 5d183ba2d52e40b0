"""A real consortium for tests and benchmarks: real commands and processes, TLS on loopback, a phantom archive."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rin.client import join as joining
from rin.client.home import Home
from rin.client.ingest.pipeline import ingest
from rin.common.files import write_atomic
from rin.common.labels import label_set_digest
from rin.common.layout import file_digest
from rin.server import archive, consortium
from rin.server.rundir import RunDir
from rin.server.scanners import SITES

PLAN = """
protocol = 1
name = "test"
label-set = "{labels}"

[sites]
{sites}

[model]
backbone = "{backbone}"
image-size = 32

[training]
rounds = {rounds}
local-steps = {steps}
batch-size = 8
learning-rate = 0.01

[limits]
min-sites = {quorum}
quorum = {quorum}
deadline-s = 600.0
"""

SITE = """
site = "{site}"

[labels]
declared = {declared}

[device]
name = "cpu"
threads = 1

[coordinator]
address = "{address}"

[policy]
privacy = "none"
none-agreed-by = "a test"
none-agreed-on = "2026-11-23"
metrics = ["loss", "images"]
min-steps = 1
min-patients = 1
min-sites = 1
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def ingest_phantom(folder: Path, *, patients: int = 8) -> Home:
    """A home with a catalog of a small phantom archive in it and nothing else; `give` copies it to sites."""
    archive.write_archive("siteA", folder / "archives", seed=5, patients=patients)
    home, source = Home(folder / "ingested"), folder / "archives" / "siteA"
    ingest(home, site="siteA", roots=[source / "dicom"], labels=source / "labels.csv", mapping=source / "mapping.csv")
    return home


@dataclass
class Consortium:
    """One run directory and its sites. `phantom` is an ingested home whose catalog every site gets a copy of."""

    folder: Path
    phantom: Home
    sites: tuple[str, ...] = ("north", "south")
    backbone: str = "resnet18"
    rounds: int = 2
    steps: int = 2
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        address = f"https://localhost:{self.port}"
        plan = PLAN.format(
            labels=label_set_digest(),
            sites="\n".join(f"{site} = 1.0" for site in self.sites),
            backbone=self.backbone,
            rounds=self.rounds,
            steps=self.steps,
            quorum=len(self.sites),
        ).encode()
        consortium.init(self.run, plan=plan, address=address)
        for site in self.sites:
            self._admit(site, plan, address)

    def _admit(self, site: str, plan: bytes, address: str) -> None:
        home = self.home(site)
        for part in ("catalog.sqlite", "cache", "keys"):
            source, target = self.phantom.catalog.with_name(part), home.catalog.with_name(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        path, fingerprint = consortium.invite(self.run, site)
        answer = joining.join(home, path, site=site, fingerprint=fingerprint)
        declared = json.dumps(list(SITES["siteA"].labels))
        text = SITE.format(site=site, declared=declared, address=address)
        write_atomic(home.site_toml, text.encode(), mode=0o600)
        joining.accept(home, plan, by="a test")
        consortium.admit(self.run, answer, joining.join_fingerprint(answer))

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder / "run")

    def home(self, site: str) -> Home:
        return Home(self.folder / "sites" / site)

    def weights(self) -> str:
        """Digest of the last checkpoint's tensor bytes."""
        return file_digest(self.run.checkpoint(self.rounds))

    def records(self) -> list[dict[str, Any]]:
        paths = sorted((self.run.root / "rounds").glob("*/round.json"))
        return [json.loads(path.read_bytes()) for path in paths]

    def coordinator(self, *extra: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return self._process("coordinator", "server", "run", "--run", str(self.run.root), "--host", "127.0.0.1", *extra)

    def agent(self, site: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return self._process(site, "client", "start", "--home", str(self.home(site).root))

    @contextlib.contextmanager
    def _process(self, name: str, side: str, *args: str) -> Iterator[subprocess.Popen[bytes]]:
        log = self.folder / f"{name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", f"rin.{side}.cli", *args],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    @contextlib.contextmanager
    def agents(self) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
        with contextlib.ExitStack() as stack:
            yield {site: stack.enter_context(self.agent(site)) for site in self.sites}

    def logs(self) -> str:
        """The end of every log, for a failed assertion."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(self.folder.glob("*.log"))
        )


def wait_for(condition: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """The first true value of `condition`, asked five times a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise TimeoutError(what)
