"""A site's way into a consortium: check the invite, make the keys, answer; and a person's yes to a plan (T4, T9)."""

from __future__ import annotations

import datetime as dt
import re
from importlib import resources
from pathlib import Path

from rin.client.home import Home
from rin.client.site import Site, read_site
from rin.common import keys
from rin.common.errors import ConfigError, StateError
from rin.common.files import canonical_json, read_json, write_atomic, write_json
from rin.common.invite import Invite, Join, read_paper
from rin.common.labels import label_set_digest
from rin.common.plan import Plan, parse_plan, plan_digest
from rin.common.settings import parse_toml


def invite_fingerprint(path: Path) -> str:
    """The fingerprint of an invite, to be compared with the coordinator by telephone.

    Raises:
        ConfigError: no invite.
    """
    return keys.fingerprint(read_paper(path, Invite)[1])


def join_fingerprint(path: Path) -> str:
    """The fingerprint of a join file, to be read out to the coordinator by telephone.

    Raises:
        ConfigError: no join file.
    """
    return keys.fingerprint(read_paper(path, Join)[1])


def join(home: Home, invite_path: Path, *, site: str | None = None, fingerprint: str, renew: bool = False) -> Path:
    """Make this site's keys and its answer to the invite; the path of `HOME/SITE.join`, which is public.

    Done again with the same keys it writes the answer again; an existing site.toml is left alone.

    Args:
        site: the name that the operator expects, compared with the invite's.
        fingerprint: as the coordinator read it out.
        renew: make new keys in place of the old.

    Raises:
        ConfigError: the invite is wrong, altered, for another site or another label set.
        StateError: the home belongs to another site or consortium.
    """
    paper, data = read_paper(invite_path, Invite)
    if not keys.same_fingerprint(fingerprint, data):
        raise ConfigError(
            f"{invite_path.name} has another fingerprint than the one given",
            step="compare it with the coordinator by telephone; if it still differs, the file was altered on its way",
        )
    _check_invite(paper, site)
    _check_home(home, paper, renew=renew)
    home.net.mkdir(parents=True, exist_ok=True)
    home.keys.parent.mkdir(mode=0o700, exist_ok=True)
    node, signing = home.net / "node.key", home.keys / "signing.key"
    if renew or not signing.exists():
        keys.save_private(signing, keys.make_signing_key())
    if renew or not node.exists():
        keys.save_private(node, keys.make_node_key())
    write_atomic(home.net / "ca.crt", paper.ca.encode())
    write_atomic(home.net / "plan.toml", paper.plan.encode())
    if not home.site_toml.exists():
        write_atomic(home.site_toml, site_template(paper.site, paper.address).encode(), mode=0o600)
    write_json(home.net / "coordinator.json", {"address": paper.address, "site": paper.site})
    target = home.root / f"{paper.site}.join"
    write_atomic(target, _answer(home, paper, data))
    return target


def site_template(site: str, address: str) -> str:
    """The text of a site.toml with the strictest values, every key explained."""
    text = resources.files("rin.client").joinpath("site_template.toml").read_text(encoding="utf-8")
    text = text.replace("@SITE@", site).replace("@ADDRESS@", address)
    parse_toml(text, Site, name="site.toml")
    return text


def _check_invite(paper: Invite, site: str | None) -> None:
    if site is not None and site != paper.site:
        raise ConfigError(f"the invite is for {paper.site}, not for {site}", step="ask for this site's invite")
    if paper.label_set != label_set_digest():
        raise ConfigError("the invite is for another label set", step="install the consortium's release of rin")
    plan = parse_plan(paper.plan.encode(), name="the invite's plan")
    if plan_digest(paper.plan.encode()) != paper.plan_digest or paper.site not in plan.sites:
        raise ConfigError("the invite does not fit its plan", step="ask for a new one")
    keys.days_left(paper.ca.encode())


def _check_home(home: Home, paper: Invite, *, renew: bool) -> None:
    known = home.net / "coordinator.json"
    if home.site_toml.exists() and (name := read_site(home).site) != paper.site:
        raise StateError(f"{home.root} belongs to {name}", step=f"choose another --home for {paper.site}")
    if known.exists() and (name := read_json(known).get("site")) != paper.site:
        raise StateError(f"{home.root} belongs to {name}", step=f"choose another --home for {paper.site}")
    ca = home.net / "ca.crt"
    if not renew and ca.exists() and ca.read_bytes() != paper.ca.encode():
        raise StateError(
            "this home has joined another consortium, or the consortium has a new CA",
            step="choose another --home, or pass --renew if the coordinator confirms the new CA",
        )


