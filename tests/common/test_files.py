from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rin.common.errors import StateError
from rin.common.files import canonical_json, lock, make_dir, publish, read_json, sha256_file, write_atomic, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_kill_9_shows_the_old_or_the_new_file_and_no_mixture(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = (
        "import sys, pathlib; from rin.common.files import write_atomic\n"
        "n = 0\nwhile True:\n    n += 1; write_atomic(pathlib.Path(sys.argv[1]), (b'%08d' % n) * 50_000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    end = time.monotonic() + 20
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    data = path.read_bytes()
    assert len(data) == 400_000 and data == data[:8] * 50_000


@given(JSON)
def test_canonical_json_is_one_text_a_value(value: object) -> None:
    text = canonical_json(value)
    assert text.isascii() and json.loads(text) == value and canonical_json(json.loads(text)) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError):
        canonical_json({"x": value})
    with pytest.raises(ValueError):
        write_json(tmp_path / "x", [value])


def test_read_json_says_missing_and_damaged(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"b": 1, "a": [2]})
    assert read_json(tmp_path / "x") == {"a": [2], "b": 1}
    with pytest.raises(StateError, match="missing"):
        read_json(tmp_path / "y")
    (tmp_path / "x").write_bytes(b'{"a": \xff')
    with pytest.raises(StateError, match="not valid JSON"):
        read_json(tmp_path / "x")
    with pytest.raises(StateError, match="cannot be read"):
        read_json(tmp_path)


def test_a_private_directory_is_its_owners_and_an_impossible_one_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o755)
    for path in (tmp_path / "a", tmp_path / "b" / "c"):
        make_dir(path, private=True)
        assert path.stat().st_mode & 0o777 == 0o700
    for path in (Path("/dev/null/a"), Path("/proc/nobody/a")):
        with pytest.raises(StateError, match="cannot be made"):
            make_dir(path)


def test_who_is_locked_out_is_sent_to_commands_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    for shown, step in ((True, "stop it first, or look at it with `rin-server status`"), (False, "stop it first")):
        again = lock(path, holder="rin-server run", shown=shown)
        with lock(path, holder="rin-server run"), pytest.raises(StateError) as caught, again:
            pass
        assert caught.value.step == step


def test_publish_never_replaces(tmp_path: Path) -> None:
    first, second, target = tmp_path / "1", tmp_path / "2", tmp_path / "out" / "t"
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    assert publish(first, target) and not publish(second, target)
    assert target.read_bytes() == b"first" and target.stat().st_mode & 0o777 == 0o400
    assert not first.exists() and not second.exists() and target.stat().st_nlink == 1


def test_sha256_of_a_file_from_an_offset(tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x", offset=17) == hashlib.sha256(data[17:]).hexdigest()


def test_a_lock_is_held_by_one_and_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, time, pathlib; from rin.common.files import lock\n"
        "with lock(pathlib.Path(sys.argv[1]), holder='x'):\n    print('held', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"held\n"
    with pytest.raises(StateError, match="another rin-server"), lock(path, holder="rin-server"):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with lock(path, holder="rin-server"), pytest.raises(StateError), lock(path, holder="rin-server"):
        pass


def test_a_lock_may_be_waited_for(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with lock(tmp_path / "lock", holder="x", wait=True):
            order.append("second")

    with lock(tmp_path / "lock", holder="x"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
