"""A hundred thousand plans that nobody should send: none makes a site train outside its policy."""

from __future__ import annotations

import math
import random
import time
import tomllib
from collections import Counter
from collections.abc import Set
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rin.client import policy
from rin.client.policy import MAX_PLAN, allowed_metrics, check, check_private, open_plan
from rin.client.private import mechanism_of, row_of
from rin.client.site import Site
from rin.common.errors import ConfigError, RefusedError
from rin.common.noise import Source
from rin.common.plan import Plan, parse_plan, plan_digest
from rin.common.private import Mechanism, PatientGradients
from tests.client import fuzzed_plans

SMALLEST_CLIP: Final = 1e-6  # far above where float32 loses the noise and keeps the gradient
NOBODY: Final[dict[str, Any]] = {"privacy": "none", "none-agreed-by": "A", "none-agreed-on": "2026-11-23"}


def site(name: str = "siteA", /, **policy: Any) -> Site:
    """A site with this policy; `processes` is of its device."""
    device = {"processes": policy.pop("processes", 1)}
    table = {key.replace("_", "-"): value for key, value in policy.items()}
    return Site.model_validate({"site": name, "device": device, "policy": table})


# Sites whose limits are the defaults, none at all, just at what the plans want, or what nobody would write.
OPEN: Final[dict[str, Any]] = {"plans": "any", "min_sites": 1, "max_rate": 1.0, "delta": 1e-3, "max_rounds": 10**6}
SITES: Final = (
    site(),
    site(plans="any"),
    site(patients=60, delta=1e-3, max_rate=0.1, min_sigma=1.0, max_clip=1.0, max_steps=12, max_rounds=10),
    site(**OPEN, patients=60, min_sigma=0.3, max_clip=1e4, max_steps=10**6, epsilon=1e6),
    site(**OPEN, patients=6, min_patients=1),
    site(**OPEN, patients=10**9, min_sigma=0.3, max_steps=10**7, epsilon=1e-300),
    site(**OPEN | {"delta": 5e-324}, patients=100, min_sigma=1e4, max_clip=5e-324, epsilon=1e308),
    site(**OPEN | {"delta": 9.9e-3}, patients=101),
    site(**OPEN | {"delta": 9.9e-3}, patients=102),
    site(**OPEN, patients=60, processes=2),
    site("siteD", **OPEN, patients=60),
    site(**OPEN),
    site(**OPEN, **NOBODY, patients=60, metrics=("loss", "images", "validation")),
    site(**OPEN, **NOBODY, min_steps=12, min_batch=16, min_patients=1),
    site(**OPEN, **NOBODY, min_steps=1, min_batch=1, min_patients=10**9),
    site(**NOBODY, patients=60, min_sites=3, metrics=("loss",)),
    site("SITEA", **OPEN, **NOBODY, patients=60),
)


def within(plan: Plan, digest: str, site: Site, accepted: Set[str], patients: int) -> bool:
    """What a site's policy promises to its privacy officer, one inequality a line; not by the tables of the product.

    Args:
        patients: in the site's catalog.
    """
    own, private = site.policy, plan.privacy.mode == "patient"
    holds = [
        own.plans == "any" or digest in accepted,
        own.privacy == "none" or private,
        site.site in plan.sites,
        own.min_sites <= plan.limits.min_sites <= plan.limits.quorum <= len(plan.sites),
        plan.training.rounds <= own.max_rounds,
    ]
    if private:
        return all(holds) and protected(plan, site) and (own.patients or 0) >= own.min_patients
    holds += [
        plan.training.local_steps >= own.min_steps,
        plan.training.batch_size >= own.min_batch,
        patients >= own.min_patients,
    ]
    return all(holds)


def protected(plan: Plan, site: Site) -> bool:
    """The same for what protects the patients in a private plan, wherever its weights go."""
    own, private, training = site.policy, plan.privacy, plan.training
    declared = own.patients or 0
    return all(
        [
            declared >= 1,
            0 < private.patients <= own.max_rate * declared,
            max(0.3, own.min_sigma) <= private.sigma < math.inf,
            SMALLEST_CLIP <= private.clip <= own.max_clip,
            1 <= training.local_steps <= own.max_steps,
            0 < own.delta <= private.delta < 1,
            own.delta * declared <= 1,
            site.device.processes == 1,
            plan.model.norm == "group" or plan.model.backbone == "swin_t",
            training.mixup == 0,
            training.sampling == "uniform",
            training.logit_adjustment == 0,
            plan.strategy.name != "fedprox",
            plan.metrics == (),
            plan.last_round == training.rounds,  # none that measures
        ]
    )


