from __future__ import annotations

import re

import pytest

from rin.common.errors import CODES, ConfigError, RefusedError, RinError, StateError, TransferError


def test_codes_are_short_words_with_a_sentence() -> None:
    for code, text in CODES.items():
        assert re.fullmatch(r"[a-z-]{3,24}", code) and text and not text.endswith(".")
    assert list(CODES) == sorted(CODES)


def test_a_code_of_nobody_is_internal() -> None:
    assert RinError("x", code="PatientID 12345").code == "internal"
    assert RefusedError("anything").code == "internal"


def test_every_error_shows_its_next_step() -> None:
    assert str(ConfigError("wrong", step="correct it")) == "wrong\n  next: correct it"
    assert str(StateError("wrong")) == "wrong"
    assert str(RefusedError("policy")) == CODES["policy"]


def test_a_transfer_may_be_repeated_unless_said_otherwise() -> None:
    assert TransferError("cut").retry and TransferError("cut").code == "transfer"
    assert not TransferError("refused", retry=False).retry


@pytest.mark.parametrize("kind", [ConfigError, RefusedError, StateError, TransferError])
def test_the_tree_has_one_root(kind: type[RinError]) -> None:
    assert issubclass(kind, RinError)
