"""What a checkpoint says about itself, whoever wrote it: network, input, plan, round, protection of patients."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any, Final

from rin.common.backbones import NORMALISATIONS
from rin.common.plan import Plan
from rin.common.statement import UNPROTECTED

# What a checkpoint says about the protection of the patients it was trained on, by the plan's privacy mode; where sites
# have trained privately, what they claim takes its place.
STATEMENTS: Final[dict[str, str]] = {
    "none": UNPROTECTED,
    "patient": "no patient's image has had a part in these weights since the run began",
}
# Of weights that one site trained alone; nothing of that training left it.
ALONE: Final = (
    "none: trained at one site alone, without differential privacy. Training sent nothing to anybody; nothing is "
    "promised about what these weights reveal of a patient to whoever is given them."
)


def facts_of(plan: Plan, *, plan_digest: str, round: int, updates: Mapping[str, str]) -> dict[str, Any]:
    """What the checkpoint of round `round` says about itself; no time in it, so that a repeat gives the same bytes.

    Args:
        updates: site to the digest of its counted update.
    """
    mean, deviation = NORMALISATIONS[plan.model.normalisation]
    return {
        "backbone": plan.model.backbone,
        "norm": plan.model.norm,
        "image_size": plan.model.image_size,
        "normalisation": plan.model.normalisation,
        "mean": list(mean),
        "deviation": list(deviation),
        "target": plan.model.target,
        "label_set": plan.label_set,
        "plan": plan_digest,
        "name": plan.name,
        "round": round,
        "rounds": plan.training.rounds,
        "updates": dict(updates),
        "start": plan.model.start,
        "release": metadata.version("rin"),
        "privacy_mode": plan.privacy.mode,
        "privacy": STATEMENTS[plan.privacy.mode],
    }
