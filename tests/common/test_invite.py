from __future__ import annotations

import json
from pathlib import Path

import pytest

from rin.common.errors import ConfigError
from rin.common.invite import MAX_PAPER, Invite, Join, read_paper

INVITE = {
    "protocol": 1,
    "site": "siteA",
    "address": "https://rin.example.org:8443",
    "ca": "PEM",
    "plan": "text",
    "plan_digest": "0" * 64,
    "label_set": "1" * 64,
}


def test_an_invite_is_read_with_its_exact_bytes(tmp_path: Path) -> None:
    path = tmp_path / "siteA.invite"
    path.write_text(json.dumps(INVITE, indent=3))
    paper, data = read_paper(path, Invite)
    assert paper.site == "siteA" and data == path.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": 2},
        {"site": "../x"},
        {"address": "http://rin.example.org"},
        {"address": "https://a/b"},
        {"policy": {"privacy": "none"}},
        {"plan_digest": "x"},
        {"ca": None},
    ],
)
def test_anything_else_is_no_invite(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "siteA.invite"
    path.write_text(json.dumps(INVITE | change))
    with pytest.raises(ConfigError, match="no invite file"):
        read_paper(path, Invite)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"{}", b" " * (MAX_PAPER + 1)])
def test_no_paper_at_all(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "siteA.join"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="no join file"):
        read_paper(path, Join)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_paper(tmp_path / "none", Join)


def test_the_statement_is_all_but_the_signatures() -> None:
    join = Join(site="siteA", invite="0" * 64, node_key="k", signing_key="1" * 64)
    signed = join.model_copy(update={"signature": "s", "node_proof": "p"})
    assert signed.statement() == join.statement()
    assert join.model_copy(update={"node_key": "l"}).statement() != join.statement()
    assert join.statement().startswith(b"rin-join-v1\n")
