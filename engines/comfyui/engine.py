"""Workflows, run by the host's ComfyUI: hand in, follow node by node, fetch what came out; or withdraw.

A thread of each job speaks with the server, so that the job's own thread hears a cancel at once whatever the server
does. The end of a prompt is read from the server's history; its socket tells of progress, and when to look.
"""

import base64
import io
import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

import websocket
from PIL import Image

from engines import media
from engines.catalogue import Model
from engines.comfyui import outputs
from engines.comfyui.progress import Nodes
from engines.comfyui.server import Away, Refused, Server, cut
from engines.contract import (
    Device,
    EngineBroken,
    EngineError,
    JobInterrupted,
    OutOfMemory,
    Report,
    ServerAway,
)

logger = logging.getLogger(__name__)

#: How long a ComfyUI that is started beside its worker may take to answer: it imports torch and its nodes first.
PATIENCE_S = 60.0
#: How often report() is called, and the socket left for other things.
POLL_S = 0.1
#: How often history is looked at when the socket says nothing.
LOOK_EVERY_S = 1.0
#: A server that answers nothing for so long under a job is taken for dead. A node may hold its process for a while.
SILENCE_S = 60.0
#: How often a prompt is asked to stop, and how long a job waits for it: less than what a worker lets a step overrun.
ASK_AGAIN_S = 1.0
LET_GO_S = 8.0
#: A server may take so long to say goodbye on its socket; nobody waits for that.
CLOSE_S = 1.0


