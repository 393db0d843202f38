"""Brokers and stores elsewhere without TLS are refused, by every process, unless the operator says otherwise."""

import os
import subprocess
import sys

import pytest

from app import control
from app.settings import Settings
from tasks import transport
from tasks.options import EXIT_CONFIG, SettingsError
from tasks.routing import Region
from tests.rig import ROOT

PLAIN = "redis://:canary@10.0.0.5:6379/1"


@pytest.mark.parametrize(
    ("url", "exposed"),
    [
        ("redis://127.0.0.1:6390/0", False),
        ("redis://:p@localhost/0", False),
        ("redis://[::1]:6390/0", False),
        ("amqp://", False),
        ("unix:///run/valkey.sock", False),
        ("redis+socket:///run/valkey.sock", False),
        ("rediss://10.0.0.5/0", False),
        ("amqps://broker.example.com//", False),
        ("redis://10.0.0.5/0", True),
        ("redis://0.0.0.0/0", True),
        ("redis://127.0.0.1.example.com/0", True),
        ("redis://[fd00::5]/0", True),
        ("amqp://u:p@broker.example.com//", True),
        ("pyamqp://broker//", True),
    ],
)
def test_what_crosses_a_network_in_plain_text_is_known_by_its_url(url: str, exposed: bool):
    assert transport.is_exposed(url) is exposed


def test_each_of_several_brokers_counts():
    region = Region("r", "amqp://localhost//;amqp://elsewhere//", "rediss://s/1", 0.0, 0.0)

    with pytest.raises(SettingsError, match=r"broker of r, amqp://elsewhere//, .* Use amqps://"):
        transport.check([region], allowed=False)
    transport.check([region], allowed=True)


def test_api_control_and_worker_refuse_in_one_line_that_names_the_setting(monkeypatch: pytest.MonkeyPatch):
    environ = {**os.environ, "GPU_STORE_URL": PLAIN, "GPU_LLM_MODEL": "echo"}
    monkeypatch.setenv("GPU_STORE_URL", PLAIN)
    worker = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", "asia-east.llm"]
    started = subprocess.Popen(
        worker, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    with pytest.raises(SettingsError) as api:
        Settings.from_environ(environ)
    with pytest.raises(SystemExit) as reconciler:
        control.main()
    said, _ = started.communicate(timeout=60)

    line = "The store of asia-east, redis://:***@10.0.0.5:6379/1, is not on this machine and not behind TLS"
    assert started.returncode == EXIT_CONFIG
    for words in (str(api.value), str(reconciler.value), said):
        assert line in words
        assert "GPU_ALLOW_PLAINTEXT=1" in words
        assert "canary" not in words
        assert "Traceback" not in words
    assert Settings.from_environ({**environ, "GPU_ALLOW_PLAINTEXT": "1"}).regions["asia-east"].store == PLAIN
