"""The model card of exported weights: what they are, what they learned from, how they are loaded, what not to do."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rin.common.labels import Label, label_index, label_set
from rin.common.plan import Plan, plan_digest, read_plan
from rin.common.settings import Table
from rin.common.weights import read_facts
from rin.server.record import Record, read_record
from rin.server.rundir import RunDir
from rin.server.snippets import snippet
from rin.server.validation import COLUMNS, table

NOT_STATED: Final = "not stated"
UNKNOWN_PRIVACY: Final = "unknown: the file says nothing about how it was trained"
LIMITS: Final = (
    "Trained on key images: single two-dimensional pictures that somebody chose because they show a finding. A volume, "
    "or an image that nobody chose, is another population.",
    "Labels come from routine reports and local mappings; they were not read again.",
    "Meant as a start for fine-tuning and as a feature extractor. Not a medical device, not for diagnosis, and not "
    "validated for any clinical use.",
    "Inputs normalised in another way than stated above give features without meaning. Five conventions circulate for "
    "RadImageNet weights.",
)


@dataclass(frozen=True, slots=True)
class File:
    """One exported file."""

    name: str
    format: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run directory tells about the weights of round `number`.

    Attributes:
        counted: site to the rounds, up to `number`, in which its update counted.
        labels: site to the head rows that it declared.
        source: of the start: layout, file, head; empty for random weights.
        measured: of these very weights on held-out patients, where sites measured them.
    """

    plan: Plan
    digest: str
    number: int
    counted: Mapping[str, int]
    labels: Mapping[str, Sequence[int]]
    source: Mapping[str, Any]
    measured: Sequence[tuple[str, ...]] = ()

    @property
    def trained(self) -> list[str]:
        """Names of the labels that any site declared whose update counted: of these the head's rows were trained."""
        rows = {row for site, own in self.labels.items() if self.counted.get(site) for row in own}
        return [label_set()[row].name for row in sorted(rows)]


def run_data(run: RunDir, number: int) -> RunData:
    """What the run directory tells about its checkpoint `number`.

    Raises:
        ConfigError: there is no plan, so this is no run directory.
    """
    plan, data = read_plan(run.plan)
    records = [record for i in range(1, number + 1) if (record := read_record(run, i)) is not None]
    counted = Counter(site for record in records for site in record.receipts)
    source = read_facts(run.start).get("source", {}) if plan.model.start and run.start.exists() else {}
    after = read_record(run, number + 1)
    return RunData(
        plan,
        plan_digest(data),
        number,
        {site: counted[site] for site in sorted(plan.sites)},
        dict(sorted(records[-1].labels.items())) if records else {},
        source,
        _measured(after),
    )


def _measured(record: Record | None) -> Sequence[tuple[str, ...]]:
    return table(record.validation) if record is not None and record.validation is not None else ()


