from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rin.client.home import Home, default_root
from rin.client.join import site_template
from rin.client.site import Policy, Site, read_site
from rin.common.errors import ConfigError
from rin.common.labels import label_set
from rin.common.settings import Table, parse_toml

LABELS = [label.name for label in label_set()]


def fault(text: str) -> str:
    with pytest.raises(ConfigError) as failed:
        parse_toml('site = "siteA"\n' + text, Site, name="site.toml")
    return failed.value.message


def test_the_default_policy_is_the_strictest() -> None:
    policy = Policy()
    assert (policy.privacy, policy.plans, policy.metrics) == ("required", "accepted", ())
    assert (policy.min_steps, policy.min_batch, policy.min_patients, policy.min_sites) == (8, 8, 20, 3)


@pytest.mark.parametrize(
    "text,words",
    [
        ('[policy]\nprivacy = "none"', "needs none-agreed-by"),
        ('[policy]\nprivacy = "none"\nnone-agreed-by = "Dr. X"', "needs none-agreed-by"),
        ('[policy]\nprivacy = "none"\nnone-agreed-by = "Dr. X"\nnone-agreed-on = "yesterday"', "none-agreed-on"),
        ('[policy]\nprivacy = "off"', "policy.privacy"),
        ("[policy]\nmin-sites = 0", "policy.min-sites"),
        ('[policy]\nmetrics = ["accuracy"]', "policy.metrics.0"),
        ('[labels]\ndeclared = ["MR_knee_nothing"]', "not in the label set: MR_knee_nothing"),
        (f'[labels]\nexhaustive = ["{LABELS[0]}"]', "may only name declared labels"),
        ('[device]\nname = "tpu"', "device.name"),
        ("[device]\nthreads = 0", "device.threads"),
        ('[device]\nname = "cuda:1"\nprocesses = 2', "is one GPU"),
        ('[coordinator]\naddress = "http://x"', "coordinator.address"),
        ("[polcy]", "unknown key 'polcy'"),
    ],
)
def test_what_a_site_file_may_not_say(text: str, words: str) -> None:
    assert words in fault(text)


def test_none_with_a_name_and_a_date_is_a_persons_word() -> None:
    text = 'site = "A"\n[policy]\nprivacy = "none"\nnone-agreed-by = "Dr. X"\nnone-agreed-on = "2026-11-23"'
    assert parse_toml(text, Site, name="site.toml").policy.none_agreed_by == "Dr. X"


def test_declared_labels_become_head_rows_in_order() -> None:
    names = json.dumps([LABELS[7], LABELS[3], LABELS[7]])
    site = parse_toml(f'site = "A"\n[labels]\ndeclared = {names}\nexhaustive = ["{LABELS[7]}"]', Site, name="x")
    assert site.labels.rows() == (3, 7) and site.labels.exhaustive_rows() == (7,)


def test_the_template_names_every_key(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.site_toml.parent.mkdir()
    home.site_toml.write_text(site_template("siteA", "https://x:1"))
    assert read_site(home).model_dump(exclude={"site", "coordinator"}) == Site.model_validate(
        {"site": "siteA"}
    ).model_dump(exclude={"site", "coordinator"})
    every = re.sub(r"^# ([a-z-]+ = )", r"\1", home.site_toml.read_text(), flags=re.M)
    shown = json.loads(parse_toml(every, Site, name="x").model_dump_json(by_alias=True, exclude_unset=True))
    for name, field in Site.model_fields.items():
        table = field.annotation
        if isinstance(table, type) and issubclass(table, Table):
            assert {each.alias or key for key, each in table.model_fields.items()} == set(shown[name])


def test_a_home_keeps_keys_apart_and_sides_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    vault = (home.site_toml, home.keys, home.catalog, home.cache, home.jobs, home.accepted, home.egress_log)
    assert all(path.is_relative_to(tmp_path / "vault") for path in vault)
    assert home.keys.name == "keys" and not home.catalog.is_relative_to(home.keys)
    assert not home.net.is_relative_to(tmp_path / "vault") and home.inbox.parent == home.outbox.parent
    monkeypatch.setenv("RIN_HOME", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.setenv("RIN_HOME", "")
    assert default_root() == Path.home() / ".rin"
