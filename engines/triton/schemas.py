"""Params and results of Triton jobs: tensors as JSON, as the v2 inference protocol has them."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate

from engines.fields import Int, Text

MOST_TENSORS = 64
MOST_DIMENSIONS = 16
#: Elements of one tensor; as JSON each takes a few bytes.
MOST_ELEMENTS = 16 * 2**20
_FLOATS = {"FP16": 65504.0, "FP32": 3.4028234663852886e38, "FP64": math.inf}
_WHOLES = {
    **{f"UINT{bits}": (0, 2**bits - 1) for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
}
#: Kinds of element, by the protocol's names.
DATATYPES = ("BOOL", *_WHOLES, *_FLOATS, "BYTES")

_NAME = validate.Length(min=1, max=256)


class Input(Schema):
    """A tensor that a model is given: its shape, and its elements row by row."""

    class Meta:
        unknown = RAISE

    name = Text(required=True, validate=_NAME)
    shape = fields.List(
        Int(validate=validate.Range(min=0, max=MOST_ELEMENTS)),
        required=True,
        validate=validate.Length(max=MOST_DIMENSIONS),
    )
    datatype = fields.String(required=True, validate=validate.OneOf(DATATYPES))
    data = fields.Raw(
        required=True,
        metadata={
            "type": "array",
            "items": {},
            "description": "Flat, or nested as the shape says. Elements of BOOL are true and false, of BYTES texts.",
        },
    )

    @post_load
    def _flatten(self, tensor: dict[str, Any], **_: Any) -> dict[str, Any]:
        """With flat data that is what shape and datatype say."""
        count = 1
        for size in tensor["shape"]:
            count *= size
            # At each step: sixteen sizes of a million make a number of a hundred digits.
            if count > MOST_ELEMENTS:
                raise ValidationError(f"At most {MOST_ELEMENTS} elements.", "shape")
        if not isinstance(tensor["data"], list):
            raise ValidationError("Must be a list.", "data")
        elements = list(itertools.islice(_flat(tensor["data"], len(tensor["shape"])), count + 1))
        if len(elements) != count:
            found = "more" if len(elements) > count else len(elements)
            raise ValidationError(f"The shape has {count} elements; here are {found}.", "data")
        fits = _CHECKS[tensor["datatype"]]
        for index, element in enumerate(elements):
            if not fits(element):
                raise ValidationError(f"Element {index} is no {tensor['datatype']}.", "data")
        return {**tensor, "data": elements}


def _flat(data: list[Any], depth: int) -> Iterator[Any]:
    """The elements within at most `depth` lists; what is nested deeper comes as it is."""
    for entry in data:
        if isinstance(entry, list) and depth > 1:
            yield from _flat(entry, depth - 1)
        else:
            yield entry


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda element: type(element) is int and least <= element <= most


def _float(most: float) -> Callable[[Any], bool]:
    def fits(element: Any) -> bool:
        try:
            return type(element) in (int, float) and abs(float(element)) <= most
        except OverflowError:
            return False

    return fits


def _text(element: Any) -> bool:
    try:
        element.encode()
    except (AttributeError, UnicodeEncodeError):
        return False
    return True


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "BOOL": lambda element: isinstance(element, bool),
    **{name: _whole(*bounds) for name, bounds in _WHOLES.items()},
    **{name: _float(most) for name, most in _FLOATS.items()},
    "BYTES": _text,
}


class WantedOutput(Schema):
    """A tensor that is asked back."""

    class Meta:
        unknown = RAISE

    name = Text(required=True, validate=_NAME)


class TritonParams(Schema):
    """A model that a Triton server has loaded, and what it is given."""

    class Meta:
        unknown = RAISE

    model_name = fields.String(
        required=True,
        validate=validate.Regexp(
            r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z",
            error="Must be a model's name: letters, digits, dots, dashes and underscores, at most 64.",
        ),
    )
    model_version = fields.String(
        load_default=None,
        allow_none=True,
        validate=validate.Regexp(r"[0-9]{1,18}\Z", error="Must be a version's number, as text."),
        metadata={"description": "Left out, the server's policy chooses."},
    )
    inputs = fields.List(fields.Nested(Input), required=True, validate=validate.Length(min=1, max=MOST_TENSORS))
    outputs = fields.List(
        fields.Nested(WantedOutput),
        load_default=list,
        validate=validate.Length(max=MOST_TENSORS),
        metadata={"description": "Left out, all of them come back."},
    )


class Output(Schema):
    """A tensor that a model gave."""

    name = fields.String(required=True)
    shape = fields.List(fields.Integer(), required=True)
    datatype = fields.String(required=True)
    data = fields.List(fields.Raw(), required=True, metadata={"description": "Flat, row by row."})


class TritonResult(Schema):
    """What an inference gave."""

    model_name = fields.String(required=True)
    model_version = fields.String(required=True)
    outputs = fields.List(fields.Nested(Output), required=True)
    model = fields.String(required=True)
    warnings = fields.List(fields.String())