@dataclass(frozen=True, slots=True)
class Card:
    """All that the text is made of.

    Attributes:
        facts: `Weights.all_facts()`.
        digest: of the tensor bytes.
        head: whether the files hold a head over the label set.
        scores: rows of the benchmark's summary.json that are of these weights, with its tasks and seeds.
        statistics: what the guard says.
        notes: what was dropped or assumed when the weights were read.
    """

    name: str
    facts: Mapping[str, Any]
    digest: str
    head: bool
    files: Sequence[File]
    run: RunData | None = None
    scores: Sequence[Mapping[str, Any]] = ()
    bench: Mapping[str, Any] = field(default_factory=dict)
    statistics: str = ""
    notes: Sequence[str] = ()
    licence: str = ""

    def text(self) -> str:
        """The card as Markdown."""
        parts = [self._title(), self._files(), self._input(), self._loading(), self._data(), self._training()]
        parts += [self._privacy(), self._benchmark(), _section("Limitations", *(f"- {line}" for line in LIMITS))]
        parts.append(_section("Licence", plain(self.licence) or NOT_STATED))
        return "\n\n".join(part for part in parts if part) + "\n"

    def _title(self) -> str:
        facts = self.facts
        head = f"{len(label_set())} labels, names by row in {self.name}.json, label set {facts.get('label_set')}"
        rows = [
            ("backbone", facts["backbone"]),
            ("norm", facts["norm"]),
            ("head", head if self.head else "none"),
            ("weights", f"SHA-256 of the tensor bytes {self.digest}"),
            ("made with", f"rin {facts.get('release', NOT_STATED)}"),
        ]
        return f"# {plain(self.name)}\n\n{_table(('what', 'value'), rows)}"

    def _files(self) -> str:
        rows = [(file.name, file.format, f"{file.size:,}", file.sha256) for file in self.files]
        return _section("Files", _table(("file", "format", "bytes", "SHA-256"), rows))

    def _input(self) -> str:
        facts = self.facts
        mean, deviation = (", ".join(f"{value:g}" for value in facts[key]) for key in ("mean", "deviation"))
        lines = [
            f"Grey images of {facts['image_size']} x {facts['image_size']} pixels, aspect kept and padded to a square, "
            f"values 0..1, the same in all three channels, then `(x - mean) / deviation` (`{facts['normalisation']}`):",
            f"mean {mean}; deviation {deviation}. The ONNX file has this inside and takes values 0..1 in one channel.",
            f"Check of the statistics: {plain(self.statistics)}." if self.statistics else "",
            *(f"When the weights were read: {plain(note)}." for note in self.notes),
        ]
        return _section("Input", *lines)

    def _loading(self) -> str:
        texts = [snippet(file.format, file.name, self.facts, head=self.head) for file in self.files]
        return _section("Loading", *(text for text in texts if text))

    def _data(self) -> str:
        return _section("Data", *(self._sites() if self.run is None else self._run_sites(self.run)), self._trained())

    def _sites(self) -> Iterable[str]:
        """What the file itself says about where its images are."""
        facts = self.facts
        if "site" in facts:
            yield f"Key images that stayed at one site, {plain(facts['site'])}, which trained alone."
        elif sites := sorted(facts.get("updates", {})):
            yield f"Sites whose updates counted in the last round: {', '.join(plain(site) for site in sites)}."
        else:
            yield "Not known: the file does not say what it was trained on."

    def _run_sites(self, run: RunData) -> Iterable[str]:
        total = sum(run.plan.sites.values())
        rows = [
            (site, f"{run.plan.sites[site] / total:.0%}", str(run.counted[site]), _labels(run.labels.get(site)))
            for site in run.counted
        ]
        yield "Key images that stayed at these sites; weights in the mean are agreed in the plan and tell no counts."
        yield _table(("site", "weight in the mean", "rounds counted", "labels declared"), rows)

    def _trained(self) -> str:
        """Which rows of the head have learned anything."""
        names = self.facts.get("trained_labels")
        if names is None:
            return "Labels trained: not stated." if self.head else ""
        known = [label_index()[name] for name in names if name in label_index()]
        listed = f": {_labels(sorted(known))}" if known else ""
        rest = " The head's other rows hold what training began with." if self.head else ""
        return f"Labels trained: {len(names)} of {len(label_set())}{listed}.{rest}"

    def _training(self) -> str:
        facts = self.facts
        if self.run is not None:
            return _section("Training", *self._run_training(self.run))
        if not facts.get("plan"):
            return ""
        start = facts.get("start")
        rows = [
            ("plan", f"{facts.get('name', NOT_STATED)}, SHA-256 {facts['plan']}"),
            ("started from", f"weights {start}" if start else "random weights" if start == "" else NOT_STATED),
            ("rounds", f"{facts.get('round', NOT_STATED)} of {facts.get('rounds', NOT_STATED)}"),
        ]
        return _section("Training", _table(("what", "value"), rows))

    def _run_training(self, run: RunData) -> Iterable[str]:
        plan, source = run.plan, run.source
        training = plan.training
        start = "random weights"
        if plan.model.start:
            layout = f", read from a file in {source['layout']} layout (SHA-256 {source['file']})" if source else ""
            start = f"weights {plan.model.start}{layout}"
        tables: dict[str, Table] = {"network": plan.model, "training": training}
        tables |= {"augment": plan.augment, "strategy": plan.strategy}
        if plan.privacy.mode == "patient":  # a step has patients there, and no batch size
            tables |= {"privacy": plan.privacy}
        rows = [
            ("plan", f"{plan.name}, SHA-256 {run.digest}"),
            ("started from", start),
            ("rounds", f"{min(run.number, training.rounds)} of {training.rounds}"),
            *((name, _inline(table, private="privacy" in tables)) for name, table in tables.items()),
        ]
        yield _table(("what", "value"), rows)
        if run.measured:
            yield "On held-out patients of the sites, with small counts withheld:"
            yield _table(COLUMNS, run.measured)

    def _privacy(self) -> str:
        said = plain(str(self.facts.get("privacy", UNKNOWN_PRIVACY)))
        claims = self.facts.get("privacy_sites")
        if not claims:
            return _section("Privacy", said)
        keys = ("unit", "epsilon", "delta", "mechanism", "accountant")
        rows = [(site, *(claim.get(key, NOT_STATED) for key in keys)) for site, claim in sorted(claims.items())]
        as_json = f"For programs: `privacy_sites` in {self.name}.json."
        return _section("Privacy", said, _table(("site", *keys), rows), as_json)

    def _benchmark(self) -> str:
        if not self.scores:
            return _section("Benchmark", "No benchmark was given for these weights.")
        rows = [_score(score) for score in self.scores]
        made = f"{plain(str(self.bench['date']))}, rin {plain(str(self.bench['release']))}"
        return _section(
            "Benchmark",
            "Fine-tuned from these weights and from random ones by the same recipe; mean of "
            f"{self.bench['seeds']} seeds, 95 % intervals over test images ({made}).",
            _table(("task", "from these weights", "from random", "difference", "verdict"), rows),
        )


