"""Where everything of a site lies: one directory, three parts with their own owners, keys apart from the data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Home:
    """The paths below one site directory.

    `vault/` belongs to the trainer (patient data, keys, policy), `net/` to the agent (Flower's files), `air/` lies
    between them. The pseudonym key is in `vault/keys/`, apart from catalog and cache, so that a copy of the data
    alone cannot be undone (threat T14).
    """

    root: Path

    @property
    def site_toml(self) -> Path:
        return self.root / "vault" / "site.toml"

    @property
    def keys(self) -> Path:
        """0700: `pseudonym.key`, `signing.key`, `ledger.anchor`."""
        return self.root / "vault" / "keys"

    @property
    def pseudonym_key(self) -> Path:
        """32 random bytes, 0600; without it nobody can tell whom a pseudonym stands for."""
        return self.keys / "pseudonym.key"

    @property
    def ledger(self) -> Path:
        """Every debit of the patients' privacy, 0600, append-only, a hash chain (`rin.common.ledger`)."""
        return self.root / "vault" / "ledger.jsonl"

    @property
    def ledger_anchor(self) -> Path:
        """Number and hash of the ledger's last entry, apart from it."""
        return self.keys / "ledger.anchor"

    @property
    def catalog(self) -> Path:
        return self.root / "vault" / "catalog.sqlite"

    @property
    def cache(self) -> Path:
        """uint8 shards; images of patients."""
        return self.root / "vault" / "cache"

    @property
    def cache_lock(self) -> Path:
        """Shared by whoever reads the cache; nothing is erased there meanwhile."""
        return self.root / "vault" / "cache.lock"

    @property
    def jobs(self) -> Path:
        """Per request: the trainer's checkpoints and its finished, stored updates."""
        return self.root / "vault" / "jobs"

    @property
    def alone(self) -> Path:
        """Per private training alone: the snapshot of its round.

        It is not with that training's checkpoints: a copy of theirs would go on a second time inside one debit.
        """
        return self.root / "vault" / "alone"

    @property
    def norms(self) -> Path:
        """Per run: the site's own norm layers, where the plan says local-norms."""
        return self.root / "vault" / "norms"

    @property
    def accepted(self) -> Path:
        """Plans that a person accepted: `<digest>.toml` and `<digest>.json` (who, when)."""
        return self.root / "vault" / "accepted"

    @property
    def budget(self) -> Path:
        """What the ledger had come to after the last debit, for people; nothing is decided by it."""
        return self.root / "vault" / "budget.json"

    @property
    def vault_log(self) -> Path:
        return self.root / "vault" / "log"

    @property
    def egress_log(self) -> Path:
        return self.root / "vault" / "egress.jsonl"

    @property
    def net(self) -> Path:
        """`node.key`, `ca.crt`, `coordinator.json`, Flower's home, logs; nothing of a patient."""
        return self.root / "net"

    @property
    def inbox(self) -> Path:
        """Global weights on their way in, named by digest."""
        return self.root / "air" / "inbox"

    @property
    def outbox(self) -> Path:
        """Finished updates on their way out, named by request; read-only for the agent."""
        return self.root / "air" / "outbox"


def default_root() -> Path:
    """`RIN_HOME`, else `~/.rin`."""
    return Path(os.environ.get("RIN_HOME") or Path.home() / ".rin")
