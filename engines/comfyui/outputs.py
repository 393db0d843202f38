"""What a workflow's nodes put out, from ComfyUI's history: pictures, other files, texts."""

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from engines import media
from engines.comfyui.server import Server, TooLarge
from engines.contract import EngineError

#: Of one job, together; as Base64 that is a third more.
MOST_BYTES = 48 * 2**20
MOST_FILES = 128
MOST_CHARACTERS = 2**20


class Gone(Exception):
    """A file that history names is not there any more: the nodes were answered from ComfyUI's cache."""


@dataclass(frozen=True, slots=True)
class Put:
    """One file or text that a node put out."""

    node: str
    #: filename, subfolder and type, or a text.
    what: Mapping[str, str] | str


def collect(server: Server, outputs: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """images, files and texts of the result.

    outputs: of history, by node. Raises Gone, EngineError for more than a result may hold, and Away.
    """
    found: dict[str, list[dict[str, Any]]] = {"images": [], "files": [], "texts": []}
    puts = list(_puts(outputs))
    names = [put for put in puts if not isinstance(put.what, str)]
    if len(names) > MOST_FILES:
        raise EngineError(f"The workflow put out {len(names)} files; at most {MOST_FILES}.", code="output_too_large")
    left, characters = MOST_BYTES, 0
    for put in puts:
        if isinstance(put.what, str):
            characters += len(put.what)
            if characters > MOST_CHARACTERS:
                raise EngineError(f"The texts have more than {MOST_CHARACTERS} characters.", code="output_too_large")
            found["texts"].append({"node": put.node, "text": put.what})
            continue
        try:
            data = server.fetch(put.what, left)
        except TooLarge as error:
            raise TooLarge(f"The outputs take more than {MOST_BYTES // 2**20} MiB together.") from error
        if data is None:
            raise Gone(f"Node {put.node} put out {put.what['filename']}, which is not there any more.")
        left -= len(data)
        kind, entry = _entry(put.node, put.what, data)
        found[kind].append(entry)
    return found


def _puts(outputs: Mapping[str, Any]) -> Iterator[Put]:
    """In the order of history; each file once, since a node may name it under several keys."""
    seen = set()
    for node, named in outputs.items():
        for values in named.values() if isinstance(named, dict) else ():
            for value in values if isinstance(values, list) else [values]:
                if isinstance(value, str):
                    yield Put(node, value)
                elif isinstance(value, dict) and isinstance(value.get("filename"), str):
                    file = {name: str(value.get(name) or "") for name in ("filename", "subfolder", "type")}
                    if (key := tuple(file.values())) not in seen:
                        seen.add(key)
                        yield Put(node, file)


def _entry(node: str, file: Mapping[str, str], data: bytes) -> tuple[str, dict[str, Any]]:
    name = "/".join(filter(None, (file["subfolder"], file["filename"])))
    text = base64.b64encode(data).decode()
    try:
        media.check_picture(data)
    except media.BadMedia:
        return "files", {"node": node, "filename": name, "file_base64": text}
    with Image.open(io.BytesIO(data), formats=media.PICTURES) as picture:
        shown = {"format": str(picture.format).lower(), "width": picture.width, "height": picture.height}
    return "images", {"node": node, "filename": name, "image_base64": text, **shown}
