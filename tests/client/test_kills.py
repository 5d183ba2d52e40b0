"""Kill -9 of a trainer at any step: the finished update has an undisturbed one's bits, and little is done twice."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from rin.common.layout import file_digest

if TYPE_CHECKING:
    from tests.client.conftest import SmallSite

    Make = Callable[..., SmallSite]

SLACK = 6  # steps that a trainer may take between a line and the kill that follows it


def lives(orders: Sequence[tuple[SmallSite, Mapping[int, Sequence[int]]]]) -> list[dict[str, Any]]:
    """Train the rounds of each site, killed at those steps; every life."""
    lines = [
        json.dumps(
            {"home": str(site.home.root), "request": site.request(number).to_bytes().decode(), "kills": list(steps)}
        )
        for site, kills in orders
        for number, steps in kills.items()
    ]
    command = [sys.executable, "-m", "tests.client.lives"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def cpu_seconds() -> float:
    """Of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def updates(site: SmallSite) -> dict[str, str]:
    """Request to update, of the rounds that are kept."""
    return {path.stem: file_digest(path) for path in site.home.outbox.glob("*.safetensors")}


def check(found: list[dict[str, Any]], steps: int) -> None:
    """Within a round no life begins before the one before it, and most go on after a snapshot."""
    last: dict[tuple[str, int], int] = {}
    for life in found:
        key = life["home"], life["round"]
        if life["first"]:  # else it was killed before its first step, or only had to write its update
            assert life["first"] >= last.get(key, 1)
            last[key] = life["first"]
    again = [life["first"] for life in found if life["first"] > 1]
    assert len(again) > 0.8 * sum(1 for life in found if life["killed"])
    assert max(again) > steps / 2


@pytest.mark.slow  # one kill of a trainer, in tests/client/test_airlock.py, is in the default suite
def test_killed_twice_it_goes_on_from_its_snapshots(small_site: Make) -> None:
    disturbed, other = small_site(steps=24), small_site(steps=24, name="undisturbed")
    found = lives([(disturbed, {1: (8, 18)}), (other, {1: ()})])
    assert [bool(life["killed"]) for life in found] == [True, True, False, False]
    assert found[0]["first"] == found[3]["first"] == 1
    assert 1 < found[1]["first"] <= found[0]["killed"] + SLACK
    assert found[1]["first"] <= found[2]["first"] <= found[1]["killed"] + SLACK
    assert found[2]["first"] > found[0]["killed"] / 2
    assert updates(disturbed) == updates(other) != {}


@pytest.mark.slow
def test_fifty_kills_leave_the_same_bits(small_site: Make) -> None:
    steps, rounds = 60, 3
    chosen = sorted(random.Random(50).sample(range(1, steps * rounds), 50))
    kills = {n: [k - (n - 1) * steps for k in chosen if 0 < k - (n - 1) * steps <= steps] for n in range(1, rounds + 1)}
    disturbed, other = small_site(steps=steps), small_site(steps=steps, name="undisturbed")
    began, used = time.monotonic(), cpu_seconds()
    found = lives([(disturbed, kills), (other, dict.fromkeys(kills, ()))])
    killed = [life for life in found if life["killed"]]
    print(f"{len(killed)} kills: {time.monotonic() - began:.0f} s, of them {cpu_seconds() - used:.0f} s CPU")
    assert len(killed) >= 48  # a round may end before its last kill comes
    check(found, steps)
    assert updates(disturbed) == updates(other)
    assert len(updates(other)) == 2  # those of the last two rounds are kept