def see(plan: Plan, digest: str, site: Site, accepted: Set[str], patients: int) -> bool:
    """Whether the site trains the plan; it must be within its policy then, and what it does what both files declare."""
    admitted = not check(plan, digest, site, accepted, patients=patients)
    assert admitted == within(plan, digest, site, accepted, patients), (plan, site)
    if plan.privacy.mode == "patient":
        assert protected(plan, site) == (not check_private(plan, digest, site))
    if admitted and plan.privacy.mode == "patient":
        mechanism, row, private = mechanism_of(plan, site), row_of(plan, site), plan.privacy
        assert site.policy.patients is not None
        assert mechanism.rate == row.rate == private.patients / site.policy.patients
        assert 0 < row.rate <= 1
        assert (mechanism.sigma, mechanism.clip) == (private.sigma, private.clip) and mechanism.sigma == row.sigma
        assert (mechanism.patients, mechanism.images, mechanism.views) == (
            private.patients,
            private.images,
            private.views,
        )
        assert row.steps == plan.training.local_steps
        assert allowed_metrics(plan, site) == frozenset()
    return admitted


def opened(data: bytes) -> Plan | str:
    """The plan in `data`, or the code of its refusal; any other error is a fault."""
    try:
        return open_plan(data, plan_digest(data))
    except RefusedError as error:
        assert error.code in ("bad-request", "labels-mismatch")
        assert len(error.message) < 50 * 600
        return error.code


def said(data: bytes, plan: Plan) -> None:
    """What a person reads in the file is what the plan holds: no value was taken for another, nothing left out."""

    def same(read: Any, held: Any) -> bool:
        if isinstance(read, dict):
            return isinstance(held, dict) and all(key in held and same(each, held[key]) for key, each in read.items())
        if isinstance(read, list):
            return len(read) == len(held) and all(map(same, read, held))
        read = float(read) if isinstance(held, float) and not isinstance(read, bool) else read
        return read == held and type(read) is type(held)

    read = tomllib.loads(data.decode())
    assert read.pop("protocol") == 1  # it may say true
    assert same(read, plan.model_dump(by_alias=True, mode="json")), data


def fuzz(rng: random.Random, count: int) -> Counter[str]:
    """Ask some of `SITES` whether they train each of `count` plans, and look at all that must hold; what came out."""
    found = Counter[str]()
    for _ in range(count):
        data = fuzzed_plans.plan(rng)
        plan = opened(data)
        if isinstance(plan, str):
            found[plan] += 1
            continue
        said(data, plan)
        digest, found[plan.privacy.mode] = plan_digest(data), found[plan.privacy.mode] + 1
        for here in rng.sample(SITES, 4):
            accepted = rng.choice((frozenset(), frozenset({digest}), frozenset({"0" * 64})))
            admitted = see(plan, digest, here, accepted, rng.choice((0, 1, 19, 20, 1000)))
            found["trained " + plan.privacy.mode] += admitted
            found["asked"] += 1
    return found


def test_none_of_a_hundred_thousand_plans_is_trained_outside_a_sites_policy() -> None:
    began = time.process_time()
    found = fuzz(random.Random(100_000), 100_000)
    print(f"{time.process_time() - began:.0f} CPU-s: {dict(found)}")
    assert min(found["trained patient"], found["trained none"], found["labels-mismatch"]) > 500


@pytest.mark.parametrize(
    ("table", "at"), [(name, at) for name in ("RULES", "PRIVATE_RULES") for at in range(len(getattr(policy, name)))]
)
def test_a_rule_that_is_gone_is_missed(monkeypatch: pytest.MonkeyPatch, table: str, at: int) -> None:
    """Each rule of the product is needed, and the sites and plans here would tell."""
    rules = getattr(policy, table)
    monkeypatch.setattr(policy, table, rules[:at] + rules[at + 1 :])
    with pytest.raises((AssertionError, RefusedError)):
        fuzz(random.Random(at), 20_000)


Numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, min_value=5e-324, max_value=1e-2, exclude_max=True),
    st.sampled_from([1e-3, 1e-6]),
)


