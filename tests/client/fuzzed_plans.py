"""Plans that nobody should send: real ones whose values, keys and text are changed at random, from a seed."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any, Final

from rin.common.labels import label_set_digest


class Raw(str):
    """Text that stands in the file as it is."""


PLAN: Final[dict[str, Any]] = {
    "protocol": 1,
    "name": "fuzzed",
    "label-set": label_set_digest(),
    "sites": {"siteA": 1.0, "siteB": 1.0, "siteC": 2.0},
    "training": {"rounds": 10, "local-steps": 12, "batch-size": 16},
}
PRIVATE: Final[dict[str, Any]] = {
    **PLAN,
    "metrics": [],
    "model": {"backbone": "resnet18", "norm": "group", "image-size": 64},
    "privacy": {"mode": "patient", "sigma": 1.0, "clip": 1.0, "patients": 6, "images": 2, "delta": 1e-2},
}
BASES: Final = (PLAN, {**PLAN, "model": {"backbone": "resnet18", "image-size": 32}}, PRIVATE, PRIVATE)

# Values around what sites ask for, so that a plan is now just inside and now just outside; key by key.
NEAR: Final[dict[str, tuple[Any, ...]]] = {
    "protocol": (1, 2),
    "name": ("p", "a b", "x" * 64, "x" * 65),
    "label-set": (label_set_digest(), "0" * 64, label_set_digest().upper()),
    "metrics": ([], ["loss"], ["validation"], ["validation", "auc"], ["auc"], ["images", "images"]),
    "sites.siteA": (1.0, 1, 1e-308, 5e-324, 1e308, 0.0, -1.0),
    "sites.sitea": (1.0,),
    "sites.site D": (1.0,),
    "model.backbone": ("resnet18", "resnet50", "swin_t", "densenet121", "vgg"),
    "model.norm": ("batch", "group", "layer", "Group"),
    "model.image-size": (31, 32, 64, 224, 512, 513),
    "model.target": ("single", "multi"),
    "model.start": ("", "0" * 64, "0" * 63),
    "model.local-norms": (True, False),
    "training.rounds": (1, 9, 10, 11, 100, 1000, 1001, 99_999, 100_000, 0),
    "training.local-steps": (1, 7, 8, 9, 11, 12, 13, 10_000, 10_001, 1_000_000, 1_000_001),
    "training.batch-size": (1, 7, 8, 15, 16, 17, 65_536, 65_537),
    "training.learning-rate": (0.05, 1e-308, 1e308),
    "training.sampling": ("uniform", "balanced"),
    "training.mixup": (0.0, 0, -0.0, 5e-324, 0.2, 8.0, 9.0),
    "training.logit-adjustment": (0.0, 5e-324, 1.0, 4.0),
    "training.ema": (0.0, 0.9, 1.0),
    "training.freeze": ("none", "head", "top10"),
    "strategy.name": ("fedavg", "fedavgm", "fedprox", "fedadam"),
    "strategy.mu": (0.0, 0.1),
    "limits.min-sites": (1, 2, 3, 4, 10**9),
    "limits.quorum": (1, 2, 3, 4),
    "privacy.mode": ("none", "patient", "patient ", "Patient"),
    "privacy.sigma": (0.3, 0.29999999999999993, 0.5, 0.49999999999999994, 0.8, 1, 2.5, 1e4, 10000.000000000002),
    "privacy.clip": (1.0, 10.0, 10.000000000000002, 5e-324, 1e-45, 9.99e-7, 1e-6, 1e4, 10001.0),
    "privacy.patients": (1, 5, 6, 12, 13, 30, 60, 61, 10**7, 10**7 + 1),
    "privacy.images": (1, 1000, 1001),
    "privacy.views": (1, 64, 65),
    "privacy.delta": (1e-2, 0.010000000000000002, 1e-3, 9.999999999999999e-4, 1e-6, 1e-308, 5e-324),
}
POISON: Final[tuple[Any, ...]] = (
    *(True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**20, 10**400),
    *(0.0, -0.0, 0.5, 1e-308, 5e-324, 1e308, math.inf, -math.inf, math.nan),
    *("", "1", "none", "patient", "group", "nan", "\u0000", "\u2028", "💥", "a" * 5000),
    *([], [1], [[]], ["loss", 1], {}, {"a": 1}, [{}], {"mode": "none"}),
    *map(Raw, ("1979-05-27", "07:32:00", "0x10", "0o17", "1_0", "+1", "1e400", "9" * 5000, "[" * 2000 + "]" * 2000)),
    *map(Raw, ("{a = {a = 1}}", "'''x'''", "01", "1.", "tru", "", "# nothing", "nan", "+inf", "0x" + "f" * 9000)),
)
PIECES: Final = (
    "\n",
    '"',
    "'",
    "[",
    "]",
    "[[",
    "{",
    "}",
    "=",
    ".",
    "#",
    "\\",
    "\x00",
    "\ufeff",
    "é",
    "\u2028",
    "-",
    "1",
)


def dumps(values: dict[str, Any]) -> str:
    """`values` as TOML: plain keys first, then tables."""
    lines = [f"{_key(key)} = {_value(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += [f"[{_key(name)}]", *(f"{_key(key)} = {_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if key.replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)  # nan and inf as TOML writes them
    return json.dumps(value)


def plan(rng: random.Random) -> bytes:
    """One plan file: some are as they should be, most are nearly so, some are not even text."""
    values = copy.deepcopy(rng.choice(BASES))
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 8))):
        change(values, rng)
    text = dumps(values)
    for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 2))):
        text = scribble(text, rng)
    data = text.encode()
    if rng.random() < 0.02:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.randbytes(rng.randint(1, 4)) + data[at:]
    return data


def change(values: dict[str, Any], rng: random.Random) -> None:
    """Change one key of a plan."""
    where, near = rng.choice(list(NEAR.items()))
    name, _, key = where.rpartition(".")
    table = values.setdefault(name, {}) if name else values
    if not isinstance(table, dict):  # poisoned before
        return
    dice = rng.random()
    if dice < 0.7:
        table[key] = rng.choice(near)
    elif dice < 0.84:
        table[key] = rng.choice(POISON)
    elif dice < 0.92:
        table.pop(key, None)
    elif dice < 0.95:
        table[rng.choice(("sigmä", "Sigma", "local_steps", "unit", "", "a.b"))] = rng.choice(POISON)
    elif dice < 0.98 and name:
        values[name] = rng.choice(POISON)
    else:
        values.pop(name or key, None)


def scribble(text: str, rng: random.Random) -> str:
    """Change the text itself: lines dropped, doubled, moved; letters dropped and put in."""
    lines, dice = text.split("\n"), rng.randrange(6)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    if dice == 0:
        del lines[at]
    elif dice == 1:
        lines.insert(other, lines[at])
    elif dice == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif dice == 3:
        return text + text[rng.randrange(len(text) + 1) :]  # tables that come twice
    else:
        cut = rng.randrange(len(text) + 1)
        gone = rng.choice((0, 0, 1, 5)) if dice == 4 else len(text)
        return text[:cut] + rng.choice(PIECES) + text[cut + gone :]
    return "\n".join(lines)
