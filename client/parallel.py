"""A round's local steps in several processes under torchrun, one a GPU: what the trainer starts, follows and ends.

`python -m rin.client.parallel --processes N FOLDER` is torchrun, which starts `python -m rin.client.parallel FOLDER` N
times. Job and result are files of FOLDER, a directory of the vault. They talk over the loopback of a network namespace
that holds nothing else, where the kernel gives one.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict

from rin.client import confine
from rin.client.home import Home
from rin.client.site import Site
from rin.common.errors import CODES, RefusedError
from rin.common.files import publish, read_json, write_atomic, write_json
from rin.common.plan import Plan
from rin.common.supervise import die_with_parent

if TYPE_CHECKING:
    from rin.common.backbones import Network
    from rin.common.fit import FitResult
    from rin.common.parallel import Ranks

log = logging.getLogger(__name__)

SNAPSHOT: Final = "snapshot.safetensors"  # its name in the folder of a round
# Pattern of all that a round leaves in its folder, in one process or in several.
MADE: Final = r"(snapshot|start|local)\.safetensors|(job|result)\.json|ranks\.log|refused(\.\d+)?|torchrun"
WORKER: Final = "rin.client.parallel"  # the module that every process runs
LOOK_EVERY: Final = 0.2  # seconds between two questions whether the work is still wanted
LAUNCHER: Final = "RIN_LAUNCHER"  # process id of torchrun, in its workers' environment


class Job(BaseModel):
    """What the processes are to do; `start.safetensors` beside it holds the weights to begin with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path
    plan: Plan
    site: Site
    round: int
    name: str  # of the snapshot


# --- the trainer's side -----------------------------------------------------------------------------------------


