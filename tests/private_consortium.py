"""The consortium of `tests.simulator` with a private plan: sites that declare their patients and have a ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rin.client.ingest.pseudonyms import site_pseudonyms
from rin.client.ledger import site_ledger
from rin.common.plan import plan_digest
from rin.common.wire import Request
from rin.server import checkpoints, tickets
from rin.server.carrier import FileCarrier
from tests.simulator import RUN_ID, Consortium, Images, make, plan_text, stripes

SITES = ("siteA", "siteB", "siteC")
ROWS = (0, 1, 2, 3)
PRIVACY = {"mode": "patient", "sigma": 1.0, "clip": 1.0, "patients": 6, "images": 2}
POLICY = 'privacy = "required"\npatients = 60\nmin-patients = 20\nepsilon = 50.0\ndelta = 1e-3\nmax-rate = 0.5\n'


def private_plan(**tables: dict[str, Any]) -> bytes:
    given = {
        "model": {"norm": "group"},
        "training": {"rounds": 2, "local_steps": 5},
        "privacy": {**PRIVACY, "delta": 1e-2},
    }
    for name, table in tables.items():
        given[name] = {**given.get(name, {}), **table}
    return plan_text(SITES, **given).replace(b"[sites]", b"metrics = []\n[sites]", 1)


def consortium(root: Path, *, policy: str = POLICY, n: int = 120, **tables: dict[str, Any]) -> Consortium:
    images: dict[str, list[Images]] = {site: [stripes(ROWS, n, seed)] for seed, site in enumerate(SITES)}
    made = make(root, images, dict.fromkeys(SITES, ROWS), private_plan(**tables))
    for home in made.homes.values():
        text = home.site_toml.read_text()
        home.site_toml.write_text(text[: text.index("[policy]")] + "[policy]\n" + policy)
        site_pseudonyms(home.pseudonym_key, create=True)
        site_ledger(home).create()
    return made


def request_of(made: Consortium, site: str = "siteA", **changes: Any) -> Request:
    """A first request, with the global weights in the site's inbox."""
    digest = plan_digest(made.run.plan.read_bytes())
    checkpoints.begin(made.run, made.plan, digest)
    base = checkpoints.digest_of(made.run, 0)
    ticket = tickets.issue(made.run, 1, site, plan=digest, base=base)
    home = made.homes[site]
    home.inbox.mkdir(parents=True, exist_ok=True)
    FileCarrier(made.run).fetch(base, ticket, home.inbox / base)
    facts = {"run": RUN_ID, "round": 1, "site": site, "plan": digest, "base": base, "deadline_s": 60.0}
    return Request.model_validate(facts | changes)
