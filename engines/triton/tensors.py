"""Tensors between JSON and gRPC, as the v2 inference protocol has them in both.

Source: kserve/open-inference-protocol, specification/protocol; triton-inference-server/client, grpc/_infer_result.py.
"""

import base64
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import triton_to_np_dtype

from engines.contract import InvalidInput

#: Elements of all outputs of a job together: as JSON that is up to 80 MB.
MOST_OUTPUT_ELEMENTS = 4 * 2**20


def to_request(params: Mapping[str, Any]) -> Any:
    """The ModelInferRequest of validated params."""
    request = service_pb2.ModelInferRequest(
        model_name=params["model_name"], model_version=params.get("model_version") or ""
    )
    for tensor in params["inputs"]:
        request.inputs.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"])
        request.raw_input_contents.append(_to_bytes(tensor["datatype"], tensor["data"]))
    for output in params.get("outputs") or ():
        request.outputs.add(name=output["name"])
    return request


def to_result(response: Any) -> tuple[dict[str, Any], list[str]]:
    """The result that a ModelInferResponse means, and what to say about values that JSON cannot carry.

    Raises InvalidInput for more elements than a result may hold.
    """
    count = sum(math.prod(output.shape) for output in response.outputs)
    if count > MOST_OUTPUT_ELEMENTS:
        raise InvalidInput(
            f"The outputs hold {count:,} elements together; a result may hold {MOST_OUTPUT_ELEMENTS:,}. Name fewer in "
            "`outputs`, or let the model give less."
        )
    found = InferResult(response)
    outputs, warnings = [], []
    for output in response.outputs:
        values, warning = _to_json(found.as_numpy(output.name), output.name)
        if warning:
            warnings.append(warning)
        outputs.append({"name": output.name, "shape": list(output.shape), "datatype": output.datatype, "data": values})
    model = {"model_name": response.model_name, "model_version": response.model_version}
    return {**model, "outputs": outputs}, warnings


def _to_bytes(datatype: str, data: list[Any]) -> bytes:
    if datatype == "BYTES":
        texts = [text.encode() for text in data]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    # A number that the type only holds as infinity was refused with the params.
    array = np.asarray(data, dtype=triton_to_np_dtype(datatype))
    return bytes(array.tobytes())


def _to_json(array: np.ndarray, name: str) -> tuple[list[Any], str | None]:
    """Flat values, and what was changed about them."""
    values: list[Any] = array.ravel().tolist()
    if array.dtype == np.object_:
        try:
            return [value.decode() for value in values], None
        except UnicodeDecodeError:
            told = f"Output {name} holds bytes that are no text: all of its values are given as Base64."
            return [base64.b64encode(value).decode() for value in values], told
    if array.dtype.kind == "f" and (lost := int(np.count_nonzero(~np.isfinite(array)))):
        # JSON has no NaN and no infinity.
        told = f"Output {name} holds {lost} of {array.size} numbers that are not finite: they are given as null."
        return [value if math.isfinite(value) else None for value in values], told
    return values, None
