"""The airlock between the network side and the trainer: gRPC on a Unix socket.

`python -m rin.client.airlock --home DIR` is the trainer process. The only file that imports grpc. Server
and client are here together, since they share their limits.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final

import grpc

from rin.client import trainer_pb2 as pb
from rin.client import trainer_pb2_grpc as pb_grpc
from rin.client.home import Home, default_root
from rin.client.policy import MAX_PLAN
from rin.client.rendezvous import socket_path
from rin.client.trainer import Done, Progress, State, Trainer, warm_up
from rin.common.errors import CODES, RefusedError, RinError, StateError
from rin.common.files import lock
from rin.common.wire import Request, from_bytes

log = logging.getLogger(__name__)

MAX_MESSAGE: Final = MAX_PLAN + (64 << 10)  # bytes; no message here holds weights
MAX_STREAMS: Final = 8  # calls at once; one Train stream and a few Hellos are normal
PULSE: Final = 0.5  # seconds between two events of a stream
LAST_WORDS: Final = 1.0  # seconds for the answer of a trainer that cannot go on
LIMITS: Final = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.enable_http_proxy", 0),
]


# --- the trainer's side -----------------------------------------------------------------------------------------


class _Job:
    """One request being trained in its own thread; any number of streams watch it."""

    def __init__(self, trainer: Trainer, request: Request, plan: bytes) -> None:
        self.request, self.progress = request, Progress(0, 0)
        self.result: Done | pb.Refused | None = None
        self.news = threading.Condition()
        self._plan, self._trainer = plan, trainer
        self._stop = ""
        self._deadline = 0.0
        self.extend(request.deadline_s)
        self._thread = threading.Thread(target=self._run, name="job", daemon=True)
        self._thread.start()

    def same(self, request: Request, plan: bytes) -> bool:
        return (self.request.id, self.request.run, self._plan) == (request.id, request.run, plan)

    def extend(self, seconds: float) -> None:
        """A repeated request may come with a later deadline; it never shortens."""
        self._deadline = max(self._deadline, time.monotonic() + seconds)

    def stop(self, code: str) -> None:
        self._stop = self._stop or code

    def cancelled(self) -> str:
        """The code that ends the work before its next step, or nothing."""
        return self._stop or ("deadline" if time.monotonic() > self._deadline else "")

    def wait(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        result: Done | pb.Refused = pb.Refused(code="internal")
        try:
            result = self._trainer.train(self.request, self._plan, self._report, self.cancelled)
        except RefusedError as error:
            result = _refused(error)
        finally:
            with self.news:
                self.result = result
                self.news.notify_all()
            if self._trainer.lost:
                log.error("the device is lost to this process; the agent starts a new one")
                threading.Timer(LAST_WORDS, os._exit, [1]).start()

    def _report(self, progress: Progress) -> None:
        self.progress = progress  # streams look twice a second; waking them at each step would cost more

    def events(self) -> Iterator[pb.Event]:
        """Progress as it comes, at most twice a second, then the result."""
        while True:
            with self.news:
                self.news.wait_for(lambda: self.result is not None, timeout=PULSE)
                progress, result = self.progress, self.result
            if isinstance(result, Done):
                yield pb.Event(done=pb.Done(request=result.request, update=result.update))
                return
            if result is not None:
                yield pb.Event(refused=result)
                return
            yield pb.Event(progress=pb.Progress(step=progress.step, steps=progress.steps))


def _refused(error: RefusedError) -> pb.Refused:
    return pb.Refused(code=error.code, note=error.note)


class _Service(pb_grpc.TrainerServicer):
    """The RPCs. One job at a time; a newer round of the same run takes the place of an older one."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._job: _Job | None = None
        self._lock = threading.Lock()

    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.State:
        job = self._running()
        try:
            state = self._trainer.hello()
        except RinError as error:
            log.error("site.toml cannot be used: %s", error)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.code)
        return pb.State(
            protocol=state.protocol,
            release=state.release,
            site=state.site,
            label_set=state.label_set,
            busy=job.request.id if job else "",
        )

    def Train(self, request: pb.TrainRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:
        try:
            job = self._job_of(from_bytes(Request, request.request), request.plan)
        except RefusedError as error:
            yield pb.Event(refused=_refused(error))
            return
        yield from job.events()

    def Cancel(self, request: pb.CancelRequest, context: grpc.ServicerContext) -> pb.CancelReply:
        job = self._running()
        if job is None or job.request.id != request.request:
            return pb.CancelReply(running=False)
        job.stop("cancelled")
        return pb.CancelReply(running=True)

    def _running(self) -> _Job | None:
        job = self._job
        return job if job is not None and job.result is None else None

    def _job_of(self, request: Request, plan: bytes) -> _Job:
        """The running job of `request`, or a new one.

        Raises:
            RefusedError: trainer-away, while another request is being trained that this one does not supersede.
        """
        with self._lock:
            job = self._running()
            if job is not None and job.same(request, plan):
                job.extend(request.deadline_s)
                return job
            if job is not None:
                if (job.request.run, job.request.plan) != (request.run, request.plan) or not (
                    request.round > job.request.round
                ):
                    raise RefusedError("trainer-away", "another request is being trained")
                job.stop("cancelled")
                job.wait()
            self._job = _Job(self._trainer, request, plan)
            return self._job


def serve(trainer: Trainer, path: Path) -> grpc.Server:
    """Serve `trainer` on the Unix socket `path`, which only this user and its group may use; returns started.

    Raises:
        StateError: the socket cannot be made.
    """
    path.unlink(missing_ok=True)
    server = grpc.server(ThreadPoolExecutor(MAX_STREAMS, "rpc"), options=LIMITS, maximum_concurrent_rpcs=MAX_STREAMS)
    pb_grpc.add_TrainerServicer_to_server(_Service(trainer), server)
    before = os.umask(0o117)  # the socket's mode: 0660
    try:
        server.add_insecure_port(f"unix:{path}")
        server.start()
    except RuntimeError:
        raise StateError("the trainer's socket cannot be made", step="check RIN_SOCKET and its directory") from None
    finally:
        os.umask(before)
    return server


# --- the network's side -----------------------------------------------------------------------------------------


class Stub:
    """The ClientApp's hold on the trainer. Every method raises RefusedError('trainer-away') when it does not answer."""

    def __init__(self, path: Path) -> None:
        self._channel = grpc.insecure_channel(
            f"unix:{path}", options=[*LIMITS, ("grpc.max_reconnect_backoff_ms", 1000)]
        )
        self._stub = pb_grpc.TrainerStub(self._channel)

    def __enter__(self) -> Stub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def hello(self, *, timeout: float = 10.0) -> State:
        """Who the trainer is."""
        with _answers():
            state = self._stub.Hello(pb.HelloRequest(), timeout=timeout)
        return State(state.protocol, state.release, state.site, state.label_set)

    def train(
        self,
        request: Request,
        plan: bytes,
        progress: Callable[[Progress], None] = lambda progress: None,
        *,
        timeout: float,
    ) -> Done:
        """Ask for one round and follow it to its end; at most `timeout` seconds.

        Raises:
            RefusedError: with the trainer's code and note.
        """
        message = pb.TrainRequest(request=request.to_bytes(), plan=plan)
        with _answers():
            for event in self._stub.Train(message, timeout=timeout):
                if event.HasField("done"):
                    return Done(event.done.request, event.done.update)
                if event.HasField("refused"):
                    refused = event.refused
                    raise RefusedError(refused.code if refused.code in CODES else "internal", note=refused.note)
                progress(Progress(event.progress.step, event.progress.steps))
        raise RefusedError("trainer-away")

    def cancel(self, request: str) -> bool:
        """End the job of the request id, before its next step; whether it was running."""
        with _answers():
            return self._stub.Cancel(pb.CancelRequest(request=request), timeout=10.0).running


@contextlib.contextmanager
def _answers() -> Iterator[None]:
    """gRPC's errors as ours; their text holds the socket's path."""
    try:
        yield
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else None
        if code == grpc.StatusCode.FAILED_PRECONDITION:
            raise RefusedError("internal") from None
        raise RefusedError("trainer-away") from None


# --- the process ------------------------------------------------------------------------------------------------


def run(home: Home) -> None:
    """Serve the trainer of `home` until SIGTERM or SIGINT.

    Raises:
        StateError: another trainer works in this home.
    """
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with lock(home.jobs / "trainer.lock", holder="rin-client"):
        trainer = Trainer(home)
        path = socket_path(home)
        server = serve(trainer, path)
        log.info("trainer ready")
        threading.Thread(target=warm_up, name="warm-up", daemon=True).start()
        stopped.wait()
        server.stop(grace=None)
        path.unlink(missing_ok=True)
    # A round in its middle is trained again after the next start, to the same bits: nothing is worth waiting for.
    os._exit(0)


def main() -> None:
    """Entry point of the trainer process."""
    from rin.common import log as logs

    parser = argparse.ArgumentParser(prog="rin.client.airlock", description="The trainer of one site.")
    parser.add_argument("--home", type=Path, default=None)
    home = Home((parser.parse_args().home or default_root()).expanduser().resolve())
    logs.setup(home.vault_log / "trainer.jsonl")
    try:
        run(home)
    except RinError as error:
        log.error("%s", error.message)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
