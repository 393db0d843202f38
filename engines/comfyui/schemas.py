"""Params and results of workflow jobs."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate, validates_schema

from engines import media
from engines.fields import File

MOST_NODES = 500
MOST_INPUTS = 256
#: A workflow's JSON; some nodes hold a picture as text.
MOST_CHARACTERS = 16 * 2**20
#: Lists and objects within an input's value.
MOST_DEPTH = 16
LONGEST_NAME = 128
MOST_IMAGES = 16

#: A plain name: no path, nothing hidden.
_FILE_NAME = re.compile(r"[^\W_][\w .()-]*")


class Workflow(fields.Dict):
    """A workflow as ComfyUI's "Export (API)" writes it: nodes by id, each with class_type and inputs.

    What the nodes are and take is for the ComfyUI that runs it to say; here is checked what it could not bear.
    """

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValidationError("Must be an object of nodes by id.")
        if isinstance(value.get("nodes"), list):
            raise ValidationError(
                'This is the editor\'s format, with "nodes" and "links". Export the workflow with "Export (API)".'
            )
        if not 1 <= len(value) <= MOST_NODES:
            raise ValidationError(f"Must have 1 to {MOST_NODES} nodes.")
        if errors := {
            node_id[:LONGEST_NAME]: error for node_id, node in value.items() if (error := _wrong(node_id, node))
        }:
            raise ValidationError(errors)
        try:
            size = len(json.dumps(value, ensure_ascii=False).encode())
        except UnicodeEncodeError as error:
            raise ValidationError("Not valid Unicode: a surrogate stands alone.") from error
        if size > MOST_CHARACTERS:
            raise ValidationError(f"Too large: at most {MOST_CHARACTERS} bytes.")
        return {
            node_id: {name: node[name] for name in ("class_type", "inputs", "_meta") if name in node}
            for node_id, node in value.items()
        }


def _wrong(node_id: str, node: Any) -> dict[str, list[str]] | list[str] | None:
    """What is wrong with a node, by field."""
    if not 1 <= len(node_id) <= LONGEST_NAME:
        return [f"A node's id must have 1 to {LONGEST_NAME} characters."]
    if not isinstance(node, dict):
        return ["A node must be an object with class_type and inputs."]
    # is_changed stands in workflows that older versions wrote into their pictures; it means nothing to a new run.
    if unknown := set(node) - {"class_type", "inputs", "_meta", "is_changed"}:
        return {name[:LONGEST_NAME]: ["Unknown field. Known: class_type, inputs, _meta."] for name in unknown}
    kind, inputs = node.get("class_type"), node.get("inputs")
    if not isinstance(kind, str) or not 1 <= len(kind) <= LONGEST_NAME:
        return {"class_type": [f"Must be the node's type, of 1 to {LONGEST_NAME} characters."]}
    if not isinstance(inputs, dict) or len(inputs) > MOST_INPUTS:
        return {"inputs": [f"Must be an object of at most {MOST_INPUTS} inputs."]}
    if deep := [name for name, value in inputs.items() if _too_deep(value)]:
        return {
            f"inputs.{name[:LONGEST_NAME]}": [f"At most {MOST_DEPTH} lists and objects within another."]
            for name in deep
        }
    if not isinstance(node.get("_meta", {}), dict) or _too_deep(node.get("_meta")):
        return {"_meta": ["Must be an object."]}
    return None


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _file_name(name: str) -> None:
    if len(name) > LONGEST_NAME or not _FILE_NAME.fullmatch(name):
        raise ValidationError(f"Must be a plain file name such as cat.png, of at most {LONGEST_NAME} characters.")


class ComfyuiParams(Schema):
    """A workflow, and the pictures that its nodes name."""

    class Meta:
        unknown = RAISE

    workflow = Workflow(
        required=True,
        metadata={
            "description": 'Nodes by id, as "Export (API)" writes them.',
            "additionalProperties": {
                "type": "object",
                "required": ["class_type", "inputs"],
                "properties": {"class_type": {"type": "string"}, "inputs": {"type": "object"}},
            },
        },
    )
    images = fields.Dict(
        keys=fields.String(validate=_file_name),
        values=File(media.check_picture, media.MOST_PICTURE_BYTES),
        load_default=dict,
        validate=validate.Length(max=MOST_IMAGES),
        metadata={"description": "Pictures by file name; a node's input that is this name gets the picture."},
    )

    @validates_schema
    def _used(self, data: Mapping[str, Any], **_: Any) -> None:
        said = {
            value for node in data["workflow"].values() for value in node["inputs"].values() if isinstance(value, str)
        }
        if idle := [name for name in data["images"] if name not in said]:
            raise ValidationError({"images": {name: ["No input of the workflow names it."] for name in idle}})


class WorkflowImage(Schema):
    """A picture that a node put out."""

    node = fields.String(required=True)
    filename = fields.String(required=True)
    image_base64 = fields.String(required=True)
    format = fields.String(required=True)
    width = fields.Integer(required=True)
    height = fields.Integer(required=True)


class WorkflowFile(Schema):
    """Another file that a node put out: a video, a sound, a model."""

    node = fields.String(required=True)
    filename = fields.String(required=True)
    file_base64 = fields.String(required=True)


class WorkflowText(Schema):
    """Text that a node put out."""

    node = fields.String(required=True)
    text = fields.String(required=True)


class ComfyuiResult(Schema):
    """What a workflow's output nodes gave, node by node."""

    images = fields.List(fields.Nested(WorkflowImage), required=True)
    files = fields.List(fields.Nested(WorkflowFile), required=True)
    texts = fields.List(fields.Nested(WorkflowText), required=True)
    model = fields.String(required=True)
    warnings = fields.List(fields.String())