@settings(max_examples=300, deadline=None)
@given(
    private=st.fixed_dictionaries(
        {
            "mode": st.just("patient"),
            "sigma": st.floats(0.3, 1e4),
            "clip": st.floats(SMALLEST_CLIP, 1e4),
            "patients": st.integers(1, 10**7),
            "images": st.integers(1, 1000),
            "delta": Numbers,
        }
    ),
    steps=st.integers(1, 10**6),
    own=st.fixed_dictionaries(
        {
            "patients": st.integers(1, 10**9),
            "delta": Numbers,
            "min_sigma": st.floats(0.3, 1e4),
            "max_rate": st.floats(5e-324, 1),
            "max_clip": st.floats(SMALLEST_CLIP, 1e4),
            "max_steps": st.integers(1, 10**6),
        }
    ),
    at=st.sets(st.sampled_from(["sigma", "clip", "patients", "delta", "steps", "max-delta"])),
)
def test_any_figures_are_held_against_the_sites(
    private: dict[str, Any], steps: int, own: dict[str, Any], at: set[str]
) -> None:
    """With some of them exactly at the limit of the site."""
    for name, limit in (("sigma", own["min_sigma"]), ("clip", own["max_clip"]), ("delta", own["delta"])):
        private = private | ({name: limit} if name in at else {})
    if "patients" in at:
        private["patients"] = max(1, min(10**7, int(own["max_rate"] * own["patients"])))
    if "max-delta" in at and own["patients"] > 101:
        own["delta"] = 1 / own["patients"]
    text = {**fuzzed_plans.PRIVATE, "privacy": private}
    text["training"] = {**text["training"], "local-steps": own["max_steps"] if "steps" in at else steps}
    plan = parse_plan(fuzzed_plans.dumps(text).encode())
    see(plan, "d" * 64, site(plans="any", min_patients=1, **own), frozenset(), 0)


HOSTILE: Final = {
    "arrays": "x = " + "[" * 100_000 + "]" * 100_000,
    "tables": "x = " + "{a=" * 30_000 + "1" + "}" * 30_000,
    "a dotted key": "a." * 80_000 + "b = 1",
    "quoted keys": 'x."".' * 30_000 + "b = 1",
    "a dotted table": "[" + "a." * 80_000 + "b]",
    "a deep table of many keys": "[" + "a." * 900 + "b]\n" + "\n".join(f"b.k{n} = 1" for n in range(20_000)),
    "digits": "x = " + "9" * 200_000,
    "hexadecimal digits": "x = 0x" + "f" * 200_000,
    "unknown tables": "\n".join(f"[k{n}]" for n in range(25_000)),
    "a long name": "[" + "k" * 200_000 + "]",
    "a long text": 'x = "' + "k" * 200_000 + '"',
    "escapes": 'x = "' + "\\n" * 100_000 + '"',
    "a surrogate": 'x = "\\ud800"',
    "wrong values": "[bench]\ntasks = [" + "1," * 100_000 + "]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("first", [True, False])
def test_text_that_is_made_to_hurt_its_reader_is_refused_soon_and_in_few_words(text: str, first: bool) -> None:
    parts = [text, fuzzed_plans.dumps(fuzzed_plans.PLAN)]
    data, began = "\n".join(parts if first else parts[::-1]).encode(), time.process_time()
    assert len(data) < MAX_PLAN
    assert isinstance(opened(data), str)
    assert time.process_time() - began < 5


def test_a_plan_of_a_thousand_sites_is_none_of_them() -> None:
    sites = "sites = {" + ", ".join(f"site{n} = 1.0" for n in range(1000)) + "}\n"
    text = fuzzed_plans.dumps({key: each for key, each in fuzzed_plans.PLAN.items() if key != "sites"})
    assert len(parse_plan((sites + text).encode()).sites) == 1000


@pytest.mark.parametrize("clip", [5e-324, 1e-45, 1e-30, 9.99e-7, 0.0, -1.0])
def test_a_clip_below_what_float32_can_add_noise_to_is_in_no_plan(clip: float) -> None:
    text = {**fuzzed_plans.PRIVATE, "privacy": {**fuzzed_plans.PRIVATE["privacy"], "clip": clip}}
    with pytest.raises(ConfigError, match=r"privacy\.clip"):
        parse_plan(fuzzed_plans.dumps(text).encode())


@pytest.mark.parametrize(("clip", "noisy"), [(SMALLEST_CLIP, True), (1e-45, False)])
def test_the_weakest_noise_of_a_plan_is_noise(clip: float, noisy: bool) -> None:
    """And at a clip that plans may not have, a patient's gradient was there without any."""
    layer, nobody = torch.nn.Linear(10_000, 1, bias=False), torch.device("cpu")
    mechanism = Mechanism(rate=1.0, patients=1e7, images=1, views=1, clip=clip, sigma=0.3)
    gradients = PatientGradients(layer, lambda outputs, _: outputs.sum(), mechanism, Source(), device=nobody)
    gradients.settle()
    assert layer.weight.grad is not None
    found = layer.weight.grad.double().std().item() * 1e7
    assert (found == pytest.approx(0.3 * clip, rel=0.05, abs=0)) == noisy
