"""IP addresses of clients and of this host, as direct mode compares them."""

import ipaddress
import socket


def plain_address(text: str) -> str:
    """An IP address in its one form; ::ffff:10.0.0.1 is 10.0.0.1. Raises ValueError for what is none."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def is_loopback(address: str) -> bool:
    """Whether a plain address is of this host alone."""
    return ipaddress.ip_address(address).is_loopback


def own_address(host: str | None, port: int) -> str:
    """The address that this host has on its way to another one. Raises OSError where there is no way."""
    kind, _, _, _, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    # Nothing is sent: connecting a datagram socket only looks the route up.
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(there)
        return str(probe.getsockname()[0])
