"""Report: one file, nothing loaded, everything escaped, every number shown."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from rin.common import statement
from rin.common.chain import MECHANISM, START
from rin.common.wire import Claim
from rin.server.bench.report import RANDOM, Examples, headline, render, write_report
from rin.server.bench.statistics import Comparison, Interval
from rin.server.bench.summary import Checkpoint, RoundFacts, SiteRound, Summary, TaskFacts, TaskScore

EVIL = "<script>alert('&')</script>"


def comparison(value: float, random: float) -> Comparison:
    gap = value - random
    return Comparison(
        Interval(value, value - 0.02, value + 0.02),
        Interval(random, random - 0.03, random + 0.03),
        Interval(gap, gap - 0.03, gap + 0.03),
        (value - 0.01, value, value + 0.01),
        (random + 0.02, random, random - 0.02),
    )


def summary(**changes: Any) -> Summary:
    tasks = (
        TaskFacts(
            "nodule",
            "auc",
            "benign or malignant?",
            ("benign", "malignant"),
            {"source": "image folder", "training_images": 48},
            {"steps": 60},
        ),
        TaskFacts(
            "lesion",
            "dice",
            "outline of the lesion",
            ("lesion",),
            {"source": "phantom", "dropped": {"duplicate": 3}},
            {"steps": 60},
        ),
    )
    scores = (
        TaskScore("nodule", "round-0005", comparison(0.93, 0.81), 40.0),
        TaskScore("lesion", "round-0005", comparison(0.62, 0.61), 40.0),
    )
    sites = ("siteA", "siteB", "siteC")
    rounds = tuple(
        RoundFacts(
            n,
            20.0 + n,
            tuple(SiteRound(s, {"loss": 2.4 / n + i / 10, "top1": n / (8 + i)}) for i, s in enumerate(sites)),
            (("siteB", "transfer", 2),) if n == 2 else (),
        )
        for n in range(1, 6)
    )
    facts = {
        "backbone": "resnet18",
        "image_size": 64,
        "updates": dict.fromkeys(sites, "ab" * 32),
        "privacy": "No mechanism.",
    }
    base = Summary(
        "0.1.0",
        "2026-11-23",
        3,
        2000,
        2,
        (Checkpoint("round-0005", "cd" * 32, facts),),
        tasks,
        scores,
        {
            "name": "phantom consortium",
            "sites": list(sites),
            "rounds": 5,
            "strategy": "fedavg",
            "privacy": "none",
            "plan": "ab" * 32,
        },
        rounds,
        {
            s: {"files": 1700, "accepted": 1650, "refused": {"truncated": 30, "not-dicom": 20}, "seconds": 9.0}
            for s in sites
        },
        {"canaries": 3000, "bytes_searched": 9e8, "found": 0, "damaged": dict.fromkeys(sites, 45), "unaccounted": 0},
    )
    return dataclasses.replace(base, **changes)


def examples() -> dict[str, Examples]:
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64), dtype=np.uint8)
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[:, 20:40, 20:40] = 1
    auc = {"round-0005": [("malignant 0.93", None)] * 2, RANDOM: [("benign 0.51", None)] * 2}
    dice = {"round-0005": [("Dice 0.71", masks[0])] * 2, RANDOM: [("Dice 0.30", masks[0])] * 2}
    return {
        "nodule": Examples(images, ("benign", "malignant"), None, auc),
        "lesion": Examples(images, ("lesion", "lesion"), masks, dice),
    }


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_nothing_and_says_so_to_the_browser() -> None:
    page = Page(render(summary(), examples()))
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert not {"script", "link", "iframe", "object", "form", "a"} & {tag for tag, _ in page.tags}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 2 + 2 + 2 + 4
    assert all(
        source and re.match(r"data:image/(png|jpeg|svg\+xml);base64,[A-Za-z0-9+/=]+$", source) for source in sources
    )
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")


def test_the_page_shows_every_headline_number_and_account() -> None:
    text = " ".join(Page(render(summary(), examples())).text.split())
    for expected in (
        "0.930",
        "+0.120",
        "(+0.090 to +0.150)",
        "better",
        "not clearly different",
        "siteB: transfer, 2 times",
    ):
        assert expected in text
    assert "1700" in text
    assert "not-dicom 20, truncated 30" in text
    assert "0 found" in text
    assert "No mechanism." in text
    assert "Privacy mode of the run: none." in text
    assert "cd" * 32 in text
    assert text.count("Look for names burned into the images") == 1


def test_every_text_is_escaped_wherever_it_comes_from() -> None:
    base = summary()
    evil = summary(
        release=EVIL,
        date=EVIL,
        checkpoints=(Checkpoint(EVIL, EVIL, {EVIL: EVIL, "privacy": EVIL, "list": [EVIL], "table": {EVIL: EVIL}}),),
        tasks=tuple(
            dataclasses.replace(t, description=EVIL, classes=(EVIL,), dataset={EVIL: EVIL, "source": EVIL})
            for t in base.tasks
        ),
        scores=tuple(dataclasses.replace(s, checkpoint=EVIL) for s in base.scores),
        run={**base.run, "name": EVIL, "strategy": EVIL},
        rounds=(RoundFacts(1, 1.0, (SiteRound(EVIL, {"loss": 1.0}),), ((EVIL, EVIL, 1),)),),
        ingest={EVIL: {"files": 1, "accepted": 0, "refused": {EVIL: 1}}},
        privacy={"canaries": EVIL, "bytes_searched": 1, "found": EVIL, "unaccounted": EVIL, "damaged": {EVIL: 1}},
    )
    pictures = {"nodule": dataclasses.replace(examples()["nodule"], captions=(EVIL, EVIL))}
    page = render(evil, pictures)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 20


def test_a_benchmark_of_several_weights_without_a_run_is_shown_too() -> None:
    base = summary()
    several = (*base.checkpoints, Checkpoint("siteA", "ee" * 32, {}))
    scores = tuple(dataclasses.replace(s, checkpoint=c.name) for c in several for s in base.scores)
    text = Page(render(summary(checkpoints=several, scores=scores, run={}, rounds=(), ingest={}, privacy={}), {})).text
    assert "siteA" in text
    assert "nothing can be said about privacy" in text
    assert "Learning, by round" not in text
    assert "What became of every file" not in text


def test_the_headline_never_claims_more_than_the_intervals() -> None:
    better, unclear, worse = comparison(0.9, 0.8), comparison(0.81, 0.8), comparison(0.7, 0.8)

    def line(*found: Comparison) -> str:
        scores = tuple(TaskScore(f"t{i}", "round-0005", c, 1.0) for i, c in enumerate(found))
        return headline(summary(scores=scores))

    assert line(better).endswith("is better on t0.")
    assert line(better, worse, unclear).endswith("is better on t0, not clearly different on t2, worse on t1.")
    assert line(unclear, unclear).endswith("is not clearly different on every task.")
    assert "better" not in line(worse, unclear)


def test_names_with_dollar_signs_are_names() -> None:
    base = summary()
    several = (Checkpoint("a$b", "ee" * 32, {}), Checkpoint(r"$\frac$", "dd" * 32, {}))
    scores = tuple(dataclasses.replace(s, checkpoint=c.name) for c in several for s in base.scores)
    assert "a$b" in render(summary(checkpoints=several, scores=scores), {})


def test_the_same_summary_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(summary(), examples(), tmp_path / name / "index.html")
    assert (tmp_path / "a" / "index.html").read_bytes() == (tmp_path / "b" / "index.html").read_bytes()


def test_a_private_run_is_said_in_words_and_its_claims_as_json() -> None:
    claim = Claim(epsilon=1.25, delta=1e-5, mechanism=MECHANISM, ledger=START)
    facts = {"backbone": "resnet18", **statement.facts({"siteA": claim})}
    text = Page(render(summary(checkpoints=(Checkpoint("round-0005", "cd" * 32, facts),)), {})).text
    assert facts["privacy"] in " ".join(text.split())
    assert json.dumps(facts["privacy_sites"]["siteA"], sort_keys=True) in text
