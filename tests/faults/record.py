"""What goes on at a region's servers, taken down: every command of a Valkey, every message of a RabbitMQ."""

import socket
import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

import amqp

from tests.conftest import Valkey
from tests.rig import until
from tests.servers import RabbitMq

SLICE_S = 0.2


class Record(ABC):
    """A recording that begins with the block and goes on when its server has been away."""

    def __init__(self) -> None:
        self._said = bytearray()
        self._on = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen_for_ever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        until(self._on.is_set)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def __contains__(self, word: str) -> bool:
        return word.encode() in self._said

    def _listen_for_ever(self) -> None:
        while not self._stop.is_set():
            try:
                self._listen()
            except (OSError, amqp.AMQPError):
                self._on.clear()
                self._stop.wait(SLICE_S)

    @abstractmethod
    def _listen(self) -> None:
        """Take down what is said, until stopped or cut off."""


class ValkeyRecord(Record):
    """Of every command with its arguments, also those that scripts call."""

    def __init__(self, server: Valkey) -> None:
        super().__init__()
        self._server = server

    def _listen(self) -> None:
        with socket.create_connection((self._server.host, self._server.port), timeout=SLICE_S) as connection:
            connection.sendall(b"MONITOR\r\n")
            while not self._stop.is_set():
                try:
                    said = connection.recv(1 << 16)
                except TimeoutError:
                    continue
                if not said:
                    raise ConnectionError("the server has gone")
                self._said += said
                self._on.set()


class RabbitMqRecord(Record):
    """Of every message that is published or delivered, with its headers."""

    def __init__(self, server: RabbitMq) -> None:
        super().__init__()
        self._server = server

    def _listen(self) -> None:
        with self._server.connect() as connection:
            channel = connection.channel()
            queue, _, _ = channel.queue_declare(exclusive=True)
            channel.queue_bind(queue, "amq.rabbitmq.trace", "#")
            channel.basic_consume(queue, no_ack=True, callback=self._take)
            self._on.set()
            while not self._stop.is_set():
                try:
                    connection.drain_events(timeout=SLICE_S)
                except TimeoutError:
                    continue

    def _take(self, message: amqp.Message) -> None:
        body = message.body if isinstance(message.body, bytes) else str(message.body).encode()
        self._said += repr(message.headers).encode() + body
