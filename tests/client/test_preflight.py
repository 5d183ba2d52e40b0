"""What stands between a site and its coordinator is said in words, with the next step."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rin.client import preflight as module
from rin.client.preflight import preflight
from rin.common import keys
from rin.common.errors import StateError, TransferError
from tests.client.tlsserver import front_door


def fault(address: str, ca: Path) -> str:
    with pytest.raises(TransferError) as caught:
        preflight(address, ca)
    assert caught.value.step
    return caught.value.message


def test_all_is_well(tmp_path: Path) -> None:
    with front_door(tmp_path) as door:
        assert preflight(door.address, door.ca) == []
        assert door.paths == ["/health"]


def test_a_bundle_of_two_authorities_is_fine(tmp_path: Path) -> None:
    other, _ = keys.make_ca("the next one")
    with front_door(tmp_path) as door:
        bundle = tmp_path / "bundle.crt"
        bundle.write_bytes(other + door.ca.read_bytes())
        assert preflight(door.address, bundle) == []


def test_another_ca(tmp_path: Path) -> None:
    other, _ = keys.make_ca("somebody else")
    (tmp_path / "other.crt").write_bytes(other)
    with front_door(tmp_path) as door:
        assert "another CA" in fault(door.address, tmp_path / "other.crt")
        assert door.paths == []


def test_no_tls(tmp_path: Path) -> None:
    with front_door(tmp_path, tls=False) as door:
        assert "TLS" in fault(door.address, door.ca)


def test_nobody_there(tmp_path: Path) -> None:
    with front_door(tmp_path) as door:
        address, ca = door.address, door.ca
    assert "nothing answers" in fault(address, ca)


def test_a_coordinator_that_is_starting(tmp_path: Path) -> None:
    with front_door(tmp_path) as door:
        door.status = 502
        assert "502" in fault(door.address, door.ca)


@pytest.mark.parametrize(("ahead", "word"), [(-20.0, "ahead of"), (400.0, "behind")])
def test_a_clock_that_flower_refuses(tmp_path: Path, ahead: float, word: str) -> None:
    with front_door(tmp_path) as door:
        door.ahead = ahead
        message = fault(door.address, door.ca)
    assert "clock" in message
    assert word in message


def test_a_clock_that_is_only_wrong_is_a_warning(tmp_path: Path) -> None:
    with front_door(tmp_path) as door:
        door.ahead = 90.0
        (line,) = preflight(door.address, door.ca)
    assert "behind" in line


def test_an_old_certificate_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SERVER_DAYS", 20)
    with front_door(tmp_path) as door:
        (line,) = preflight(door.address, door.ca)
    assert "rin-server renew" in line
    assert "19 days" in line or "20 days" in line


def test_no_ca_file(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(StateError):
        preflight(f"https://127.0.0.1:{server.getsockname()[1]}", tmp_path / "ca.crt")


def test_the_limits_are_flowers() -> None:
    from flwr.supercore import constant

    assert constant.MIN_TIMESTAMP_DIFF_SECONDS == 1 - module.CLOCK_AHEAD
    assert constant.MAX_TIMESTAMP_DIFF_SECONDS >= module.CLOCK_BEHIND
