"""Where everything of a run lies: one directory, which is the truth on the coordinator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths below one run directory."""

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "plan.toml"

    @property
    def facts(self) -> Path:
        """`run.json`: {"run": 32 hex digits, "epoch": how often a coordinator has started here}."""
        return self.root / "run.json"

    @property
    def members(self) -> Path:
        """`members.json`: the truth about who may take part."""
        return self.root / "members.json"

    @property
    def ca(self) -> Path:
        """0700: `ca.crt`, `ca.key` (to be taken offline), `server.crt`, `server.key`."""
        return self.root / "ca"

    @property
    def invites(self) -> Path:
        return self.root / "invites"

    @property
    def layout(self) -> Path:
        """`layout.json`: `Layout.to_json()` of the plan's network."""
        return self.root / "layout.json"

    @property
    def start(self) -> Path:
        """The weights that the plan's `model.start` names, as a checkpoint; absent where a run starts at random."""
        return self.root / "start.safetensors"

    @property
    def weights(self) -> Path:
        """Global weights as sites fetch them: `<digest>.safetensors`, empty metadata."""
        return self.root / "weights"

    @property
    def checkpoints(self) -> Path:
        """Global weights as people use them: `round-NNNN.safetensors`, facts in the metadata; 0000 is the start."""
        return self.root / "checkpoints"

    @property
    def state(self) -> Path:
        """Flower's home, pid files, `nodes.json` (site to Flower node id), the strategy's state."""
        return self.root / "state"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def lock(self) -> Path:
        return self.root / "coordinator.lock"

    def round(self, number: int) -> Path:
        """The directory of round `number` (from 1): `round.json`, `tickets.json`, `receipts/`."""
        return self.root / "rounds" / f"{number:04d}"

    def receipts(self, number: int) -> Path:
        """`<site>.safetensors` and `<site>.json` (manifest, signature): together they are the receipt."""
        return self.round(number) / "receipts"

    def weights_file(self, digest: str) -> Path:
        return self.weights / f"{digest}.safetensors"

    def checkpoint(self, number: int) -> Path:
        return self.checkpoints / f"round-{number:04d}.safetensors"
