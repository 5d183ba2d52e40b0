"""The trainer's memory between processes: which rounds were trained, and the finished updates of the last two."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rin.client.home import Home
from rin.common.egress import UpdateFacts
from rin.common.errors import RefusedError, StateError
from rin.common.files import BLOCK, publish, read_json, write_json
from rin.common.layout import Layout, file_digest
from rin.common.plan import Digest, MetricName
from rin.common.scores import GroupScores
from rin.common.wire import Claim, Request, RoundNumber, RunId

KEPT_ROUNDS: Final = 2  # this one and the one before; an older round is closed and nobody may ask for it again


class Stored(BaseModel):
    """What is remembered of a finished update; `metrics` and `scores` have passed the egress gate."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run: RunId
    round: RoundNumber
    plan: Digest
    update: Digest
    norm: float
    steps: Annotated[int, Field(ge=0)]
    labels: tuple[int, ...]
    metrics: dict[MetricName, float]
    scores: tuple[GroupScores, ...] = ()
    privacy: Claim | None = None

    @classmethod
    def of(
        cls,
        request: Request,
        update: UpdateFacts,
        *,
        steps: int,
        labels: tuple[int, ...],
        scores: tuple[GroupScores, ...],
        metrics: dict[MetricName, float] | None = None,
        privacy: Claim | None = None,
    ) -> Self:
        """What is remembered of the finished `update` that answers `request`."""
        return cls(
            run=request.run,
            round=request.round,
            plan=request.plan,
            update=update.digest,
            norm=update.norm,
            steps=steps,
            labels=labels,
            metrics=metrics or {},
            scores=scores,
            privacy=privacy,
        )


@dataclass(frozen=True, slots=True)
class Jobs:
    """`vault/jobs/`: `rounds.json` and one directory a request.

    It holds `update.safetensors` and `update.json`; before that `base` and what `rin.client.training` keeps on the way.
    """

    home: Home

    @property
    def _rounds(self) -> Path:
        return self.home.jobs / "rounds.json"

    def folder(self, request: Request) -> Path:
        return self.home.jobs / request.id

    def base(self, request: Request) -> Path:
        """The trainer's own copy of the global weights."""
        return self.folder(request) / "base"

    def update(self, request: Request) -> Path:
        return self.folder(request) / "update.safetensors"

    def admit(self, request: Request, *, max_rounds: int, trains: bool = True) -> None:
        """Note that `request` is going to be trained; durable before training begins (threat T9).

        Args:
            max_rounds: of one plan, over all its runs.
            trains: False for a round that only measures, and so counts for nothing.

        Raises:
            RefusedError: round-old, base-conflict, or policy beyond `max_rounds`.
        """
        table: dict[str, Any] = read_json(self._rounds) if self._rounds.exists() else {}
        runs: dict[str, Any] = table.setdefault(request.plan, {})
        row = runs.get(request.run, {"round": 0, "base": "", "trained": 0})
        if request.round < row["round"]:
            raise RefusedError(
                "round-old", f"round {row['round']} was already asked for, round {request.round} is past"
            )
        if request.round == row["round"]:
            if request.base != row["base"]:
                raise RefusedError("base-conflict")
            return
        if trains and sum(run["trained"] for run in runs.values()) >= max_rounds:
            raise RefusedError("policy", f"policy.max-rounds: this plan was trained {max_rounds} times here")
        runs[request.run] = {"round": request.round, "base": request.base, "trained": row["trained"] + trains}
        write_json(self._rounds, table, mode=0o600)

    def stored(self, request: Request) -> Stored | None:
        """The finished update of `request`, if its file is whole."""
        try:
            facts = Stored.model_validate_json((self.folder(request) / "update.json").read_bytes())
            return facts if file_digest(self.update(request)) == facts.update else None
        except (OSError, ValueError):  # missing or torn: trained again
            return None

    def store(self, request: Request, facts: Stored) -> None:
        """Remember the finished update; its file is in place; what only training needed goes."""
        write_json(self.folder(request) / "update.json", facts.model_dump(mode="json"), mode=0o600)
        for path in self.folder(request).iterdir():
            if not path.name.startswith("update."):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def prune(self, request: Request) -> None:
        """Delete what belongs neither to `request`'s round nor to the round before it, in vault and outbox."""
        keep = {request.id}
        for path in self.home.jobs.glob("*/update.json"):
            with contextlib.suppress(OSError, ValidationError):
                facts = Stored.model_validate_json(path.read_bytes())
                recent = request.round - facts.round < KEPT_ROUNDS
                if (facts.run, facts.plan) == (request.run, request.plan) and recent:
                    keep.add(path.parent.name)
        for path in self.home.jobs.iterdir():
            if path.is_dir() and path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.home.outbox.iterdir():
            if path.name.partition(".")[0] not in keep:
                path.unlink(missing_ok=True)


def take_in(
    inbox: Path, name: str, target: Path, layout: Layout, *, between: Callable[[], None] = lambda: None
) -> None:
    """Copy the weight file `name` of `inbox` to `target`, checking it on the way (threat T16).

    The bytes that are checked are the bytes that are written: whoever owns the inbox may change its file afterwards.

    Args:
        name: hex SHA-256 that the tensor bytes must have.
        between: called between two blocks; what it raises ends the copying.

    Raises:
        RefusedError: bad-weights.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    header, sha = layout.header(), hashlib.sha256()
    with os.fdopen(_open_plain(inbox, name), "rb") as source, target.open("wb") as copy:
        if os.fstat(source.fileno()).st_size != layout.file_bytes or source.read(len(header)) != header:
            raise RefusedError("bad-weights", "the global weights are not in the plan's layout")
        copy.write(header)
        left = layout.data_bytes
        while left and (block := source.read(min(BLOCK, left))):
            between()
            sha.update(block)
            copy.write(block)
            left -= len(block)
    if left or sha.hexdigest() != name:
        raise RefusedError("bad-weights", "the global weights do not have the digest that the request names")


def _open_plain(folder: Path, name: str) -> int:
    """Open `name` in `folder` for reading: a regular file of one name, reached through no link."""
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError:
        raise RefusedError("bad-weights", "the global weights are not in the inbox as a plain file") from None
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
        os.close(fd)
        raise RefusedError("bad-weights", "the global weights are not a file of their own")
    return fd


def put_out(source: Path, outbox: Path, name: str, digest: str) -> None:
    """Publish a copy of `source` as `name` in `outbox`, mode 0440; a whole one that is there already is left.

    Args:
        digest: hex SHA-256 of the tensor bytes of `source`.
    """
    target = outbox / name
    with contextlib.suppress(OSError, ValueError):
        if not target.is_symlink() and file_digest(target) == digest:
            return
    target.unlink(missing_ok=True)
    fd, part = tempfile.mkstemp(dir=outbox, prefix=f".{name}.", suffix=".part")
    with os.fdopen(fd, "wb") as copy, source.open("rb") as file:
        shutil.copyfileobj(file, copy, BLOCK)
        copy.flush()
        os.fsync(copy.fileno())
    if not publish(Path(part), target, mode=0o440):
        raise StateError("another process writes into the outbox", step="stop it: only the trainer writes there")
