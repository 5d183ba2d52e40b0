"""The site's limits against a plan: a pure table of rules; the stricter of plan and site wins (threats T2, T8, T9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Final

from rin.client.site import Site
from rin.common.errors import ConfigError, RefusedError
from rin.common.labels import label_set_digest
from rin.common.plan import FigureName, Plan, parse_plan, plan_digest
from rin.common.settings import load_toml

MAX_PLAN: Final = 256 << 10  # bytes; a plan of a thousand sites stays below


@dataclass(frozen=True, slots=True)
class Reason:
    """One refusal. `code` may leave the site; `text` and `step` are for its operator only."""

    code: str
    text: str
    step: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules look at: the plan, its digest, the site file, accepted digests, training patients here.

    `patients` are those that the site declares where the plan is private, and else those in its catalog.
    """

    plan: Plan
    digest: str
    site: Site
    accepted: Set[str]
    patients: int

    @property
    def private(self) -> bool:
        return self.plan.privacy.mode == "patient"

    @property
    def rate(self) -> float:
        """Probability of each patient in a private step; above 1 where the plan wants more than there are."""
        return self.plan.privacy.patients / max(1, self.site.policy.patients or 0)


@dataclass(frozen=True, slots=True)
class Rule:
    """`broken` says whether the plan breaks the rule; the texts are formatted with `facts`."""

    code: str
    broken: Callable[[Facts], bool]
    text: str
    step: str


RULES: Final = (
    Rule(
        "plan-not-accepted",
        lambda f: f.site.policy.plans == "accepted" and f.digest not in f.accepted,
        "nobody here has accepted plan {facts.digest}",
        "read the plan and run `rin-client accept PLAN`",
    ),
    Rule(
        "policy",
        lambda f: f.site.policy.privacy == "required" and f.plan.privacy.mode == "none",
        "site.toml: policy.privacy is required, but the plan trains without protection of patients",
        'agree on another plan, or set policy.privacy = "none" with a name and a date',
    ),
    Rule(
        "policy",
        lambda f: f.site.site not in f.plan.sites,
        "the plan does not name site {facts.site.site}",
        "ask the coordinator for the consortium's plan",
    ),
    Rule(
        "policy",
        lambda f: not f.private and f.plan.training.local_steps < f.site.policy.min_steps,
        "training.local-steps is {facts.plan.training.local_steps}, this site wants {facts.site.policy.min_steps}",
        "agree on more local steps, or lower policy.min-steps",
    ),
    Rule(
        "policy",
        lambda f: not f.private and f.plan.training.batch_size < f.site.policy.min_batch,
        "training.batch-size is {facts.plan.training.batch_size}, this site wants {facts.site.policy.min_batch}",
        "agree on larger batches, or lower policy.min-batch",
    ),
    Rule(
        "policy",
        lambda f: f.patients < f.site.policy.min_patients,
        "{facts.patients} patients are in training here, this site wants {facts.site.policy.min_patients}",
        "ingest more studies, or lower policy.min-patients (data without patient ids counts as one patient)",
    ),
    Rule(
        "policy",
        lambda f: f.plan.limits.min_sites < f.site.policy.min_sites,
        "limits.min-sites is {facts.plan.limits.min_sites}, this site wants {facts.site.policy.min_sites}",
        "agree on larger aggregates, or lower policy.min-sites",
    ),
    Rule(
        "policy",
        lambda f: f.plan.training.rounds > f.site.policy.max_rounds,
        "training.rounds is {facts.plan.training.rounds}, this site allows {facts.site.policy.max_rounds}",
        "agree on fewer rounds, or raise policy.max-rounds",
    ),
)

