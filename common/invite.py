"""The two papers of a join: the coordinator's invite and the site's answer; both public, both compared by telephone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rin.common.errors import ConfigError
from rin.common.files import canonical_json
from rin.common.plan import PROTOCOL, Digest, SiteName

ADDRESS: Final = r"^https://[A-Za-z0-9.-]+(:[0-9]{1,5})?$"
JOIN_CONTEXT: Final = b"rin-join-v1\n"  # keeps a signature over a join file from being one over anything else
MAX_PAPER: Final = 1 << 20  # bytes of either file


class _Paper(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Invite(_Paper):
    """What a site needs to know to join. No secret and no policy of the site (threat T4)."""

    protocol: Literal[1] = PROTOCOL
    site: SiteName
    address: Annotated[str, Field(pattern=ADDRESS)]
    ca: str  # PEM
    plan: str  # the plan file's text
    plan_digest: Digest
    label_set: Digest


class Join(_Paper):
    """A site's answer: its public keys, signed with both private ones."""

    protocol: Literal[1] = PROTOCOL
    site: SiteName
    invite: Digest  # of the invite file's bytes
    node_key: Annotated[str, Field(max_length=512)]  # OpenSSH line
    signing_key: Digest  # 64 hex digits, Ed25519
    node_proof: str = ""  # base64url; ECDSA of the node key over `statement()`
    signature: str = ""  # base64url; Ed25519 of the signing key over `statement()`

    def statement(self) -> bytes:
        """What both keys sign: everything but the signatures."""
        return JOIN_CONTEXT + canonical_json(self.model_dump(exclude={"node_proof", "signature"}))


P = TypeVar("P", bound=_Paper)


def read_paper(path: Path, model: type[P]) -> tuple[P, bytes]:
    """The invite or join file at `path` and its exact bytes, over which the fingerprint goes.

    Raises:
        ConfigError: missing, too large, or not such a file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PAPER + 1)
    except OSError:
        raise ConfigError(f"{path} cannot be read", step="check the path") from None
    try:
        if len(data) > MAX_PAPER:
            raise ValueError("too large")
        return model.model_validate_json(data), data
    except (ValidationError, ValueError):
        kind = model.__name__.lower()
        raise ConfigError(
            f"{path.name} is no {kind} file of this release", step="ask for it again, unaltered"
        ) from None
