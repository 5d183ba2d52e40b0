from __future__ import annotations

import json
from pathlib import Path

import pytest

from rin.client import join
from rin.client.home import Home
from rin.client.site import read_site
from rin.common import keys
from rin.common.errors import ConfigError, StateError
from rin.common.files import read_json
from rin.common.plan import plan_digest
from rin.server import consortium
from rin.server.rundir import RunDir


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("join") / "run")
    consortium.init(run, plan=None, address="https://localhost:8443")
    return run


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def answer(run: RunDir, home: Home, site: str = "siteA", *, renew: bool = False) -> Path:
    path, fingerprint = consortium.invite(run, site)
    return join.join(home, path, fingerprint=fingerprint, renew=renew)


def key_files(home: Home) -> list[bytes]:
    return [(home.net / "node.key").read_bytes(), (home.keys / "signing.key").read_bytes()]


# --- join -------------------------------------------------------------------------------------------------------


def test_join_makes_the_keys_here_and_a_public_answer(run: RunDir, home: Home) -> None:
    path = answer(run, home)
    assert path == home.root / "siteA.join"
    text = path.read_text()
    assert set(json.loads(text)) == {
        "protocol", "site", "invite", "node_key", "signing_key", "node_proof", "signature"
    }  # fmt: skip
    for private in key_files(home):
        assert private.splitlines()[1].decode() not in text
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (home.net / "node.key", home.keys / "signing.key"))
    assert home.keys.stat().st_mode & 0o777 == 0o700 and home.site_toml.parent.stat().st_mode & 0o777 == 0o700
    assert (home.net / "ca.crt").read_bytes() == (run.ca / "ca.crt").read_bytes()
    assert read_json(home.net / "coordinator.json") == {"address": "https://localhost:8443", "site": "siteA"}
    assert (home.net / "plan.toml").read_bytes() == run.plan.read_bytes()
    assert join.join_fingerprint(path) == keys.fingerprint(path.read_bytes())


def test_nothing_is_made_before_the_fingerprint_holds(run: RunDir, home: Home) -> None:
    path, fingerprint = consortium.invite(run, "siteA")
    path.write_bytes(path.read_bytes().replace(b"localhost:8443", b"localhost:8444"))
    with pytest.raises(ConfigError, match="another fingerprint") as failed:
        join.join(home, path, fingerprint=fingerprint)
    assert "telephone" in failed.value.step and not home.root.exists()
    with pytest.raises(ConfigError):
        join.join(home, path, fingerprint="")


def test_an_invite_for_another_site_is_refused(run: RunDir, home: Home) -> None:
    path, fingerprint = consortium.invite(run, "siteA")
    with pytest.raises(ConfigError, match="for siteA, not for siteB"):
        join.join(home, path, site="siteB", fingerprint=fingerprint)
    assert not home.root.exists()
    assert join.join(home, path, site="siteA", fingerprint=fingerprint).exists()


@pytest.mark.parametrize(
    "change,words",
    [
        ({"label_set": "0" * 64}, "another label set"),
        ({"plan_digest": "0" * 64}, "does not fit its plan"),
        ({"site": "siteZ"}, "does not fit its plan"),
        ({"plan": "protocol = 1"}, "this key is required"),
        ({"ca": "no certificate"}, "not a PEM certificate"),
    ],
)
def test_an_invite_that_contradicts_itself_is_refused(
    run: RunDir, home: Home, tmp_path: Path, change: dict[str, str], words: str
) -> None:
    value = json.loads(consortium.invite(run, "siteA")[0].read_text()) | change
    path = tmp_path / "altered.invite"
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=words):
        join.join(home, path, fingerprint=join.invite_fingerprint(path))
    assert not home.root.exists()


def test_join_again_keeps_the_keys_and_renew_replaces_them(run: RunDir, home: Home) -> None:
    answer(run, home)
    first = key_files(home)
    home.site_toml.write_text(home.site_toml.read_text() + "# edited here\n")
    answer(run, home)
    assert key_files(home) == first and home.site_toml.read_text().endswith("# edited here\n")
    answer(run, home, renew=True)
    assert not set(first) & set(key_files(home)) and home.site_toml.read_text().endswith("# edited here\n")


