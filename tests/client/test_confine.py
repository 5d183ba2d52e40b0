"""The kernel's half of the airlock, with real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from rin.client import confine

NOBODY = 65534
pytestmark = pytest.mark.skipif(
    not confine.works(no_network=True) or not confine.works(hide=[Path("/var/empty-or-missing")]),
    reason="this kernel gives no namespaces to this user",
)


def run(code: str, *arguments: str, no_network: bool = False, hide: list[Path] | None = None) -> str:
    """What a confined Python prints."""
    command = confine.argv(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], no_network=no_network, hide=hide or []
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CONNECT = """
    import socket, sys
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2)
        print("connected")
    except OSError:
        print("no way")
"""


def test_without_network_there_is_no_way_to_a_listener_of_this_host() -> None:
    addresses = ["127.0.0.1", *socket.gethostbyname_ex(socket.gethostname())[2]]
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = str(server.getsockname()[1])
        assert run(CONNECT, "127.0.0.1", port, hide=[Path("/var/empty-or-missing")]) == "connected"
        for address in addresses:
            assert run(CONNECT, address, port, no_network=True) == "no way"


def test_without_network_lo_is_the_only_interface_and_it_is_up() -> None:
    code = """
        import socket
        print(socket.if_nameindex())
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2).close()
        print("up")
    """
    assert run(code, no_network=True).splitlines()[-2:] == ["[(1, 'lo')]", "up"]


def test_a_unix_socket_works_across(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def greet() -> None:
            with server.accept()[0] as peer:
                peer.sendall(b"hello")

        thread = threading.Thread(target=greet)
        thread.start()
        code = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(9).decode())"
        )
        assert run(code, str(path), no_network=True) == "hello"
        thread.join()


LOOK = """
    import sys
    for path in sys.argv[1:]:
        try:
            with open(path) as file:
                print(repr(file.read()))
        except OSError as error:
            print(type(error).__name__)
"""


def test_hidden_directories_and_files_cannot_be_opened(tmp_path: Path) -> None:
    vault, labels, air = tmp_path / "vault", tmp_path / "labels.csv", tmp_path / "air"
    vault.mkdir()
    air.mkdir()
    link = tmp_path / "link"
    link.symlink_to(vault)
    (vault / "catalog").write_text("patients")
    labels.write_text("patients")
    (air / "weights").write_text("weights")
    paths = [vault / "catalog", link / "catalog", labels, air / "weights"]
    paths.append(Path(f"/proc/{os.getpid()}/root{vault}/catalog"))
    seen = run(LOOK, *map(str, paths), hide=[link, labels, tmp_path / "missing"]).splitlines()
    assert seen[0] in ("PermissionError", "FileNotFoundError")
    assert seen[1] == seen[0]
    assert seen[2] == "''"
    assert seen[3] == "'weights'"
    assert seen[4] == "PermissionError"


def test_the_working_directory_is_no_way_below_the_cover(tmp_path: Path) -> None:
    (tmp_path / "catalog").write_text("patients")
    command = confine.argv([sys.executable, "-c", textwrap.dedent(LOOK), "catalog"], hide=[tmp_path])
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "patients" not in done.stdout
    assert "Error" in done.stdout


def test_the_command_cannot_undo_it(tmp_path: Path) -> None:
    (tmp_path / "catalog").write_text("patients")
    code = """
        import ctypes, sys
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.umount2(sys.argv[1].encode(), 0), libc.umount2(sys.argv[1].encode(), 2))
        print(libc.unshare(0x10020000))
        print(libc.umount2(sys.argv[1].encode(), 2))
        try:
            print(open(sys.argv[1] + "/catalog").read())
        except OSError as error:
            print(type(error).__name__)
    """
    lines = run(code, str(tmp_path), hide=[tmp_path]).splitlines()
    assert lines[0] == "-1 -1"
    assert lines[2] == "-1"  # also with the capabilities of one more user namespace
    assert lines[3] in ("PermissionError", "FileNotFoundError")


def test_no_capability_is_left() -> None:
    code = 'print([line for line in open("/proc/self/status") if line.startswith(("Cap", "NoNewPrivs"))])'
    lines = run(code, no_network=True)
    assert lines.count("0000000000000000") >= 4
    assert "NoNewPrivs:\\t1" in lines


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_it_works_for_an_ordinary_user() -> None:
    secret = Path(f"/tmp/rin-confine-{os.getpid()}")  # tmp_path is closed to other users
    secret.mkdir(mode=0o755)
    # The interpreter itself may be closed to other users, so the process changes its user after its imports.
    code = f"""
        import os, pathlib
        from rin.client import confine
        os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
        os.chdir("/")
        confine.enter(no_network=True, hide=[pathlib.Path("{secret}")])
        os.execv("/bin/cat", ["cat", "{secret}/catalog"])
    """
    try:
        (secret / "catalog").write_text("patients")
        assert subprocess.run(["/bin/cat", secret / "catalog"], user=NOBODY, cwd="/", check=True).returncode == 0
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
        )
        assert done.stdout == ""
        assert "denied" in done.stderr
    finally:
        (secret / "catalog").unlink()
        secret.rmdir()


def test_a_command_fails_with_its_own_code_and_a_refusal_with_77() -> None:
    command = confine.argv([sys.executable, "-c", "raise SystemExit(5)"], no_network=True)
    assert subprocess.run(command, check=False).returncode == 5
    # User namespaces nest 32 deep (user_namespaces(7)); below that the kernel says no.
    code = f"""
        import ctypes, subprocess
        while ctypes.CDLL(None).unshare(0x10000000) == 0:
            pass
        print(subprocess.run({command!r}, capture_output=True).returncode)
    """
    assert run(code, no_network=True) == str(confine.REFUSED)