def _answer(home: Home, paper: Invite, data: bytes) -> bytes:
    node = keys.load_private(home.net / "node.key")
    signing = keys.load_signing_key(home.keys / "signing.key")
    answer = Join(
        site=paper.site,
        invite=keys.sha256(data),
        node_key=keys.node_public(node),
        signing_key=keys.signing_public(signing),
    )
    statement = answer.statement()
    proofs = {
        "node_proof": keys.encode(keys.node_sign(node, statement)),
        "signature": keys.encode(keys.sign(signing, statement)),
    }
    return canonical_json(answer.model_dump() | proofs)


# --- plans ------------------------------------------------------------------------------------------------------


def plan_bytes(path: Path) -> bytes:
    """The plan's bytes from a plan file, or from the invite that holds it.

    Raises:
        ConfigError: the file is missing or too large.
    """
    if path.suffix == ".invite":
        return read_paper(path, Invite)[0].plan.encode()
    try:
        return path.read_bytes()
    except OSError:
        raise ConfigError(f"{path} cannot be read", step="check the path") from None


def accept(home: Home, plan: bytes | Path, *, by: str) -> str:
    """Keep a plan that a person agreed to, with name and time; its digest, which the trainer then answers to.

    Raises:
        ConfigError: the plan is wrong, is for another label set, does not name this site, or `by` is empty.
    """
    data = plan_bytes(plan) if isinstance(plan, Path) else plan
    parsed = parse_plan(data)
    site = read_site(home).site
    if site not in parsed.sites:
        raise ConfigError(f"the plan does not name this site, {site}", step="ask the coordinator for the right plan")
    if not by.strip():
        raise ConfigError("nobody's name is given", step="pass --by NAME")
    digest = plan_digest(data)
    write_atomic(home.accepted / f"{digest}.toml", data, mode=0o600)
    when = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    write_json(home.accepted / f"{digest}.json", {"digest": digest, "by": by.strip(), "on": when}, mode=0o600)
    return digest


def accepted(home: Home) -> set[str]:
    """Digests of the plans that a person accepted here; a plan file that has changed since does not count."""
    found = set()
    for record in home.accepted.glob("*.json"):
        plan = record.with_suffix(".toml")
        if (
            re.fullmatch(r"[0-9a-f]{64}", record.stem)
            and plan.exists()
            and keys.sha256(plan.read_bytes()) == record.stem
        ):
            found.add(record.stem)
    return found


def plan_summary(data: bytes) -> list[tuple[str, str]]:
    """What a person should have read before agreeing: (what, value) in reading order.

    Raises:
        ConfigError: the plan is wrong.
    """
    plan = parse_plan(data)
    training, limits = plan.training, plan.limits
    total = sum(plan.sites.values())
    return [
        ("plan", f"{plan.name} ({plan_digest(data)})"),
        ("fingerprint", keys.fingerprint(data)),
        ("sites", ", ".join(f"{site} {weight / total:.0%}" for site, weight in sorted(plan.sites.items()))),
        ("network", f"{plan.model.backbone}, {plan.model.image_size} pixels, {plan.model.target} label"),
        ("starts from", f"weights {plan.model.start}" if plan.model.start else "random weights"),
        *_amount(plan),
        ("optimizer", f"{training.optimizer}, learning rate {training.learning_rate:g}, {training.schedule}"),
        ("strategy", plan.strategy.name),
        ("protection", _protection(plan)),
        ("may leave the site", ", ".join(["the update of the weights", *_told(plan)])),
        ("fewest sites", f"{limits.min_sites} in an aggregate, {limits.quorum} in a round"),
        ("deadline of a round", f"{limits.deadline_s / 60:.0f} min"),
        ("updates kept", "no, digests only" if plan.retention.receipts == "delete" else "yes, at the coordinator"),
        ("scored on", ", ".join(plan.bench.tasks) or "nothing"),
    ]


def _amount(plan: Plan) -> list[tuple[str, str]]:
    """How much a site trains."""
    training, private = plan.training, plan.privacy
    steps = training.rounds * training.local_steps
    if private.mode == "patient":
        each = f"about {private.patients} patients drawn by chance, up to {private.images} images of each"
        return [("rounds", f"{training.rounds}, each {training.local_steps} steps of {each}")]
    return [
        ("rounds", f"{training.rounds}, each {training.local_steps} steps of {training.batch_size} images"),
        ("images seen", f"at most {steps * training.batch_size:,} at each site"),
    ]


def _told(plan: Plan) -> list[str]:
    return ["epsilon so far and the ledger's head"] if plan.privacy.mode == "patient" else list(plan.metrics)


def _protection(plan: Plan) -> str:
    private = plan.privacy
    return {
        "none": "none: whoever holds an update can learn about single patients",
        "patient": f"differential privacy for each patient: noise {private.sigma:g} times the clip {private.clip:g}, "
        f"delta {private.delta:g} at most; epsilon is held by this site's policy and ledger",
    }[private.mode]
