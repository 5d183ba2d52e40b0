"""`rin-client train`: the plan's rounds at one site alone, without coordinator, keys or network, from a folder.

A round is what it is in a federation of this one site, to the bit: the same local steps with the same draws, then the
global weights plus the update, in float32. The coordinator's optimizer (`strategy`) has no part in it. A round of a
private plan is debited in the site's ledger before its first step, and held to what the site's policy says of privacy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rin.client import policy
from rin.client.data import TrainingData
from rin.client.folder import ELSEWHERE, LOCK, Folder
from rin.client.home import Home
from rin.client.norms import LocalNorms
from rin.client.parallel import SNAPSHOT
from rin.client.private import Names, private_steps
from rin.client.site import Site, read_site
from rin.client.training import Work, images_of, limit_memory, local_steps, room
from rin.common import statement
from rin.common.errors import ConfigError, RefusedError, StateError
from rin.common.files import canonical_json, lock, make_dir, read_json, write_atomic, write_json
from rin.common.labels import label_set
from rin.common.plan import Plan, parse_plan, plan_digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rin.common.backbones import Network
    from rin.common.layout import Layout

    Floats = NDArray[np.float32]

DIGITS: Final = 6  # of a figure
FULL: Final = (errno.ENOSPC, errno.EDQUOT)
RUN: Final = re.compile(r"[0-9a-f]{32}")
Figures = dict[str, Any]


def train(
    home: Home,
    data: bytes,
    out: Path,
    *,
    weights: Path | None = None,
    normalisation: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], str] = lambda: "",
    on_round: Callable[[Figures], None] = lambda figures: None,
) -> Path:
    """Train the plan `data` at the site `home` from where `out` stands, to its last round.

    Args:
        data: a plan file's bytes; it need not name the site, and nobody has to have accepted it.
        weights: a weight file of any layout to start from, else the plan's random ones; may be left out when going on.
        normalisation: what that file was trained with, if it does not say.
        progress: called with steps done and all steps of all rounds.
        cancelled: asked before each step and each batch of validation; a code ends the work.
        on_round: called with the line of each round.

    Returns:
        The last checkpoint.

    Raises:
        ConfigError: plan, site.toml or weights do not fit each other.
        StateError: `out` holds another training, a damaged one or anything else, or another process trains in it;
            nothing was ingested; the ledger is not what it was.
        RefusedError: no-data, not-finite, memory, device, disk-full, or what `cancelled` gives; policy or budget, of a
            private plan.
    """
    plan, site, folder = parse_plan(data), read_site(home), Folder(out)
    if normalisation is not None and weights is None:
        raise ConfigError("--normalisation is about the file of --weights", step="name that file too, or leave it out")
    private = plan.privacy.mode == "patient"
    if private:
        policy.refuse(policy.check_private(plan, plan_digest(data), site))
    folder.take()
    try:
        with contextlib.ExitStack() as held:
            held.enter_context(lock(out / LOCK, holder="rin-client train", shown=False))
            if private:  # two copies of one folder must not train one round side by side
                make_dir(home.alone, private=True)
                held.enter_context(lock(home.alone / LOCK, holder="private rin-client train", shown=False))
            images = images_of(home, site)
            if images.n_images == 0:
                raise RefusedError("no-data", step="ingest, or declare labels that the catalog holds")
            alone = _Alone(home, folder, plan, plan_digest(data), site, images, progress, cancelled)
            alone.begin(data, weights, normalisation)
            return alone.main(on_round)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RefusedError("disk-full", step="free some space; the same command goes on") from None


@dataclass(slots=True)
class _Alone:
    """One training in one folder."""

    home: Home
    folder: Folder
    plan: Plan
    digest: str
    site: Site
    images: TrainingData
    progress: Callable[[int, int], None]
    cancelled: Callable[[], str]
    run: str = ""  # of a private plan: what its debits name

    @property
    def private(self) -> bool:
        return self.plan.privacy.mode == "patient"

    @property
    def work(self) -> Path:
        """Where a round keeps its snapshot."""
        return self.home.alone / self.run if self.private else self.folder.work

    def begin(self, data: bytes, path: Path | None, normalisation: str | None) -> None:
        """See that the folder is this training's; make it, with the first weights, where it is new."""
        labels = self.site.labels
        wanted: dict[str, Any] = {
            "plan": self.digest,
            "site": self.site.site,
            "labels": list(labels.rows()),
            "exhaustive": list(labels.exhaustive_rows()),
            "hold-out": self.site.archive.hold_out,
        }
        new = not self.folder.facts.exists()
        if new or path is not None:
            network = _first(self.plan, path, normalisation)
            wanted["weights"] = _digest(network)
            if new:
                run = {"run": secrets.token_hex(16)} if self.private else {}
                self._make(network, data, wanted | run, start=wanted["weights"] if path else "")
        self.folder.agree(wanted)
        if self.private:
            self.run = str(self.folder.said().get("run", ""))
            if not RUN.fullmatch(self.run):
                raise StateError(f"{self.folder.facts} does not say which run its debits name", step=ELSEWHERE)
            make_dir(self.work, private=True)

    def _make(self, network: Network, data: bytes, wanted: dict[str, Any], *, start: str) -> None:
        """Write the start; the file that says what the folder is comes last."""
        from rin.common.weights import layout_of, save

        if self.plan.model.start not in ("", wanted["weights"]):
            raise ConfigError(
                f"the plan starts from weights {self.plan.model.start}, not {wanted['weights']}",
                step="pass --weights with the file that the plan was made with",
            )
        write_atomic(self.folder.root / "plan.toml", data)
        facts = self._facts(0, start) | {"weights": wanted["weights"]}
        save(self.folder.checkpoint(0), network, layout_of(network), facts=facts)
        write_json(self.folder.facts, wanted)

    def main(self, on_round: Callable[[Figures], None]) -> Path:
        """Round after round; a line of figures after each."""
        from rin.common import backbones
        from rin.common.weights import layout_of

        limit_memory(self.site)
        network = backbones.build(self.plan.model)
        layout = layout_of(network)
        last = self.folder.last()
        again = "for another debit" if self.private else "to the same bits"
        self.folder.verify(last, self.digest, again="" if self.plan.model.local_norms else again)
        if last:
            self._figures(network, layout, last, on_round)
        for round in range(last + 1, self.plan.training.rounds + 1):
            self._round(network, layout, round)
            self._figures(network, layout, round, on_round)
        if self.private:
            shutil.rmtree(self.work, ignore_errors=True)
        return self.folder.checkpoint(self.plan.training.rounds)

    def _round(self, network: Network, layout: Layout, round: int) -> None:
        """Local steps, then the next checkpoint."""
        import numpy as np

        from rin.common import weights

        self._see_room(layout)
        weights.read_into(network, self.folder.checkpoint(round - 1), layout)
        base = _copies(network, layout)
        norms = self._norms()
        if norms is not None:
            norms.bring(network, round)
        said = self._train(network, round)
        if norms is not None:
            norms.keep(network, round)
        local = _copies(network, layout)
        after = [np.add(base[name], np.subtract(local[name], base[name])) for name in local]
        sha = hashlib.sha256()
        for values in after:
            sha.update(values.data)
        start = str(weights.read_facts(self.folder.checkpoint(0)).get("start", ""))
        facts = self._facts(round, start) | said | {"weights": sha.hexdigest()}
        weights.write_tensors(self.folder.checkpoint(round), layout, after, facts=facts)
        self.folder.tidy(self.plan.retention.checkpoints)
        if self.private:  # whoever puts an older folder back trains the round anew, for another debit
            (self.work / SNAPSHOT).unlink(missing_ok=True)

    def _train(self, network: Network, round: int) -> dict[str, Any]:
        """The local steps; what a checkpoint of private ones may say of its patients."""
        from rin.common.weights import read_facts

        steps = self.plan.training.local_steps
        before, total = (round - 1) * steps, self.plan.training.rounds * steps

        def progress(step: int, _: int) -> None:
            self.progress(before + step, total)

        work = Work(self.home, self.plan, self.site, self.images, round, self.work, progress, self.cancelled)
        if not self.private:
            result = local_steps(network, work, name=f"{self.digest} {round}")
            write_json(self.folder.work / "trained.json", {"round": round, **_shares(result.metrics)})
            return {}
        base = read_facts(self.folder.checkpoint(round - 1))["weights"]
        named = canonical_json(["alone", self.run, self.digest, round, base, self.site.site])
        names = Names(self.run, self.digest, hashlib.sha256(named).hexdigest())
        return statement.facts({self.site.site: private_steps(network, work, names)})

    def _see_room(self, layout: Layout) -> None:
        """Refuse a round that would not find its place on the disk.

        Raises:
            RefusedError: disk-full.
        """
        there = self.work / SNAPSHOT  # of a round that was cut short
        needed = room(self.plan, self.site, layout) + layout.file_bytes  # and the checkpoint
        needed -= there.stat().st_size if there.exists() else 0
        places = (self.folder.root, self.work) if self.private else (self.folder.root,)
        left = min(shutil.disk_usage(path).free for path in places) - needed
        if left < self.site.device.disk_reserve_gib * 2**30:
            raise RefusedError("disk-full", "less than device.disk-reserve-gib would be left", step="free some space")

    def _figures(self, network: Network, layout: Layout, round: int, on_round: Callable[[Figures], None]) -> None:
        """Write the line of a finished round, unless it is there."""
        lines = self.folder.lines()
        if round in lines:
            return
        figures = self._spent(round) if self.private else self._measured(network, layout, round)
        new = json.dumps({"round": round, **figures}, sort_keys=True, allow_nan=False)
        text = "".join(f"{line}\n" for line in [*lines.values(), new])
        write_atomic(self.folder.figures, text.encode())
        on_round({"round": round, **figures})

    def _spent(self, round: int) -> Figures:
        """What the ledger had come to with a private round: no other figure of one is computed from patients."""
        from rin.common.weights import read_facts

        claim = read_facts(self.folder.checkpoint(round))["privacy_sites"][self.site.site]
        return {"epsilon": claim["epsilon"], "delta": claim["delta"]}

    def _measured(self, network: Network, layout: Layout, round: int) -> Figures:
        """Of a round that is not private: the training batches, and the held-out patients."""
        from rin.common import weights

        weights.read_into(network, self.folder.checkpoint(round), layout)
        norms = self._norms()
        if norms is not None:
            norms.bring(network, round + 1)
        figures: Figures = {}
        trained = read_json(self.folder.work / "trained.json")
        if trained.pop("round") == round:
            figures["training"] = trained
        if validation := self._validation(network):
            figures["validation"] = validation
        return figures

    def _validation(self, network: Network) -> Figures:
        """Loss, top-1, top-5 and macro AUC on the held-out patients; empty where there are none."""
        from rin.common import evaluate, fit
        from rin.common.metrics import log_softmax, macro_auc

        rows = self.site.labels.rows()
        images = TrainingData.open(self.home, labels=rows, split="val")
        if not self.site.archive.hold_out or images.n_images == 0:
            return {}
        found = evaluate.evaluate(
            network,
            images,
            self.plan,
            rows=rows,
            exhaustive_rows=self.site.labels.exhaustive_rows(),
            device=fit.pick_device(self.site.device.name),
            threads=self.site.device.threads,
            cancelled=lambda: bool(self.cancelled()),
        )
        single = self.plan.model.target == "single"
        area = macro_auc(log_softmax(found.logits, rows) if single else found.logits, found.labels).mean
        return _shares(found.metrics) | ({"auc": round(area, DIGITS)} if math.isfinite(area) else {})

    def _norms(self) -> LocalNorms | None:
        return LocalNorms(self.folder.work / "norms") if self.plan.model.local_norms else None

    def _facts(self, round: int, start: str) -> dict[str, Any]:
        """Of the checkpoint after `round`; `start` is the digest of the weights that were given, if any were."""
        from rin.common import checkpoint

        facts = checkpoint.facts_of(self.plan, plan_digest=self.digest, round=round, updates={})
        names = [label_set()[row].name for row in self.site.labels.rows()] if round else []
        privacy = {} if self.private else {"privacy": checkpoint.ALONE}
        return facts | privacy | {"site": self.site.site, "trained_labels": names, "start": start}


def _first(plan: Plan, path: Path | None, normalisation: str | None) -> Network:
    """The plan's random weights, with those of the file at `path` over them."""
    from rin.common import formats
    from rin.common.backbones import initial

    if path is None:
        return initial(plan.model, plan.training.seed)
    weights = formats.read(path, normalisation=normalisation)
    return formats.start_of(plan.model, plan.training.seed, weights, path.name)


def _digest(network: Network) -> str:
    from rin.common.formats import weights_of

    return weights_of(network).digest()


def _copies(network: Network, layout: Layout) -> dict[str, Floats]:
    """The network's tensors in file order, as arrays of their own."""
    state = network.state_dict()
    return {t.name: state[t.name].detach().to("cpu", copy=True).contiguous().numpy() for t in layout.tensors}


def _shares(metrics: Mapping[Any, float]) -> Figures:
    """Counts as shares of the images, all rounded; what is not finite is left out."""
    images = metrics["images"]
    shares: Iterable[tuple[str, float]] = (
        (name, value / images if name in ("top1", "top5") else value) for name, value in metrics.items()
    )
    return {name: round(value, DIGITS) for name, value in shares if math.isfinite(value)}
