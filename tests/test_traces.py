"""One job through API, worker and control: its spans join in one trace, its log lines say whose they are."""

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.conftest import Valkey
from tests.rig import ROOT, Worker, free_port, until

UP_S = 60
CANARY = "canary-in-the-trace"
TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """An OTLP receiver that keeps what it gets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.bodies: list[bytes] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def spans(self) -> dict[str, dict[str, Any]]:
        """By name, of the client's trace: service, ids, attributes and events."""
        found = {}
        for body in list(self.bodies):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = next(
                    one.value.string_value for one in resource.resource.attributes if one.key == "service.name"
                )
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    if span.trace_id.hex() == TRACE:
                        found[span.name] = {
                            "service": service,
                            "id": span.span_id.hex(),
                            "parent": span.parent_span_id.hex(),
                            "job": next((a.value.string_value for a in span.attributes if a.key == "gpu.job_id"), ""),
                            "events": [event.name for event in span.events],
                        }
        return found


class Receiver(BaseHTTPRequestHandler):
    """Takes POST /v1/traces."""

    server: Collector

    def do_POST(self) -> None:
        """Keep the body."""
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Traced:
    """API, control and worker that send traces and log JSON."""

    port = free_port()
    names: ClassVar[tuple[str, ...]] = ("api", "control", "worker0")

    def __init__(self, environ: dict[str, str], folder: Path) -> None:
        self.collector = Collector()
        self.folder = folder
        at = f"http://127.0.0.1:{self.collector.server_port}"
        self.environ = {
            **environ,
            "OTEL_EXPORTER_OTLP_ENDPOINT": at,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "LOG_FORMAT": "json",
            "PORT": str(self.port),
            "API_THREADS": "20",
        }
        self.processes = [self._start("api", "app.serve"), self._start("control", "app.control")]
        self.worker = Worker(self.environ, folder / "worker0.log", "asia-east.llm")
        until(lambda: self.worker.id is not None and self._answers(), UP_S)

    def _start(self, name: str, module: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as out:
            command = [sys.executable, "-m", module]
            return subprocess.Popen(command, cwd=ROOT, env=self.environ, stdout=out, stderr=subprocess.STDOUT)

    def _answers(self) -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/health", timeout=2).ok
        except requests.RequestException:
            return False

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What a process has logged."""
        return [json.loads(line) for line in (self.folder / f"{name}.log").read_text().splitlines()]

    def close(self) -> None:
        """End everything."""
        for process in (*self.processes, self.worker.process):
            process.kill()
            process.wait()
        self.collector.shutdown()


@pytest.fixture
def traced(valkey: Valkey, database_url: str, tmp_path: Path) -> Iterator[Traced]:
    """One platform of three processes."""
    environ = {
        **os.environ,
        "GPU_BROKER_URL": f"{valkey.url}/0",
        "GPU_STORE_URL": f"{valkey.url}/1",
        "DATABASE_URL": database_url,
        "BLOBS_URL": str(tmp_path / "blobs"),
        "GPU_LLM_MODEL": "echo",
    }
    made = Traced(environ, tmp_path)
    yield made
    made.close()


def test_one_job_is_one_trace_and_every_line_about_it_says_so(traced: Traced):
    chat = {"type": "llm", "params": {"messages": [{"role": "user", "content": f"{CANARY} {uuid.uuid4()}"}]}}
    headers = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01", "X-Request-ID": "request-7"}

    answer = requests.post(f"http://127.0.0.1:{traced.port}/api/v1/jobs", json=chat, headers=headers, timeout=30)

    job_id = answer.json()["job_id"]
    asked = "POST /api/v1/jobs"
    names = {asked, "submit", "publish", "job", "begin", "engine.run", "finish", "fold"}
    until(lambda: names <= traced.collector.spans.keys())
    spans = traced.collector.spans
    parents = {name: next((n for n, s in spans.items() if s["id"] == spans[name]["parent"]), None) for name in names}
    assert parents == {
        asked: None,
        "submit": asked,
        "publish": "submit",
        "job": "publish",
        "begin": "job",
        "engine.run": "job",
        "finish": "job",
        "fold": "publish",
    }
    assert spans[asked]["parent"] == CLIENT_SPAN
    services = {name: spans[name]["service"] for name in (asked, "publish", "job", "fold")}
    assert services == {asked: "gpu-api", "publish": "gpu-api", "job": "gpu-worker", "fold": "gpu-control"}
    assert {spans[name]["job"] for name in ("submit", "publish", "job", "fold")} == {job_id}
    assert "progress" in spans["engine.run"]["events"]
    assert not any(CANARY.encode() in body for body in traced.collector.bodies)

    lines = {name: traced.lines(name) for name in traced.names}
    assert all({"time", "level", "logger", "message"} <= line.keys() for told in lines.values() for line in told)
    about = [line for told in lines.values() for line in told if job_id in line["message"]]
    assert about
    assert {line.get("job_id") for line in about} == {job_id}
    assert not any(CANARY in json.dumps(line) for told in lines.values() for line in told)


def test_without_the_packages_everything_but_traces_works():
    absent = "import sys; sys.modules['opentelemetry'] = None; import os, wsgi, app.control, tasks.infer"
    told = "from tasks import tracing; tracing.start('api', {'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://collector:4318'})"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}

    without, told_to = (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        for code in (absent, f"{absent}; {told}")
    )

    assert without.returncode == 0, without.stderr
    assert "pip install -r requirements/traces.txt" in told_to.stderr
