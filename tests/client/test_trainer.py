"""The trainer: what it refuses, what it publishes, and that the same request gives the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from rin.client.jobs import Jobs
from rin.client.parallel import SNAPSHOT
from rin.client.trainer import Done, Progress, Trainer, accepted_plans, refusal_of
from rin.common import keys, snapshots
from rin.common.errors import ConfigError, RefusedError
from rin.common.events import read_events
from rin.common.layout import file_digest
from rin.common.statement import UNPROTECTED
from rin.common.wire import Manifest, Request, from_bytes

if TYPE_CHECKING:
    from tests.client.conftest import SmallSite

    Make = Callable[..., SmallSite]


def train(site: SmallSite, request: Request | None = None) -> Done:
    return Trainer(site.home).train(request or site.request(), site.plan_bytes, lambda _: None, lambda: "")


def refused(site: SmallSite, request: Request | None = None) -> str:
    with pytest.raises(RefusedError) as caught:
        train(site, request)
    return caught.value.code


def papers(site: SmallSite, request: Request) -> tuple[Manifest, bytes, bytes]:
    facts = json.loads((site.home.outbox / f"{request.id}.json").read_bytes())
    paper, signature = keys.decode(facts["manifest"]), keys.decode(facts["signature"])
    assert paper is not None
    assert signature is not None
    return from_bytes(Manifest, paper), paper, signature


def test_a_round_ends_with_a_signed_update_in_the_outbox(small_site: Make) -> None:
    site, steps = small_site(), list[Progress]()
    request = site.request()
    done = Trainer(site.home).train(request, site.plan_bytes, steps.append, lambda: "")
    manifest, _, signature = papers(site, request)
    update = site.home.outbox / f"{request.id}.safetensors"
    assert done == Done(request.id, file_digest(update)) == Done(request.id, manifest.update)
    manifest.check(request)
    assert steps[-1] == Progress(8, 8)
    assert manifest.steps == 8
    assert set(manifest.metrics) == {"loss", "top1", "images"}  # the plan allows top5 too, the site does not
    assert manifest.metrics["images"] == 64
    public = keys.signing_public(keys.load_signing_key(site.home.keys / "signing.key"))
    assert keys.verify(public, manifest.signed_bytes(), signature)
    for path in site.home.outbox.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o440
    assert not Jobs(site.home).base(request).exists()


def test_the_egress_log_names_what_left_and_nothing_of_a_patient(small_site: Make) -> None:
    site = small_site()
    done = train(site)
    line = json.loads(site.home.egress_log.read_bytes())
    assert line["sha256"] == done.update
    assert line["metrics"].keys() == {"loss", "top1", "images"}
    assert line["privacy"] is None and line["statement"] == UNPROTECTED
    assert line["scores"] == []  # neither plan nor site asks for figures of validation
    assert set(line) - {"time", "what", "sha256", "to", "scores", "privacy", "statement"} == {
        *("manifest", "run", "round", "plan", "bytes", "norm", "metrics")
    }


def test_nothing_is_published_where_the_egress_log_cannot_be_written(small_site: Make) -> None:
    site = small_site()
    site.home.egress_log.mkdir(parents=True)
    assert refused(site) == "internal"
    assert list(site.home.outbox.iterdir()) == []


def test_the_update_is_local_minus_global_and_the_same_in_another_process(small_site: Make, tmp_path: Path) -> None:
    site = small_site()
    first = train(site)
    other = tmp_path / "other"
    shutil.copytree(site.home.root, other)
    shutil.rmtree(other / "vault" / "jobs")
    shutil.rmtree(other / "air" / "outbox")
    code = f"""
import sys
from pathlib import Path
from rin.client.home import Home
from rin.client.trainer import Trainer
from rin.common.wire import Request, from_bytes
request = from_bytes(Request, {site.request().to_bytes()!r})
print(Trainer(Home(Path({str(other)!r}))).train(request, {site.plan_bytes!r}, lambda _: None, lambda: "").update)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == [first.update], done.stderr


