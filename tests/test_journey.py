"""The front door, as a newcomer opens it: `python -m local.demo` with the real model."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from local.settings import LOOPBACK

ROOT = Path(__file__).resolve().parent.parent
PORTS = ("PORT", "FLOWER_PORT", "STORE_PORT")
#: The settings of whoever runs the tests must not lead the demo elsewhere.
FOREIGN = {
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/x",
    "GPU_BROKER_URL": "redis://127.0.0.1:9",
    "REGIONS": '{"mars": {}}',
}


# Where the model has not been prepared yet, that takes another minute and a half.
@pytest.mark.timeout(400)
def test_the_demo_answers_a_chat_and_an_asynchronous_job_and_leaves_nothing(tmp_path: Path) -> None:
    servers = [socket.create_server((LOOPBACK, 0)) for _ in PORTS]
    ports = {name: str(server.getsockname()[1]) for name, server in zip(PORTS, servers, strict=True)}
    for server in servers:
        server.close()
    environ = {
        **{name: value for name, value in os.environ.items() if name != "GPU_LLM_MODEL"},
        **FOREIGN,
        **ports,
        "GPU_DATA_DIR": str(tmp_path),
        "http_proxy": "http://127.0.0.1:9",
    }

    demo = subprocess.run(
        [sys.executable, "-m", "local.demo"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=380
    )

    said = demo.stdout + demo.stderr
    assert demo.returncode == 0, said
    first, second = (part.split("[", 1)[0] for part in said.split("POST /api/v1/jobs")[1:])
    assert re.search(r"^  answer +.*Paris", first, re.MULTILINE), said
    for part in (first, second):
        assert re.search(r"^  tokens +\d+ in, [1-9]\d* out$", part, re.MULTILINE), said
        assert re.search(r"^  region +asia-east$", part, re.MULTILINE), said
        assert re.search(r"^  worker +asia-east-\S+$", part, re.MULTILINE), said
    states = re.findall(r" s (queued|running|completed)", second)
    assert states[-1] == "completed", said
    assert "everything is stopped" in said
    for name, port in ports.items():
        with socket.socket() as probe:
            assert probe.connect_ex((LOOPBACK, int(port))) != 0, name
