import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from rin.common.backbones import initial
from rin.common.errors import RefusedError
from rin.common.fit import FitResult, fit_round
from rin.common.plan import Plan
from rin.common.snapshots import Snapshots
from tests.common.test_fit import CPU, EVERYTHING, ROWS, Stripes, plan


def stretch(p: Plan, snapshots: Snapshots | None, stop_after: int = 99) -> tuple[dict[str, torch.Tensor], FitResult]:
    """A round's weights, cancelled after some of its steps."""
    net, done = initial(p.model, 0), 0

    def progress(step: int, steps: int) -> None:
        nonlocal done
        done = step

    result = fit_round(
        net,
        Stripes(30),
        p,
        rows=ROWS,
        round=1,
        site="a",
        device=CPU,
        threads=1,
        progress=progress,
        cancelled=lambda: done >= stop_after,
        snapshots=snapshots,
    )
    return {name: value.clone() for name, value in net.state_dict().items()}, result


@pytest.mark.parametrize("options", [{"optimizer": "sgd"}, {"optimizer": "adamw", **EVERYTHING}])
def test_an_interrupted_stretch_ends_in_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    p = plan({"name": "fedprox", "mu": 0.1}, local_steps=5, **options)
    whole, figures = stretch(p, None)
    for stop in (2, 4):
        with pytest.raises(RefusedError):
            stretch(p, Snapshots(tmp_path / "kept", "one", every=0.0), stop)
    again, counted = stretch(p, Snapshots(tmp_path / "kept", "one"))
    assert all(torch.equal(whole[name], value) for name, value in again.items())
    assert counted == figures


def test_what_is_of_another_stretch_or_damaged_is_not_taken_up(tmp_path: Path) -> None:
    p = plan(local_steps=3)
    whole, _ = stretch(p, None)
    with pytest.raises(RefusedError):
        stretch(p, Snapshots(tmp_path / "kept", "one", every=0.0), 2)
    kept = (tmp_path / "kept").read_bytes()
    for name, content in [("two", kept), ("one", kept[:-9]), ("one", b"")]:
        (tmp_path / "kept").write_bytes(content)
        again, _ = stretch(p, Snapshots(tmp_path / "kept", name))
        assert all(torch.equal(whole[name], value) for name, value in again.items())


def test_a_snapshot_waits_for_its_time_and_a_full_disk_costs_only_it(tmp_path: Path) -> None:
    p = plan(local_steps=3)
    stretch(p, Snapshots(tmp_path / "kept", "one"))
    assert not (tmp_path / "kept").exists()
    stretch(p, Snapshots(Path("/dev/null/kept"), "one", every=0.0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # as a disk that is full within the file
    try:
        stretch(p, Snapshots(tmp_path / "kept", "one", every=0.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    stretch(p, snapshots := Snapshots(tmp_path / "kept", "one", every=0.0))
    assert (tmp_path / "kept").exists()
    snapshots.remove()
    assert not (tmp_path / "kept").exists()
