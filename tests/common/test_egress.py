"""The egress gate on real files: what may leave, what may not, and what is written down before it does."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rin.common.egress import check_update, pass_metrics, record
from rin.common.errors import RefusedError
from rin.common.layout import Layout
from rin.common.plan import MetricName

LAYOUT = Layout.of(
    [("head.weight", (3, 4), "parameter"), ("bn.mean", (5,), "buffer"), ("head.bias", (3,), "parameter")]
)
ALL: frozenset[MetricName] = frozenset({"loss", "top1", "top5", "images"})


def write(path: Path, values: list[float], layout: Layout = LAYOUT) -> Path:
    path.write_bytes(layout.header() + np.array(values, "<f4").tobytes())
    return path


def refused(path: Path, *, max_norm: float = 1e6, layout: Layout = LAYOUT) -> str:
    with pytest.raises(RefusedError) as caught:
        check_update(path, layout, max_norm=max_norm)
    return caught.value.code


def test_digest_and_norm_over_the_parameters_only(tmp_path: Path) -> None:
    values = [100.0] * 5 + [3.0, 0.0, 0.0] + [4.0] + [0.0] * 11  # bn.mean, head.bias, head.weight
    path = write(tmp_path / "u", values)
    facts = check_update(path, LAYOUT, max_norm=5.0)
    assert facts.norm == 5.0
    assert facts.digest == hashlib.sha256(np.array(values, "<f4").tobytes()).hexdigest()
    assert refused(path, max_norm=4.999) == "egress-refused"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 4, 5, 19])
def test_one_value_that_is_not_finite(tmp_path: Path, bad: float, place: int) -> None:
    values = [0.0] * 20
    values[place] = bad
    assert refused(write(tmp_path / "u", values)) == "not-finite"


def test_a_norm_beyond_float32_is_still_a_number(tmp_path: Path) -> None:
    assert refused(write(tmp_path / "u", [3e38] * 20), max_norm=1e38) == "egress-refused"


@pytest.mark.parametrize("change", ["short", "long", "header", "empty"])
def test_another_file_than_the_layouts(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "u", [0.0] * 20)
    data = path.read_bytes()
    path.write_bytes(
        {
            "short": data[:-1],
            "long": data + b"\0",
            "header": data.replace(b"bn.mean", b"bn.evil"),
            "empty": b"",
        }[change]
    )
    assert refused(path) == "egress-refused"


def test_memory_stays_flat(tmp_path: Path) -> None:
    big = Layout.of([("a", (32 << 20,), "parameter")])  # 128 MiB
    with (tmp_path / "u").open("wb") as file:
        file.write(big.header())
        file.truncate(big.file_bytes)
    code = f"""
import resource
from pathlib import Path
from rin.common.egress import check_update
from rin.common.layout import Layout
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
check_update(Path({str(tmp_path / "u")!r}), Layout.of([("a", (32 << 20,), "parameter")]), max_norm=1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert resource.RUSAGE_SELF is not None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 << 10  # KiB: a few blocks of 4 MiB and their squares in float64


def test_metrics_are_filtered_and_rounded() -> None:
    found: dict[MetricName, float] = {"loss": 1.234567, "top1": 12345.0, "top5": 23456.0, "images": 30000.0}
    assert pass_metrics(found, ALL) == {"loss": 1.235, "top1": 12340.0, "top5": 23460.0, "images": 30000.0}
    assert pass_metrics(found, frozenset({"top1"})) == {"top1": 12340.0}
    assert pass_metrics(found, frozenset()) == {}


def test_small_counts_stay_and_what_is_derived_from_them() -> None:
    assert pass_metrics({"loss": 0.5, "top1": 9.0, "top5": 10.0, "images": 10.0}, ALL) == {
        "loss": 0.5,
        "top5": 10.0,
        "images": 10.0,
    }
    assert pass_metrics({"loss": 0.5, "top1": 9.0, "images": 9.0}, ALL) == {}
    assert pass_metrics({"loss": 0.5}, ALL) == {}
    assert pass_metrics({"loss": 0.5, "images": math.nan}, ALL) == {}


@given(st.dictionaries(st.sampled_from(sorted(ALL)), st.floats()), st.sets(st.sampled_from(sorted(ALL))))
@example({"images": 1.7975e308}, {"images"})  # finite, and infinite when it is rounded
def test_nothing_passes_that_is_not_allowed_or_not_finite(found: dict[MetricName, float], allowed: set[str]) -> None:
    passed = pass_metrics(found, frozenset(name for name in ALL if name in allowed))
    assert passed.keys() <= allowed & found.keys()
    assert all(math.isfinite(value) for value in passed.values())
    assert not passed or found.get("images", 0) >= 10


def test_the_log_is_appended_line_by_line(tmp_path: Path) -> None:
    log = tmp_path / "vault" / "egress.jsonl"
    for number in (1, 2):
        record(log, what="update", digest="d" * 64, to="coordinator", facts={"round": number})
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert lines[0].keys() == {"time", "what", "sha256", "to", "round"}


def test_a_torn_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    log = tmp_path / "egress.jsonl"
    log.write_bytes(b'{"time": "2026-')
    record(log, what="update", digest="d" * 64, to="coordinator", facts={})
    assert json.loads(log.read_bytes().splitlines()[-1])["what"] == "update"


def test_facts_cannot_replace_what_the_log_says(tmp_path: Path) -> None:
    log = tmp_path / "egress.jsonl"
    record(log, what="update", digest="d" * 64, to="coordinator", facts={"sha256": "0", "what": "nothing"})
    line = json.loads(log.read_bytes())
    assert (line["sha256"], line["what"]) == ("d" * 64, "update")


def test_a_full_disk_is_an_error_and_not_a_silence() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match=os.strerror(28)):
        record(Path("/dev/full"), what="update", digest="d" * 64, to="coordinator", facts={})
