"""One ComfyUI, as its HTTP API shows it: pictures in, a prompt, its place in the queue, its end, files out.

Routes and answers are those of server.py in ComfyUI. A workflow that was handed in is a prompt there, by its prompt_id.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import requests
import websocket
from urllib3.exceptions import NewConnectionError

from engines.contract import EngineError, InvalidInput

logger = logging.getLogger(__name__)

#: How long one answer may take. ComfyUI answers from the process that computes, which may be busy for a while.
ANSWER_S = 10.0
CONNECT_S = 3.0
#: For what it checks, or stores, before it answers.
WORK_S = 60.0
#: Errors of nodes that one message names, and characters of each.
MOST_ERRORS = 5
LONGEST_WORDS = 500


class Away(Exception):
    """The server does not answer."""


class Refused(Away):
    """Nobody listens at its address: the process is gone, and with it what waited or ran there."""


class Place(Enum):
    """Where a prompt stands."""

    WAITING = "waiting"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class Accepted:
    """A prompt that the server has taken."""

    #: Older servers choose their own.
    id: str
    #: What it leaves out, in words.
    warnings: list[str]


class TooLarge(EngineError):
    """A file has more bytes than were asked for."""

    code = "output_too_large"


class Server:
    """A ComfyUI by its URL. Every call but follow() raises Away."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = requests.Session()
        # It is the host's own: no proxy of the environment stands between, and no .netrc knows it.
        self._session.trust_env = False

    def close(self) -> None:
        """Close its connections."""
        self._session.close()

    def version(self) -> str:
        """ComfyUI's version, once it answers. Raises EngineError for a server that is no ComfyUI."""
        response = self._ask("GET", "/system_stats")
        try:
            return str(response.json()["system"].get("comfyui_version", "unknown"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"{self.url} answers {response.status_code}, and not as ComfyUI does.") from error

    def upload(self, data: bytes, kind: str) -> str:
        """Put a picture among the server's inputs; the name it has there.

        kind: as Pillow calls its format. Named by its content, so that no job can replace another's picture, a picture
        that comes again takes no more room, and ComfyUI's cache knows it.
        """
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.{kind.lower()}"
        response = self._ask("POST", "/upload/image", WORK_S, files={"image": (name, data)})
        if response.status_code != 200:
            raise EngineError(f"ComfyUI does not take the picture: {_words(response)}")
        said = response.json()
        return "/".join(filter(None, (said.get("subfolder"), said["name"])))

    def submit(self, workflow: Mapping[str, Any], prompt_id: str, client_id: str) -> Accepted:
        """Queue a workflow. Raises InvalidInput, which names nodes and inputs, where the server refuses it."""
        body = {"prompt": workflow, "client_id": client_id, "prompt_id": prompt_id}
        response = self._ask("POST", "/prompt", WORK_S, json=body)
        if response.status_code in (400, 413):
            raise InvalidInput(f"ComfyUI refuses the workflow: {_refusal(response)}")
        if response.status_code != 200:
            raise EngineError(f"ComfyUI cannot read the workflow: {_words(response)}")
        said = response.json()
        left_out = [f"ComfyUI left an output out: {words}" for words in _node_errors(said.get("node_errors"))]
        return Accepted(str(said["prompt_id"]), left_out)

    def place(self, prompt_id: str) -> Place | None:
        """Where a prompt stands; None if it neither waits nor runs."""
        said = self._json("GET", "/queue")
        for place, key in ((Place.RUNNING, "queue_running"), (Place.WAITING, "queue_pending")):
            # Each is [number, prompt_id, prompt, extra, outputs].
            if any(entry[1] == prompt_id for entry in said.get(key, [])):
                return place
        return None

    def ended(self, prompt_id: str) -> dict[str, Any] | None:
        """What the server's history says of a prompt that has ended: outputs by node, and its status."""
        entry: dict[str, Any] | None = self._json("GET", f"/history/{prompt_id}").get(prompt_id)
        return entry

    def withdraw(self, prompt_id: str) -> bool:
        """Ask that a prompt stop, and no other; False once it neither waits nor runs.

        A prompt that begins just now may miss it: ask again while this is True.
        """
        place = self.place(prompt_id)
        if place is None:
            return False
        # Newer servers know one call for both; it stops what has that id.
        if self._ask("POST", f"/api/jobs/{prompt_id}/cancel").status_code == 200:
            return True
        if place is Place.WAITING:
            self._ask("POST", "/queue", json={"delete": [prompt_id]})
        else:
            # The oldest servers do not read the id and stop whatever runs: that it is ours was just seen.
            self._ask("POST", "/interrupt", json={"prompt_id": prompt_id})
        return True

    def forget_cache(self) -> None:
        """Make the server compute everything anew from its next prompt on."""
        self._ask("POST", "/free", json={"free_memory": True})

    def fetch(self, file: Mapping[str, str], most_bytes: int) -> bytes | None:
        """A file that a node put out; None if it is not there any more. Raises TooLarge.

        file: filename, subfolder and type, as history has them.
        """
        query = {name: file.get(name, "") for name in ("filename", "subfolder", "type")}
        with self._ask("GET", "/view", params=query, stream=True) as response:
            if response.status_code == 404:
                return None
            if response.status_code != 200:
                raise EngineError(f"ComfyUI does not hand out {query['filename']}: {_words(response)}")
            data = bytearray()
            try:
                for chunk in response.iter_content(2**16):
                    data += chunk
                    if len(data) > most_bytes:
                        raise TooLarge(f"The outputs take more than {most_bytes} bytes with {query['filename']}.")
            except requests.RequestException as error:
                raise Away(cut(str(error))) from error
        return bytes(data)

    def follow(self, client_id: str) -> websocket.WebSocket | None:
        """A socket on which the server tells of this client's prompts; None if it cannot be had now."""
        try:
            return websocket.create_connection(
                f"ws{self.url.removeprefix('http')}/ws?clientId={client_id}",
                timeout=CONNECT_S,
                http_no_proxy=["*"],
            )
        except (OSError, websocket.WebSocketException) as error:
            logger.warning("no socket to %s, so progress is not shown: %s", self.url, error)
            return None

    def _json(self, method: str, path: str) -> dict[str, Any]:
        response = self._ask(method, path)
        try:
            said = response.json() if response.status_code == 200 else None
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise Away(f"{path} is answered with {response.status_code}.")
        return said

    def _ask(self, method: str, path: str, answer_s: float = ANSWER_S, **request: Any) -> requests.Response:
        try:
            response = self._session.request(method, self.url + path, timeout=(CONNECT_S, answer_s), **request)
        except requests.Timeout as error:
            raise Away(f"no answer to {path} in time.") from error
        except requests.ConnectionError as error:
            reason = getattr(error.args[0], "reason", None) if error.args else None
            if isinstance(reason, NewConnectionError):
                raise Refused("nobody listens there.") from error
            raise Away(f"the connection broke: {cut(str(error))}") from error
        except requests.RequestException as error:
            raise Away(cut(str(error))) from error
        if response.status_code in (502, 503, 504):
            raise Away(f"{path} is answered with {response.status_code}.")
        return response


def _refusal(response: requests.Response) -> str:
    """Why a workflow was refused, in ComfyUI's words."""
    try:
        said = response.json()
        error = said["error"]
        words = error if isinstance(error, str) else _sentence(error)
        found = [words, *_node_errors(said.get("node_errors"))]
    except (ValueError, KeyError, TypeError, AttributeError):
        return _words(response)
    return " ".join(found)


def _node_errors(said: Any) -> Sequence[str]:
    """What is wrong with which node and input, a sentence each."""
    found = []
    for node, about in said.items() if isinstance(said, dict) else ():
        for error in about.get("errors", []):
            name = (error.get("extra_info") or {}).get("input_name")
            where = f"node {node} ({about.get('class_type')})" + (f", input {name}" if name else "")
            found.append(f"{where}: {_sentence(error)}")
    more = [f"{len(found) - MOST_ERRORS} more."] if len(found) > MOST_ERRORS else []
    return [*found[:MOST_ERRORS], *more]


def _sentence(error: Mapping[str, Any]) -> str:
    message, details = str(error.get("message", "")), str(error.get("details", ""))
    words = message if not details or details == message else f"{message.rstrip('.')}: {details}"
    return cut(words).rstrip(".") + "."


def _words(response: requests.Response) -> str:
    return f"status {response.status_code}. {cut(response.text)}".strip()


def cut(words: str) -> str:
    """Words on one line, of at most LONGEST_WORDS characters."""
    line = " ".join(words.split())
    return line if len(line) <= LONGEST_WORDS else f"{line[:LONGEST_WORDS]}..."
