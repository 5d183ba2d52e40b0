"""What a run directory tells the report: the plan in a few words, and every closed round with its sites."""

from __future__ import annotations

from typing import Any

from rin.common.files import read_json
from rin.common.plan import plan_digest, read_plan
from rin.server.bench.summary import RoundFacts, SiteRound
from rin.server.rundir import RunDir


def run_facts(run: RunDir) -> dict[str, Any]:
    """Name, digest and the decisive entries of the run's plan."""
    plan, data = read_plan(run.plan)
    return {
        "name": plan.name,
        "plan": plan_digest(data),
        "sites": dict(plan.sites),
        "rounds": plan.training.rounds,
        "strategy": plan.strategy.name,
        "privacy": plan.privacy.mode,
    }


def rounds_of(run: RunDir) -> tuple[RoundFacts, ...]:
    """The closed rounds, in order."""
    found = []
    for path in sorted((run.root / "rounds").glob("[0-9]*/round.json")):
        record = read_json(path)
        if record.get("state") == "closed":
            found.append(_round(int(path.parent.name), record))
    return tuple(found)


def _round(number: int, record: dict[str, Any]) -> RoundFacts:
    sites = tuple(
        SiteRound(site, dict(row.get("metrics", {})), str(row.get("code", "")))
        for site, row in sorted(record.get("sites", {}).items())
    )
    return RoundFacts(number, record.get("seconds"), sites)
