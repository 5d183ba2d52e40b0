"""Files at the airlock: only a plain file of the right bytes comes in, only a whole one goes out."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rin.client.home import Home
from rin.client.jobs import Jobs, Stored, put_out, take_in
from rin.common.errors import RefusedError
from rin.common.layout import Layout, file_digest
from rin.common.wire import Request

LAYOUT = Layout.of([("a", (1000,), "parameter"), ("b", (10,), "buffer")])


def weight_file(path: Path, fill: float = 1.0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(LAYOUT.header() + np.full(1010, fill, "<f4").tobytes())
    return file_digest(path)


@pytest.fixture
def inbox(tmp_path: Path) -> tuple[Path, str]:
    digest = weight_file(tmp_path / "x")
    (tmp_path / "inbox").mkdir()
    (tmp_path / "x").rename(tmp_path / "inbox" / digest)
    return tmp_path / "inbox", digest


def refused(inbox: Path, digest: str) -> bool:
    with pytest.raises(RefusedError) as caught:
        take_in(inbox, digest, inbox.parent / "base", LAYOUT)
    return caught.value.code == "bad-weights"


def test_a_plain_file_comes_in(inbox: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = inbox
    take_in(folder, digest, tmp_path / "base", LAYOUT)
    assert (tmp_path / "base").read_bytes() == (folder / digest).read_bytes()


def test_nobody_who_wants_it_any_more_ends_the_copying(inbox: tuple[Path, str], tmp_path: Path) -> None:
    def between() -> None:
        raise RefusedError("deadline")

    with pytest.raises(RefusedError) as caught:
        take_in(*inbox, tmp_path / "base", LAYOUT, between=between)
    assert caught.value.code == "deadline"


def link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to(path.with_name("other"))


def hard_link(path: Path) -> None:
    path.with_name("second").hardlink_to(path)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")


def another_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"c"'))


def another_value(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [link, hard_link, fifo, folder, shorter, longer, another_header, another_value, Path.unlink],
    ids=lambda change: change.__name__,
)
def test_anything_else_stays_out(inbox: tuple[Path, str], change: Callable[[Path], None]) -> None:
    change(inbox[0] / inbox[1])
    assert refused(*inbox)


def test_the_inbox_itself_is_no_link(inbox: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(inbox[0])
    with pytest.raises(RefusedError):
        take_in(tmp_path / "way", inbox[1], tmp_path / "base", LAYOUT)


def test_no_name_leads_out_of_the_inbox(inbox: tuple[Path, str], tmp_path: Path) -> None:
    digest = weight_file(tmp_path / "secret")
    assert digest == inbox[1]
    assert refused(inbox[0], "../secret")


def test_what_goes_out_is_read_only_and_whole(tmp_path: Path) -> None:
    source, outbox = tmp_path / "update", tmp_path / "outbox"
    outbox.mkdir()
    digest = weight_file(source)
    put_out(source, outbox, "u", digest)
    assert file_digest(outbox / "u") == digest
    assert stat.S_IMODE((outbox / "u").stat().st_mode) == 0o440
    assert source.exists()
    inode = (outbox / "u").stat().st_ino
    put_out(source, outbox, "u", digest)
    assert (outbox / "u").stat().st_ino == inode  # nothing to do


@pytest.mark.parametrize("there", ["another update", "link"])
def test_what_lies_in_the_way_is_replaced(tmp_path: Path, there: str) -> None:
    source, outbox = tmp_path / "update", tmp_path / "outbox"
    outbox.mkdir()
    digest = weight_file(source)
    if there == "link":
        (outbox / "u").symlink_to(source)  # right bytes, but its owner could change where it leads
    else:
        weight_file(outbox / "u", 2.0)
    put_out(source, outbox, "u", digest)
    assert file_digest(outbox / "u") == digest
    assert not (outbox / "u").is_symlink()
    assert [path.name for path in outbox.iterdir()] == ["u"]


def request(number: int) -> Request:
    return Request(run="a" * 32, round=number, site="s", plan="b" * 64, base="c" * 64, deadline_s=1.0)


def test_a_torn_memory_of_an_update_is_no_update(tmp_path: Path) -> None:
    jobs = Jobs(Home(tmp_path))
    digest = weight_file(jobs.update(request(1)))
    facts = Stored(run="a" * 32, round=1, plan="b" * 64, update=digest, norm=1.0, steps=8, labels=(1,), metrics={})
    jobs.store(request(1), facts)
    assert jobs.stored(request(1)) == facts
    assert jobs.stored(request(2)) is None
    memory = jobs.folder(request(1)) / "update.json"
    memory.write_bytes(memory.read_bytes()[:-9])
    assert jobs.stored(request(1)) is None


def test_rounds_are_remembered_by_the_next_process(tmp_path: Path) -> None:
    Jobs(Home(tmp_path)).admit(request(5), max_rounds=10)
    with pytest.raises(RefusedError) as caught:
        Jobs(Home(tmp_path)).admit(request(4), max_rounds=10)
    assert caught.value.code == "round-old"
