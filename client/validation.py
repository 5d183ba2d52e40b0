"""A site's figures on its held-out patients: the global weights as they came, before the site trains them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rin.client import policy
from rin.client.home import Home
from rin.client.site import Site
from rin.common.errors import RefusedError
from rin.common.plan import Plan
from rin.common.scores import GroupScores

if TYPE_CHECKING:
    from rin.common.backbones import Network


def measure(
    home: Home, network: Network, plan: Plan, site: Site, cancelled: Callable[[], str]
) -> tuple[GroupScores, ...]:
    """What may leave of `network`'s outputs on the validation split; nothing where plan or site ask for none.

    The network's weights and modes stay as they are.

    Args:
        cancelled: asked before each batch; a code ends the work.

    Raises:
        RefusedError: that code, memory, or not-finite.
    """
    allowed = policy.allowed_metrics(plan, site)
    # Private training protects the patients in it, not those held back: no number of theirs leaves (threat T6).
    if plan.privacy.mode != "none" or "validation" not in allowed or not site.archive.hold_out:
        return ()
    from rin.client.data import TrainingData
    from rin.common import evaluate, fit

    rows = site.labels.rows()
    images = TrainingData.open(home, labels=rows, split="val")
    if images.n_images == 0:
        return ()
    try:
        found = evaluate.evaluate(
            network,
            images,
            plan,
            rows=rows,
            exhaustive_rows=site.labels.exhaustive_rows(),
            device=fit.pick_device(site.device.name),
            threads=site.device.threads,
            cancelled=lambda: bool(cancelled()),
        )
    except RefusedError as error:
        if error.code == "cancelled":
            raise RefusedError(cancelled() or error.code) from None
        raise
    return evaluate.scores_of(found, plan, rows=rows, patient=images.patient, allowed=allowed)
