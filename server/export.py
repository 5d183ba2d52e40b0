"""`rin-server export`: weights of any known layout as the files that other people load, with a model card."""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from rin.common.backbones import BACKBONES, Network
from rin.common.errors import ConfigError, StateError
from rin.common.files import fsync_dir, make_dir, read_json, sha256_file, write_atomic, write_json
from rin.common.formats import Weights, network_of, read
from rin.common.guard import Verdict
from rin.common.keylayouts import radimagenet_state, torchvision_state
from rin.common.labels import label_set, label_set_digest
from rin.common.layout import Layout
from rin.common.statedict import read_state
from rin.common.weights import write_tensors
from rin.server.card import UNKNOWN_PRIVACY, Card, File, RunData, run_data
from rin.server.onnxfile import write_onnx
from rin.server.record import last_record
from rin.server.rundir import RunDir
from rin.server.weightfiles import open_weights

CARD: Final = "README.md"
NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")  # of files: on every system, in a shell, in code


@dataclass(frozen=True, slots=True)
class Source:
    """What every writer gets: the weights, the network with them, and the facts for files that can hold them."""

    weights: Weights
    network: Network
    facts: Mapping[str, Any]

    @property
    def head(self) -> bool:
        return bool(self.weights.head)


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written into `folder`; `verdict` and `notes` are about the file that was read."""

    folder: Path
    files: tuple[File, ...]
    verdict: Verdict
    notes: tuple[str, ...]


def _safetensors(path: Path, source: Source) -> None:
    named = source.weights.named()
    layout = Layout.of((name, tuple(value.shape), "parameter") for name, value in named.items())
    write_tensors(path, layout, (named[t.name].numpy() for t in layout.tensors), facts=dict(source.facts))


def _torchvision(path: Path, source: Source) -> None:
    _save(path, torchvision_state(source.network, head=source.head))


def _radimagenet(path: Path, source: Source) -> None:
    _save(path, radimagenet_state(source.network))


def _onnx(path: Path, source: Source) -> None:
    write_onnx(path, source.network, head=source.head, facts=dict(source.facts))


def _save(path: Path, state: Mapping[str, Tensor]) -> None:
    """Plain tensors only, so that it loads with weights_only.

    In memory first: torch hides what the disk says.
    """
    whole = io.BytesIO()
    torch.save({name: value.contiguous().clone() for name, value in state.items()}, whole)
    path.write_bytes(whole.getbuffer())


# Format to the end of its files' names and its writer.
FORMATS: Final[dict[str, tuple[str, Callable[[Path, Source], None]]]] = {
    "safetensors": (".safetensors", _safetensors),
    "torchvision": ("-torchvision.pth", _torchvision),
    "radimagenet": ("-radimagenet.pt", _radimagenet),
    "onnx": (".onnx", _onnx),
}


def export(
    path: Path,
    out: Path,
    *,
    formats: Sequence[str] = ("safetensors",),
    run: RunDir | None = None,
    summary: Path | None = None,
    name: str | None = None,
    licence: str = "",
    normalisation: str | None = None,
    image_size: int | None = None,
) -> Exported:
    """Write the weights at `path` into the new folder `out`, which appears whole or not at all.

    Args:
        formats: some of FORMATS.
        run: the run that made the weights, for the card; found by itself for a file of a run's checkpoints/.
        summary: summary.json of a benchmark of these weights, for the card; found by itself in the run's directory.
        name: of the files, of letters, digits, dot, dash, underscore; by default backbone and round.
        licence: for the card.
        normalisation, image_size: for a file that does not say its own.

    Raises:
        ConfigError: an unknown format, one that cannot hold these weights, a name that is none for a file, another
            run's directory or benchmark.
        RefusedError: the file cannot be used; see `rin.common.formats.read`.
        StateError: `out` is there already or cannot be made, or a written file does not hold what was read.
    """
    wanted = list(dict.fromkeys(formats))
    if unknown := [each for each in wanted if each not in FORMATS]:
        raise ConfigError(f"unknown format {unknown[0]}", step=f"choose some of {', '.join(FORMATS)}")
    if name is not None and not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for files",
            step="pass --name with letters, digits, dot, dash and underscore: 64 at most, no dot at the beginning",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StateError(f"{out} is there already", step="choose another --out; an export never overwrites")
    weights, verdict = open_weights(path, normalisation=normalisation, image_size=image_size)
    data = _run_data(run or _run_of(path), weights, asked=run is not None)
    facts = _facts(path, weights, data)
    source = Source(weights, network_of(weights), facts)
    stem = name or "-".join([weights.model.backbone, *([f"round-{facts['round']:04d}"] if "round" in facts else [])])
    bench = _bench(summary, run or _run_of(path), source.weights.digest())
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    make_dir(out.parent)
    make_dir(part, private=True)
    try:
        files = tuple(_write(part, stem, each, source) for each in wanted)
        card = Card(
            stem,
            facts,
            weights.digest(),
            source.head,
            files,
            data,
            bench.get("scores", ()),
            bench,
            verdict.words,
            weights.notes,
            licence,
        )
        write_json(part / f"{stem}.json", _said(card))
        write_atomic(part / CARD, card.text().encode())
        part.chmod(0o755)
        part.replace(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    fsync_dir(out.parent)
    return Exported(out, files, verdict, weights.notes)


def _write(folder: Path, stem: str, format: str, source: Source) -> File:
    """One file, read back and compared before anybody gets it."""
    end, write = FORMATS[format]
    path = folder / f"{stem}{end}"
    write(path, source)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    path.chmod(0o644)
    if format != "onnx":  # its writer has compared it
        back = read(path, normalisation=source.weights.model.normalisation)
        wanted = source.weights.backbone | _under(source.weights.head, "head")
        found = back.backbone | _under(_head_of(path, format, back, source), "head")
        if wanted.keys() != found.keys() or any(not torch.equal(found[name], value) for name, value in wanted.items()):
            raise StateError(f"{path.name} does not hold what was read", step="look at the disk, then export again")
    return File(path.name, format, path.stat().st_size, sha256_file(path))


def _head_of(path: Path, format: str, back: Weights, source: Source) -> Mapping[str, Tensor]:
    """The head in the written file; our reader leaves the classifier of the stock networks out."""
    if format == "radimagenet":  # has none
        return source.weights.head
    if format != "torchvision":
        return back.head
    classifier = f"{BACKBONES[source.weights.model.backbone].classifier}."
    state, _ = read_state(path)
    return {name.removeprefix(classifier): value for name, value in state.items() if name.startswith(classifier)}


def _under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in tensors.items()}


# --- what the files and the card say ----------------------------------------------------------------------------


def _facts(path: Path, weights: Weights, data: RunData | None) -> dict[str, Any]:
    """The metadata of the exported files: what the file said about itself, and what it did not."""
    facts = weights.all_facts()
    foreign = {} if weights.layout == "rin" else {"source": {"layout": weights.layout, "file": sha256_file(path)}}
    return {
        **foreign,
        "privacy": UNKNOWN_PRIVACY,
        "privacy_mode": "unknown",
        "release": metadata.version("rin"),
        **facts,
        **({"label_set": label_set_digest()} if weights.head else {}),
        **({"sites": sorted(facts["updates"])} if "updates" in facts else {}),
        **({"sites": [facts["site"]]} if "site" in facts else {}),
        **({"site_weights": dict(data.plan.sites)} if data is not None else {}),
        **({"trained_labels": data.trained} if data is not None else {}),
        "weights": weights.digest(),
        "layout": "rin",
    }


def _said(card: Card) -> dict[str, Any]:
    """The facts as a file for programs, for formats that hold none."""
    return {
        **card.facts,
        "labels": [label.name for label in label_set()] if card.head else [],
        "trained_labels": card.facts.get("trained_labels"),
        "files": [asdict(file) for file in card.files],
        "licence": card.licence or None,
        "statistics": card.statistics,
        "notes": list(card.notes),
        "benchmark": list(card.scores),
    }


def _run_of(path: Path) -> RunDir | None:
    """The run whose checkpoints/ hold the file."""
    run = RunDir(path.absolute().parent.parent)
    return run if path.absolute().parent == run.checkpoints and run.facts.exists() else None


def newest(run: RunDir) -> Path:
    """The checkpoint after the last closed round.

    Raises:
        StateError: none is closed.
    """
    record = last_record(run)
    number = 0 if record is None else record.round if record.state == "closed" else record.round - 1
    if number < 1 or not run.checkpoint(number).exists():
        raise StateError(f"{run.root} has no closed round", step="run `rin-server run` first, or name a weight file")
    return run.checkpoint(number)


def _run_data(run: RunDir | None, weights: Weights, *, asked: bool) -> RunData | None:
    if run is None or not (asked or "plan" in weights.facts):
        return None
    data = run_data(run, int(weights.facts.get("round", 0)))
    if weights.facts.get("plan") != data.digest:
        raise ConfigError(f"the weights are not of the run in {run.root}", step="leave --run out, or name their run")
    return data


def _bench(summary: Path | None, run: RunDir | None, digest: str) -> dict[str, Any]:
    """The summary with only the scores of these weights; empty without one."""
    found = [summary] if summary else sorted(run.root.glob("*/summary.json")) if run else []
    for path in found:
        value = read_json(path)
        try:
            names = {each["name"] for each in value["checkpoints"] if each["digest"] == digest}
            scores = [score for score in value["scores"] if score["checkpoint"] in names]
            bench = {key: value[key] for key in ("seeds", "date", "release")}
        except (KeyError, TypeError):
            raise ConfigError(f"{path} is no summary of a benchmark", step="name the summary.json of a bench") from None
        if scores:
            return {**bench, "scores": scores}
    if summary:
        raise ConfigError(f"{summary} has no score of these weights", step="name the benchmark that scored this file")
    return {}
