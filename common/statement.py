"""What may be said about the protection of patients: in plain words and as facts, no more than the mechanism gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rin.common.wire import Claim

ASSUMPTIONS: Final = (
    "each patient of a site has one pseudonym there, and all images of a patient carry it",
    "a site runs the release that it says, and nobody who administers it works against its patients",
    "numbers are computed in floating point: the guarantee is that of the mechanism in real numbers",
)
NOT_COVERED: Final = (
    "a patient who is in the archives of two sites: what the sites say then adds up",
    "what a site declares by itself: its labels, its number of patients rounded down, its weight in the mean",
    "run times, the times of messages, and whether a site takes part",
    "training on the same patients that no ledger has seen: with other software, without privacy, or of the weights "
    "that a run started from",
    "images of patients that are not in training, which nothing here looks at",
)
RISK: Final = "whoever holds the sites' updates could reconstruct training images"  # of a plan without it (threat T8)
ADOPTED: Final = (
    "a person took that ledger over as it was found, {times} times in all: what was spent before and is not in it is "
    "not counted, and edited lines count as they are written"
)
UNPROTECTED: Final = (
    f"none: trained without differential privacy. {RISK.capitalize()}; "
    "nothing is promised about what these weights reveal of a patient."
)


def words(claim: Claim) -> str:
    """One site's claim as a sentence; its numbers are not rounded, for that could claim more."""
    text = (
        f"({claim.epsilon}, {claim.delta})-differential privacy for each patient, whatever the number of a "
        f"patient's images, over everything that the site's privacy ledger held with its entry {claim.ledger.count}"
    )
    return f"{text} ({ADOPTED.format(times=claim.adopted)})" if claim.adopted else text


def of_update(claim: Claim | None) -> str:
    """What the privacy officer reads of one update: the site's claim, or that there is none."""
    return UNPROTECTED if claim is None else f"{words(claim)}, this round included"


def facts(claims: Mapping[str, Claim]) -> dict[str, Any]:
    """What a checkpoint says whose sites trained privately: `privacy` in words, `privacy_sites` as JSON.

    Args:
        claims: site to the newest that it signed; empty for a run without private training, which changes nothing.
    """
    if not claims:
        return {}
    each = "; ".join(f"{site}: {words(claim)}" for site, claim in sorted(claims.items()))
    text = (
        f"Patients: differential privacy at each site by itself, accounted and recorded there. {each}. "
        "Mechanism: patients drawn by Poisson sampling, the gradient of each clipped as a whole, Gaussian noise once a "
        "step; neighbouring archives differ by one patient, added or removed. Accountant: numerical composition (PRV). "
        f"Assumed: {'; '.join(ASSUMPTIONS)}. Not covered: {'; '.join(NOT_COVERED)}."
    )
    return {
        "privacy": text,
        "privacy_sites": {site: claim.model_dump(mode="json") for site, claim in sorted(claims.items())},
    }
