"""ComfyUI's queue, worker, history and sockets, with a few of its nodes: the parts of its API that run workflows.

Routes, answers, messages and their order are those of ComfyUI 0.3.64. COMFYUI_ERA may be `old` (it chooses prompt ids
and interrupts whatever runs) or `new` (it wants canonical UUIDs and has /api/jobs/{id}/cancel).
"""

import base64
import email
import hashlib
import json
import os
import re
import struct
import threading
import time
import uuid
from email import policy
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image, ImageOps

#: What the one slow node takes.
BLUR_S = 0.1
REQUIRED = {
    "EmptyImage": ("width", "height", "batch_size", "color"),
    "LoadImage": ("image",),
    "ImageInvert": ("image",),
    "ImageBlur": ("image", "blur_radius", "sigma"),
    "SaveImage": ("images", "filename_prefix"),
    "PreviewImage": ("images",),
    "PreviewAny": ("source",),
    "SaveWords": ("text",),
}
OUTPUT_NODES = ("SaveImage", "PreviewImage", "PreviewAny", "SaveWords")


class Interrupted(Exception):
    """Between two nodes, because somebody asked for it."""


class Queue:
    """What waits, runs and has run, and the thread that runs it."""

    def __init__(self, folder: Path) -> None:
        """folder: for the folders input, output and temp."""
        self.folder, self.era = folder, os.environ.get("COMFYUI_ERA")
        for name in ("input", "output", "temp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.lock = threading.Condition()
        self.waiting: list[list[Any]] = []
        self.running: list[list[Any]] = []
        self.history: dict[str, Any] = {}
        self.sockets: dict[str, Any] = {}
        self.interrupted = False
        self.cache: dict[str, tuple[Any, Any]] = {}
        self.forget = False
        self.numbers = 0
        threading.Thread(target=self._work, daemon=True).start()

    def put(self, said: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The answer to POST /prompt."""
        prompt = said.get("prompt")
        if prompt is None:
            return 400, {"error": error_of("no_prompt", "No prompt provided", "No prompt provided"), "node_errors": {}}
        prompt_id = str(uuid.uuid4()) if self.era == "old" else str(said.get("prompt_id", uuid.uuid4()))
        if self.era == "new" and str(uuid.UUID(prompt_id)) != prompt_id:
            return 400, {"error": error_of("invalid_prompt_id", "prompt_id must be a UUID"), "node_errors": {}}
        wrong, node_errors, outputs = check(prompt, self.folder / "input")
        if wrong:
            return 400, {"error": wrong, "node_errors": node_errors}
        with self.lock:
            number, self.numbers = self.numbers, self.numbers + 1
            extra = {"client_id": said["client_id"]} if "client_id" in said else {}
            self.waiting.append([number, prompt_id, prompt, extra, outputs])
            self.lock.notify_all()
        return 200, {"prompt_id": prompt_id, "number": number, "node_errors": node_errors}

    def delete(self, prompt_id: str) -> None:
        """Take one from the queue."""
        with self.lock:
            self.waiting = [entry for entry in self.waiting if entry[1] != prompt_id]

    def interrupt(self, prompt_id: str | None) -> None:
        """Stop what runs, if it is that one."""
        with self.lock:
            if prompt_id is None or self.era == "old" or any(entry[1] == prompt_id for entry in self.running):
                self.interrupted = True

    def tell(self, client_id: str | None, kind: str, data: dict[str, Any]) -> None:
        """Send a message to one client, if it listens."""
        self.send(client_id, 1, json.dumps({"type": kind, "data": data}).encode())

    def send(self, client_id: str | None, opcode: int, payload: bytes) -> None:
        """Send one frame (RFC 6455), unmasked as a server's are."""
        socket = self.sockets.get(client_id or "")
        if socket is None:
            return
        size = len(payload)
        head = struct.pack("!BB", 0x80 | opcode, size) if size < 126 else struct.pack("!BBH", 0x80 | opcode, 126, size)
        try:
            socket.sendall(head + payload)
        except OSError:
            self.sockets.pop(client_id or "", None)

    def _work(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self.waiting)
                entry = self.waiting.pop(0)
                self.running.append(entry)
            result = self._execute(entry)
            with self.lock:
                if entry in self.running:
                    self.running.remove(entry)
                    self.history[entry[1]] = {"prompt": entry, **result}
                if self.forget:
                    self.cache, self.forget = {}, False
            self.tell(entry[3].get("client_id"), "executing", {"node": None, "prompt_id": entry[1]})

    def _execute(self, entry: list[Any]) -> dict[str, Any]:
        _, prompt_id, prompt, extra, outputs = entry
        client_id = extra.get("client_id")
        messages: list[Any] = []

        def add(kind: str, **data: Any) -> None:
            messages.append([kind, {"prompt_id": prompt_id, **data, "timestamp": int(time.time() * 1000)}])
            self.tell(client_id, kind, messages[-1][1])

        self.interrupted = False
        add("execution_start")
        signatures = {node: signature(prompt, node) for node in prompt}
        self.cache = {key: value for key, value in self.cache.items() if key in signatures.values()}
        add("execution_cached", nodes=[node for node in prompt if signatures[node] in self.cache])
        states: dict[str, Any] = {}
        current = None
        try:
            for current in order(prompt, outputs):
                key = signatures[current]
                if key not in self.cache:
                    self._tell_states(client_id, prompt_id, states, current, "running")
                    self.tell(
                        client_id, "executing", {"node": current, "display_node": current, "prompt_id": prompt_id}
                    )
                    # A preview, as samplers send them.
                    self.send(client_id, 2, struct.pack(">II", 1, 1) + b"\xff\xd8")
                    if self.interrupted:
                        raise Interrupted
                    self.cache[key] = self._run(prompt[current], lambda link: self.cache[signatures[link[0]]][0])
                if ui := self.cache[key][1]:
                    done = {"node": current, "display_node": current, "output": ui, "prompt_id": prompt_id}
                    self.tell(client_id, "executed", done)
                self._tell_states(client_id, prompt_id, states, current, "finished")
            add("execution_success")
            status = {"status_str": "success", "completed": True}
        except Interrupted:
            add("execution_interrupted", node_id=current, node_type=prompt[current]["class_type"], executed=[])
            status = {"status_str": "error", "completed": False}
        except (ArithmeticError, LookupError, OSError, RuntimeError, ValueError) as error:
            said = {"exception_message": f"{error}\n", "exception_type": type(error).__name__, "traceback": []}
            add("execution_error", node_id=current, node_type=prompt[current]["class_type"], executed=[], **said)
            status = {"status_str": "error", "completed": False}
        found = {node: ui for node, key in signatures.items() if (ui := self.cache.get(key, (None, None))[1])}
        return {"outputs": found, "status": {**status, "messages": messages}, "meta": {}}

    def _tell_states(self, client_id: str | None, prompt_id: str, states: dict[str, Any], node: str, to: str) -> None:
        if self.era == "old":
            return
        about = {"node_id": node, "prompt_id": prompt_id, "display_node_id": node, "real_node_id": node}
        states[node] = {"value": float(to == "finished"), "max": 1.0, "state": to, **about}
        self.tell(client_id, "progress_state", {"prompt_id": prompt_id, "nodes": states})

    def _run(self, node: dict[str, Any], value_of: Any) -> tuple[Any, Any]:
        given = {name: value_of(value) if is_link(value) else value for name, value in node["inputs"].items()}
        match node["class_type"]:
            case "EmptyImage":
                if given["width"] * given["height"] * given["batch_size"] > 10**9:
                    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
                color = given["color"]
                rgb = (color >> 16 & 255, color >> 8 & 255, color & 255)
                return Image.new("RGB", (given["width"], given["height"]), rgb), None
            case "LoadImage":
                return Image.open(self.folder / "input" / given["image"]).convert("RGB"), None
            case "ImageInvert":
                return ImageOps.invert(given["image"]), None
            case "ImageBlur":
                time.sleep(BLUR_S)
                return given["image"], None
            case "SaveImage":
                return None, {"images": [self._save(given["images"], "output", given["filename_prefix"])]}
            case "PreviewImage":
                return None, {"images": [self._save(given["images"], "temp", "ComfyUI_temp")]}
            case "PreviewAny":
                return None, {"text": [str(given["source"])]}
            case "SaveWords":
                (self.folder / "output" / "words.txt").write_text(given["text"])
                return None, {"files": [{"filename": "words.txt", "subfolder": "", "type": "output"}]}
        raise AssertionError(node)

    def _save(self, picture: Any, kind: str, prefix: str) -> dict[str, str]:
        subfolder, _, stem = prefix.rpartition("/")
        folder = self.folder / kind / subfolder
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{stem}_{len(list(folder.iterdir())) + 1:05}_.png"
        picture.save(folder / name)
        return {"filename": name, "subfolder": subfolder, "type": kind}


def check(prompt: dict[str, Any], inputs: Path) -> tuple[dict[str, Any] | None, dict[str, Any], list[str]]:
    """What is wrong with a workflow, with its nodes, and the outputs to execute."""
    for node_id, node in prompt.items():
        if node["class_type"] not in REQUIRED:
            words = f"Cannot execute because node {node['class_type']} does not exist."
            return error_of("invalid_prompt", words, f"Node ID '#{node_id}'"), {}, []
    outputs = [node_id for node_id, node in prompt.items() if node["class_type"] in OUTPUT_NODES]
    if not outputs:
        return error_of("prompt_no_outputs", "Prompt has no outputs"), {}, []
    node_errors, good = {}, []
    for output in outputs:
        bad = {}
        for node_id in order(prompt, [output]):
            node = prompt[node_id]
            errors = [
                {
                    **error_of("required_input_missing", "Required input is missing", name),
                    "extra_info": {"input_name": name},
                }
                for name in REQUIRED[node["class_type"]]
                if name not in node["inputs"]
            ]
            if node["class_type"] == "LoadImage" and not (inputs / node["inputs"]["image"]).is_file():
                words = f"image - Invalid image file: {node['inputs']['image']}"
                errors.append(error_of("custom_validation_failed", "Custom validation failed for node", words))
            if errors:
                bad[node_id] = {"errors": errors, "dependent_outputs": [output], "class_type": node["class_type"]}
        node_errors.update(bad)
        good += [] if bad else [output]
    if good:
        return None, node_errors, good
    details = "\n".join(
        f"{error['message']}: {error['details']}" for node in node_errors.values() for error in node["errors"]
    )
    return error_of("prompt_outputs_failed_validation", "Prompt outputs failed validation", details), node_errors, []


def error_of(kind: str, message: str, details: str = "") -> dict[str, Any]:
    """An error as ComfyUI writes it."""
    return {"type": kind, "message": message, "details": details, "extra_info": {}}


def is_link(value: Any) -> bool:
    """Whether an input comes from another node."""
    return isinstance(value, list) and len(value) == 2


def order(prompt: dict[str, Any], outputs: list[str]) -> list[str]:
    """Nodes that the outputs need, each after what it needs."""
    found: dict[str, None] = {}

    def visit(node: str) -> None:
        for value in prompt[node]["inputs"].values():
            if is_link(value):
                visit(value[0])
        found[node] = None

    for output in outputs:
        visit(output)
    return list(found)


def signature(prompt: dict[str, Any], node: str) -> str:
    """What a node's result depends on."""
    inputs = {
        name: signature(prompt, value[0]) if is_link(value) else value for name, value in prompt[node]["inputs"].items()
    }
    text = json.dumps([prompt[node]["class_type"], inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def get(handler: Any, queue: Queue, path: str) -> bool:
    """Answer a GET of ComfyUI's; False for what is none."""
    url = urlsplit(path)
    said = {name: values[0] for name, values in parse_qs(url.query).items()}
    if url.path == "/queue":
        with queue.lock:
            handler.answer({"queue_running": queue.running, "queue_pending": queue.waiting})
    elif url.path == "/history":
        with queue.lock:
            handler.answer(queue.history)
    elif found := re.fullmatch("/history/(.+)", url.path):
        with queue.lock:
            entry = queue.history.get(found[1])
        handler.answer({found[1]: entry} if entry else {})
    elif url.path == "/view":
        file = queue.folder / said["type"] / said.get("subfolder", "") / said["filename"]
        if file.is_file():
            handler.send(file.read_bytes(), "application/octet-stream")
        else:
            handler.answer({}, 404)
    elif url.path == "/ws":
        listen(handler, queue, said["clientId"])
    else:
        return False
    return True


def post(handler: Any, queue: Queue, path: str) -> bool:
    """Answer a POST of ComfyUI's, or an order of the tests; False for what is none."""
    if path == "/upload/image":
        handler.answer(upload(handler, queue.folder / "input"))
        return True
    said = handler.body()
    if path == "/prompt":
        status, answer = queue.put(said)
        handler.answer(answer, status)
    elif path == "/queue":
        for prompt_id in said.get("delete", []):
            queue.delete(prompt_id)
        handler.answer({})
    elif path == "/interrupt":
        queue.interrupt(said.get("prompt_id"))
        handler.answer({})
    elif path == "/free":
        queue.forget = True
        with queue.lock:
            if not queue.running:
                queue.cache = {}
        handler.answer({})
    elif queue.era == "new" and (found := re.fullmatch("/jobs/(.+)/cancel", path)):
        queue.delete(found[1])
        queue.interrupt(found[1])
        handler.answer({"cancelled": True})
    elif path in ("/stand_in/cut", "/stand_in/forget"):
        if path == "/stand_in/forget":
            # As after a restart.
            with queue.lock:
                queue.running, queue.waiting = [], []
        for socket in list(queue.sockets.values()):
            socket.shutdown(2)
        handler.answer({})
    else:
        return False
    return True


def upload(handler: BaseHTTPRequestHandler, inputs: Path) -> dict[str, str]:
    """Store the picture of a multipart form; one of the same name and content is there already."""
    body = handler.rfile.read(int(handler.headers["Content-Length"]))
    head = f"Content-Type: {handler.headers['Content-Type']}\r\n\r\n".encode()
    part = next(iter(email.message_from_bytes(head + body, policy=policy.HTTP).iter_parts()))
    name = part.get_filename() or "image.png"
    (inputs / name).write_bytes(part.get_payload(decode=True))
    return {"name": name, "subfolder": "", "type": "input"}


def listen(handler: Any, queue: Queue, client_id: str) -> None:
    """Keep a websocket until its client goes."""
    key = handler.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    handler.send_response(101)
    handler.send_header("Upgrade", "websocket")
    handler.send_header("Connection", "Upgrade")
    handler.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
    handler.end_headers()
    handler.wfile.flush()
    queue.sockets[client_id] = handler.connection
    queue.tell(client_id, "status", {"status": {"exec_info": {"queue_remaining": 0}}, "sid": client_id})
    # A client says nothing but goodbye, which is answered in kind.
    if handler.connection.recv(4096):
        queue.send(client_id, 8, b"")
    if queue.sockets.get(client_id) is handler.connection:
        del queue.sockets[client_id]
    handler.close_connection = True