# Of private plans. Each compares what plan and site declare; nothing here looks into the archive (threat T5).
PRIVATE_RULES: Final = (
    Rule(
        "policy",
        lambda f: f.site.policy.patients is None,
        "site.toml does not declare how many patients private training draws from",
        "set policy.patients to their number, rounded down, once and for all runs",
    ),
    Rule(
        "policy",
        lambda f: f.site.policy.patients is not None and f.rate > f.site.policy.max_rate,
        "privacy.patients is {facts.plan.privacy.patients}: a step draws each patient with probability "
        "{facts.rate:.3g}, this site allows {facts.site.policy.max_rate}",
        "agree on fewer patients a step, or raise policy.max-rate",
    ),
    Rule(
        "policy",
        lambda f: f.plan.privacy.sigma < f.site.policy.min_sigma,
        "privacy.sigma is {facts.plan.privacy.sigma}, this site wants {facts.site.policy.min_sigma}",
        "agree on more noise, or lower policy.min-sigma",
    ),
    Rule(
        "policy",
        lambda f: f.plan.privacy.clip > f.site.policy.max_clip,
        "privacy.clip is {facts.plan.privacy.clip}, this site allows {facts.site.policy.max_clip}",
        "agree on a smaller clip, or raise policy.max-clip",
    ),
    Rule(
        "policy",
        lambda f: f.plan.training.local_steps > f.site.policy.max_steps,
        "training.local-steps is {facts.plan.training.local_steps}, this site allows {facts.site.policy.max_steps}",
        "agree on fewer steps a round, or raise policy.max-steps",
    ),
    Rule(
        "policy",
        lambda f: f.site.policy.delta > f.plan.privacy.delta,
        "policy.delta is {facts.site.policy.delta}, the plan wants {facts.plan.privacy.delta} or less",
        "lower policy.delta; what the ledger holds is then accounted with the new one",
    ),
    Rule(
        "policy",
        lambda f: f.site.policy.delta > max(1, f.site.policy.patients or 0) ** -1.0,
        "policy.delta is {facts.site.policy.delta}, more than one in {facts.site.policy.patients} patients",
        "set policy.delta below one over the number of patients",
    ),
    Rule(
        "policy",
        lambda f: f.site.device.processes > 1,
        "device.processes is {facts.site.device.processes}: private training is one process",
        "set device.processes = 1",
    ),
)


def check(plan: Plan, digest: str, site: Site, accepted: Set[str], *, patients: int) -> list[Reason]:
    """Every reason why `site` does not train `plan`; empty means it does.

    Args:
        digest: hex SHA-256 of the plan file's bytes.
        accepted: digests of the plans that a person at the site accepted.
        patients: patients of the site's training split; a private plan looks at the declared number instead.
    """
    if plan.privacy.mode == "patient":
        patients = site.policy.patients or 0
    facts = Facts(plan, digest, site, accepted, patients)
    return _broken((*RULES, *PRIVATE_RULES) if facts.private else RULES, facts)


def check_private(plan: Plan, digest: str, site: Site) -> list[Reason]:
    """Every reason of the privacy officer's why `site` does not train the private `plan`, wherever its weights go."""
    facts = Facts(plan, digest, site, frozenset(), site.policy.patients or 0)
    return _broken(PRIVATE_RULES, facts)


def refuse(reasons: Sequence[Reason]) -> None:
    """Raise RefusedError with the code of the first of `reasons`, if there are any; the operator reads all of them."""
    if reasons:
        text = "\n".join(reason.text for reason in reasons)
        raise RefusedError(reasons[0].code, text, step="; ".join(reason.step for reason in reasons))


def _broken(rules: Sequence[Rule], facts: Facts) -> list[Reason]:
    return [Reason(rule.code, rule.text.format(facts=facts), rule.step) for rule in rules if rule.broken(facts)]


def check_start(plan: Plan, round: int, base: str) -> None:
    """The run begins from the weights that the plan names, if it names any.

    Raises:
        RefusedError: bad-weights.
    """
    if round == 1 and plan.model.start and base != plan.model.start:
        raise RefusedError("bad-weights", f"round 1 starts from {base}, the accepted plan from {plan.model.start}")


def allowed_metrics(plan: Plan, site: Site) -> frozenset[FigureName]:
    """The figures that plan and site both allow to leave; none in private training (threat T6)."""
    if plan.privacy.mode != "none":
        return frozenset()
    return frozenset(plan.metrics) & frozenset(site.policy.metrics)


def open_plan(data: bytes, digest: str) -> Plan:
    """The plan that came with a request, once it is the one that the request names.

    Raises:
        RefusedError: bad-request, or labels-mismatch where only the label set is another one.
    """
    if len(data) > MAX_PLAN or plan_digest(data) != digest:
        raise RefusedError("bad-request", "the plan is not the one that the request names")
    try:
        return parse_plan(data)
    except ConfigError as error:
        raise RefusedError(_fault(data), error.message, step=error.step) from None


def _fault(data: bytes) -> str:
    """labels-mismatch if the plan names another label set than this release's, else bad-request."""
    try:
        other = load_toml(data.decode(), name="plan.toml").get("label-set")
    except (ConfigError, UnicodeDecodeError):
        return "bad-request"
    return "labels-mismatch" if isinstance(other, str) and other != label_set_digest() else "bad-request"
