"""Training alone: the bits of a federation of one site, stopped and gone on anywhere, with no policy in its way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rin.client import alone
from rin.client.home import Home
from rin.common import formats, snapshots
from rin.common.checkpoint import ALONE
from rin.common.errors import ConfigError, RefusedError, StateError
from rin.common.files import write_atomic, write_json
from rin.common.labels import label_set
from rin.common.layout import file_digest
from rin.common.weights import read_facts
from tests import simulator
from tests.simulator import plan_text, stripes

ROWS = tuple(label.index for label in label_set() if (label.modality, label.anatomy) == ("MR", "knee"))[:3]


def plan(sites: tuple[str, ...] = ("siteA",), **tables: dict[str, Any]) -> bytes:
    limits = {"quorum": 1, "min_sites": 1}
    return plan_text(sites, **({"limits": limits} | tables))


def home_of(folder: Path, data: bytes, policy: str = "") -> Home:
    """A site with training and validation images that has accepted nothing."""
    home = Home(folder / "home")
    images = [
        stripes(ROWS, 48, 1),
        simulator.Images(*(stripes(ROWS, 45, 2).pixels, stripes(ROWS, 45, 2).labels, "val")),
    ]
    simulator.make_home(home, "siteA", images, ROWS, data)
    text = home.site_toml.read_text()
    home.site_toml.write_text(text.partition("[policy]")[0] + policy)
    for path in home.accepted.iterdir():
        path.unlink()
    return home


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("model", [{}, {"local_norms": True}, {"norm": "group", "target": "multi"}])
def test_it_is_a_federation_of_one_site_to_the_bit(tmp_path: Path, model: dict[str, Any]) -> None:
    data = plan(model={"backbone": "resnet18", "image_size": 32, **model}, training={"rounds": 3})
    images = {"siteA": [stripes(ROWS, 48, 1)]}
    federation = simulator.make(tmp_path / "federation", images, {"siteA": ROWS}, data)
    federation.go()
    last = alone.train(federation.homes["siteA"], data, tmp_path / "alone")
    assert last.name == "round-0003.safetensors"
    for number in (0, 1, 2, 3):
        here = tmp_path / "alone" / "checkpoints" / f"round-{number:04d}.safetensors"
        assert file_digest(here) == file_digest(federation.run.checkpoint(number))
    assert file_digest(last) != file_digest(federation.run.checkpoint(2))


@pytest.mark.usefixtures("tiny")
def test_no_policy_acceptance_or_site_list_is_in_its_way_and_the_checkpoint_says_so(tmp_path: Path) -> None:
    data = plan(("somebody", "else"), limits={"quorum": 2, "min_sites": 2})
    home, lines = home_of(tmp_path, data), list[dict[str, Any]]()  # privacy = "required" and every floor by default
    last = alone.train(home, data, tmp_path / "out", on_round=lines.append)
    facts = read_facts(last)
    assert (facts["privacy"], facts["site"], facts["round"], facts["updates"]) == (ALONE, "siteA", 2, {})
    assert facts["weights"] == file_digest(last)
    assert formats.read(last).model.backbone == "resnet18"
    assert [line["round"] for line in lines] == [1, 2]
    assert lines == [json.loads(line) for line in (tmp_path / "out" / "figures.jsonl").read_text().splitlines()]
    assert set(lines[1]["training"]) == {"images", "loss", "top1", "top5"}
    assert lines[1]["validation"]["images"] == 45
    assert {"loss", "top1", "auc"} <= set(lines[1]["validation"])
    assert not home.egress_log.exists()
    assert not list(home.outbox.glob("*"))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("local_norms", [False, True])
def test_stopped_anywhere_it_ends_in_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_norms: bool
) -> None:
    data = plan(model={"backbone": "resnet18", "image_size": 32, "local_norms": local_norms})
    home = home_of(tmp_path, data)
    whole = alone.train(home, data, tmp_path / "whole")
    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    steps = list[int]()

    class Stop(Exception):
        pass

    def after(number: int) -> Any:
        def progress(done: int, total: int) -> None:
            steps.append(done)
            if done == number:
                raise Stop

        return progress

    def now(figures: dict[str, Any]) -> None:
        raise Stop

    out = tmp_path / "out"
    for options in (
        {"progress": after(3)},
        {"progress": after(7)},
        {"on_round": now, "progress": after(0)},
        {"progress": after(12)},
    ):
        with pytest.raises(Stop):
            alone.train(home, data, out, **options)
    last = alone.train(home, data, out, progress=after(0))
    assert steps[:3] == [1, 2, 3]
    assert steps.count(8) == 1  # the second round did not begin anew, nor did the first
    assert last.read_bytes() == whole.read_bytes()
    assert (out / "figures.jsonl").read_bytes() == (tmp_path / "whole" / "figures.jsonl").read_bytes()
    assert alone.train(home, data, out) == last  # nothing left to do
    assert {path.name for path in (out / "work").iterdir()} <= {"trained.json", "norms"}


@pytest.mark.usefixtures("tiny")
def test_it_starts_from_weights_of_its_network(tmp_path: Path) -> None:
    data = plan()
    home = home_of(tmp_path, data)
    first = alone.train(home, data, tmp_path / "first")
    again = plan(training={"rounds": 1, "seed": 9})
    alone.train(home, again, tmp_path / "second", weights=first)
    start = tmp_path / "second" / "checkpoints" / "round-0000.safetensors"
    assert file_digest(start) == file_digest(first)
    alone.train(home, again, tmp_path / "second", weights=first)
    with pytest.raises(StateError, match="of another weights"):
        alone.train(
            home, again, tmp_path / "second", weights=tmp_path / "first" / "checkpoints" / "round-0001.safetensors"
        )
    other = plan(model={"backbone": "resnet18", "image_size": 32, "normalisation": "imagenet"})
    with pytest.raises(ConfigError, match="normalised as symmetric, the plan says"):
        alone.train(home, other, tmp_path / "third", weights=first)
    named = plan(model={"backbone": "resnet18", "image_size": 32, "start": "0" * 64})
    with pytest.raises(ConfigError, match="the plan starts from weights 000"):
        alone.train(home, named, tmp_path / "fourth", weights=first)


@pytest.mark.usefixtures("tiny")
def test_what_it_refuses(tmp_path: Path) -> None:
    data, out = plan(), tmp_path / "out"
    home = home_of(tmp_path, data)
    alone.train(home, data, out)
    with pytest.raises(StateError, match="a training of another plan"):
        alone.train(home, plan(training={"seed": 1}), out)
    text = home.site_toml.read_text()
    home.site_toml.write_text(text.replace(label_set()[ROWS[0]].name, label_set()[0].name))
    with pytest.raises(StateError, match="of another labels"):
        alone.train(home, data, out)
    home.site_toml.write_text('site = "siteA"\n')
    with pytest.raises(RefusedError) as caught:
        alone.train(home, data, tmp_path / "other")
    assert caught.value.code == "no-data"


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *sorted(folder.rglob("*"))]
    }


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt"],
        ["plan.toml"],
        ["work/thesis.tex", "train.lock"],
        ["checkpoints/round-0007.safetensors", "train.lock"],
        ["train.json"],
        ["plan.toml", "run.json", "members.json"],
    ],
)
def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path: Path, names: list[str]) -> None:
    data, out = plan(), tmp_path / "out"
    home = home_of(tmp_path, data)
    for name in names:
        write_atomic(out / name, b"" if name.endswith("lock") else b"{}")
    out.chmod(0o755)
    before = everything(out)
    with pytest.raises(StateError) as caught:
        alone.train(home, data, out)
    assert caught.value.step
    assert everything(out) == before


@pytest.mark.usefixtures("tiny")
def test_a_run_directory_is_refused_even_with_a_training_in_it(tmp_path: Path) -> None:
    data, out = plan(), tmp_path / "out"
    home = home_of(tmp_path, data)
    alone.train(home, data, out)
    write_json(out / "members.json", {})
    before = everything(out)
    with pytest.raises(StateError, match="run directory of a coordinator"):
        alone.train(home, data, out)
    assert everything(out) == before


@pytest.mark.usefixtures("tiny")
def test_a_first_start_that_was_cut_short_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = plan(), tmp_path / "out"
    home = home_of(tmp_path, data)
    with monkeypatch.context() as patch:
        patch.setattr(alone, "write_json", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            alone.train(home, data, out)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "plan.toml", "train.lock"]
    (out / ".train.json.abc_1234.part").touch()
    (out / "checkpoints" / ".round-0000.safetensors.abc_1234.part").touch()
    assert alone.train(home, data, out).exists()


@pytest.mark.usefixtures("tiny")
def test_the_folder_is_its_owners_and_nothing_goes_that_training_has_not_made(tmp_path: Path) -> None:
    data, out = plan(training={"rounds": 1}), tmp_path / "out"
    home = home_of(tmp_path, data)
    out.mkdir(mode=0o755)
    for name in ("work/notes.txt", "work/torchrun.bak/log", "checkpoints/round-final.safetensors", "mine"):
        with pytest.raises(RefusedError, match="cancelled"):
            alone.train(home, data, out, cancelled=lambda: "cancelled")
        write_atomic(out / name, b"mine")
    assert out.stat().st_mode & 0o777 == 0o700
    (out / "checkpoints" / ".round-0001.safetensors.abc_1234.part").touch()
    alone.train(home, data, out)
    assert {path.name for path in (out / "work").iterdir()} == {"trained.json", "notes.txt", "torchrun.bak"}
    kept = {path.name for path in (out / "checkpoints").iterdir()}
    assert kept == {"round-0000.safetensors", "round-0001.safetensors", "round-final.safetensors"}


@pytest.mark.usefixtures("tiny")
def test_what_is_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    data, out = plan(), tmp_path / "out"
    home = home_of(tmp_path, data)
    last = alone.train(home, data, out)
    before = everything(out)
    flipped = last.read_bytes()[:-1] + bytes([last.read_bytes()[-1] ^ 1])
    torn = {
        last: [last.read_bytes()[:-3], b"", flipped],
        out / "figures.jsonl": [(out / "figures.jsonl").read_bytes()[:-9], b"[]\n", b"\xff"],
        out / "train.json": [b"{", b"[]", b"{}"],
    }
    for path, contents in torn.items():
        whole = path.read_bytes()
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(StateError) as caught:
                alone.train(home, data, out)
            assert path.name in str(caught.value)
            assert caught.value.step
        path.write_bytes(whole)
    last.unlink()  # as the error says
    assert alone.train(home, data, out) == last
    assert everything(out) == before


@pytest.mark.usefixtures("tiny")
def test_what_the_labels_mean_and_what_is_held_out_stay(tmp_path: Path) -> None:
    data, out = plan(), tmp_path / "out"
    home = home_of(tmp_path, data)
    alone.train(home, data, out)
    text = home.site_toml.read_text()
    name = label_set()[ROWS[0]].name
    home.site_toml.write_text(text.replace("[labels]\n", f'[labels]\nexhaustive = ["{name}"]\n'))
    with pytest.raises(StateError, match="of another exhaustive"):
        alone.train(home, data, out)
    home.site_toml.write_text(text + "[archive]\nhold-out = false\n")
    with pytest.raises(StateError, match="of another hold-out"):
        alone.train(home, data, out)
    home.site_toml.write_text(text)
    alone.train(home, data, out)


@pytest.mark.usefixtures("tiny")
def test_a_round_finds_room_for_all_that_it_writes_or_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = plan(training={"rounds": 1, "optimizer": "adamw", "ema": 0.5})
    home, sizes, out = home_of(tmp_path, data), list[int](), tmp_path / "out"
    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    real = shutil.disk_usage(tmp_path)

    def look(done: int, total: int) -> None:
        sizes.append(2 * (out / "work" / "snapshot.safetensors").stat().st_size)

    def disk(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=free))

    last = alone.train(home, data, out, progress=look)
    header = 4000  # names in a snapshot; nothing beside the weights of a real network
    needed = max(sizes) - 2 * header + last.stat().st_size
    disk(needed - 1)
    with pytest.raises(RefusedError) as caught:
        alone.train(home, data, tmp_path / "other")
    assert caught.value.code == "disk-full"


@pytest.mark.usefixtures("tiny")
def test_a_disk_that_fills_up_in_a_round_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = plan()
    home = home_of(tmp_path, data)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args: Any, **options: Any) -> None:
        raise full

    monkeypatch.setattr(alone, "write_json", fail)
    with pytest.raises(RefusedError) as caught:
        alone.train(home, data, tmp_path / "out")
    assert caught.value.code == "disk-full"
    assert "goes on" in caught.value.step


@pytest.mark.usefixtures("tiny")
def test_a_checkpoint_says_which_labels_it_was_trained_on_and_from_what(tmp_path: Path) -> None:
    data = plan(training={"rounds": 1})
    home = home_of(tmp_path, data)
    first = alone.train(home, data, tmp_path / "first")
    names = [label_set()[row].name for row in ROWS]
    facts = read_facts(first)
    assert (facts["trained_labels"], facts["start"]) == (names, "")
    start = tmp_path / "first" / "checkpoints" / "round-0000.safetensors"
    assert read_facts(start)["trained_labels"] == []
    second = alone.train(home, data, tmp_path / "second", weights=first)
    assert read_facts(second)["start"] == file_digest(first)
    with pytest.raises(ConfigError, match="about the file of --weights"):
        alone.train(home, data, tmp_path / "third", normalisation="imagenet")


def test_the_command_can_be_stopped_and_goes_on(tmp_path: Path) -> None:
    data = plan(training={"rounds": 2, "local_steps": 6, "batch_size": 8})
    home = home_of(tmp_path, data)
    (tmp_path / "plan.toml").write_bytes(data)
    command = [sys.executable, "-m", "rin.client.cli", "train", "--home", str(home.root), "--json"]
    command += ["--plan", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["round"] == 1
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "the same command goes on from here" in errors
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["round"] for line in done.stdout.splitlines()] == [2]
    assert "no network" in done.stderr or "network is open" in done.stderr
    whole = alone.train(home, data, tmp_path / "whole")
    assert file_digest(whole) == file_digest(tmp_path / "out" / "checkpoints" / "round-0002.safetensors")
