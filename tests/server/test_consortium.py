from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cryptography import x509

from rin.client import join
from rin.client.home import Home
from rin.common import keys
from rin.common.errors import ConfigError, RefusedError, StateError
from rin.common.files import read_json
from rin.common.labels import label_set_digest
from rin.common.plan import Plan, parse_plan, read_plan
from rin.common.settings import Table
from rin.server import consortium, members, receipts, tickets
from rin.server.receipts import accept_file
from rin.server.rundir import RunDir
from tests.small_run import SmallRun

ADDRESS = "https://rin.example.org:8443"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    consortium.init(run, plan=None, address=ADDRESS)
    return run


def joined(run: RunDir, site: str, home: Home, *, renew: bool = False) -> Path:
    path, fingerprint = consortium.invite(run, site)
    return join.join(home, path, fingerprint=fingerprint, renew=renew)


def admit(run: RunDir, path: Path) -> members.Member:
    return consortium.admit(run, path, join.join_fingerprint(path))


def altered(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, sort_keys=True, separators=(",", ":")))
    return path


# --- init -------------------------------------------------------------------------------------------------------


def test_init_makes_a_run_that_can_be_served(run: RunDir) -> None:
    facts = read_json(run.facts)
    assert re.fullmatch(r"[0-9a-f]{32}", facts["run"]) and facts["epoch"] == 0 and facts["address"] == ADDRESS
    assert members.members(run) == {} and read_plan(run.plan)[0].label_set == label_set_digest()
    modes = {path.name: path.stat().st_mode & 0o777 for path in run.ca.iterdir()}
    assert modes == {"ca.crt": 0o644, "ca.key": 0o600, "server.crt": 0o644, "server.key": 0o600}
    assert run.ca.stat().st_mode & 0o777 == 0o700
    names = x509.load_pem_x509_certificate((run.ca / "server.crt").read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost", "rin.example.org"]


def test_init_overwrites_nothing(run: RunDir) -> None:
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    with pytest.raises(StateError, match="holds a run already"):
        consortium.init(run, plan=None, address=ADDRESS)
    assert before == {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}


def test_init_takes_the_plan_that_is_there_or_given(tmp_path: Path) -> None:
    plan = consortium.plan_template().replace(b"rounds = 100 ", b"rounds = 7 ")
    given, there, both = RunDir(tmp_path / "a"), RunDir(tmp_path / "b"), RunDir(tmp_path / "c")
    consortium.init(given, plan=plan, address=ADDRESS)
    for run in (there, both):
        run.root.mkdir()
        run.plan.write_bytes(plan)
    consortium.init(there, plan=None, address=ADDRESS)
    assert given.plan.read_bytes() == there.plan.read_bytes() == plan
    with pytest.raises(StateError, match="another plan"):
        consortium.init(both, plan=consortium.plan_template(), address=ADDRESS)


def test_an_init_that_was_killed_is_done_again(run: RunDir) -> None:
    run.facts.unlink()  # it is written last
    consortium.init(run, plan=None, address=ADDRESS)
    consortium.invite(run, "siteA")


@pytest.mark.parametrize("address", ["http://x:1", "rin.example.org:8443", "https://x/y", "https://x:1 ", ""])
def test_an_address_is_https_and_nothing_more(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        consortium.init(RunDir(tmp_path), plan=None, address=address)
    assert not (tmp_path / "ca").exists()


def test_a_wrong_plan_makes_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="protocol"):
        consortium.init(RunDir(tmp_path / "run"), plan=b"", address=ADDRESS)
    assert not (tmp_path / "run").exists()


def keys_of(table: type[Table], prefix: str = "") -> set[str]:
    found = set()
    for name, field in table.model_fields.items():
        nested = field.annotation
        key = prefix + (field.alias or name)
        deeper = isinstance(nested, type) and issubclass(nested, Table)
        found |= keys_of(nested, key + ".") if deeper else {key}  # type: ignore[arg-type]
    return found


def test_the_template_names_every_key_with_its_default() -> None:
    text = consortium.plan_template()
    plan = parse_plan(text)
    shown = json.loads(plan.model_dump_json(by_alias=True, exclude_unset=True))
    flat = {f"{table}.{key}" for table, value in shown.items() if isinstance(value, dict) for key in value}
    flat |= {key for key, value in shown.items() if not isinstance(value, dict)}
    assert keys_of(Plan) - {"sites"} <= flat
    assert (Path(__file__).resolve().parents[2] / "deploy" / "plan.example.toml").read_bytes() == text


# --- invite and admit -------------------------------------------------------------------------------------------


def test_an_invite_holds_no_secret_and_no_policy(run: RunDir) -> None:
    path, fingerprint = consortium.invite(run, "siteA")
    text = path.read_text()
    assert set(json.loads(text)) == {"protocol", "site", "address", "ca", "plan", "plan_digest", "label_set"}
    assert "PRIVATE KEY" not in text and "[policy]" not in text
    assert fingerprint == keys.fingerprint(path.read_bytes()) == join.invite_fingerprint(path)
    assert consortium.invite(run, "siteA") == (path, fingerprint)


def test_only_sites_of_the_plan_are_invited(run: RunDir) -> None:
    with pytest.raises(ConfigError, match="does not name the site siteX"):
        consortium.invite(run, "siteX")
    with pytest.raises(ConfigError, match="it names siteA"):
        consortium.invite(run, "SITEA")
    with pytest.raises(ConfigError):
        consortium.invite(run, "../siteA")
    assert not run.invites.exists()


def test_admit_registers_both_keys(run: RunDir, tmp_path: Path) -> None:
    home = Home(tmp_path / "A")
    member = admit(run, joined(run, "siteA", home))
    assert member.node_key == keys.node_public(keys.load_private(home.net / "node.key"))
    assert member.signing_key == keys.signing_public(keys.load_signing_key(home.keys / "signing.key"))
    assert members.members(run) == {"siteA": member}


def test_the_fingerprint_is_not_optional(run: RunDir, tmp_path: Path) -> None:
    path = joined(run, "siteA", Home(tmp_path / "A"))
    for given in ("", "0000-0000-0000-0000-0000-0000-0000-0000", keys.fingerprint(b"another")):
        with pytest.raises(ConfigError, match="another fingerprint"):
            consortium.admit(run, path, given)
    assert members.members(run) == {}


def test_an_altered_join_file_is_refused_even_with_its_own_fingerprint(run: RunDir, tmp_path: Path) -> None:
    mallory = Home(tmp_path / "M")
    foreign = json.loads(joined(run, "siteA", mallory).read_text())
    for changes, words in [
        ({"site": "siteB"}, "not signed"),
        ({"signing_key": foreign["signing_key"]}, "not signed"),
        ({"node_key": foreign["node_key"]}, "not signed"),
        ({"signature": foreign["signature"]}, "not signed"),
        ({"signature": "!"}, "not signed"),
        ({"node_proof": foreign["node_proof"]}, "node key"),
        ({"node_proof": ""}, "node key"),
        ({"invite": "0" * 64}, "not signed"),
        ({"more": 1}, "no join file"),
    ]:
        path = altered(joined(run, "siteA", Home(tmp_path / "A")), **changes)
        with pytest.raises(ConfigError, match=words):
            consortium.admit(run, path, keys.fingerprint(path.read_bytes()))
    assert members.members(run) == {}


def test_the_node_key_of_another_needs_its_private_half(run: RunDir, tmp_path: Path) -> None:
    """A site that signs someone else's public node key with its own signing key proves nothing."""
    from rin.common.invite import Join, read_paper

    victim = read_paper(joined(run, "siteB", Home(tmp_path / "B")), Join)[0]
    home = Home(tmp_path / "A")
    mine = read_paper(joined(run, "siteA", home), Join)[0]
    forged = mine.model_copy(update={"node_key": victim.node_key, "node_proof": victim.node_proof})
    signature = keys.sign(keys.load_signing_key(home.keys / "signing.key"), forged.statement())
    path = tmp_path / "forged.join"
    path.write_text(forged.model_copy(update={"signature": keys.encode(signature)}).model_dump_json())
    with pytest.raises(ConfigError, match="node key"):
        consortium.admit(run, path, keys.fingerprint(path.read_bytes()))


def test_an_answer_to_another_invite_is_refused(run: RunDir, tmp_path: Path) -> None:
    path = joined(run, "siteA", Home(tmp_path / "A"))
    run.plan.write_bytes(run.plan.read_bytes() + b"\n# edited\n")
    consortium.invite(run, "siteA")
    with pytest.raises(ConfigError, match="another invite"):
        admit(run, path)


def test_a_site_that_left_the_plan_is_not_admitted(run: RunDir, tmp_path: Path) -> None:
    path = joined(run, "siteC", Home(tmp_path / "C"))
    run.plan.write_bytes(run.plan.read_bytes().replace(b"siteC = 2.0", b"siteD = 2.0"))
    with pytest.raises(ConfigError, match="does not name the site siteC"):
        admit(run, path)


# --- revoke and renew -------------------------------------------------------------------------------------------


def test_revoke_takes_tickets_and_uncounted_receipts(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    counted, number = small.update("siteA"), small.next_round()
    for update in (counted, small.update("siteA", number=number), small.update("siteB", number=number)):
        accept_file(small.run, update.ticket, update.manifest.to_bytes(), update.signature, update.path)
    tickets.close(small.run, counted.number)
    later = small.ticket(small.next_round(), "siteA")
    consortium.revoke(small.run, "siteA")
    assert [each.site for each in receipts.receipts(small.run, number)] == ["siteB"]
    assert not (small.run.receipts(number) / "siteA.safetensors").exists()
    assert (small.run.receipts(counted.number) / "siteA.safetensors").exists()  # frozen rounds keep what they counted
    with pytest.raises(RefusedError):
        tickets.check(small.run, later)
    assert list(members.members(small.run)) == ["siteB", "siteC"]
    with pytest.raises(StateError, match="not a member"):
        consortium.revoke(small.run, "siteA")


def test_a_revoked_site_comes_back_with_new_keys_only(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    consortium.revoke(small.run, "siteA")
    with pytest.raises(RefusedError, match="revoked or replaced"):
        small.join("siteA")
    small.join("siteA", renew=True)
    assert members.member(small.run, "siteA").serial == 4


def test_new_keys_void_what_the_old_ones_opened(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    update = small.update("siteA")
    accept_file(small.run, update.ticket, update.manifest.to_bytes(), update.signature, update.path)
    small.join("siteA", renew=True)
    assert receipts.receipts(small.run, update.number) == []
    with pytest.raises(RefusedError):
        tickets.check(small.run, update.ticket)
    again = small.update("siteA", number=update.number)
    accept_file(small.run, again.ticket, again.manifest.to_bytes(), again.signature, again.path)


def test_admitting_the_same_file_again_takes_nothing_away(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    update = small.update("siteA")
    small.join("siteA")
    assert tickets.check(small.run, update.ticket).site == "siteA"


def test_renew_needs_the_ca_key_back(run: RunDir) -> None:
    key, before = run.ca / "ca.key", (run.ca / "server.crt").read_bytes()
    offline = key.read_bytes()
    key.unlink()
    with pytest.raises(StateError, match="is not here"):
        consortium.renew(run)
    assert (run.ca / "server.crt").read_bytes() == before
    keys.save_private(key, offline)
    end = consortium.renew(run)
    after = (run.ca / "server.crt").read_bytes()
    assert after != before and x509.load_pem_x509_certificate(after).not_valid_after_utc == end
    assert keys.days_left(after) >= 396
    x509.load_pem_x509_certificate(after).verify_directly_issued_by(
        x509.load_pem_x509_certificate((run.ca / "ca.crt").read_bytes())
    )
