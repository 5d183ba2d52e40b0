"""The site's own privacy ledger: whose it is, when it is made, and what it says run by run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rin.client.home import Home
from rin.client.ingest.pseudonyms import Pseudonyms, site_pseudonyms
from rin.common.errors import StateError
from rin.common.ledger import Debit, Ledger

if TYPE_CHECKING:
    from rin.client.ingest.catalog import Catalog

log = logging.getLogger(__name__)

MADE: Final = "ledger"  # in the catalog's meta table: this home had its ledger, another one is never made


def site_ledger(home: Home) -> Ledger:
    """The ledger of the population that the home's pseudonym key stands for; nothing is read or made yet.

    Raises:
        StateError: the key is missing or damaged.
    """
    if not home.pseudonym_key.exists() and (home.ledger.exists() or home.ledger_anchor.exists()):
        raise StateError(  # ingest would make another key, and this ledger that of another population
            "the pseudonym key is missing, and the privacy ledger goes with it",
            step=f"restore {home.pseudonym_key.name} from its own backup before anything else runs",
            code="ledger",
        )
    return _ledger(home, site_pseudonyms(home.pseudonym_key, create=False))


def _ledger(home: Home, names: Pseudonyms) -> Ledger:
    return Ledger(home.ledger, home.ledger_anchor, names.id)


def make_ledger(home: Home, catalog: Catalog, names: Pseudonyms) -> None:
    """Give a home its empty ledger, once: with the pseudonym key, or where an earlier release made that key.

    A ledger that is lost later is not made again: whoever could replace it by an empty one would have a new budget.
    """
    if catalog.meta(MADE) is not None:
        return
    if _ledger(home, names).create() and catalog.meta("run") is not None:
        log.warning("made an empty privacy ledger: an earlier release, which could not train privately, made this home")
    catalog.set_meta(MADE, "made")


@dataclass(frozen=True, slots=True)
class Spent:
    """All debits of one run with the same noise and sampling."""

    run: str
    rounds: int  # distinct ones
    debits: int  # more than rounds where one was trained anew
    sigma: float
    rate: float
    steps: int


def by_run(debits: Sequence[Debit]) -> list[Spent]:
    """What each run has spent, in the order of the first debits; a run that changed its noise has several rows."""
    groups: dict[tuple[str, float, float], list[Debit]] = {}
    for debit in debits:
        groups.setdefault((debit.run, debit.sigma, debit.rate), []).append(debit)
    return [
        Spent(run, len({debit.round for debit in of}), len(of), sigma, rate, sum(debit.steps for debit in of))
        for (run, sigma, rate), of in groups.items()
    ]


def epsilon_of(spent: Sequence[Spent], delta: float) -> float:
    """What these have cost together, by the accountant; 0 for nothing."""
    if not spent:
        return 0.0
    from rin.common.accountant import Row, epsilon  # imports opacus: seconds

    return epsilon([Row(each.sigma, each.rate, each.steps) for each in spent], delta)
