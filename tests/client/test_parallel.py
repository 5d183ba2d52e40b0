"""Several processes at a site: ended at once, gone on after kill -9, and in the end the update of one process."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from rin.client import parallel
from rin.client.jobs import Jobs
from rin.client.trainer import Progress, Trainer
from rin.common import backbones, fit, weights
from rin.common.errors import RefusedError
from rin.common.plan import parse_plan
from rin.common.wire import Request

if TYPE_CHECKING:
    from tests.client.conftest import SmallSite

    Make = Callable[..., SmallSite]

STEPS, FEW = 8, 4
DEVICE = '[device]\nname = "cpu"\n'


def grouped(site: SmallSite, processes: int) -> tuple[Request, bytes]:
    """Give `site` so many processes and a plan with group norm; its first request and the plan."""
    data = site.plan_bytes.replace(b"image-size = 32", b'image-size = 32\nnorm = "group"')
    digest = hashlib.sha256(data).hexdigest()
    (site.home.accepted / f"{digest}.toml").write_bytes(data)
    network = backbones.initial(parse_plan(data).model, 1)
    base = weights.save(site.home.inbox / "x", network, weights.layout_of(network))
    (site.home.inbox / "x").rename(site.home.inbox / base)
    text = site.home.site_toml.read_text().replace(DEVICE, f"{DEVICE}processes = {processes}\n")
    site.home.site_toml.write_text(text)
    return site.request(plan=digest, base=base), data


def left_of(folder: Path) -> list[int]:
    """Processes that work in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] if str(folder).encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


def wait_until_gone(folder: Path, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while left_of(folder) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left_of(folder)


def test_two_processes_are_ended_at_once_go_on_and_give_the_update_of_one(
    small_site: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "WORKER", "tests.client.float32")
    monkeypatch.setattr(fit, "half_precision", lambda device: False)
    # Few steps: roundings add up, and where one turns a ReLU the two go apart.
    two, one = (small_site(steps=FEW, site="min-steps = 1\n", name=name) for name in ("two", "one"))
    request, plan = grouped(two, 2)
    trainer, seen = Trainer(two.home), list[Progress]()
    asked = 0.0

    def cancelled() -> str:
        nonlocal asked
        if len(seen) >= 2:
            asked = asked or time.monotonic()
            return "cancelled"
        return ""

    with pytest.raises(RefusedError) as caught:
        trainer.train(request, plan, seen.append, cancelled)
    assert time.monotonic() - asked < 2
    assert caught.value.code == "cancelled"
    assert left_of(two.home.jobs) == []
    first = len(seen)
    trainer.train(request, plan, seen.append, lambda: "")
    assert seen[first].step > 1  # it went on after a snapshot
    assert seen[-1] == Progress(FEW, FEW)
    same, _ = grouped(one, 1)
    Trainer(one.home).train(same, plan, lambda _: None, lambda: "")
    found, wanted = (load_file(Jobs(site.home).update(request)) for site in (two, one))
    assert max(float((found[name] - value).abs().max()) for name, value in wanted.items()) < 1e-6
    assert max(float(value.abs().max()) for value in wanted.values()) > 1e-3
    figures = [json.loads((Jobs(site.home).folder(request) / "update.json").read_bytes()) for site in (two, one)]
    assert figures[0]["metrics"] == pytest.approx(figures[1]["metrics"], rel=1e-3)
    assert sorted(path.name for path in Jobs(two.home).folder(request).iterdir()) == [
        "update.json",
        "update.safetensors",
    ]


@pytest.mark.parametrize(
    ("name", "processes", "norm", "words"),
    [
        ("cpu", 2, "batch", "batch norm"),
        ("cpu", 9, "group", "fewer images"),
        pytest.param(
            "cuda",
            8,
            "group",
            "GPUs are here",
            marks=pytest.mark.skipif(not 0 < torch.cuda.device_count() < 8, reason="no GPU, or more than enough"),
        ),
    ],
)
def test_what_cannot_be_split_is_refused_with_what_to_change(
    small_site: Make, name: str, processes: int, norm: str, words: str
) -> None:
    site = small_site()
    request, plan = (site.request(), site.plan_bytes) if norm == "batch" else grouped(site, 1)
    text = site.home.site_toml.read_text().replace("processes = 1\n", "")
    site.home.site_toml.write_text(text.replace(DEVICE, f'[device]\nname = "{name}"\nprocesses = {processes}\n'))
    with pytest.raises(RefusedError) as caught:
        Trainer(site.home).train(request, plan, lambda _: None, lambda: "")
    assert caught.value.code == "device"
    assert words in caught.value.message


SCRIPT = """
import sys
from pathlib import Path
from rin.client import parallel
from rin.client.home import Home
from rin.client.trainer import Trainer
from rin.common.errors import RefusedError
from rin.common.wire import Request, from_bytes
parallel.WORKER = "tests.client.float32"
request, plan = from_bytes(Request, sys.argv[2].encode()), Path(sys.argv[3]).read_bytes()
tell = lambda at: print(at.step, flush=True)
try:
    print(Trainer(Home(Path(sys.argv[1]))).train(request, plan, tell, lambda: "").update)
except RefusedError as error:
    print(error.code)
"""


def spawn(site: SmallSite, request: Request) -> subprocess.Popen[str]:
    plan = site.home.accepted / f"{request.plan}.toml"
    command = [sys.executable, "-c", SCRIPT, str(site.home.root), request.to_bytes().decode(), str(plan)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["trainer", "worker"])
def test_kill_9_leaves_nobody_and_the_same_bits(small_site: Make, victim: str) -> None:
    site, other = small_site(steps=STEPS), small_site(steps=STEPS, name="undisturbed")
    request, _ = grouped(site, 2)
    with spawn(site, request) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 3:
            pass
        workers = [pid for pid in left_of(site.home.jobs) if b"float32" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(process.pid if victim == "trainer" else workers[-1], signal.SIGKILL)
        words = process.stdout.read().split()
    assert victim == "trainer" or words[-1] == "internal"
    wait_until_gone(site.home.jobs)
    with spawn(site, request) as again, spawn(other, grouped(other, 2)[0]) as whole:
        lines, undisturbed = again.communicate()[0].split(), whole.communicate()[0].split()
    assert int(lines[0]) > 1
    assert lines[-1] == undisturbed[-1]
    assert len(lines[-1]) == 64


@pytest.mark.slow
def test_a_process_that_runs_out_of_memory_is_a_code(small_site: Make) -> None:
    site = small_site(steps=STEPS)
    request, _ = grouped(site, 2)
    text = site.home.site_toml.read_text()
    site.home.site_toml.write_text(text.replace(DEVICE, f"{DEVICE}memory-gib = 0.3\n"))
    assert spawn(site, request).communicate()[0].split()[-1:] == ["memory"]
    site.home.site_toml.write_text(text)
    assert len(spawn(site, request).communicate()[0].split()[-1]) == 64
