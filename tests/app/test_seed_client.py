"""The seed's own Python client, letter for letter, and its curl bodies, against the platform with a worker."""

# ruff: noqa: PTH123, RUF013

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from werkzeug.serving import make_server

from app import create_app
from app.client import GPUInferenceClient as Sdk
from app.settings import Settings
from engines.catalogue import JobType
from tasks.settings import load_regions
from tests.rig import ECHO, EVERY_TYPE, Platform


# fmt: off
class GPUInferenceClient:
    def __init__(self, base_url: str, api_key: str = None):
        self.base_url = base_url.rstrip('/')
        self.session = requests.Session()
        if api_key:
            self.session.headers['X-API-Key'] = api_key

    def chat(self, messages: list, **kwargs) -> dict:
        """LLM对话"""
        response = self.session.post(
            f"{self.base_url}/api/v1/jobs/sync",
            json={
                "type": "llm",
                "params": {
                    "messages": messages,
                    "max_tokens": kwargs.get("max_tokens", 2048),
                    "temperature": kwargs.get("temperature", 0.7)
                }
            },
            params={"timeout": kwargs.get("timeout", 60)}
        )
        response.raise_for_status()
        return response.json()

    def generate_image(self, prompt: str, **kwargs) -> bytes:
        """图像生成"""
        response = self.session.post(
            f"{self.base_url}/api/v1/jobs/sync",
            json={
                "type": "image_gen",
                "params": {
                    "prompt": prompt,
                    "negative_prompt": kwargs.get("negative_prompt", ""),
                    "width": kwargs.get("width", 1024),
                    "height": kwargs.get("height", 1024),
                    "steps": kwargs.get("steps", 4)
                }
            },
            params={"timeout": kwargs.get("timeout", 120)}
        )
        response.raise_for_status()
        result = response.json()
        return base64.b64decode(result["result"]["image_base64"])

    def transcribe(self, audio_path: str, **kwargs) -> str:
        """语音识别"""
        with open(audio_path, "rb") as f:
            audio_base64 = base64.b64encode(f.read()).decode()

        response = self.session.post(
            f"{self.base_url}/api/v1/jobs/sync",
            json={
                "type": "whisper",
                "params": {
                    "audio_base64": audio_base64,
                    "language": kwargs.get("language")
                }
            },
            params={"timeout": kwargs.get("timeout", 120)}
        )
        response.raise_for_status()
        return response.json()["result"]["text"]

    def analyze_image(self, image_path: str, question: str = None, task: str = "image_qa", **kwargs) -> str:
        """图像识别/视觉问答"""
        with open(image_path, "rb") as f:
            image_base64 = base64.b64encode(f.read()).decode()

        params = {
            "image_base64": image_base64,
            "task": task,
            "max_tokens": kwargs.get("max_tokens", 1024)
        }
        if question:
            params["question"] = question

        response = self.session.post(
            f"{self.base_url}/api/v1/jobs/sync",
            json={"type": "vision", "params": params},
            params={"timeout": kwargs.get("timeout", 60)}
        )
        response.raise_for_status()
        return response.json()["result"]["response"]


# fmt: on
ROOT = Path(__file__).resolve().parents[2]
SPEECH = ROOT / "local" / "speech.ogg"


@pytest.fixture
def url(platform: Platform) -> Iterator[str]:
    """The API on a port of its own, with one worker that serves every type."""
    platform.start_worker(queues=EVERY_TYPE, **ECHO)
    blobs = str(platform.folder / "blobs")
    settings = Settings(platform.database_url, blobs, load_regions(platform.environ), "asia-east", threads=8)
    app = create_app(settings)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()
    app.extensions["dispatch"].close()


def test_the_seeds_client_and_ours_call_every_type_as_the_seed_writes_it(url: str, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (32, 32), (255, 140, 0)).save(photo)

    for client in (GPUInferenceClient(url), Sdk(url)):
        any_client: Any = client
        chat = any_client.chat([{"role": "user", "content": "请用Python写一个快速排序算法"}])
        image = any_client.generate_image("a cute cat sitting on a desk, digital art", width=1024, height=1024)
        assert chat["result"]["response"] == "请用Python写一个快速排序算法"
        assert set(chat["result"]["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
        assert image.startswith(b"\x89PNG")
        assert any_client.analyze_image(str(photo), "这张图片里有什么？") == "这张图片里有什么？"
        assert any_client.analyze_image(str(photo), task="ocr") == "ocr"
        assert any_client.transcribe(str(SPEECH)) == ""
    sdk = Sdk(url)
    assert len(sdk.embed(["a", "b"])) == 2
    picture = {"1": {"class_type": "LoadImage", "inputs": {"image": "cat.jpg"}}}
    assert sdk.run_workflow(picture, {"cat.jpg": str(photo)})[0].startswith(b"\x89PNG")
    tensor = {"name": "INPUT0", "shape": [2], "datatype": "FP32", "data": [1, 2.5]}
    assert sdk.infer("MAM", [tensor], model_version="1")["INPUT0"] == tensor
    assert {model["type"] for model in sdk.models(live="true")} == set(JobType)
    assert sdk.run("llm", {"messages": [{"role": "user", "content": "hi"}]}, model="echo")["model"] == "echo"
    queue = requests.get(f"{url}/api/v1/jobs/stats/queue", timeout=5).json()
    assert (queue["total_queued"], queue["available_workers"]) == (0, 1)
