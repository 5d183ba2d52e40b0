"""Fuzzed plans at a real trainer: it trains and debits what its site's policy allows, and else leaves all as it was."""

from __future__ import annotations

import itertools
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from rin.client.ledger import site_ledger
from rin.client.private import rows_of
from rin.client.site import Site, read_site
from rin.client.trainer import Trainer
from rin.common import backbones, keys, weights
from rin.common.accountant import epsilon
from rin.common.errors import CODES, RefusedError
from rin.common.files import read_json
from rin.common.ledger import Debit, debits
from rin.common.plan import Plan, plan_digest
from rin.common.wire import Manifest, Request, from_bytes
from tests.client import fuzzed_plans
from tests.client.test_policy_fuzz import opened, within
from tests.private_consortium import POLICY, consortium
from tests.simulator import RUN_ID, Consortium, quicken

POLICIES: Final = {  # of each site of a small consortium
    "siteA": POLICY.replace("epsilon = 50.0", "epsilon = 4.0") + 'plans = "any"\nmax-steps = 12\nmax-rounds = 100\n',
    "siteB": POLICY + 'plans = "any"\nmin-sigma = 1.0\nmax-clip = 1.0\n',
    "siteC": 'privacy = "none"\nnone-agreed-by = "A"\nnone-agreed-on = "2026-11-23"\nplans = "any"\n',
}


def small_plans(rng: random.Random) -> Iterator[tuple[bytes, Plan | str]]:
    """Fuzzed plans, no two alike, and what was read; the network, if there is one, is the tiny one of the tests."""
    seen = set[bytes]()
    while True:
        data = fuzzed_plans.plan(rng)
        plan = opened(data)
        if isinstance(plan, str):
            if rng.random() < 0.9:
                continue
        else:
            small = plan.training.local_steps <= 13 and plan.training.batch_size <= 17 and plan.privacy.views == 1
            small &= plan.model.image_size <= 64 and plan.model.backbone == "resnet18" and not plan.model.start
            if not small or data in seen:
                continue
        seen.add(data)
        yield data, plan


class Fuzzed:
    """One trainer, and what its home looks like before and after a request."""

    def __init__(self, made: Consortium, name: str) -> None:
        self.home, self.name = made.homes[name], name
        text = self.home.site_toml.read_text()
        self.home.site_toml.write_text(text[: text.index("[policy]")] + "[policy]\n" + POLICIES[name])
        self.trainer, self.ledger = Trainer(self.home), site_ledger(self.home)
        self.home.inbox.mkdir(parents=True, exist_ok=True)
        self.n_patients = 60

    def seen(self) -> tuple[Any, ...]:
        """What training would change."""
        outbox, jobs = sorted(self.home.outbox.iterdir()), sorted(self.home.jobs.rglob("*"))
        rounds = self.home.jobs / "rounds.json"
        return outbox, jobs, rounds.read_bytes() if rounds.exists() else b"", self.ledger.entries()

    def train(self, data: bytes, base: str) -> str:
        """The code of the answer, "" for an update, after all that must hold has been looked at."""
        facts = {"run": RUN_ID, "round": 1, "site": self.name, "plan": plan_digest(data), "base": base}
        request, before = Request.model_validate({**facts, "deadline_s": 60.0}), self.seen()
        site, plan, code = read_site(self.home), opened(data), ""
        try:
            self.trainer.train(request, data, lambda progress: None, lambda: "")
        except RefusedError as error:
            code = error.code
        assert code in CODES or not code
        assert code != "internal"
        may = isinstance(plan, Plan) and within(plan, request.plan, site, frozenset(), self.n_patients)
        debited = debits(self.ledger.entries())[len(debits(before[3])) :]
        if not may:
            assert code and self.seen() == before
            return code
        assert isinstance(plan, Plan)
        assert code in ("", "budget", "not-finite")
        if plan.privacy.mode == "none" or code == "budget":
            assert debited == []
        else:
            self.paid(plan, site, debited, request)
        if plan.privacy.mode == "patient" and not code:
            self.claimed(site, request)
        return code

    def paid(self, plan: Plan, site: Site, debited: list[Debit], request: Request) -> None:
        """The debit of a private round says what its plan and site say."""
        (debit,) = debited
        private, declared = plan.privacy, site.policy.patients or 0
        assert (debit.sigma, debit.clip, debit.images) == (private.sigma, private.clip, private.images)
        assert (debit.rate, debit.patients) == (private.patients / declared, declared)
        assert (debit.steps, debit.delta) == (plan.training.local_steps, site.policy.delta)
        assert (debit.plan, debit.request) == (request.plan, request.id)

    def claimed(self, site: Site, request: Request) -> None:
        """No figure leaves with a private update, and what it claims is below the ceiling."""
        paper = keys.decode(read_json(self.home.outbox / f"{request.id}.json")["manifest"])
        assert paper is not None
        manifest = from_bytes(Manifest, paper)
        assert manifest.metrics == {} and manifest.scores == () and manifest.privacy is not None
        assert manifest.privacy.epsilon <= site.policy.epsilon


def test_fuzzed_plans_at_a_trainer_train_and_debit_only_what_the_site_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicken(monkeypatch)
    made, rng, bases = consortium(tmp_path), random.Random(300), dict[str, str]()
    for kind in ("batch", "group"):
        network = backbones.initial(made.plan.model.model_copy(update={"norm": kind}), 1)
        bases[kind] = weights.save(tmp_path / kind, network, weights.layout_of(network))
    sites, answers = [Fuzzed(made, name) for name in POLICIES], Counter[str]()
    for here, kind in itertools.product(sites, bases):
        shutil.copyfile(tmp_path / kind, here.home.inbox / bases[kind])
    for data, plan in itertools.islice(small_plans(rng), 200):
        here = rng.choice(sites)
        kind = "batch" if isinstance(plan, str) else plan.model.norm
        mode = "" if isinstance(plan, str) else plan.privacy.mode
        answers[f"{mode} {here.train(data, bases[kind]) or 'trained'}".strip()] += 1
    print(dict(answers))
    assert min(answers[f"{mode} trained"] for mode in ("patient", "none")) > 5
    assert min(answers["patient budget"], answers["patient policy"], answers["none policy"]) > 3
    for here in sites:
        own = read_site(here.home).policy
        assert epsilon(rows_of(here.ledger.entries()), own.delta) <= own.epsilon
