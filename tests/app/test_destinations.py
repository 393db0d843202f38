"""Where webhooks may go: an address inside the network is refused in whatever way it is written."""

import ipaddress
import socket
import time

import pytest

from app.destinations import Destinations, Refused, Unreachable
from tests.app.receiver import receiving

LOOPBACK = [ipaddress.ip_network("127.0.0.0/8")]
INTERNAL = [
    "127.0.0.1",
    "127.255.255.254",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "0",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.3.4",
    "192.168.1.1",
    "100.64.0.1",
    "100.100.100.200",
    "169.254.169.254",
    "168.63.129.16",
    "192.0.0.192",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "[::]",
    "[::1]",
    "[::127.0.0.1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:7f00:1::]",
    "[2002:a00:1::1]",
    "[2001:0:1:1::f5ff:fffe]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[fe80::1%25lo]",
    "[fec0::1]",
    "[ff02::1]",
    "[2001:db8::1]",
    "localhost",
    "LOCALHOST.",
    "metadata.localhost",
]


@pytest.mark.parametrize("host", INTERNAL)
def test_what_is_inside_is_refused(host):
    with pytest.raises(Refused):
        Destinations().check(f"https://{host}/hook")


@pytest.mark.parametrize("host", ["93.184.216.34", "[2606:2800:220:1:248:1893:25c8:1946]"])
def test_what_is_outside_is_let_through(host):
    assert Destinations().check(f"https://{host}:8443/hook?x=1")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "localhost", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]"])
def test_a_network_that_the_operator_names_may_be_reached(host):
    networks = [*LOOPBACK, ipaddress.ip_network("::1/128")]

    assert Destinations(networks).check(f"https://{host}/hook")
    with pytest.raises(Refused):
        Destinations(networks).check("https://10.0.0.1/hook")


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("http://93.184.216.34/", "Must begin with https://."),
        ("ftp://93.184.216.34/", "Must begin with https://."),
        ("93.184.216.34", "Must begin with https://."),
        ("https://", "without a fragment"),
        ("https://user:secret@93.184.216.34/", "no user name"),
        ("https://93.184.216.34/#part", "without a fragment"),
        ("https://93.184.216.34:0/", "without a fragment"),
        ("https://93.184.216.34:99999/", "a URL like"),
        ("https://[::1/", "a URL like"),
        ("https://93.184.216.34\\@127.0.0.1/", "visible characters"),
        ("https://93.184.216.34/\r\nX: y", "visible characters"),
        (f"https://93.184.216.34/{'x' * 2048}", "2048"),
        (f"https://{'x' * 64}.example/", "a URL like"),
        ("https://no-such-name.invalid/", "cannot be resolved"),
    ],
    ids=lambda value: value[:32] if isinstance(value, str) else None,
)
def test_what_is_no_such_url_is_refused_with_its_rule(url, rule):
    with pytest.raises(Refused, match=rule.replace(".", r"\.")):
        Destinations().check(url)


def test_a_name_is_resolved_once_and_the_connection_goes_to_what_was_checked(monkeypatch):
    outside, asked = "93.184.216.34", []
    real = socket.getaddrinfo

    def rebinding(host, *args, **kwargs):
        asked.append(host)
        # As a hostile name server would: harmless while it is checked, inside afterwards.
        return real(outside if asked.count(host) == 1 else "127.0.0.1", *args, **kwargs)

    connected = []

    def refuse(address, **_):
        connected.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(socket, "create_connection", refuse)

    with pytest.raises(Unreachable, match="refused"):
        Destinations().post("https://rebinding.example/", b"{}", {})

    assert (asked, connected) == (["rebinding.example"], [outside])


def test_an_address_that_became_internal_is_refused_at_the_delivery(monkeypatch):
    with receiving() as receiver:
        destinations = Destinations(http=True)

        with pytest.raises(Refused):
            destinations.post(receiver.url.replace("127.0.0.1", "localhost"), b"{}", {})

        assert receiver.got == []


def test_an_answer_that_drips_is_given_up_as_a_whole():
    with receiving() as receiver:
        receiver.drip_s = 0.05
        began = time.monotonic()

        with pytest.raises(Unreachable, match=r"No answer within 0\.5 s"):
            Destinations(LOOPBACK, http=True, timeout_s=0.5).post(receiver.url, b"{}", {})

        assert time.monotonic() - began < 5


def test_host_path_and_query_are_sent_as_the_url_has_them():
    with receiving() as receiver:
        name = receiver.url.replace("127.0.0.1", "localhost")

        answer = Destinations([*LOOPBACK, ipaddress.ip_network("::1/128")], http=True).post(f"{name}?q=ü", b"{}", {})

        assert answer.status == 204
        assert receiver.got[0][0]["host"] == name.split("/")[2]


def test_without_tls_behind_an_https_url_nothing_is_sent():
    with receiving() as receiver:
        with pytest.raises(Unreachable, match="TLS"):
            Destinations(LOOPBACK).post(receiver.url.replace("http:", "https:"), b"{}", {})

        assert receiver.got == []
