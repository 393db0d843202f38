"""A small value that fits a JSON schema, for answers that no model writes."""

from collections.abc import Mapping
from typing import Any

from engines.contract import InvalidInput

#: References that are followed within each other.
MOST_REFERENCES = 32


def instance(schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, references: int = 0) -> Any:
    """The first or least of what a schema allows: its first constant or alternative, 0, "", [], required properties.

    Of lengths and ranges it knows the lower bounds; patterns, formats and combinations it leaves unread. Raises
    InvalidInput for references that lead nowhere or to themselves.
    """
    root = schema if root is None else root
    if "$ref" in schema:
        if references == MOST_REFERENCES:
            raise InvalidInput(f"response_format.json_schema.schema: {schema['$ref']} leads to itself.")
        return instance(_resolve(root, schema["$ref"]), root, references + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for either in ("anyOf", "oneOf"):
        if schema.get(either):
            return instance(schema[either][0], root, references)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            known = schema.get("properties", {})
            return {name: instance(known.get(name, {}), root, references) for name in schema.get("required", ())}
        case "array":
            return [instance(schema.get("items", {}), root, references)] * min(schema.get("minItems", 0), 100)
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return False
        case "null":
            return None
        case _:
            return "x" * min(schema.get("minLength", 0), 10_000)


def _resolve(root: Any, reference: str) -> Mapping[str, Any]:
    found = root
    for name in filter(None, reference.removeprefix("#").split("/")):
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise InvalidInput(f"response_format.json_schema.schema: there is no {reference}.")
    return found