def run(
    network: Network,
    job: Job,
    *,
    folder: Path,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], str],
) -> FitResult:
    """Train `network`, in place, in `device.processes` processes; an interrupted job goes on from its snapshot.

    Args:
        folder: of the vault, this job's own.
        progress, cancelled: as for `rin.client.training.local_steps`.

    Raises:
        RefusedError: what `cancelled` gives; device, where the site's processes do not fit its device or the plan; and
            what a process met.
    """
    from rin.common import weights
    from rin.common.fit import FitResult

    check(network, job)
    layout = weights.layout_of(network)
    for name in ("result.json", "refused"):
        (folder / name).unlink(missing_ok=True)
    weights.save(folder / "start.safetensors", network, layout)
    write_atomic(folder / "job.json", job.model_dump_json(by_alias=True).encode(), mode=0o600)
    with (folder / "ranks.log").open("ab") as errors:
        process = subprocess.Popen(
            _argv(job, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(job),
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        _follow(process.stdout, progress, cancelled)
        code = process.wait()
    finally:
        _end(process)
    if code != 0:
        raise _refusal(folder)
    weights.read_into(network, folder / "local.safetensors", layout)
    return FitResult(**read_json(folder / "result.json"))


def check(network: Network, job: Job) -> None:
    """See that so many processes can train `network` on the site's device.

    Raises:
        RefusedError: device, with what to change.
    """
    import torch

    from rin.common.fit import pick_device
    from rin.common.norms import batch_norms

    processes, step = job.site.device.processes, "set device.processes in site.toml"
    if processes > job.plan.training.batch_size:
        raise RefusedError("device", f"device.processes: {processes} for batches of fewer images", step=step)
    if pick_device(job.site.device.name).type == "cuda":
        if processes > torch.cuda.device_count():
            there = torch.cuda.device_count()
            raise RefusedError("device", f"device.processes: {processes}, and {there} GPUs are here", step=step)
    elif batch_norms(network):
        raise RefusedError(
            "device",
            "device.processes: several processes without GPUs cannot share the statistics of batch norm",
            step='set device.processes = 1 in site.toml, or agree on a plan with model.norm = "group"',
        )


def _argv(job: Job, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "rin.client.parallel", "--processes", str(job.site.device.processes)]
    command += ["--parent", str(os.getpid()), "--worker", WORKER, str(folder)]
    if all(name == "lo" for _, name in socket.if_nameindex()):
        return command  # confined with the trainer
    if confine.works(no_network=True):
        return confine.argv(command, no_network=True)
    log.warning("this kernel confines nobody: torchrun's port can be reached from the network while a round is trained")
    return command


def _environment(job: Job) -> dict[str, str]:
    """What torch's libraries need to find each other on loopback; a host name may lead nowhere there."""
    threads = str(job.site.device.threads)
    return os.environ | {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": threads}


def _follow(lines: IO[bytes], progress: Callable[[int, int], None], cancelled: Callable[[], str]) -> None:
    """Pass on the lines `STEP STEPS` of the first process until the last process has closed its end.

    Raises:
        RefusedError: with the code of `cancelled`.
    """
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(lines, selectors.EVENT_READ)
        while True:
            if code := cancelled():
                raise RefusedError(code)
            if not selector.select(LOOK_EVERY):
                continue
            data = os.read(lines.fileno(), 1 << 16)
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                step, _, steps = line.partition(b" ")
                progress(int(step), int(steps))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill torchrun, with which its workers die; back when the last of them has let go of the folder."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    with process.stdout as lines:
        while lines.read(1 << 16):
            pass


def _refusal(folder: Path) -> RefusedError:
    """What the first process that failed has left."""
    path = folder / "refused"
    code = path.read_text() if path.exists() else ""
    return RefusedError(code if code in CODES else "internal", step=f"look into {folder / 'ranks.log'}")


# --- torchrun ---------------------------------------------------------------------------------------------------


def _launch(processes: int, parent: int, worker: str, folder: Path) -> None:
    """Become torchrun; the kernel ends it with the trainer."""
    from torch.distributed.run import main as torchrun

    die_with_parent(parent)
    os.environ[LAUNCHER] = str(os.getpid())
    torchrun(
        [
            *("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)),
            *("--log-dir", str(folder / "torchrun"), "-m", worker, str(folder)),
        ]
    )


# --- one of the processes ---------------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """Be one of the processes of the job in `folder`; a fault ends as a code in its file `refused`."""
    die_with_parent(int(os.environ[LAUNCHER]))
    from rin.client.trainer import refusal_of

    try:
        _work(folder, Job.model_validate_json((folder / "job.json").read_bytes()))
    except Exception as error:  # noqa: BLE001 - a process's edge: a code for the trainer, the trace for ranks.log
        _leave(folder, refusal_of(error).code)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly end would wait for the other processes


def _work(folder: Path, job: Job) -> None:
    from rin.client.training import images_of, limit_memory
    from rin.common import backbones, fit, parallel, weights
    from rin.common.snapshots import Snapshots

    limit_memory(job.site)
    images = images_of(Home(job.home), job.site)
    network = backbones.build(job.plan.model)
    layout = weights.layout_of(network)
    weights.read_into(network, folder / "start.safetensors", layout)
    with parallel.joined(fit.pick_device(job.site.device.name).type) as (ranks, device):
        if device.type == "cuda":
            parallel.synchronised(network)
        result = fit.fit_round(
            network,
            images,
            job.plan,
            rows=job.site.labels.rows(),
            exhaustive_rows=job.site.labels.exhaustive_rows(),
            round=job.round,
            site=job.site.site,
            device=device,
            threads=job.site.device.threads,
            compile=job.site.device.compile,
            progress=_teller(ranks),
            snapshots=Snapshots(folder / SNAPSHOT, job.name, writes=ranks.leads),
            ranks=ranks,
        )
        if ranks.leads:
            weights.save(folder / "local.safetensors", network, layout)
            write_json(folder / "result.json", {"steps": result.steps, "metrics": result.metrics}, mode=0o600)


def _teller(ranks: Ranks) -> Callable[[int, int], None]:
    def tell(step: int, steps: int) -> None:
        if ranks.leads:
            os.write(sys.stdout.fileno(), b"%d %d\n" % (step, steps))

    return tell


def _leave(folder: Path, code: str) -> None:
    """Say why; the first to do so counts, for the others then only miss it."""
    part = folder / f"refused.{os.getpid()}"
    part.write_text(code)
    publish(part, folder / "refused")


def main() -> None:
    """Entry point of torchrun and of its workers."""
    parser = argparse.ArgumentParser(prog="rin.client.parallel", description="One round in several processes.")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--parent", type=int, default=0)
    parser.add_argument("--worker", default=WORKER)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.processes:
        _launch(options.processes, options.parent, options.worker, options.folder)
    else:
        work(options.folder)


if __name__ == "__main__":
    main()
