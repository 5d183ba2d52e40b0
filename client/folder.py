"""The folder of a training alone: what is in it, whose it is, and whether it can be gone on with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rin.client.parallel import MADE
from rin.common.errors import RefusedError, StateError
from rin.common.files import make_dir, read_json

LOCK: Final = "train.lock"
ELSEWHERE: Final = "choose a new or an empty folder for --out"
# By what a coordinator's run directory is known, even if a training was begun in it.
RUN: Final = frozenset({"run.json", "members.json", "coordinator.lock", "rounds"})
# What is there before `train.json`, which is written last, if the first start was cut short.
BEGUN: Final = re.compile(r"train\.lock|plan\.toml|checkpoints|\.(plan\.toml|train\.json)\.\w+\.part")
FIRST: Final = re.compile(r"round-0000\.safetensors|\.round-0000\.safetensors\.\w+\.part")
CHECKPOINT: Final = re.compile(r"round-(\d{4,})\.safetensors")
PART: Final = re.compile(r"\.round-\d{4,}\.safetensors\.\w+\.part")
ROUND: Final = re.compile(rf"({MADE})|\.({MADE}|trained\.json)\.\w+\.part")
SAID: Final = frozenset({"plan", "site", "labels", "weights"})  # what train.json says at the least


@dataclass(frozen=True, slots=True)
class Folder:
    """What `train` writes: `plan.toml`, `train.json`, `checkpoints/`, `figures.jsonl`, and `work/` while it trains."""

    root: Path

    @property
    def facts(self) -> Path:
        """Which training this is: digests of the plan and of the first weights, site, labels, whether it holds out.

        Of a private plan also the run, 32 hex digits, which its debits name.
        """
        return self.root / "train.json"

    @property
    def figures(self) -> Path:
        """One JSON line a round."""
        return self.root / "figures.jsonl"

    @property
    def work(self) -> Path:
        return self.root / "work"

    def checkpoint(self, round: int) -> Path:
        """The weights after `round`; 0 is the start."""
        return self.root / "checkpoints" / f"round-{round:04d}.safetensors"

    def take(self) -> None:
        """Make the folder, for its owner alone, or see that it is one of a training; nothing in it is touched.

        Raises:
            StateError: it holds anything else, or cannot be made.
        """
        try:
            names = {path.name for path in self.root.iterdir()}
        except FileNotFoundError:
            names = set[str]()
        except OSError as error:
            raise StateError(f"{self.root} cannot be used: {error.strerror}", step=ELSEWHERE) from None
        if names & RUN:
            raise StateError(f"{self.root} is the run directory of a coordinator", step=ELSEWHERE)
        if self.facts.name in names:
            self.said()
            return
        if names and not self._cut_short(names):
            raise StateError(f"{self.root} holds files that are not of a training", step=ELSEWHERE)
        make_dir(self.root, private=True)

    def _cut_short(self, names: set[str]) -> bool:
        """Whether all that is there is what a first start leaves that was stopped; its lock comes first."""
        lock, checkpoints = self.root / LOCK, self.root / "checkpoints"
        if not lock.is_file() or lock.stat().st_size or not all(BEGUN.fullmatch(name) for name in names):
            return False
        return not checkpoints.exists() or all(FIRST.fullmatch(path.name) for path in checkpoints.iterdir())

    def said(self) -> dict[str, Any]:
        """What `train.json` says.

        Raises:
            StateError: it is missing, damaged, or somebody else's.
        """
        value = read_json(self.facts)
        if not isinstance(value, dict) or not value.keys() >= SAID:
            raise StateError(
                f"{self.facts} is not what a training wrote", step=f"restore it from a backup, or {ELSEWHERE}"
            )
        return value

    def agree(self, wanted: Mapping[str, Any]) -> None:
        """See that the folder is of the training that `wanted` tells; older folders do not say everything.

        Raises:
            StateError: it is of another one.
        """
        found = self.said()
        different = [key for key, value in wanted.items() if found.get(key, value) != value]
        if different:
            raise StateError(
                f"{self.root} holds a training of another {' and '.join(different)}",
                step="choose another --out, or go back to what it was begun with",
            )

    def last(self) -> int:
        """The newest round that is finished."""
        return max(self._rounds(), default=0)

    def _rounds(self) -> list[int]:
        found = (CHECKPOINT.fullmatch(path.name) for path in self.root.glob("checkpoints/round-*"))
        return [int(match[1]) for match in found if match]

    def verify(self, round: int, plan: str, *, again: str) -> None:
        """See that the checkpoint of `round` is whole and of the plan with the digest `plan`.

        Args:
            again: at what price a round can be trained again from the one before; empty where it cannot.

        Raises:
            StateError: it is not.
        """
        from rin.common.layout import file_digest
        from rin.common.weights import read_facts

        path = self.checkpoint(round)
        try:
            facts = read_facts(path)
            good = (facts.get("plan"), facts.get("round")) == (plan, round) and facts.get("weights") == file_digest(
                path
            )
        except RefusedError:
            good = False
        if good:
            return
        step = "restore it from a backup, or begin again in another --out"
        if round and again:
            step = f"delete it: the same command trains round {round} again, {again}"
        raise StateError(f"{path} is damaged, or not of this training", step=step)

    def lines(self) -> dict[int, str]:
        """The lines of `figures.jsonl` by round.

        Raises:
            StateError: it is damaged.
        """
        if not self.figures.exists():
            return {}
        try:
            return {json.loads(line)["round"]: line for line in self.figures.read_text("utf-8").splitlines()}
        except (ValueError, LookupError, TypeError):
            raise StateError(
                f"{self.figures} is damaged",
                step="restore it from a backup, or delete it to go on without the figures of earlier rounds",
            ) from None

    def tidy(self, keep: int) -> None:
        """Delete what only the newest round's training needed, and checkpoints but the start and the newest `keep + 1`.

        Nothing goes that training has not made.
        """
        for path in self.work.iterdir() if self.work.is_dir() else ():
            if ROUND.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.root.glob("checkpoints/.round-*"):
            if PART.fullmatch(path.name):
                path.unlink()
        newest = self.last()
        for round in self._rounds():
            if 0 < round < newest - keep:
                self.checkpoint(round).unlink()
