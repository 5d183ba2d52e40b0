"""What a weight file says about itself, read strictly: whoever wrote the file may have written anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rin.common.errors import RefusedError

Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
Rounds = Annotated[int, Field(ge=0, le=100_001)]  # one more than a plan's: of the closing one


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Source(_Strict):
    """Of weights that came from a file of another layout."""

    layout: str
    file: str


class Facts(_Strict):
    """What our files may say; all of it may be missing, and what is not named here is for other releases.

    The defaults are never read: a file's facts stay the mapping that they are.
    """

    backbone: str = ""
    norm: str = ""
    image_size: Annotated[int, Field(ge=1)] = 1
    normalisation: str = ""
    mean: Channels = []
    deviation: Channels = []
    target: str = ""
    label_set: str = ""
    plan: str = ""
    name: str = ""
    round: Rounds = 0
    rounds: Rounds = 0
    updates: dict[str, str] = {}
    start: str = ""
    release: str = ""
    privacy_mode: str = ""
    privacy: str = ""
    privacy_sites: dict[str, dict[str, Any]] = {}
    site: str = ""
    sites: list[str] = []
    site_weights: dict[str, float] = {}
    trained_labels: list[str] = []
    weights: str = ""
    layout: str = ""
    source: Source = Source(layout="", file="")


def check_facts(name: str, facts: Mapping[str, Any]) -> None:
    """See that `facts` of the file `name` are of the types that they are read as.

    Raises:
        RefusedError: bad-weights, with what is wrong.
    """
    try:
        Facts.model_validate(dict(facts))
    except ValidationError as error:
        faults = "; ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors())
        raise RefusedError("bad-weights", f"{name} says odd things about itself: {faults}") from None
