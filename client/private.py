"""A private round at the site: may it be paid for, the debit before its first step, and what is then claimed."""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rin.client import parallel
from rin.client.home import Home
from rin.client.ledger import site_ledger
from rin.client.site import Site
from rin.client.training import Work
from rin.common import egress, keys, statement
from rin.common.chain import MECHANISM
from rin.common.errors import RefusedError, RinError
from rin.common.files import write_json
from rin.common.ledger import Adopt, Debit, Entry, Ledger, debits
from rin.common.plan import Plan
from rin.common.wire import Claim, Refusal, Request, SignedRefusal

if TYPE_CHECKING:
    from rin.common.accountant import Row
    from rin.common.backbones import Network
    from rin.common.private import Mechanism


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Names:
    """What a debit is for: run, digest of the plan, and the site's work in one round of it from one base."""

    run: str
    plan: str
    request: str


def mechanism_of(plan: Plan, site: Site) -> Mechanism:
    """What each step does, by what plan and site declare and by nothing else (threat T5)."""
    from rin.common.private import Mechanism

    private = plan.privacy
    return Mechanism(
        rate=private.patients / _patients(site),
        patients=float(private.patients),
        images=private.images,
        views=private.views,
        clip=private.clip,
        sigma=private.sigma,
    )


def row_of(plan: Plan, site: Site) -> Row:
    """What a round of `plan` costs, for the accountant."""
    from rin.common.accountant import Row

    return Row(plan.privacy.sigma, plan.privacy.patients / _patients(site), plan.training.local_steps)


def rows_of(entries: Sequence[Entry]) -> list[Row]:
    """What the ledger holds, for the accountant: all runs, finished or not."""
    from rin.common.accountant import Row

    return [Row(debit.sigma, debit.rate, debit.steps) for debit in debits(entries)]


def gate(plan: Plan, site: Site) -> Callable[[Sequence[Entry]], None]:
    """A function that raises RefusedError("budget") where the entries and one more round cross the site's ceiling."""

    def allow(entries: Sequence[Entry]) -> None:
        from rin.common.accountant import fits

        policy, rows = site.policy, rows_of(entries)
        if not fits(rows, row_of(plan, site), policy.epsilon, policy.delta):
            raise RefusedError(
                "budget",
                f"policy.epsilon is {policy.epsilon:g} at delta {policy.delta:g}, and this round would cross it "
                f"({len(rows)} rounds are debited)",
                step="look at `rin-client ledger show`; more is a decision of the privacy officer, in site.toml",
            )

    return allow


def private_steps(network: Network, work: Work, names: Names) -> Claim:
    """Train `network`, which holds the weights that the round starts from, in place; the round is debited first.

    An interrupted round goes on from its snapshot with new randomness and inside its debit. Where the snapshot is lost,
    the round begins anew and costs another one.

    Args:
        work: its folder is of this round's own.

    Raises:
        LedgerError: the ledger is not what it was; nothing is trained then.
        RefusedError: budget, policy, cancelled, not-finite, memory or device.
    """
    from rin.common import fit
    from rin.common.private import fit_private
    from rin.common.snapshots import Snapshots

    if not work.images.patients_known:
        raise RefusedError("policy", "the archive names no patients, so nobody can be protected as one")
    plan, site = work.plan, work.site
    ledger, path = site_ledger(work.home), work.folder / parallel.SNAPSHOT
    attempt = _attempt(ledger, path, names.request) or secrets.token_hex(16)

    def charge() -> None:
        if attempt not in {debit.attempt for debit in debits(ledger.entries())}:
            ledger.debit(_debit(work, names, attempt), gate(plan, site))

    try:
        skipped = fit_private(
            network,
            work.images,
            plan,
            mechanism_of(plan, site),
            rows=site.labels.rows(),
            exhaustive_rows=site.labels.exhaustive_rows(),
            round=work.round,
            device=fit.pick_device(site.device.name),
            threads=site.device.threads,
            charge=charge,
            progress=work.progress,
            cancelled=lambda: bool(work.cancelled()),
            snapshots=Snapshots(path, _name(names.request, attempt)),
        )
    except RefusedError as error:
        if error.code == "cancelled":
            raise RefusedError(work.cancelled() or error.code) from None
        raise
    if skipped:
        log.warning("%d drawn patients gave no finite gradient and were left out", skipped)
    found = claim(ledger, site)
    _show(work.home, ledger, found, plan, site)
    return found


