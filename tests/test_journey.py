"""The front door, as a newcomer opens it: `python -m local.demo` with the real models."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from local.settings import LOOPBACK
from shapes.world import Scene, judge
from tasks.settings import MODEL_VARIABLES
from tests.rig import ROOT, free_port

PORTS = ("PORT", "FLOWER_PORT", "STORE_PORT", "GPU_ADMIN_PORT")
#: The settings of whoever runs the tests must not lead the demo elsewhere.
FOREIGN = {
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/x",
    "GPU_BROKER_URL": "redis://127.0.0.1:9",
    "REGIONS": '{"mars": {}}',
}


# Where the models have not been prepared yet, that takes another two minutes.
@pytest.mark.timeout(500)
def test_the_demo_shows_every_type_and_leaves_nothing(tmp_path: Path) -> None:
    ports = {name: str(free_port()) for name in PORTS}
    environ = {
        **{name: value for name, value in os.environ.items() if name not in MODEL_VARIABLES},
        **FOREIGN,
        **ports,
        "GPU_DATA_DIR": str(tmp_path),
        "http_proxy": "http://127.0.0.1:9",
    }

    demo = subprocess.run(
        [sys.executable, "-m", "local.demo"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=480
    )

    said = demo.stdout + demo.stderr
    assert demo.returncode == 0, said
    chat, follow, image, vision, speech, similarity = re.split(
        r"^(?:llm|image_gen|vision|whisper|embedding): ", said, flags=re.MULTILINE
    )[1:]
    assert re.search(r"^  answer +.*Paris", chat, re.MULTILINE), said
    for part in (chat, follow):
        assert re.search(r"^  tokens +\d+ in, [1-9]\d* out$", part, re.MULTILINE), said
    assert re.search(
        r"^  model +HuggingFaceTB/SmolLM2-135M-Instruct on asia-east-\S+, [\d.]+ s$", chat, re.MULTILINE
    ), said
    assert re.findall(r" s (queued|running|completed)", follow)[-1] == "completed", said
    file = Path(re.search(r"^  file +(.*)$", image, re.MULTILINE).group(1))  # type: ignore[union-attr]
    with Image.open(file) as picture:
        assert (picture.size, judge(picture)) == ((256, 256), Scene("red", "circle", "blue")), said
    assert "circle" in vision, said
    assert "蓝色背景上有一个红色的圆形" in vision, said
    assert re.search(r"^  heard +.*lazy dog", speech, re.MULTILINE), said
    same, near, far = map(float, re.findall(r"^ +(-?\d\.\d\d) ", similarity, re.MULTILINE))
    assert same > 0.99 > near > 0.4 > far, said
    assert "everything is stopped" in said
    for name, port in ports.items():
        with socket.socket() as probe:
            assert probe.connect_ex((LOOPBACK, int(port))) != 0, name