def test_a_home_belongs_to_one_site_and_one_consortium(run: RunDir, home: Home, tmp_path: Path) -> None:
    answer(run, home)
    with pytest.raises(StateError, match="belongs to siteA"):
        answer(run, home, "siteB")
    home.site_toml.unlink()
    with pytest.raises(StateError, match="belongs to siteA"):
        answer(run, home, "siteB")
    other = RunDir(tmp_path / "other")
    consortium.init(other, plan=None, address="https://localhost:9443")
    with pytest.raises(StateError, match="another consortium"):
        answer(other, home)
    answer(other, home, renew=True)
    assert (home.net / "ca.crt").read_bytes() == (other.ca / "ca.crt").read_bytes()


def test_the_policy_comes_from_the_release_and_is_the_strictest(run: RunDir, home: Home) -> None:
    answer(run, home)
    site = read_site(home)
    assert site.policy == type(site.policy)()  # the defaults of the release
    assert site.policy.privacy == "required" and site.policy.plans == "accepted" and site.policy.metrics == ()
    assert site.site == "siteA" and site.coordinator.address is None
    assert site.labels.declared == () and site.archive.roots == ()
    assert home.site_toml.stat().st_mode & 0o777 == 0o600


# --- accept -----------------------------------------------------------------------------------------------------


def test_accept_keeps_plan_name_and_time(run: RunDir, home: Home) -> None:
    answer(run, home)
    assert join.accepted(home) == set()
    digest = join.accept(home, run.plan, by=" Dr. Example ")
    assert digest == plan_digest(run.plan.read_bytes()) and join.accepted(home) == {digest}
    assert (home.accepted / f"{digest}.toml").read_bytes() == run.plan.read_bytes()
    record = read_json(home.accepted / f"{digest}.json")
    assert record["by"] == "Dr. Example" and record["on"].endswith("+00:00")


def test_the_plan_may_come_from_the_invite(run: RunDir, home: Home) -> None:
    answer(run, home)
    path, _ = consortium.invite(run, "siteA")
    assert join.plan_bytes(path) == run.plan.read_bytes() == join.plan_bytes(home.net / "plan.toml")
    assert join.accept(home, path, by="x") == join.accept(home, run.plan.read_bytes(), by="y")


def test_a_plan_that_is_not_for_this_site_is_not_accepted(run: RunDir, home: Home) -> None:
    answer(run, home)
    data = run.plan.read_bytes()
    for plan, words in [
        (data.replace(b"siteA = 1.0", b"siteX = 1.0"), "does not name this site"),
        (data.replace(b'label-set = "', b'label-set = "0'), "label-set"),
        (b"", "required"),
        (home.root / "none.toml", "cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=words):
            join.accept(home, plan, by="x")
    with pytest.raises(ConfigError, match="nobody"):
        join.accept(home, data, by=" ")
    assert join.accepted(home) == set()


def test_a_plan_that_was_edited_afterwards_is_not_accepted_any_more(run: RunDir, home: Home) -> None:
    answer(run, home)
    digest = join.accept(home, run.plan, by="x")
    stored = home.accepted / f"{digest}.toml"
    stored.write_bytes(stored.read_bytes() + b"#")
    assert join.accepted(home) == set()
    (home.accepted / f"{digest}.json").rename(home.accepted / "other.json")
    assert join.accepted(home) == set()


def test_a_person_reads_what_matters(run: RunDir) -> None:
    rows = dict(join.plan_summary(run.plan.read_bytes()))
    assert rows["sites"] == "siteA 25%, siteB 25%, siteC 50%"
    assert rows["rounds"] == "100, each 500 steps of 64 images"
    assert "none" in rows["protection"] and "loss" in rows["may leave the site"]
    assert plan_digest(run.plan.read_bytes()) in rows["plan"]
    with pytest.raises(ConfigError):
        join.plan_summary(b"")