def _inline(table: Table, *, private: bool) -> str:
    meaningless = {"start", "rounds", *({"batch_size"} if private else ())}
    values = table.model_dump(mode="json", by_alias=True, exclude=meaningless)
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _score(score: Mapping[str, Any]) -> tuple[str, ...]:
    found = score["comparison"]
    figures = (_figure(found[key], sign) for key, sign in (("checkpoint", ""), ("random", ""), ("difference", "+")))
    return (str(score["task"]), *figures, str(score["verdict"]))


def _figure(interval: Mapping[str, float], sign: str) -> str:
    return f"{interval['value']:{sign}.3f} ({interval['low']:{sign}.3f} to {interval['high']:{sign}.3f})"


def _labels(rows: Sequence[int] | None) -> str:
    """Head rows as findings by modality and anatomy."""
    if rows is None:
        return "not known"
    groups: dict[str, list[Label]] = defaultdict(list)
    for row in rows:
        groups[f"{label_set()[row].modality} {label_set()[row].anatomy}"].append(label_set()[row])
    return "; ".join(f"{group}: {', '.join(f'`{each.finding}`' for each in found)}" for group, found in groups.items())


def _section(title: str, *paragraphs: str) -> str:
    kept = [text for text in paragraphs if text]
    lists = all(text.startswith("- ") for text in kept)
    return f"## {title}\n\n" + ("\n" if lists else "\n\n").join(kept)


def _table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    heads = list(columns)
    lines = [heads, ["---"] * len(heads), *([_cell(str(value)) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return (
        " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace("|", "\\|").replace("<", "&lt;")
    )


def plain(text: str) -> str:
    """`text` of somebody else's on one line, without anything that Markdown takes for more than words."""
    for mark in "`*_[]#":
        text = text.replace(mark, f"\\{mark}")
    return _cell(text)
