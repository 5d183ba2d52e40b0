"""What could keep a site from its coordinator, looked at before Flower starts, which does not say it in words."""

from __future__ import annotations

import ssl
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

import httpx

from rin.common.errors import TransferError
from rin.common.keys import WARN_DAYS, days_left
from rin.common.transfer import explain, make_client

# Flower takes a signed time stamp that is at most 5 s ahead of its own clock and 305 s behind it. The Date header
# counts whole seconds, hence one second more.
CLOCK_AHEAD: Final = 6.0
CLOCK_BEHIND: Final = 300.0
CLOCK_WARN: Final = 60.0
TIMEOUT: Final = 10.0


def preflight(address: str, ca: Path, proxy: str | None = None) -> list[str]:
    """Reach the gateway as Flower and the transfers will: name, connection, TLS, certificate, clock, coordinator.

    Args:
        address: `https://host:port`.
        ca: PEM with the certificates to trust.
        proxy: URL; else the environment's.

    Returns:
        Warnings: what will stop the site soon.

    Raises:
        TransferError: what stops it now, with the next step.
        StateError: `ca` is missing or no certificate.
    """
    with make_client(address, ca, proxy) as client:
        try:
            with client.stream("GET", "/health", timeout=TIMEOUT) as answer:
                left = _days_of_server(answer)
        except httpx.HTTPError as error:
            raise explain(error) from None
    if answer.status_code != 200:
        raise TransferError(
            f"the gateway answers, but the coordinator behind it does not ({answer.status_code})",
            step="wait: it may be starting; if it lasts, call the coordinator",
        )
    return _clock(answer.headers.get("date", "")) + _expiry(left, days_left(ca.read_bytes()))


def _days_of_server(answer: httpx.Response) -> int | None:
    """Days until the server's certificate expires; None where a proxy hides it."""
    stream = answer.extensions.get("network_stream")
    peer = stream.get_extra_info("ssl_object") if stream is not None else None
    facts = peer.getpeercert() if peer is not None else None
    if not facts:
        return None
    return int((ssl.cert_time_to_seconds(str(facts["notAfter"])) - time.time()) // 86_400)


def _clock(date: str) -> list[str]:
    """A warning where this clock and the coordinator's differ by more than a minute.

    Raises:
        TransferError: by more than Flower takes.
    """
    try:
        ahead = time.time() - parsedate_to_datetime(date).timestamp()
    except ValueError:
        return []
    words = f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    if ahead > CLOCK_AHEAD or ahead < -CLOCK_BEHIND:
        raise TransferError(f"{words}, more than Flower takes", step="set the clock (NTP), then wait")
    return [f"{words}: set it (NTP)"] if abs(ahead) > CLOCK_WARN else []


def _expiry(server: int | None, ca: int) -> list[str]:
    lines = []
    if server is not None and server <= WARN_DAYS:
        lines.append(f"the coordinator's certificate expires in {server} days: ask for `rin-server renew`")
    if ca <= WARN_DAYS:
        lines.append(f"the consortium's CA expires in {ca} days: ask the coordinator for a new invite")
    return lines
