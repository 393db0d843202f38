"""Where a client is: the region that its jobs go to first, and how that was found.

In this order: the region that the job names; the X-Client-Region header of a trusted proxy; the operator's table of
networks; the country of the client's address; the default region. Nobody elsewhere is asked.

A header that a proxy sets is believed only if the connection comes from a proxy that the settings trust. Who may call
the API at all (app/auth.py) never depends on what is found here: it looks at the connection itself.
"""

import functools
import ipaddress
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from flask import current_app, request

from app.settings import Settings
from tasks.reading import near
from tasks.routing import Region, distance_km

HEADER = "X-Client-Region"

Address = IPv4Address | IPv6Address


class FoundBy(StrEnum):
    """What a client's region was found by."""

    #: The job names it.
    REQUEST = "request"
    #: A trusted proxy says so.
    HEADER = "header"
    #: The operator's table of networks.
    NETWORK = "network"
    #: The country of its address.
    COUNTRY = "country"
    #: Nothing is known.
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Origin:
    """The region of a client."""

    region: str
    found_by: FoundBy


class UnknownRegion(ValueError):
    """A trusted proxy's header names neither a region nor a country; the message names those that are known."""


class Origins:
    """Finds where clients are."""

    def __init__(self, settings: Settings) -> None:
        self._regions = settings.regions
        self._default = settings.default_region
        self._proxies = settings.trusted_proxies
        self._by_name = {name.casefold(): name for name in settings.regions}
        self._home_of = {
            country.upper(): name for name, region in settings.regions.items() for country in region.countries
        }
        # By IP version and prefix length, longest first: one look-up for each length that occurs.
        self._networks: dict[tuple[int, int], dict[int, str]] = {}
        for network, region in sorted(settings.client_regions.items(), key=lambda entry: -entry[0].prefixlen):
            same_length = self._networks.setdefault((network.version, network.prefixlen), {})
            same_length[_prefix(network.network_address, network.prefixlen)] = region

    def find(self, region: str | None, *, peer: str, told: str = "", forwarded: str = "") -> Origin:
        """Where a client is.

        region: what its job names. peer: the address at the other end of the connection, or nothing where it has none.
        told and forwarded: the headers X-Client-Region and X-Forwarded-For. Raises UnknownRegion for a trusted proxy's
        X-Client-Region that cannot be read.
        """
        if region is not None:
            return Origin(region, FoundBy.REQUEST)
        connected = _address(peer)
        if told.strip() and self._trusts(connected) and (named := self._named(told.strip())):
            return Origin(named, FoundBy.HEADER)
        address = self._client(connected, forwarded)
        if address is not None and (own := self._own_network(address)):
            return Origin(own, FoundBy.NETWORK)
        if address is not None and (home := self._of_country(country_of(address))):
            return Origin(home, FoundBy.COUNTRY)
        return Origin(self._default, FoundBy.DEFAULT)

    def address(self, *, peer: str, forwarded: str = "") -> Address | None:
        """A client's own address; None where the proxy that speaks for it does not say one. Arguments as for find()."""
        return self._client(_address(peer), forwarded)

    def _trusts(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._proxies)

    def _client(self, connected: Address | None, forwarded: str) -> Address | None:
        """The last address that a trusted proxy vouches for; None where the proxy does not say one.

        Each proxy appends the address that it was called from, so the list is read from its end; what stands before
        the first stranger is that stranger's own claim.
        """
        address = connected
        for hop in reversed(forwarded.split(",") if forwarded.strip() else []):
            if not self._trusts(address):
                return address
            address = _address(hop)
        return address

    def _named(self, told: str) -> str | None:
        """The region that a header means, by its name or a country's code; None for a country that it does not know."""
        if found := self._by_name.get(told.casefold()):
            return found
        # Proxies have codes of their own for "unknown" and "Tor": XX, ZZ, T1.
        if len(told) == 2 and told.isascii() and told.isalnum():
            return self._of_country(told.upper())
        raise UnknownRegion(
            f"Must be a region, or a country's ISO 3166 code of two letters. {near(told, self._regions)}"
        )

    def _own_network(self, address: Address) -> str | None:
        for (version, length), regions in self._networks.items():
            if version == address.version and (found := regions.get(_prefix(address, length))):
                return found
        return None

    def _of_country(self, country: str | None) -> str | None:
        """The region that lists the country, else the nearest one to it; None for a country that is none."""
        if country is None:
            return None
        if home := self._home_of.get(country):
            return home
        spot = _country_spots().get(country)
        if spot is None:
            return None
        here = Region(country, "", "", *spot)
        return min(self._regions, key=lambda name: distance_km(here, self._regions[name]))


def find_here(region: str | None) -> Origin:
    """Where the client of this HTTP request is; region: what its job names. Raises UnknownRegion."""
    origins: Origins = current_app.extensions["origins"]
    return origins.find(
        region,
        peer=request.remote_addr or "",
        told=request.headers.get(HEADER, ""),
        forwarded=request.headers.get("X-Forwarded-For", ""),
    )


def address_here() -> Address | None:
    """The address of this HTTP request's client; None where it is not known."""
    origins: Origins = current_app.extensions["origins"]
    return origins.address(peer=request.remote_addr or "", forwarded=request.headers.get("X-Forwarded-For", ""))


def country_of(address: Address) -> str | None:
    """ISO 3166 code of the country that an address was given to; None for one that is private or unknown."""
    if not address.is_global or address.is_multicast:
        return None
    country = _countries().lookup(str(address)).country_code
    return country if len(country) == 2 and country.isalpha() else None


def _address(text: str) -> Address | None:
    """The address that a connection or a proxy states, with or without a port; None for anything else."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _prefix(address: Address, length: int) -> int:
    return int(address) >> (address.max_prefixlen - length)


class _Detail(Protocol):
    country_code: str


class _Countries(Protocol):
    def lookup(self, address: str) -> _Detail:
        """What is known of an address."""


@functools.cache
def _countries() -> _Countries:
    """The table of countries by address: 0.3 s and about 50 MB, so not before the first public address asks for it."""
    # Imported here: API processes behind private addresses never need it.
    from geoip2fast import GeoIP2Fast

    # By its full path: by its name, a file in the working directory would come first, and the file is a pickle.
    path = files("geoip2fast") / "geoip2fast-ipv6.dat.gz"
    table: _Countries = GeoIP2Fast(geoip2fast_data_file=str(path))
    return table


@functools.cache
def _country_spots() -> dict[str, tuple[float, float]]:
    """Latitude and longitude of one city in each country: that of its first time zone in the tz database."""
    spots: dict[str, tuple[float, float]] = {}
    for line in (files("tzdata") / "zoneinfo" / "zone.tab").read_text().splitlines():
        if not line.startswith("#"):
            country, spot, *_ = line.split("\t")
            spots.setdefault(country, _coordinates(spot))
    return spots


def _coordinates(text: str) -> tuple[float, float]:
    """ISO 6709, as in +513030-0000731 or -1247+04514: degrees, minutes, and seconds or none."""
    split = max(text.rfind("+"), text.rfind("-"))
    return _degrees(text[:split], whole=2), _degrees(text[split:], whole=3)


def _degrees(text: str, *, whole: int) -> float:
    sign, digits = text[0], text[1:]
    seconds = digits[whole + 2 :] or "0"
    value = int(digits[:whole]) + int(digits[whole : whole + 2]) / 60 + int(seconds) / 3600
    return -value if sign == "-" else value
