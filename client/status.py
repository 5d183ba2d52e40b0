"""What `rin-client status` shows: read from the files of a home, whether anything runs or not."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from rin.client.home import Home
from rin.client.ingest.catalog import undamaged
from rin.client.ingest.gone import NEXT
from rin.client.ingest.report import PATIENTS_UNKNOWN, PATIENTS_WARNING
from rin.client.ledger import site_ledger
from rin.client.site import Policy, read_site
from rin.common.errors import ConfigError, StateError
from rin.common.files import lock, read_json
from rin.common.statement import RISK

# Images that the last ingest which came to its end found no file of.
_GONE: Final = (
    "images JOIN files USING (path_key) WHERE seen < (SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'finished')"
)


def status(home: Home) -> dict[str, Any]:
    """Agent, coordinator, trainer, airlock, protection, budget, catalog.

    None stands for what is not known, or not readable for this user.

    Raises:
        StateError: there is no such home.
    """
    if not home.root.is_dir():
        raise StateError(f"{home.root} is no site directory", step="check --home, or run `rin-client join INVITE`")
    place, agent = _facts(home.net / "coordinator.json"), _facts(home.net / "agent.json")
    running = _held(home.net / "agent.lock")
    trainer = _facts(home.root / "vault" / "status.json")
    if not _held(home.jobs / "trainer.lock"):
        trainer = {key: value for key, value in trainer.items() if key in ("round", "time", "code")}
        trainer["state"] = "stopped"
    catalog = _catalog(home.catalog)
    known = catalog.pop("site")  # of a home that never joined: the name that it was ingested under
    return {
        "site": place.get("site") or known,
        "agent": "running" if running else "stopped",
        "coordinator": {
            "address": place.get("address"),
            "connected": bool(running and agent.get("connected")),
            "state": agent.get("coordinator") if running else None,
            "last_contact": agent.get("last_contact"),
        },
        "trainer": trainer,
        "airlock": _airlock(home, agent),
        "protection": _protection(home),
        "budget": _budget(home),
        "catalog": catalog,
    }


def _airlock(home: Home, agent: dict[str, Any]) -> str | None:
    """Whether the kernel held both halves apart when they were last started."""
    halves = (agent.get("files_hidden"), _facts(home.vault_log / "airlock.json").get("trainer"))
    if None in halves:
        return None
    return "enforced" if all(halves) else "by convention"


def _protection(home: Home) -> str | None:
    """What the site's policy says of the protection of its patients, in words."""
    policy = _policy(home)
    if policy is None:
        return None
    if policy.privacy == "required":
        return "required: plans without differential privacy for each patient are refused"
    agreed = f"{policy.none_agreed_by} agreed on {policy.none_agreed_on}"
    return f"not required, as {agreed}: under a plan without differential privacy {RISK}"


def _policy(home: Home) -> Policy | None:
    try:
        return read_site(home).policy
    except (ConfigError, OSError):
        return None


def _budget(home: Home) -> dict[str, Any] | None:
    """What the last private round wrote down, held against ledger and site.toml as they are now.

    The accountant takes seconds to import: epsilon is not computed anew here, but said to be of an earlier entry.
    """
    try:
        if not any(path.exists() for path in (home.budget, home.ledger, home.ledger_anchor)):
            return None
        now = site_ledger(home).head.count
    except StateError as error:
        return {"fault": error.message, "next": error.step, "stale": True}
    except OSError:
        return None
    shown, policy = _facts(home.budget), _policy(home)
    if not shown and not now:
        return None
    stale = shown.get("entries") != now
    notes = list(_notes(shown, now, policy))
    facts = {key: shown.get(key) for key in ("epsilon", "delta", "entries")}
    facts |= {"ledger_entries": now, "ceiling": policy and policy.epsilon, "stale": stale}
    if not stale:
        facts["statement"] = shown.get("statement")
        if policy and (policy.epsilon, policy.delta) == (shown.get("ceiling"), shown.get("delta")):
            facts["rounds_left"] = shown.get("rounds_left")
    return facts | ({"warning": "; ".join(notes), "next": "run `rin-client ledger show`"} if notes else {})


def _notes(shown: dict[str, Any], now: int, policy: Policy | None) -> Iterator[str]:
    """Why what is shown is not what holds now."""
    if not shown:
        yield f"epsilon is not known here; entries in the ledger: {now}"
    elif shown.get("entries") != now:
        yield f"epsilon is that of entry {shown.get('entries')}, and {now} are in the ledger now"
    if policy is None:
        yield "site.toml is missing or wrong, so the ceiling is not known"
    elif shown and shown.get("delta") != policy.delta:
        yield f"epsilon is at delta {shown.get('delta')}, site.toml says {policy.delta:g} now"


def _held(path: Path) -> bool:
    """Whether a living process holds the lock at `path`."""
    if not os.access(path, os.R_OK | os.W_OK):
        return False
    try:
        with lock(path, holder="rin-client"):
            return False
    except StateError:
        return True


def _facts(path: Path) -> dict[str, Any]:
    with contextlib.suppress(StateError, OSError):
        return read_json(path)
    return {}


def _catalog(path: Path) -> dict[str, int | str | None]:
    """Site, images, patients and files without an image; never a row. With it what a person must know or do."""
    queries = {
        "site": "SELECT (SELECT value FROM meta WHERE key = 'site')",
        "images": "SELECT count(*) FROM images",
        "patients": "SELECT count(DISTINCT patient) FROM images",
        "files_refused": "SELECT count(*) FROM files WHERE reason NOT NULL",
        "images_gone": f"SELECT count(*) FROM {_GONE}",
        "images_to_erase": "SELECT count(*) FROM erased",
        "patients_gone": f"SELECT count(DISTINCT patient) FROM {_GONE}",
    }
    warning: dict[str, str] = {}
    try:
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with undamaged(path), contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            if db.execute("SELECT 1 FROM meta WHERE key = 'patients' AND value = ?", (PATIENTS_UNKNOWN,)).fetchone():
                warning = {"warning": PATIENTS_WARNING}
                queries |= dict.fromkeys(("patients", "patients_gone"), f"SELECT '{PATIENTS_UNKNOWN}'")
            counts = {name: db.execute(query).fetchone()[0] for name, query in queries.items()}
            return counts | warning | ({"next": f"images without a file: {NEXT}"} if counts["images_gone"] else {})
    except StateError as error:
        return dict.fromkeys(queries) | {"fault": error.message, "next": error.step}
    except (sqlite3.Error, OSError):
        return dict.fromkeys(queries)
