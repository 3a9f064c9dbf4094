"""A verdict, posted as JSON."""

from __future__ import annotations

import urllib.error
import urllib.request
from urllib.parse import urlsplit

from entropy_probe import __version__
from entropy_probe.errors import ConfigError, ProbeError

_SECONDS = 10.0


def require_url(url: str) -> None:
    """Raises `ConfigError` for what is no http or https address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError("--webhook", f"got {url!r}", "give an address that begins with https://")


def post(url: str, body: str) -> None:
    """Raises `ProbeError` where it is not taken within ten seconds."""
    headers = {"Content-Type": "application/json", "User-Agent": f"entropy-probe/{__version__}"}
    request = urllib.request.Request(url, body.encode(), headers, method="POST")  # noqa: S310 (require_url)
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS):  # noqa: S310
            pass
    except (
        OSError,
        ValueError,
    ) as error:  # URLError, and an answer that is no success, are OSErrors
        host = urlsplit(url).hostname or url
        raise ProbeError(
            f"webhook at {host}", f"did not take the verdict ({error})", "mend it"
        ) from error
