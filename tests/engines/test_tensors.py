"""Tensors of triton jobs, before any server sees them."""

from typing import Any

import pytest
from marshmallow import ValidationError

from engines.catalogue import JobType
from engines.schemas import load_params


def load(shape: list[int], datatype: str, data: Any) -> Any:
    tensor = {"name": "INPUT0", "shape": shape, "datatype": datatype, "data": data}
    return load_params(JobType.TRITON, {"model_name": "MAM", "inputs": [tensor]})["inputs"][0]["data"]


@pytest.mark.parametrize(
    ("shape", "datatype", "data", "flat"),
    [
        ([2, 2], "INT8", [[1, -128], [3, 127]], [1, -128, 3, 127]),
        ([2, 2], "UINT64", [0, 2**64 - 1, 2, 3], [0, 2**64 - 1, 2, 3]),
        ([1, 2], "FP32", [[1, 2.5]], [1, 2.5]),
        ([], "BOOL", [True], [True]),
        ([0], "FP64", [], []),
        ([1], "BYTES", ["你好"], ["你好"]),
    ],
)
def test_flat_and_nested_tensors_load_flat(shape: list[int], datatype: str, data: Any, flat: list[Any]) -> None:
    assert load(shape, datatype, data) == flat


@pytest.mark.parametrize(
    ("shape", "datatype", "data", "words"),
    [
        ([2, 2], "INT8", [1, 2, 3], "has 4 elements; here are 3"),
        ([1], "INT8", [1, 2, 3], "here are more"),
        ([2], "FP32", [[1, 2]], "here are 1"),
        ([2], "INT8", [1, 128], "Element 1 is no INT8"),
        ([1], "UINT8", [-1], "Element 0 is no UINT8"),
        ([1], "INT32", [True], "Element 0 is no INT32"),
        ([1], "INT32", [1.0], "Element 0 is no INT32"),
        ([1], "FP32", [10**400], "Element 0 is no FP32"),
        ([1], "FP16", [70000], "Element 0 is no FP16"),
        ([1], "BOOL", [1], "Element 0 is no BOOL"),
        ([1], "BYTES", ["\ud800"], "Element 0 is no BYTES"),
        ([1], "FP32", {}, "Must be a list"),
        ([10**6] * 9, "FP32", [], "At most"),
        ([-1], "FP32", [], "greater than or equal to 0"),
        ([1], "BF16", [1], "Must be one of"),
    ],
)
def test_what_is_not_what_shape_and_datatype_say_is_refused(
    shape: list[int], datatype: str, data: Any, words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        load(shape, datatype, data)


@pytest.mark.parametrize("name", ["../MAM", "a/b", ".hidden", "", "a" * 65, "MAM\n"])
def test_a_models_name_is_no_path(name: str) -> None:
    with pytest.raises(ValidationError, match="Must be a model's name"):
        load_params(
            JobType.TRITON,
            {"model_name": name, "inputs": [{"name": "x", "shape": [1], "datatype": "BOOL", "data": [True]}]},
        )