def test_a_repeated_request_is_answered_from_the_stored_update(small_site: Make) -> None:
    site, request = small_site(), None
    request = site.request()
    first = train(site)
    before = papers(site, request)[1]
    (site.home.inbox / site.base).unlink()  # nothing could be trained any more
    shutil.rmtree(site.home.outbox)
    assert train(site, site.request(deadline_s=1.0)) == first
    assert papers(site, request)[1] == before


def test_a_stored_update_that_was_damaged_is_trained_again_to_the_same_bytes(small_site: Make) -> None:
    site = small_site()
    first = train(site)
    stored = Jobs(site.home).update(site.request())
    with stored.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")
    outbox = site.home.outbox / f"{first.request}.safetensors"
    outbox.unlink()
    outbox.symlink_to("/etc/passwd")
    assert train(site) == first
    assert file_digest(outbox) == first.update
    assert not outbox.is_symlink()


def test_a_model_kept_between_rounds_gives_the_bytes_of_a_new_one(small_site: Make) -> None:
    site = small_site()
    trainer = Trainer(site.home)
    trainer.train(site.request(1), site.plan_bytes, lambda _: None, lambda: "")
    warm = trainer.train(site.request(2), site.plan_bytes, lambda _: None, lambda: "")
    shutil.rmtree(site.home.jobs)
    assert train(site, site.request(2)) == warm


def test_rounds_only_go_up_and_have_one_base(small_site: Make) -> None:
    site = small_site()
    train(site, site.request(2))
    assert refused(site, site.request(1)) == "round-old"
    assert refused(site, site.request(2, base="0" * 64)) == "base-conflict"
    train(site, site.request(1, run="cd" * 16))  # another run of the same plan begins at its own first round


def test_the_base_is_pinned_before_training_begins(small_site: Make) -> None:
    site = small_site()
    with pytest.raises(RefusedError):
        Trainer(site.home).train(site.request(), site.plan_bytes, lambda _: None, lambda: "cancelled")
    assert refused(site, site.request(base="0" * 64)) == "base-conflict"


def test_only_the_last_two_rounds_are_kept(small_site: Make) -> None:
    site = small_site()
    for number in (1, 2, 3):
        train(site, site.request(number))
    kept = {site.request(number).id for number in (2, 3)}
    assert {path.name for path in site.home.jobs.iterdir() if path.is_dir()} == kept
    assert {path.name.partition(".")[0] for path in site.home.outbox.iterdir()} == kept


def test_a_plan_is_trained_no_more_often_than_the_site_allows(small_site: Make) -> None:
    site = small_site(site="max-rounds = 3\n")
    for number, run in ((1, "ab"), (2, "ab"), (3, "cd")):
        train(site, site.request(number, run=run * 16))
    assert refused(site, site.request(1, run="ef" * 16)) == "policy"


@pytest.mark.parametrize(
    ("make", "changes", "code"),
    [
        ({"accepted": False}, {}, "plan-not-accepted"),
        ({"site": "min-steps = 9\n"}, {}, "policy"),
        ({"patients": 19}, {}, "policy"),
        ({}, {"site": "siteB"}, "bad-request"),
        ({}, {"round": 4}, "bad-request"),
        ({}, {"plan": "0" * 64}, "bad-request"),
        ({}, {"base": "0" * 64}, "bad-weights"),
        ({"patients": 0}, {}, "internal"),  # no catalog at all: the operator's text says to ingest
    ],
)
def test_it_refuses_with_a_code(small_site: Make, make: dict[str, Any], changes: dict[str, Any], code: str) -> None:
    site = small_site(**make)
    assert refused(site, site.request(**changes)) == code
    assert not list(site.home.outbox.iterdir())
    assert json.loads((site.home.root / "vault" / "status.json").read_bytes())["code"] == code
    events, _ = read_events(site.home.vault_log / "events.jsonl")
    assert [(event.kind, event.fields["code"]) for event in events] == [("request-refused", code)]


def test_a_plan_with_another_label_set_is_a_mismatch(small_site: Make) -> None:
    site = small_site()
    data = site.plan_bytes.replace(site.plan.label_set.encode(), b"0" * 64)
    request = site.request(plan=hashlib.sha256(data).hexdigest())
    with pytest.raises(RefusedError) as caught:
        Trainer(site.home).train(request, data, lambda _: None, lambda: "")
    assert caught.value.code == "labels-mismatch"