def _show(home: Home, ledger: Ledger, found: Claim, plan: Plan, site: Site) -> None:
    """Write down what `rin-client status` shows: it has no accountant, which takes seconds to import."""
    from rin.common.accountant import most_rounds

    left = most_rounds(rows_of(ledger.entries()), row_of(plan, site), site.policy.epsilon, site.policy.delta)
    facts = {"epsilon": found.epsilon, "delta": found.delta, "entries": found.ledger.count}
    facts |= {"ceiling": site.policy.epsilon, "rounds_left": left, "statement": statement.words(found)}
    with contextlib.suppress(OSError):
        write_json(home.budget, facts, mode=0o600)


def claim(ledger: Ledger, site: Site) -> Claim:
    """What the site may say now, by all that its ledger holds; epsilon is rounded up."""
    from rin.common.accountant import epsilon

    entries = ledger.entries()
    spent = epsilon(rows_of(entries), site.policy.delta)
    return Claim(
        epsilon=math.ceil(spent * 1000) / 1000,
        delta=site.policy.delta,
        mechanism=MECHANISM,
        ledger=entries[-1].head,
        adopted=sum(isinstance(entry.payload, Adopt) for entry in entries),
    )


def signed_refusal(home: Home, request: Request, code: str) -> bytes:
    """The site's word that it refuses `request`, with its ledger's head, once the egress log has it.

    Returns:
        Bytes of a `SignedRefusal`; none where there is no ledger to speak of, or no key: the code then goes alone.
    """
    try:
        refusal = Refusal(
            run=request.run,
            round=request.round,
            site=request.site,
            request=request.id,
            code=code,
            ledger=site_ledger(home).head,
        )
        signature = keys.sign(keys.load_signing_key(home.keys / "signing.key"), refusal.signed_bytes())
        note = SignedRefusal(refusal=refusal, signature=keys.encode(signature)).to_bytes()
        egress.record(
            home.egress_log,
            what="refusal",
            digest=keys.sha256(note),
            to="coordinator",
            facts=refusal.model_dump(mode="json", include={"run", "round", "code", "ledger"}),
        )
    except (RinError, OSError) as error:
        log.warning("the refusal goes without the ledger's head: %s", type(error).__name__)
        return b""
    return note


def _patients(site: Site) -> int:
    """N as the site declares it; the policy's rules have been checked before anything is computed."""
    if site.policy.patients is None:
        raise RefusedError("policy", "site.toml does not declare policy.patients", step="set it, rounded down")
    return site.policy.patients


def _debit(work: Work, names: Names, attempt: str) -> Debit:
    plan, site = work.plan, work.site
    row = row_of(plan, site)
    return Debit(
        run=names.run,
        round=work.round,
        plan=names.plan,
        request=names.request,
        attempt=attempt,
        sigma=row.sigma,
        rate=row.rate,
        steps=row.steps,
        clip=plan.privacy.clip,
        images=plan.privacy.images,
        patients=_patients(site),
        delta=site.policy.delta,
        release=metadata.version("rin"),
    )


def _name(request: str, attempt: str) -> str:
    return f"{request} {attempt}"


def _attempt(ledger: Ledger, snapshot: Path, request: str) -> str:
    """The attempt whose snapshot is here, if it is of this request; empty if there is none.

    Raises:
        LedgerError: the ledger is not what it was.
    """
    from rin.common.weights import read_facts

    ledger.entries()
    try:
        name = str(read_facts(snapshot).get("name", ""))
    except RefusedError:
        return ""
    of, _, attempt = name.partition(" ")
    return attempt if of == request else ""