class Engine:
    """Hands workflows to the ComfyUI at the model's URL."""

    #: ComfyUI runs one prompt at a time. A second one would wait in its queue rather than the platform's, where it
    #: could no longer go to another worker, and its time would run.
    slots = 1

    def __init__(self, model: Model, device: Device) -> None:
        """Returns once the server answers. Raises ServerAway."""
        assert model.url is not None
        self._model = model
        self._server = Server(model.url)
        self._closed = threading.Event()
        try:
            self._await_server()
        except BaseException:
            self._server.close()
            raise

    def run(self, params: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """What the workflow's output nodes gave; progress counts its nodes.

        Raises InvalidInput with the nodes and inputs that ComfyUI refuses, EngineError and OutOfMemory with the node
        that failed, and EngineBroken when the server went away under the job or before it.
        """
        if self._closed.is_set():
            raise self._gone()
        talk = _Talk(self._server, params)
        thread = threading.Thread(target=talk.run, name=f"comfyui {talk.id}", daemon=True)
        thread.start()
        try:
            while not talk.done.wait(POLL_S):
                report(talk.nodes.progress)
                if self._closed.is_set():
                    raise self._gone()
            report(talk.nodes.progress)
        except (JobInterrupted, EngineBroken):
            talk.stop.set()
            if not talk.idle.wait(LET_GO_S):
                logger.warning("ComfyUI has not stopped yet with what job %s handed in", talk.id)
            raise
        return {**talk.result(), "model": self._model.id}

    def close(self) -> None:
        """Withdraw what still runs; that job ends with EngineBroken."""
        self._closed.set()
        self._server.close()

    def _await_server(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                logger.info("ComfyUI %s at %s", self._server.version(), self._server.url)
                return
            except (Away, EngineError) as error:
                if time.monotonic() > end:
                    raise ServerAway(
                        f"No ComfyUI answers at {self._server.url} within {PATIENCE_S:g} s: {error} Start it, or set "
                        "GPU_COMFYUI_URL."
                    ) from error
            time.sleep(POLL_S)

    def _gone(self) -> EngineBroken:
        return EngineBroken(f"The engine of {self._model.id} was closed.")


class _Stopped(Exception):
    """The job needs no answer any more."""


class _Talk:
    """One job's conversation with the server, in a thread of its own.

    Ownership: the thread writes everything but stop; others read result() once done is set, and nodes.progress always.
    """

    def __init__(self, server: Server, params: Mapping[str, Any]) -> None:
        self.id = str(uuid.uuid4())
        self.nodes = Nodes(params["workflow"])
        #: Set when the job needs no answer any more.
        self.stop = threading.Event()
        self.done = threading.Event()
        #: Clear while the server works for it, or may begin to.
        self.idle = threading.Event()
        self.idle.set()
        self._server = server
        self._params = params
        self._result: dict[str, Any] = {}
        self._error: Exception | None = None
        self._socket: websocket.WebSocket | None = None
        #: Whether the socket has stood since before the prompt was handed in: then the server is still the same.
        self._unbroken = False
        #: Whether the server was once found not to know the prompt.
        self._missed = False
        self._heard_of = time.monotonic()

    def run(self) -> None:
        """Speak with the server until there is a result or an error, or nobody wants one."""
        try:
            workflow = self._with_images()
            try:
                self._result = self._once(workflow)
            except outputs.Gone as error:
                # ComfyUI answers equal nodes from its cache, with names of files that somebody has cleared away since.
                logger.info("%s ComfyUI computes it anew.", error)
                self._server.forget_cache()
                self._result = self._once(workflow)
        except _Stopped:
            pass
        except outputs.Gone as error:
            self._error = EngineError(str(error), code="output_gone")
        except Away as error:
            self._error = EngineBroken(f"The ComfyUI at {self._server.url} went away: {error}")
        except Exception as error:  # noqa: BLE001 - raised again in the thread of the job
            self._error = error
        finally:
            self.idle.set()
            self.done.set()
            if self._socket is not None:
                self._socket.close(timeout=CLOSE_S)

    def result(self) -> dict[str, Any]:
        """What came of it; raises what went wrong."""
        if self._error is not None:
            raise self._error
        return self._result

    def _once(self, workflow: Mapping[str, Any]) -> dict[str, Any]:
        if self._socket is None:
            self._socket = self._server.follow(self.id)
        self._unbroken, self._missed = self._socket is not None, False
        if self.stop.is_set():
            raise _Stopped
        self.idle.clear()
        # A prompt of its own each time: history has the old one.
        prompt = self._server.submit(workflow, str(uuid.uuid4()), self.id)
        self._heard_of = time.monotonic()
        try:
            entry = self._follow(prompt.id)
        except _Stopped:
            self._withdraw(prompt.id)
            raise
        self.idle.set()
        _check(entry.get("status"))
        self.nodes.finish()
        found = self._collect(entry.get("outputs") or {})
        return {**found, **({"warnings": prompt.warnings} if prompt.warnings else {})}

    def _with_images(self) -> dict[str, Any]:
        """The workflow with the server's names for the pictures that came along."""
        names = {}
        for name, text in self._params["images"].items():
            data = base64.b64decode(text)
            names[name] = self._server.upload(data, _kind(data))
        return {
            node_id: {
                **node,
                "inputs": {
                    key: names.get(value, value) if isinstance(value, str) else value
                    for key, value in node["inputs"].items()
                },
            }
            for node_id, node in self._params["workflow"].items()
        }

    def _follow(self, prompt_id: str) -> dict[str, Any]:
        """What history says once the prompt has ended. Raises _Stopped, and Away for a server that has died."""
        look_at = 0.0
        while True:
            if self.stop.is_set():
                raise _Stopped
            if self._hear(prompt_id) or time.monotonic() > look_at:
                if entry := self._tolerantly(prompt_id):
                    return entry
                if self._socket is None:
                    self._socket = self._server.follow(self.id)
                look_at = time.monotonic() + LOOK_EVERY_S

    def _look(self, prompt_id: str) -> dict[str, Any] | None:
        """What history says, or None while the prompt waits or runs; raises for one that the server does not know."""
        if entry := self._server.ended(prompt_id):
            return entry
        if self._server.place(prompt_id) is not None:
            return None
        # It may have ended between the two questions.
        if entry := self._server.ended(prompt_id):
            return entry
        if not self._unbroken:
            raise Refused("it was started again, and does not know the prompt.")
        if self._missed:
            raise EngineError("Somebody took it out of ComfyUI's queue.", code="removed")
        # Another look: that the socket broke may not have been heard yet.
        self._missed = True
        return None

    def _tolerantly(self, prompt_id: str) -> dict[str, Any] | None:
        """As _look(), but None for a server that is busy. Raises Away for one that is silent for too long, or gone."""
        try:
            entry = self._look(prompt_id)
        except Refused:
            raise
        except Away:
            if time.monotonic() > self._heard_of + SILENCE_S:
                raise
            return None
        self._heard_of = time.monotonic()
        return entry

    def _hear(self, prompt_id: str) -> bool:
        """Take one message of the socket in, waiting POLL_S at most; True if history should be looked at."""
        if self._socket is None:
            self.stop.wait(POLL_S)
            return False
        try:
            self._socket.settimeout(POLL_S)
            # Binary ones are previews.
            message = self._socket.recv()
            return isinstance(message, str) and bool(message) and self.nodes.hear(_json(message), prompt_id)
        except websocket.WebSocketTimeoutException:
            return False
        except (OSError, websocket.WebSocketException) as error:
            logger.info("the socket to %s was lost: %s", self._server.url, error)
            self._socket.shutdown()
            self._socket, self._unbroken = None, False
            return True

    def _collect(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """What the nodes put out. Raises Away for a server that is silent for too long, or gone."""
        while True:
            try:
                return outputs.collect(self._server, named)
            except Refused:
                raise
            except Away:
                if time.monotonic() > self._heard_of + SILENCE_S:
                    raise
            if self.stop.wait(LOOK_EVERY_S):
                raise _Stopped

    def _withdraw(self, prompt_id: str) -> None:
        """Have the prompt, and no other, taken from the queue or interrupted; returns once it is gone, or LET_GO_S."""
        end = time.monotonic() + LET_GO_S
        try:
            while time.monotonic() < end and self._server.withdraw(prompt_id):
                again = time.monotonic() + ASK_AGAIN_S
                while time.monotonic() < again:
                    if self._server.place(prompt_id) is None:
                        return
                    time.sleep(POLL_S)
        except Away as error:
            logger.warning("prompt %s could not be withdrawn from %s: %s", prompt_id, self._server.url, error)


def _check(status: Any) -> None:
    """Pass if a prompt that has ended did what it should. Raises EngineError or OutOfMemory, naming the node."""
    if not isinstance(status, dict) or status.get("status_str") != "error":
        return
    events = dict(status.get("messages") or [])
    if error := events.get("execution_error"):
        where = f"Node {error.get('node_id')} ({error.get('node_type')})"
        kind, words = str(error.get("exception_type")), cut(str(error.get("exception_message")))
        # The latter is what torch says of a host's memory.
        if kind.rpartition(".")[2] == "OutOfMemoryError" or "can't allocate memory" in words:
            raise OutOfMemory(f"{where} ran out of memory: {words}")
        raise EngineError(f"{where} failed with {kind}: {words}", code="node_failed")
    if "execution_interrupted" in events:
        raise EngineError("Somebody interrupted it in ComfyUI.", code="interrupted")
    raise EngineError("ComfyUI says that it failed, and not why.")


def _kind(picture: bytes) -> str:
    with Image.open(io.BytesIO(picture), formats=media.PICTURES) as opened:
        # A camera's pictures in one file; the first is what it shows.
        return "jpg" if opened.format in ("JPEG", "MPO") else str(opened.format).lower()


def _json(text: str) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
