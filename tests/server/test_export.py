"""Export: what comes out loads elsewhere, equals what went in, and says on its card where it came from."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from rin.common import formats, weights
from rin.common.backbones import BACKBONES, initial
from rin.common.checkpoint import facts_of as checkpoint_facts
from rin.common.errors import ConfigError, StateError
from rin.common.files import sha256_file, write_json
from rin.common.formats import network_of, read, weights_of
from rin.common.keylayouts import CHILDREN
from rin.common.labels import label_set, label_set_digest
from rin.common.layout import file_digest
from rin.common.plan import IMAGE_SIZES, Model, parse_plan
from rin.server.card import Card, RunData
from rin.server.export import FORMATS, Source, export, newest
from rin.server.rundir import RunDir
from tests.private_consortium import private_plan
from tests.simulator import TINY, plan_text, small

ROWS = {"siteA": (0, 1, 2), "siteB": (1, 2, 3), "siteC": (0, 1, 2, 3)}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "resnet18", TINY)
        made = small(tmp_path_factory.mktemp("consortium"), rows=ROWS)
        made.go()
    return made.run


@pytest.fixture
def run(tiny_run: RunDir, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Two rounds of three sites, of the tiny network."""
    monkeypatch.setitem(BACKBONES, "resnet18", TINY)
    return tiny_run


def checkpoint(path: Path, backbone: str = "resnet18", norm: str = "batch") -> Path:
    """A file as a run writes it, of the real network, with nothing about a run in it."""
    size = IMAGE_SIZES[backbone].smallest
    facts: dict[str, Any] = {"backbone": backbone, "norm": norm, "image_size": size, "normalisation": "symmetric"}
    network = initial(Model.model_validate({key.replace("_", "-"): value for key, value in facts.items()}), 5)
    weights.save(path, network, weights.layout_of(network), facts={**facts, "label_set": label_set_digest()})
    return path


def test_the_card_of_a_private_run_names_its_mechanism_and_no_batch_size() -> None:
    for data, private in ((private_plan(), True), (plan_text(["siteA", "siteB", "siteC"]), False)):
        plan = parse_plan(data)
        facts = {**checkpoint_facts(plan, plan_digest="0" * 64, round=1, updates={}), "label_set": label_set_digest()}
        run = RunData(plan, "0" * 64, 1, {"siteA": 1}, {}, {})
        text = Card(name="w", facts=facts, digest="1" * 64, head=True, files=(), run=run).text()
        assert ("| privacy | mode patient, sigma 1.0, clip 1.0, patients 6" in text) is private
        assert ("batch-size" in text) is not private


def summary(path: Path, digest: str, task: str = "lesions") -> Path:
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    score = {
        "task": task,
        "checkpoint": "w",
        "verdict": "better",
        "comparison": dict.fromkeys(("checkpoint", "random", "difference"), interval),
    }
    checkpoints = [{"name": "w", "digest": digest, "facts": {}}]
    write_json(path, {"checkpoints": checkpoints, "scores": [score], "seeds": 3, "date": "2026-11-23", "release": "1"})
    return path


def test_a_runs_checkpoint_comes_out_with_all_that_the_run_knows(run: RunDir, tmp_path: Path) -> None:
    path = newest(run)
    assert path == run.checkpoint(2)
    done = export(path, tmp_path / "out", formats=["safetensors", "torchvision"], licence="CC-BY-4.0")
    names = ["resnet18-round-0002.safetensors", "resnet18-round-0002-torchvision.pth"]
    assert [file.name for file in done.files] == names
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == sorted(
        [*names, "README.md", "resnet18-round-0002.json"]
    )
    ours = tmp_path / "out" / names[0]
    assert file_digest(ours) == file_digest(path)
    facts = weights.read_facts(ours)
    before = weights.read_facts(path)
    assert {key: facts[key] for key in before} == before
    assert facts["sites"] == ["siteA", "siteB", "siteC"]
    assert facts["site_weights"] == {"siteA": 1.0, "siteB": 2.0, "siteC": 3.0}
    assert (facts["privacy_mode"], facts["privacy"][:5]) == ("none", "none:")
    card = (tmp_path / "out" / "README.md").read_text()
    for file in done.files:
        assert file.sha256 == sha256_file(tmp_path / "out" / file.name)
        assert f"| {file.name} | {file.format} | {file.size:,} | {file.sha256} |" in card
    assert facts["trained_labels"] == [label_set()[row].name for row in (0, 1, 2, 3)]
    assert "Labels trained: 4 of 165: " in card
    finding = label_set()[3].finding
    assert re.search(r"\| siteB \| 33% \| 2 \| [^|]*`" + re.escape(finding), card)
    assert re.search(r"\| siteA \| 17% \| 2 \| (?![^|]*`" + re.escape(finding) + "`)", card)
    for text in (facts["plan"], "started from | random weights", "| rounds | 2 of 2 |", "CC-BY-4.0", "No benchmark"):
        assert text in card
    assert "without differential privacy" in card
    assert str(tmp_path) not in card
    said = json.loads((tmp_path / "out" / "resnet18-round-0002.json").read_text())
    assert [file["sha256"] for file in said["files"]] == [file.sha256 for file in done.files]
    assert {key: said[key] for key in facts} == facts
    assert said["labels"][3] == label_set()[3].name


