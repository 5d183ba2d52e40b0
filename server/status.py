"""What `rin-server status` shows: read from the run directory, whether a coordinator runs or not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from rin.common import keys
from rin.common.errors import CODES, StateError
from rin.common.events import read_events
from rin.common.files import lock, read_json
from rin.common.plan import plan_digest, read_plan
from rin.server.members import members
from rin.server.record import Record, last_record, read_record
from rin.server.rundir import RunDir
from rin.server.validation import COLUMNS, Validation, table

_JSON: Final = TypeAdapter(Validation)


def status(run: RunDir) -> dict[str, Any]:
    """Plan, coordinator, sites and rounds of `run` as JSON.

    Raises:
        StateError: no run directory, or a damaged one.
        ConfigError: the plan is wrong.
    """
    facts = read_json(run.facts)
    plan, data = read_plan(run.plan)
    last = last_record(run)
    records = [r for n in range(1, last.round + 1) if (r := read_record(run, n))] if last else []
    admitted, online = members(run), _online(run)
    return {
        "plan": {"name": plan.name, "digest": plan_digest(data), "rounds": plan.training.rounds},
        "coordinator": {
            "address": facts["address"],
            "state": "running" if _running(run) else "stopped",
            "certificate_days": keys.days_left((run.ca / "server.crt").read_bytes()),
        },
        "sites": {
            site: {
                "admitted": site in admitted,
                "online": online.get(site, False) and _running(run),
                "updates": sum(site in record.receipts for record in records),
                "refused": dict(Counter(f.code for record in records for f in record.failures if f.site == site)),
                "why": _why(records, site),
            }
            for site in sorted({*plan.sites, *admitted})
        },
        "rounds": [_row(record) for record in records],
        "validation": _validation(records),
    }


def _why(records: Sequence[Record], site: str) -> str:
    """Why the newest round has no update of `site`, in words; empty where it has one, or nobody knows."""
    if not records or site in records[-1].receipts:
        return ""
    codes = [failure.code for failure in records[-1].failures if failure.site == site]
    return CODES.get(codes[-1], codes[-1]) if codes else ""


def _validation(records: Sequence[Record]) -> dict[str, Any] | None:
    """The newest figures on held-out patients, and the number of the checkpoint that they are of."""
    found = [(record.round, record.validation) for record in records if record.validation is not None]
    if not found:
        return None
    number, validation = found[-1]
    return {
        "checkpoint": number - 1,
        "figures": json.loads(_JSON.dump_json(validation)),
        "table": [list(row) for row in table(validation)],
    }


def _row(record: Record) -> dict[str, Any]:
    return {
        "round": record.round,
        "state": record.state,
        "seconds": round(record.seconds, 1),
        "counted": sorted(record.receipts),
        "missing": sorted(set(record.cohort) - set(record.receipts)),
        "reason": record.reason,
    }


def _running(run: RunDir) -> bool:
    """Whether a living coordinator holds the run's lock."""
    try:
        with lock(run.lock, holder="rin-server run"):
            return False
    except StateError:
        return True


def _online(run: RunDir) -> dict[str, bool]:
    """The last word of the events about each site."""
    events, _ = read_events(run.log / "events.jsonl")
    words = {"site-online": True, "site-away": False}
    return {event.fields["site"]: words[event.kind] for event in events if event.kind in words}


def print_status(facts: dict[str, Any], *, rounds: int = 10) -> None:
    """`facts` of `status` for a person; the last `rounds` rounds."""
    console = Console(markup=False, highlight=False)
    plan, coordinator = facts["plan"], facts["coordinator"]
    closed = min(plan["rounds"], sum(row["state"] == "closed" for row in facts["rounds"]))
    console.print(f"{plan['name']}: {closed} of {plan['rounds']} rounds closed; plan {plan['digest'][:16]}")
    console.print(
        f"coordinator {coordinator['state']} for {coordinator['address']}; "
        f"server certificate ends in {coordinator['certificate_days']} days"
    )
    sites = Table("site", "admitted", "online", "updates", "refused", box=None, pad_edge=False)
    for name, site in facts["sites"].items():
        refused = ", ".join(f"{code} {count}" for code, count in site["refused"].items())
        words = ("yes" if site[key] else "no" for key in ("admitted", "online"))
        sites.add_row(name, *words, str(site["updates"]), refused or "-")
    console.print(sites)
    for name, site in facts["sites"].items():
        if site["why"]:
            console.print(f"round {facts['rounds'][-1]['round']} without {name}: {site['why']}")
    rows = Table("round", "state", "seconds", "counted", "missing", "reason", box=None, pad_edge=False)
    for row in facts["rounds"][-rounds:]:
        lists = (", ".join(row[key]) or "-" for key in ("counted", "missing"))
        number = f"{row['round']}" if row["round"] <= plan["rounds"] else "closing"
        rows.add_row(number, row["state"], f"{row['seconds']:.0f}", *lists, row["reason"] or "-")
    console.print(rows)
    if facts["validation"]:
        console.print(f"held-out patients, checkpoint {facts['validation']['checkpoint']}:")
        figures = Table(*COLUMNS, box=None, pad_edge=False)
        for row in facts["validation"]["table"]:
            figures.add_row(*row)
        console.print(figures)
