"""Short questions to a model server on this host."""

import json
import time
from dataclasses import dataclass
from typing import Any

import requests

#: The longest answer that is read.
MAX_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said."""

    #: The HTTP status.
    status: int
    body: bytes

    def json(self) -> Any:
        """The body as JSON; None if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class Probe:
    """Asks one server, for so many seconds in all."""

    def __init__(self, host: str, port: int, seconds: float) -> None:
        """host: the address that the server was told to listen on."""
        # Who listens on every address is asked on this host's own.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._end = time.monotonic() + seconds

    def get(self, path: str) -> Answer | None:
        """The answer to GET; None if none came in time."""
        with requests.Session() as session:
            # A proxy of the environment is not the way to this host.
            session.trust_env = False
            left = self._end - time.monotonic()
            if left <= 0:
                return None
            try:
                with session.get(self.url + path, timeout=left, stream=True, allow_redirects=False) as answer:
                    body = b""
                    for block in answer.iter_content(16 * 1024):
                        body += block
                        # The timeout is of each read: one that comes drop by drop would last.
                        if time.monotonic() > self._end or len(body) > MAX_BYTES:
                            return None
                    return Answer(answer.status_code, body)
            except requests.RequestException:
                return None
