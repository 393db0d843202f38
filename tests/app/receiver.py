"""A receiver of webhooks: a real HTTP server that answers as a test says, and keeps what it was sent."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Receiver:
    """Where it is, how it answers, and what it got: headers in lower case, and the body as it came."""

    url: str = ""
    #: Statuses of the next answers; with none left, 204.
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    #: Seconds between two bytes of an answer that never ends; None answers as it should.
    drip_s: float | None = None
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def ids(self) -> list[str]:
        """The webhook-ids that it got, in order."""
        return [headers["webhook-id"] for headers, _ in self.got]


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver on a port of its own, ended with the context."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        """Keeps each POST and answers it."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            if receiver.drip_s is not None:
                self._drip(receiver.drip_s)
                return
            self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
            headers: Mapping[str, str] = {"Content-Length": "0", **receiver.headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def _drip(self, pause_s: float) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            end = time.monotonic() + 30
            while time.monotonic() < end and not receiver.ended.wait(pause_s):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