def test_weights_that_diverge_never_leave(small_site: Make) -> None:
    site = small_site(plan='optimizer = "sgd"\n')
    data = site.plan_bytes.replace(b"learning-rate = 0.01", b"learning-rate = 1e30")
    digest = hashlib.sha256(data).hexdigest()
    (site.home.accepted / f"{digest}.toml").write_bytes(data)
    with pytest.raises(RefusedError) as caught:
        Trainer(site.home).train(site.request(plan=digest), data, lambda _: None, lambda: "")
    assert caught.value.code == "not-finite"
    assert not list(site.home.outbox.iterdir())


@pytest.mark.parametrize("code", ["cancelled", "deadline"])
def test_the_work_ends_before_its_next_step(small_site: Make, code: str) -> None:
    site, seen = small_site(), list[Progress]()
    with pytest.raises(RefusedError) as caught:
        Trainer(site.home).train(site.request(), site.plan_bytes, seen.append, lambda: code if len(seen) == 3 else "")
    assert caught.value.code == code
    assert len(seen) == 3


def test_a_round_cancelled_while_its_update_is_written_publishes_nothing_and_may_be_asked_again(
    small_site: Make,
) -> None:
    site, seen = small_site(), list[Progress]()
    request, plan = site.request(), site.plan_bytes
    with pytest.raises(RefusedError) as caught:
        Trainer(site.home).train(request, plan, seen.append, lambda: "cancelled" if seen and seen[-1].step == 8 else "")
    assert caught.value.code == "cancelled"
    assert not list(site.home.outbox.iterdir())
    assert not Jobs(site.home).update(request).exists()
    other = small_site(name="undisturbed")
    assert train(site).update == train(other).update


def test_what_a_superseded_round_kept_goes(small_site: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    site, seen = small_site(), list[Progress]()
    with pytest.raises(RefusedError):
        Trainer(site.home).train(
            site.request(1), site.plan_bytes, seen.append, lambda: "cancelled" if len(seen) == 2 else ""
        )
    folder = Jobs(site.home).folder(site.request(1))
    assert (folder / SNAPSHOT).exists()
    train(site, site.request(2))
    assert not folder.exists()
    assert sorted(path.name for path in Jobs(site.home).folder(site.request(2)).iterdir()) == [
        "update.json",
        "update.safetensors",
    ]


def test_an_accepted_plan_counts_only_under_its_own_digest(small_site: Make) -> None:
    site = small_site()
    (site.home.accepted / f"{'0' * 64}.toml").write_bytes(site.plan_bytes)
    assert accepted_plans(site.home) == {site.request().plan}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "device"),
        (OSError(errno.ENOSPC, "no space"), "disk-full"),
        (OSError(errno.EIO, "broken"), "internal"),
        (MemoryError(), "memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("PatientID 12345"), "internal"),
        (ConfigError("site.toml: ..."), "internal"),
        (RefusedError("no-data"), "no-data"),
    ],
)
def test_every_error_has_a_code(error: Exception, code: str) -> None:
    assert refusal_of(error).code == code


@pytest.mark.slow
def test_a_trainer_that_meets_its_memory_limit_says_so_and_trains_once_it_is_raised(small_site: Make) -> None:
    site = small_site(plan="[limits]\n")
    text = site.home.site_toml.read_text()
    site.home.site_toml.write_text(text.replace('name = "cpu"', 'name = "cpu"\nmemory-gib = 0.4'))
    code = f"""
from pathlib import Path
from rin.client.home import Home
from rin.client.trainer import Trainer
from rin.common.errors import RefusedError
from rin.common.wire import Request, from_bytes
request = from_bytes(Request, {site.request().to_bytes()!r})
trainer = Trainer(Home(Path({str(site.home.root)!r})))
try:
    trainer.train(request, {site.plan_bytes!r}, lambda _: None, lambda: "")
except RefusedError as error:
    print(error.code)
trainer.home.site_toml.write_text({text!r})
print(trainer.train(request, {site.plan_bytes!r}, lambda _: None, lambda: "").update)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    shutil.rmtree(site.home.jobs)
    assert done.stdout.split()[-2:] == ["memory", train(site).update], done.stderr