def test_an_export_never_overwrites_and_leaves_nothing_half_done(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no resnet18"):
        export(newest(run), tmp_path / "out", formats=["safetensors", "radimagenet"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    export(newest(run), tmp_path / "out", name="mine")
    assert (tmp_path / "out" / "mine.safetensors").exists()
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(StateError, match="already"):
        export(newest(run), tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ConfigError, match="unknown format tensorflow"):
        export(newest(run), tmp_path / "other", formats=["tensorflow"])


@pytest.mark.parametrize("name", ["../esc", "x/y", "", ".hidden", 'a"b', "a b", "a\nb", "ä", "a" * 65, "/tmp/x"])
def test_a_name_that_is_none_for_a_file_is_refused(run: RunDir, tmp_path: Path, name: str) -> None:
    (tmp_path / "esc.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="no name for files"):
        export(newest(run), tmp_path / "out", name=name)
    assert [path.name for path in tmp_path.iterdir()] == ["esc.safetensors"]
    assert (tmp_path / "esc.safetensors").read_text() == "mine"


@pytest.mark.parametrize("format", ["safetensors", "torchvision"])
@pytest.mark.parametrize("part", ["head", "backbone"])
def test_a_file_that_holds_anything_else_is_not_published(
    tmp_path: Path, format: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, write = FORMATS[format]

    def damage(path: Path, source: Source) -> None:
        network = copy.deepcopy(source.network)
        with torch.no_grad():
            next(network.get_submodule(part).parameters()).view(-1)[0] += 1
        changed = weights_of(network)
        write(path, replace(source, network=network, weights=changed))

    monkeypatch.setitem(FORMATS, format, (end, damage))
    with pytest.raises(StateError, match="does not hold what was read"):
        export(checkpoint(tmp_path / "w"), tmp_path / "out", formats=[format])
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_weights_trained_alone_say_so_on_their_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "resnet18", TINY)
    formats._shapes.cache_clear()
    plan = parse_plan(plan_text(["a", "b", "c"]))
    facts = checkpoint_facts(plan, plan_digest="ab" * 32, round=2, updates={})
    names = [label_set()[row].name for row in (0, 7)]
    network = initial(plan.model, 5)
    facts |= {"site": "siteA", "trained_labels": names}
    for extra, start in (({}, "random weights"), ({"start": "cd" * 32}, f"weights {'cd' * 32}")):
        weights.save(tmp_path / "w", network, weights.layout_of(network), facts=facts | extra)
        out = tmp_path / start[:6]
        export(tmp_path / "w", out)
        card = (out / "README.md").read_text()
        for text in (
            "one site, siteA, which trained alone",
            f"| plan | simulated, SHA-256 {'ab' * 32} |",
            f"| started from | {start} |",
            "| rounds | 2 of 2 |",
            "Labels trained: 2 of 165: ",
            f"`{label_set()[7].finding}`",
        ):
            assert text in card
        said = json.loads((out / "resnet18-round-0002.json").read_text())
        assert (said["trained_labels"], said["sites"], said["site"]) == (names, ["siteA"], "siteA")
    formats._shapes.cache_clear()


@pytest.mark.parametrize("out", ["/dev/null/out", "/proc/out", "/proc/nobody/out"])
def test_a_place_where_nothing_can_be_is_said_in_words(run: RunDir, out: str) -> None:
    with pytest.raises(StateError, match="cannot be made") as caught:
        export(newest(run), Path(out))
    assert caught.value.step


def test_a_benchmark_is_shown_for_the_weights_that_it_scored(run: RunDir, tmp_path: Path) -> None:
    right = summary(tmp_path / "right.json", file_digest(newest(run)), "a|b<script>")
    export(newest(run), tmp_path / "out", summary=right)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| a\\|b&lt;script> | 0.500 (0.250 to 0.750) |" in card
    assert "+0.500 (+0.250 to +0.750) | better |" in card
    with pytest.raises(ConfigError, match="no score of these weights"):
        export(newest(run), tmp_path / "no", summary=summary(tmp_path / "wrong.json", "00" * 32))
    with pytest.raises(StateError, match="cannot be read"):
        export(newest(run), tmp_path / "no", summary=tmp_path)
    write_json(tmp_path / "odd.json", [1])
    with pytest.raises(ConfigError, match="no summary"):
        export(newest(run), tmp_path / "no", summary=tmp_path / "odd.json")
    found = summary(run.root / "scores" / "summary.json", file_digest(newest(run)))
    export(newest(run), tmp_path / "found")
    found.unlink()
    assert "| lesions |" in (tmp_path / "found" / "README.md").read_text()


def test_weights_of_another_run_are_not_given_its_data(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not of the run"):
        export(checkpoint(tmp_path / "w"), tmp_path / "out", run=run)


def test_foreign_weights_come_out_without_a_head_and_with_nothing_made_up(tmp_path: Path) -> None:
    torch.save(resnet18(num_classes=7).state_dict(), tmp_path / "w")
    done = export(tmp_path / "w", tmp_path / "out", normalisation="symmetric", licence="a\n# title")
    found = read(tmp_path / "out" / "resnet18.safetensors")
    wanted = read(tmp_path / "w")
    assert found.digest() == wanted.digest()
    assert (found.head, found.model.normalisation) == ({}, "symmetric")
    assert "dropped the classifier fc" in done.notes[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Labels trained" not in card
    for text in (
        "| head | none |",
        "unknown: the file says nothing",
        "does not say what it was trained on",
        "a \\# title",
    ):
        assert text in card
    assert found.facts["source"] == {"layout": "torchvision", "file": sha256_file(tmp_path / "w")}
    again = export(tmp_path / "out" / "resnet18.safetensors", tmp_path / "again", formats=["torchvision"])
    state = torch.load(tmp_path / "again" / again.files[0].name, weights_only=True)
    assert not [name for name in state if name.startswith("fc")]


def test_what_the_guard_says_stands_on_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = resnet18(num_classes=2)
    network.bn1.running_mean.add_(1e4)  # type: ignore[operator]
    torch.save(network.state_dict(), tmp_path / "w")
    assert export(tmp_path / "w", tmp_path / "out").verdict.warning
    assert "fit no known normalisation" in (tmp_path / "out" / "README.md").read_text()
    assert "fit no known normalisation" in caplog.text


def run_card(folder: Path, backbone: str, formats: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of code on the card gives the values of the weights."""
    module = network_of(read(next(folder.glob("*.safetensors"))))
    size = module.image_size
    images = torch.randint(0, 256, (2, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features, logits = module.features(images), module(images)
    monkeypatch.chdir(folder)
    pieces = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(pieces) == len(formats)
    for format, piece in zip(formats, pieces, strict=True):
        names: dict[str, Any] = {"images": images}
        exec(piece, names)
        if format in ("safetensors", "onnx"):
            assert torch.allclose(torch.as_tensor(names["features"]), features, atol=1e-4)
        if format in ("torchvision", "onnx"):
            assert torch.allclose(torch.as_tensor(names["logits"]), logits, atol=1e-4)
        if format == "radimagenet":
            maps = names["maps"].relu().mean((2, 3)) if backbone == "densenet121" else names["maps"].flatten(1)
            assert torch.allclose(maps, features, atol=1e-4)


def test_every_file_loads_with_the_code_on_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = ["safetensors", "torchvision", "onnx"]
    export(checkpoint(tmp_path / "w"), tmp_path / "out", formats=formats)
    run_card(tmp_path / "out", "resnet18", formats, monkeypatch)
    data = (tmp_path / "out" / "resnet18.onnx").read_bytes()
    assert b"stack_trace" not in data
    assert b"site-packages" not in data
    assert str(Path(__file__).parents[2]).encode() not in data
    import onnx

    props = {prop.key: prop.value for prop in onnx.load_from_string(data).metadata_props}
    assert json.loads(props["rin"])["normalisation"] == "symmetric"


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "resnet18"])
def test_every_network_comes_out_in_every_format_that_can_hold_it(
    tmp_path: Path, backbone: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = ["safetensors", "onnx"]
    if norm == "batch" or backbone == "swin_t":
        formats.insert(1, "torchvision")
    if norm == "batch" and backbone in CHILDREN:
        formats.insert(2, "radimagenet")
    source = checkpoint(tmp_path / "w", backbone, norm)
    export(source, tmp_path / "out", formats=formats)
    run_card(tmp_path / "out", backbone, formats, monkeypatch)
    for format in set(FORMATS) - set(formats):
        with pytest.raises(ConfigError):
            export(source, tmp_path / "no", formats=[format])


def test_a_missing_package_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="onnxscript") as caught:
        export(checkpoint(tmp_path / "w"), tmp_path / "out", formats=["onnx"])
    assert "rin[onnx]" in caught.value.step


def test_a_file_that_onnxruntime_reads_differently_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    class Wrong(onnxruntime.InferenceSession):
        def run(self, *args: Any, **options: Any) -> Any:
            return [np.asarray(value) * 1.001 for value in super().run(*args, **options)]

    monkeypatch.setitem(BACKBONES, "resnet18", TINY)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(StateError, match="differs"):
        export(checkpoint(tmp_path / "w"), tmp_path / "out", formats=["onnx"])
    assert not (tmp_path / "out").exists()
