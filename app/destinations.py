"""Where webhooks may go, and the one request that is sent there: nothing behind the firewall can be reached by them.

A name is resolved once, every address that it has is checked, and the connection goes to one of the addresses that were
checked: a name that is made to point elsewhere in between gains nothing. No redirect is followed, no proxy is asked.
"""

import http.client
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import SplitResult, quote, urlsplit

from app.settings import Network

#: One attempt, from the first packet to the last.
TIMEOUT_S = 15.0
RESOLVE_S = 5.0
LONGEST_URL = 2048

_LABELS = re.compile(r"[a-z0-9._:-]+", re.IGNORECASE)
# Internal although their registries call them global, or said so late: Azure's host, IETF protocol assignments.
_INTERNAL = (ipaddress.ip_network("168.63.129.16/32"), ipaddress.ip_network("192.0.0.0/24"))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Refused(Exception):
    """This is no place to send to; the message says why."""


class Unreachable(Exception):
    """Nothing answered; the message says what happened, and nothing of what was sent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered; retry_after as its header has it."""

    status: int
    retry_after: str | None


class Destinations:
    """Says where webhooks may go, and sends them there. Threads may share it."""

    def __init__(self, allowed: Sequence[Network] = (), *, http: bool = False, timeout_s: float = TIMEOUT_S) -> None:
        """allowed: internal networks that may be reached all the same. http: without TLS, too."""
        self._allowed = allowed
        self._http = http
        self._timeout_s = timeout_s

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        # When first needed: to read all authorities takes about as long as all else that create_app does.
        return ssl.create_default_context()

    def check(self, url: str) -> list[Address]:
        """The addresses that the URL's host has now. Raises Refused."""
        parts, host, port = self._parse(url)
        try:
            found = _resolve(host, port)
        except Unreachable as error:
            raise Refused(str(error)) from error
        for address in found:
            if not self._may_reach(address):
                # Not the address: what names mean inside is nobody's business.
                raise Refused(f"{parts.hostname} is in a network that webhooks are not sent to.")
        return found

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send one request; the head of what is answered. Raises Refused and Unreachable."""
        end = time.monotonic() + self._timeout_s
        addresses = self.check(url)
        parts, host, port = self._parse(url)
        tried = addresses[:3]
        for last, address in enumerate(tried, start=1 - len(tried)):
            left_s = max(end - time.monotonic(), 0.1)
            try:
                # Half of the time for an address that swallows packets, while there is another one.
                raw = socket.create_connection((str(address), port), timeout=left_s / (1 if last == 0 else 2))
                break
            except OSError as error:
                if last == 0:
                    raise Unreachable(_spoken(error)) from error
        raw.settimeout(self._timeout_s)
        stream = raw
        if parts.scheme == "https":
            stream = self._tls.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        # Time-outs of sockets bound each packet, not all of them: whoever sends a byte now and then would hold us.
        guard = threading.Timer(max(end - time.monotonic(), 0.1), _shut, [stream])
        guard.daemon = True
        guard.start()
        try:
            with stream:
                if isinstance(stream, ssl.SSLSocket):
                    stream.do_handshake()
                answer = _exchange(stream, parts, host, port, body, headers)
            if time.monotonic() >= end:
                # Cut off by the guard: its last header may look like a whole one.
                raise TimeoutError
            return answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = time.monotonic() >= end
            raise Unreachable(f"No answer within {self._timeout_s:g} s." if late else _spoken(error)) from error
        finally:
            guard.cancel()

    def _parse(self, url: str) -> tuple[SplitResult, str, int]:
        """The URL, its host as the network knows it, and its port. Raises Refused."""
        if len(url) > LONGEST_URL or not url.isprintable() or re.search(r"[\s\\]", url):
            raise Refused(f"Must be a URL of at most {LONGEST_URL} visible characters.")
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
            if ":" not in host:
                host = host.encode("idna").decode("ascii")
            port = parts.port if parts.port is not None else (443 if parts.scheme == "https" else 80)
        except (ValueError, UnicodeError) as error:
            raise Refused("Must be a URL like https://example.com/hooks.") from error
        if parts.scheme != "https" and not (self._http and parts.scheme == "http"):
            raise Refused("Must begin with https:// or http://." if self._http else "Must begin with https://.")
        if parts.username is not None or parts.password is not None:
            raise Refused("Must hold no user name or password: the signature says who sends.")
        if parts.fragment or not _LABELS.fullmatch(host) or not 0 < port < 65_536:
            raise Refused("Must be a URL like https://example.com/hooks, without a fragment.")
        return parts, host, port

    def _may_reach(self, address: Address) -> bool:
        inner = _inner(address)
        if any(inner in network for network in self._allowed if network.version == inner.version):
            return True
        return _is_public(address) and _is_public(inner)


def _resolve(host: str, port: int) -> list[Address]:
    """Every address of the host, in the resolver's order. Raises Unreachable, after RESOLVE_S at the latest."""
    answers: queue.SimpleQueue[list[Address] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            # A zone (fe80::1%eth0) is a name of this host's own.
            answers.put([ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found])
        except (OSError, ValueError) as error:
            answers.put(error)

    # The resolver cannot be told how long it may take.
    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=RESOLVE_S)
    except queue.Empty:
        raise Unreachable(f"The name {host} was not resolved within {RESOLVE_S:g} s.") from None
    if isinstance(answer, Exception) or not answer:
        raise Unreachable(f"The name {host} cannot be resolved.")
    return list(dict.fromkeys(answer))


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, where it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None) or address


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped or address in _NAT64:
            # What it stands for is looked at.
            return True
        if address.is_site_local:
            return False
    return (
        address.is_global
        and not (address.is_multicast or address.is_reserved or address.is_unspecified)
        and not any(address in network for network in _INTERNAL if network.version == address.version)
    )


def _exchange(
    stream: socket.socket, parts: SplitResult, host: str, port: int, body: bytes, headers: Mapping[str, str]
) -> Answer:
    connection = http.client.HTTPConnection(host, port)
    connection.sock = stream
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe="%/?:@!$&'()*+,;=~[]|")
    default = port == (443 if parts.scheme == "https" else 80)
    name = f"[{host}]" if ":" in host else host
    connection.putrequest("POST", path, skip_host=True, skip_accept_encoding=True)
    connection.putheader("Host", name if default else f"{name}:{port}")
    for header, value in {**headers, "Content-Length": str(len(body)), "Connection": "close"}.items():
        connection.putheader(header, value)
    connection.endheaders(body)
    # Of its body nothing is read: the status says all.
    response = connection.getresponse()
    return Answer(response.status, response.getheader("Retry-After"))


def _shut(stream: socket.socket) -> None:
    try:
        # Below TLS: nothing is said any more.
        socket.socket.shutdown(stream, socket.SHUT_RDWR)
    except OSError:
        # It has ended by itself.
        return


def _spoken(error: Exception) -> str:
    match error:
        case TimeoutError():
            return "No answer in time."
        case ssl.SSLCertVerificationError():
            return f"Its certificate is not trusted: {error.verify_message}."
        case ssl.SSLError():
            return f"No TLS: {error.reason or type(error).__name__}."
        case ConnectionRefusedError():
            return "The connection was refused."
        case ConnectionError() | http.client.RemoteDisconnected():
            return "The connection was closed without an answer."
        case http.client.HTTPException():
            return "What answered does not speak HTTP."
        case _:
            return f"It could not be reached: {error.strerror if isinstance(error, OSError) else type(error).__name__}."
