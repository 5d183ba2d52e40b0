"""Who belongs to a run: its directory, its certificates, invites, admissions, revocations (threats T4 and T15)."""

from __future__ import annotations

import datetime as dt
import re
import secrets
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509

from rin.common import keys
from rin.common.errors import ConfigError, StateError
from rin.common.files import canonical_json, read_json, write_atomic, write_json
from rin.common.invite import ADDRESS, Invite, Join, read_paper
from rin.common.labels import label_set_digest
from rin.common.plan import parse_plan, plan_digest, read_plan
from rin.server import members, receipts, tickets
from rin.server.members import Member
from rin.server.rundir import RunDir


def plan_template() -> bytes:
    """A plan that parses, for this release's label set, with every key explained."""
    return resources.files("rin.server").joinpath("plan_template.toml").read_bytes()


def init(run: RunDir, *, plan: bytes | None, address: str) -> None:
    """Make the run directory: plan, certificates, empty member list, and run.json last, which says that all is there.

    Args:
        plan: the plan file's bytes; None keeps a plan.toml that lies there already, else writes the template.
        address: `https://host:port` as the sites will reach the gateway.

    Raises:
        ConfigError: the plan or the address is wrong.
        StateError: there is a run already, or another plan.
    """
    if not re.fullmatch(ADDRESS, address):
        raise ConfigError(f"address: want https://host:port, got {address!r}", step="pass --address")
    if run.facts.exists():
        raise StateError(f"{run.root} holds a run already", step="use it, or choose another --run")
    there = run.plan.read_bytes() if run.plan.exists() else None
    if plan is not None and there is not None and there != plan:
        raise StateError(f"{run.plan} is another plan", step="remove it, or leave --plan out to use it")
    given = plan if plan is not None else there
    data = given if given is not None else plan_template()
    name = parse_plan(data).name
    run.root.mkdir(parents=True, exist_ok=True)
    run.ca.mkdir(mode=0o700, exist_ok=True)
    write_atomic(run.plan, data)
    certificate, key = keys.make_ca(f"rin {name}")
    write_atomic(run.ca / "ca.crt", certificate)
    keys.save_private(run.ca / "ca.key", key)
    _make_server_certificate(run, key, address)
    members.create(run)
    write_json(run.facts, {"run": secrets.token_hex(16), "epoch": 0, "address": address})


def invite(run: RunDir, site: str) -> tuple[Path, str]:
    """Write invites/SITE.invite for a site of the plan; its path and its fingerprint, to be read out by telephone.

    Raises:
        ConfigError: the plan does not name the site.
    """
    address = _address(run)
    plan, data = read_plan(run.plan)
    if site not in plan.sites:
        twin = next((f" (it names {name})" for name in plan.sites if name.lower() == site.lower()), "")
        raise ConfigError(f"plan.toml does not name the site {site}{twin}", step="add it under [sites]")
    paper = Invite(
        site=site,
        address=address,
        ca=(run.ca / "ca.crt").read_text(encoding="ascii"),
        plan=data.decode("utf-8"),
        plan_digest=plan_digest(data),
        label_set=label_set_digest(),
    )
    text = canonical_json(paper.model_dump())
    path = run.invites / f"{site}.invite"
    write_atomic(path, text)
    return path, keys.fingerprint(text)


def admit(run: RunDir, join_file: Path, fingerprint: str) -> Member:
    """Take a site's join file in, after its fingerprint was compared by telephone; a member's new keys replace its old.

    Raises:
        ConfigError: the file, its signatures, its invite or the fingerprint is wrong.
        RefusedError: the keys are another site's or were revoked.
    """
    paper, data = read_paper(join_file, Join)
    if not keys.same_fingerprint(fingerprint, data):
        raise ConfigError(
            f"{join_file.name} has another fingerprint than the one given",
            step="compare it with the site by telephone; if it still differs, the file was altered on its way",
        )
    plan, _ = read_plan(run.plan)
    if paper.site not in plan.sites:
        raise ConfigError(f"plan.toml does not name the site {paper.site}", step="add it under [sites]")
    _check_proofs(paper, join_file.name)
    _check_invite(run, paper)
    before = members.members(run).get(paper.site)
    member = members.register(run, paper.site, node_key=paper.node_key, signing_key=paper.signing_key)
    if before is not None and before.serial != member.serial:  # what the old key signed counts no more
        _forget(run, paper.site)
    return member


def revoke(run: RunDir, site: str) -> Member:
    """End a membership: off the list, tickets void, uncounted receipts of open rounds gone, keys never accepted again.

    The list goes first: every check of a ticket or a receipt looks there.

    Raises:
        StateError: no such member.
    """
    member = members.strike(run, site)
    _forget(run, site)
    return member


def renew(run: RunDir) -> dt.datetime:
    """Make a new server certificate for the run's address, and say when it ends (UTC).

    Raises:
        StateError: ca.key is not there, which is how it should be at other times.
    """
    key = run.ca / "ca.key"
    if not key.exists():
        raise StateError(
            f"{key} is not here", step="bring it back from where it is kept, run this again, then take it away"
        )
    _make_server_certificate(run, keys.load_private(key), _address(run))
    return x509.load_pem_x509_certificate((run.ca / "server.crt").read_bytes()).not_valid_after_utc


def _forget(run: RunDir, site: str) -> None:
    for number in tickets.void(run, site):
        receipts.drop(run, number, site)


def _make_server_certificate(run: RunDir, ca_key: bytes, address: str) -> None:
    host = urlsplit(address).hostname or "localhost"
    certificate, key = keys.make_server_certificate((run.ca / "ca.crt").read_bytes(), ca_key, [host])
    keys.save_private(run.ca / "server.key", key)
    write_atomic(run.ca / "server.crt", certificate)


def _address(run: RunDir) -> str:
    address = read_json(run.facts).get("address")
    if not isinstance(address, str):
        raise StateError(f"{run.facts} has no address", step="make the run with `rin-server init`")
    return address


def _check_proofs(paper: Join, name: str) -> None:
    statement = paper.statement()
    signature, proof = keys.decode(paper.signature), keys.decode(paper.node_proof)
    if signature is None or not keys.verify(paper.signing_key, statement, signature):
        raise ConfigError(f"{name} is not signed with its own signing key", step="ask the site for a new one")
    if proof is None or not keys.node_verify(paper.node_key, statement, proof):
        raise ConfigError(f"{name} does not prove that the site holds its node key", step="ask the site for a new one")


def _check_invite(run: RunDir, paper: Join) -> None:
    _, data = read_paper(run.invites / f"{paper.site}.invite", Invite)
    if keys.sha256(data) != paper.invite:
        raise ConfigError(f"{paper.site} answers another invite than the last one", step="send it the last one again")
