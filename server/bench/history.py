"""What a run directory tells the report: the plan in a few words, and every closed round with its sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rin.common.plan import plan_digest, read_plan
from rin.server.bench.summary import RoundFacts, SiteRound
from rin.server.record import Record, read_record
from rin.server.rundir import RunDir


def run_facts(run: RunDir) -> dict[str, Any]:
    """Name, digest and the decisive entries of the run's plan.

    Raises:
        ConfigError: there is no plan, so this is no run directory.
    """
    plan, data = read_plan(run.plan)
    return {
        "name": plan.name,
        "plan": plan_digest(data),
        "sites": sorted(plan.sites),
        "rounds": plan.training.rounds,
        "strategy": plan.strategy.name,
        "privacy": plan.privacy.mode,
    }


def rounds_of(run: RunDir) -> tuple[RoundFacts, ...]:
    """The closed rounds, in order."""
    numbers = sorted(int(path.parent.name) for path in run.round(1).parent.glob("[0-9]*/round.json"))
    records = [record for number in numbers if (record := read_record(run, number)) and record.state == "closed"]
    return tuple(_facts(record) for record in records)


def _facts(record: Record) -> RoundFacts:
    sites = tuple(SiteRound(site, shares(counted.metrics)) for site, counted in sorted(record.receipts.items()))
    failures = Counter((failure.site, failure.code) for failure in record.failures)
    return RoundFacts(
        record.round,
        record.seconds,
        sites,
        tuple((site, code, n) for (site, code), n in sorted(failures.items())),
        record.validation,
    )


def shares(metrics: Mapping[Any, float]) -> dict[str, float]:
    """Metrics for people: the counts top1 and top5 as shares of the images; without `images` they are left out."""
    images = metrics.get("images", 0)
    found = {name: value for name, value in metrics.items() if name not in ("top1", "top5")}
    if images > 0:
        found |= {name: metrics[name] / images for name in ("top1", "top5") if name in metrics}
    return found
