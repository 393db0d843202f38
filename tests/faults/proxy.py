"""A wire that tests can stretch, narrow, cut and block: a small TCP proxy in a thread of its own.

`tc netem` is missing on some kernels, and needs root everywhere; this needs neither.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

#: Most bytes that wait on either side of the wire.
BUFFER_BYTES = 1 << 20


class Proxy:
    """Carries TCP connections to one server; every method may be called from any thread.

    with Proxy("127.0.0.1", 6379) as proxy: clients connect to 127.0.0.1 and proxy.port.
    """

    def __init__(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        """tls: what clients must speak with it; to the server it speaks plainly."""
        self._target = (host, port)
        self._tls = tls
        #: Where clients connect, from entering on.
        self.port = 0
        self._delay_s = 0.0
        self._bytes_per_s: float | None = None
        self._refusing = False
        #: Whether bytes pass towards the server, and back.
        self._there, self._back = asyncio.Event(), asyncio.Event()
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def connections(self) -> int:
        """How many stand now."""
        return len(self._clients)

    def delay(self, seconds: float) -> None:
        """Everything takes this long each way, besides what the wire itself needs."""
        self._delay_s = seconds

    def limit(self, bytes_per_s: float) -> None:
        """Each way of each connection carries about this much at the most."""
        self._bytes_per_s = bytes_per_s

    def cut(self) -> None:
        """Reset every connection that stands; new ones are carried."""
        self._do(self._reset_all)

    def refuse(self) -> None:
        """Reset every connection that stands, and each new one at once."""
        self._refusing = True
        self.cut()

    def black_hole(self) -> None:
        """Connections stand and new ones are accepted, but nothing comes through.

        What is sent meanwhile is held, and arrives late when the wire is healed: so does TCP behind a firewall that
        drops, or over a link that is down.
        """
        self._do(self._there.clear, self._back.clear)

    def half_open(self) -> None:
        """What clients send arrives; what the server answers is held."""
        self._do(self._there.set, self._back.clear)

    def heal(self) -> None:
        """A whole wire again, and as fast as it can be; what was held arrives now."""
        self._refusing, self._delay_s, self._bytes_per_s = False, 0.0, None
        self._do(self._there.set, self._back.set)

    def _do(self, *calls: Callable[[], object]) -> None:
        """Make the calls in the loop's thread; they are done when this returns."""

        async def work() -> None:
            for call in calls:
                call()

        asyncio.run_coroutine_threadsafe(work(), self._loop).result()

    # In the loop's thread

    async def _listen(self) -> None:
        self._there.set()
        self._back.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=BUFFER_BYTES, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _reset_all(self) -> None:
        for client in self._clients:
            _reset(client)

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self._refusing:
            _reset(client)
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._clients.add(client)
        server: asyncio.StreamWriter | None = None
        ways: list[asyncio.Task[None]] = []
        try:
            await self._there.wait()
            answers, server = await asyncio.open_connection(*self._target, limit=BUFFER_BYTES)
            ways = [
                asyncio.create_task(self._carry(reader, server, self._there)),
                asyncio.create_task(self._carry(answers, client, self._back)),
            ]
            # A connection that one side has left is no use to the other.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.CancelledError):
            # Nobody listens behind the wire, or the proxy is closed.
            _reset(client)
        finally:
            for way in ways:
                way.cancel()
            for side in (client, server):
                if side is not None:
                    side.close()
            self._clients.discard(client)
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passing: asyncio.Event) -> None:
        # A connection that is reset ends here like one that is closed.
        with contextlib.suppress(OSError):
            while data := await reader.read(BUFFER_BYTES):
                await asyncio.sleep(self._delay_s)
                if self._bytes_per_s is not None:
                    await asyncio.sleep(len(data) / self._bytes_per_s)
                await passing.wait()
                writer.write(data)
                await writer.drain()
        # Nor is an end seen through a wire that carries nothing.
        await passing.wait()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN, whatever has not been sent."""
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
