"""Brokers and stores behind TLS: a certificate that nobody vouches for is refused, by every client of ours."""

import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import kombu
import pytest
from celery import Celery

import celeryconfig
from tasks.publisher import BrokerError, Publisher
from tasks.routing import Region
from tasks.store import StoreError, open_store
from tests.conftest import Valkey
from tests.faults.proxy import Proxy
from tests.servers import RabbitMq, missing

QUEUE = "asia-east.llm"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a certificate of 127.0.0.1 that signs itself, and its key."""
    if shutil.which("openssl") is None:
        missing("openssl")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    words = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=tests"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", "-"]
    made = subprocess.run(["openssl", "req", "-x509", *words], check=True, capture_output=True, text=True)
    with path.open("a") as file:
        file.write(made.stdout)
    return path


@pytest.fixture
def behind_tls(certificate: Path) -> Iterator[Callable[[int], int]]:
    """Puts TLS before a port of this machine; gives the port to use instead."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    made: list[Proxy] = []

    def put(port: int) -> int:
        made.append(Proxy("127.0.0.1", port, tls=context).__enter__())
        return made[-1].port

    yield put
    for proxy in made:
        proxy.__exit__(None, None, None)


def region(broker: str, store: str) -> Region:
    return Region("asia-east", broker, store, 0.0, 0.0)


def worker_connection(broker: str) -> kombu.Connection:
    """The connection that a worker of that broker's region takes messages from."""
    app = Celery(set_as_current=False)
    app.config_from_object(celeryconfig)
    app.conf.update(celeryconfig.connections_of(region(broker, broker)))
    return app.connection_for_read()


@pytest.mark.parametrize("kind", ["rediss", "amqps"])
def test_a_broker_whose_certificate_nobody_vouches_for_is_refused(
    valkey: Valkey, rabbitmq: RabbitMq, behind_tls, certificate: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    port = behind_tls(valkey.port if kind == "rediss" else rabbitmq.port)
    broker = f"rediss://127.0.0.1:{port}/0" if kind == "rediss" else f"amqps://guest:guest@127.0.0.1:{port}//"

    with pytest.raises(BrokerError, match="CERTIFICATE_VERIFY_FAILED"):
        Publisher(broker).depths([QUEUE])
    with pytest.raises(BrokerError, match="CERTIFICATE_VERIFY_FAILED"), worker_connection(broker) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)

    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert Publisher(broker).depths([QUEUE]) == {QUEUE: 0}
    with worker_connection(broker) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)


def test_a_store_whose_certificate_nobody_vouches_for_is_refused(
    valkey: Valkey, behind_tls, certificate: Path, monkeypatch: pytest.MonkeyPatch
):
    store = f"rediss://127.0.0.1:{behind_tls(valkey.port)}/1"
    app = Celery(set_as_current=False)
    app.config_from_object(celeryconfig)
    app.conf.update(celeryconfig.connections_of(region(f"{valkey.url}/0", store)))

    for client in (open_store(store, timeout_s=2), app.backend.client):
        with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
            client.ping()

    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for client in (open_store(store, timeout_s=2), app.backend.client):
        assert client.ping()
