"""What the programs share that stand in a model server's place: HTTP with the standard library, and faults by order.

STAND_IN in a program's environment orders faults, in words:
    slow=SECONDS   it listens only after so long
    after=PATH     it listens only once that file is there
    fail           it writes an error and exits with code 3
    ignore-term    SIGTERM does not end it
    child          it has a child in its session, which lives on
    daemon         it has a child in a session of its own, which lives on
    chatty=N       it writes N lines before it listens
Other words are for the program itself.
GET /stand_in tells its command line, environment and folder, as it was really started.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAILURE = "RuntimeError: CUDA out of memory. Tried to allocate 20.00 GiB."


def orders() -> dict[str, str]:
    """What STAND_IN orders, with the value of each word that has one."""
    return dict(word.partition("=")[::2] for word in os.environ.get("STAND_IN", "").split())


def obey() -> None:
    """Do what STAND_IN orders, before anything is served."""
    ordered = orders()
    if "ignore-term" in ordered:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for order in {"child", "daemon"} & ordered.keys():
        subprocess.Popen(["sleep", "600"], start_new_session=order == "daemon")
    for number in range(int(ordered.get("chatty", 0))):
        sys.stdout.write(f"line {number} of a server that has much to say\n")
    sys.stdout.flush()
    if "fail" in ordered:
        sys.stderr.write(f"Traceback (most recent call last):\n{FAILURE}\n")
        raise SystemExit(3)
    time.sleep(float(ordered.get("slow", 0)))
    while "after" in ordered and not Path(ordered["after"]).exists():
        time.sleep(0.02)


class Handler(BaseHTTPRequestHandler):
    """Answers with JSON."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Tell how the program was started."""
        if self.path == "/stand_in":
            self.answer({"argv": sys.argv, "environ": dict(os.environ), "cwd": str(Path.cwd())})
        else:
            self.answer({"error": f"no {self.path}"}, 404)

    def answer(self, value: Any, status: int = 200) -> None:
        """Send a value as JSON."""
        self.send(json.dumps(value).encode(), "application/json", status)

    def send(self, body: bytes, kind: str, status: int = 200) -> None:
        """Send a body."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Write no line for each answer: errors are told of anyway."""

    def body(self) -> Any:
        """The request's JSON."""
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")


def serve(host: str, port: int, handler: type[Handler]) -> None:
    """Serve until the process is ended."""
    with ThreadingHTTPServer((host, port), handler) as server:
        server.daemon_threads = True
        sys.stderr.write(f"To see the GUI go to: http://{host}:{port}\n")
        server.serve_forever(poll_interval=5)


def script(module: str) -> str:
    """The text of a Python file that runs a module of these tests, wherever the file lies."""
    return f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom {module} import main\nmain()\n"
