"""Who may be spoken to in plain text: this machine, and whoever the operator says."""

import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from tasks.options import SettingsError, mask_url
from tasks.routing import Region

#: Says that the network between here and API, broker and store is trusted.
VARIABLE = "GPU_ALLOW_PLAINTEXT"
#: Schemes with TLS.
_SECURE = ("rediss", "valkeys", "amqps", "pyamqps", "https")


def check(regions: Iterable[Region], *, allowed: bool) -> None:
    """Pass if no broker and no store of these regions is spoken to in plain text beyond this machine.

    allowed: the operator trusts the network. Raises SettingsError.
    """
    if allowed:
        return
    for region in regions:
        for what, urls in (("broker", region.broker), ("store", region.store)):
            # kombu takes several, to be tried one after the other.
            if (plain := next(filter(is_exposed, urls.split(";")), None)) is not None:
                scheme = "amqps" if "amqp" in urlsplit(plain).scheme else "rediss"
                raise SettingsError(
                    f"The {what} of {region.name}, {mask_url(plain)}, is not on this machine and not behind TLS: "
                    f"prompts, answers and its password would cross the network in plain text. Use {scheme}://, or set "
                    f"{VARIABLE}=1 where that network is trusted."
                )


def is_exposed(url: str) -> bool:
    """Whether what is said to a server of that URL crosses a network in plain text."""
    try:
        parts = urlsplit(url.strip())
        scheme, host = parts.scheme.lower(), parts.hostname or ""
    except ValueError:
        return True
    if scheme in _SECURE or "socket" in scheme or scheme == "unix":
        return False
    if host in ("", "localhost") or host.endswith(".localhost"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def allowed(environ: Mapping[str, str]) -> bool:
    """Whether an environment says that the network is trusted."""
    return environ.get(VARIABLE, "").strip().lower() in ("1", "true", "yes", "on")
