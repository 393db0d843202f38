"""The wire between tests and servers does what it says."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Proxy
from tests.rig import free_port, until


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                pass

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", echo) as made:
        yield made


def dial(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def ask(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    answer = b""
    while len(answer) < len(data):
        answer += connection.recv(1 << 16) or pytest.fail("the connection was closed")
    return answer


def hears_nothing(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(5)
    return False


def test_it_carries_both_ways_and_forgets_who_left(proxy):
    data = bytes(range(256)) * 20_000

    with dial(proxy) as one, dial(proxy) as other:
        threading.Thread(target=one.sendall, args=(data,)).start()
        assert ask(other, b"there") == b"there"
        received = b""
        while len(received) < len(data):
            received += one.recv(1 << 16)
        assert proxy.connections == 2

    assert received == data
    until(lambda: proxy.connections == 0)


def test_a_delay_counts_each_way_and_a_limit_by_the_byte(proxy):
    with dial(proxy) as connection:
        proxy.delay(0.1)
        began = time.monotonic()
        ask(connection, b"x")
        assert time.monotonic() - began >= 0.2

        proxy.heal()
        proxy.limit(100_000)
        began = time.monotonic()
        ask(connection, bytes(20_000))
        assert time.monotonic() - began >= 0.4


def test_a_cut_resets_those_who_are_connected_and_no_other(proxy):
    with dial(proxy) as connection:
        ask(connection, b"x")
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)

    with dial(proxy) as connection:
        assert ask(connection, b"x") == b"x"


def test_where_it_refuses_or_nobody_listens_connections_are_reset(proxy):
    proxy.refuse()
    # The reset may come before connect() has returned.
    with pytest.raises(ConnectionResetError), dial(proxy) as connection:
        connection.recv(1)
    proxy.heal()
    with dial(proxy) as connection:
        assert ask(connection, b"x") == b"x"

    with Proxy("127.0.0.1", free_port()) as nobody, pytest.raises(ConnectionResetError), dial(nobody) as connection:
        connection.recv(1)


def test_a_black_hole_takes_everything_and_gives_it_back_when_it_heals(proxy):
    with dial(proxy) as old:
        ask(old, b"x")
        proxy.black_hole()
        with dial(proxy) as new:
            old.sendall(b"old")
            new.sendall(b"new")
            assert hears_nothing(old, 0.2)
            assert hears_nothing(new, 0.2)

            proxy.heal()

            assert (old.recv(3), new.recv(3)) == (b"old", b"new")


def test_half_open_what_is_sent_arrives_and_the_answer_does_not():
    with socket.create_server(("127.0.0.1", 0)) as server, Proxy(*server.getsockname()) as wire, dial(wire) as client:
        there, _ = server.accept()
        with there:
            wire.half_open()
            client.sendall(b"question")
            assert there.recv(8) == b"question"
            there.sendall(b"answer")
            assert hears_nothing(client, 0.2)

            wire.heal()

            assert client.recv(6) == b"answer"
