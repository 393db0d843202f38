import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engines.catalogue import JobType
from engines.contract import (
    Device,
    EngineBroken,
    EngineError,
    InvalidInput,
    JobCancelled,
    JobInterrupted,
    JobTimedOut,
    OutOfMemory,
    ServerAway,
)
from engines.loading import load, resolve
from engines.schemas import RESULTS, load_params
from engines.triton import engine as triton
from tests.gpu_admin.triton_server import CANCELLED, TritonServer, write_model
from tests.rig import free_port, until

HEARD_S = 45

#: Gives back what it is given, of every type; ORDER says otherwise.
EVERY = """
import numpy
import triton_python_backend_utils as triton

KINDS = "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING".split()


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.set_max_batch_size(0)
        for kind in [*KINDS, "ORDER"]:
            data_type = f"TYPE_{'STRING' if kind == 'ORDER' else kind}"
            config.add_input({"name": f"{kind}_IN", "data_type": data_type, "dims": [-1, -1], "optional": True})
            config.add_output({"name": f"{kind}_OUT", "data_type": data_type, "dims": [-1, -1]})
        return config

    def execute(self, requests):
        return [triton.InferenceResponse(list(map(self.answer, request.inputs()))) for request in requests]

    def answer(self, given):
        array = given.as_numpy()
        match array.ravel()[0]:
            case b"fail":
                raise triton.TritonModelException("this model fails")
            case b"oom":
                raise triton.TritonModelException("CUDA out of memory. Tried to allocate 20.00 GiB.")
            case b"bytes":
                array = numpy.array([[b"\\xff\\xfe", b"text"]], dtype=numpy.object_)
            case b"infinite":
                return triton.Tensor("FP32_OUT", numpy.array([[1.5, numpy.nan, -numpy.inf]], dtype=numpy.float32))
            case b"large":
                return triton.Tensor("UINT8_OUT", numpy.zeros((1, 5_000_000), dtype=numpy.uint8))
        return triton.Tensor(given.name().replace("_IN", "_OUT"), array)
"""
STREAMING = """
name: "streaming"
backend: "python"
model_transaction_policy { decoupled: true }
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""

#: Computes one at a time, and lets one more wait.
NARROW = """
import time

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.1)
        given = [triton.get_input_tensor_by_name(request, "INPUT0").as_numpy() for request in requests]
        return [triton.InferenceResponse([triton.Tensor("OUTPUT0", array)]) for array in given]
"""
NARROW_CONFIG = """
name: "narrow"
backend: "python"
max_batch_size: 1
dynamic_batching { default_queue_policy { max_queue_size: 1 } }
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""


def write(repository: Path, name: str, model: str, config: str) -> None:
    folder = write_model(repository, name, files="none")
    (folder / "1" / "model.py").write_text(model)
    (folder / "config.pbtxt").write_text(config)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """With the models every, narrow, sleeping and streaming loaded."""
    folder = tmp_path_factory.mktemp("triton")
    repository = folder / "models"
    write_model(repository, "sleeping", "sleeping")
    write(repository, "every", EVERY, 'name: "every"\nbackend: "python"\n')
    write(repository, "narrow", NARROW, NARROW_CONFIG)
    write(repository, "streaming", EVERY, STREAMING)
    started = TritonServer(repository, folder / "triton.log")
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(started.load, ("every", "narrow", "sleeping", "streaming")))
        yield started
    finally:
        started.close()


def engine_of(server: TritonServer) -> Any:
    return load(resolve(JobType.TRITON, f"grpc://127.0.0.1:{server.grpc_port}"), Device("cpu"))


@pytest.fixture(scope="module")
def engine(server: TritonServer) -> Iterator[Any]:
    made = engine_of(server)
    yield made
    made.close()


def infer(engine: Any, model: str, *inputs: dict[str, Any], report: Any = lambda _: None, **more: Any) -> Any:
    params = load_params(JobType.TRITON, {"model_name": model, "inputs": list(inputs), **more})
    return engine.run(params, report)


def tensor(kind: str, *values: Any, name: str | None = None) -> dict[str, Any]:
    datatype = "BYTES" if kind in ("STRING", "ORDER") else kind
    return {"name": name or f"{kind}_IN", "datatype": datatype, "shape": [1, len(values)], "data": list(values)}


def nap(engine: Any, seconds: float, report: Any = lambda _: None) -> Any:
    return infer(engine, "sleeping", {**tensor("FP32", seconds, name="INPUT0"), "shape": [1]}, report=report)


class Interruption:
    """A report() that raises once it is told to, and knows how often it was asked."""

    def __init__(self, error: JobInterrupted) -> None:
        self.error = error
        self.told = threading.Event()
        self.asked = 0

    def __call__(self, event: object) -> None:
        self.asked += 1
        if self.told.is_set():
            raise self.error


@contextmanager
def napping(engine: Any, error: JobInterrupted) -> "Iterator[tuple[Future[Any], Interruption]]":
    """A job of a minute that Triton computes; interrupted at the latest when this ends."""
    interruption = Interruption(error)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(nap, engine, 60, interruption)
        try:
            until(lambda: interruption.asked > 2, HEARD_S)
            yield job, interruption
        finally:
            interruption.told.set()


VALUES = {
    "BOOL": [True, False],
    **{f"UINT{bits}": [0, 2**bits - 1] for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] for bits in (8, 16, 32, 64)},
    "FP16": [0.5, -65504.0],
    "FP32": [0.5, -(2.0**127)],
    "FP64": [0.1, -1e300],
    "STRING": ["", "你好 \U0001f600"],
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_every_type_come_back_as_they_were(engine: Any, kind: str) -> None:
    result = infer(engine, "every", tensor(kind, *VALUES[kind]))

    assert RESULTS[JobType.TRITON].validate(result) == {}
    assert (result["model_name"], result["model_version"], result["model"]) == ("every", "1", "triton")
    (output,) = result["outputs"]
    assert (output["name"], output["shape"], output["data"]) == (f"{kind}_OUT", [1, 2], VALUES[kind])
    assert list(map(type, output["data"])) == list(map(type, VALUES[kind]))


def test_only_the_outputs_that_were_asked_for_come_back(engine: Any) -> None:
    inputs = tensor("INT8", 1), tensor("STRING", "two")

    result = infer(engine, "every", *inputs, outputs=[{"name": "STRING_OUT"}])

    assert [output["name"] for output in result["outputs"]] == ["STRING_OUT"]


@pytest.mark.parametrize(
    ("order", "data", "said"),
    [
        ("infinite", [1.5, None, None], "FP32_OUT holds 2 of 3 numbers that are not finite"),
        ("bytes", ["//4=", "dGV4dA=="], "ORDER_OUT holds bytes that are no text"),
    ],
)
def test_what_json_cannot_carry_is_told(engine: Any, order: str, data: list[Any], said: str) -> None:
    result = infer(engine, "every", tensor("ORDER", order))

    json.dumps(result, allow_nan=False)
    assert result["outputs"][0]["data"] == data
    assert said in result["warnings"][0]


def test_as_many_jobs_as_there_are_slots_get_their_own_answers(engine: Any) -> None:
    with ThreadPoolExecutor(engine.slots) as pool:
        results = list(pool.map(lambda number: infer(engine, "every", tensor("INT32", number)), range(100)))

    assert [result["outputs"][0]["data"] for result in results] == [[number] for number in range(100)]


def test_a_job_that_tritons_queue_has_no_room_for_waits(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "RETRY_S", 0.1)
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(infer, engine, "narrow", tensor("FP32", number, name="INPUT0")) for number in range(5)]

        assert [job.result()["outputs"][0]["data"] for job in jobs] == [[number] for number in range(5)]


@pytest.mark.parametrize("error", [JobCancelled(), JobTimedOut("It ran longer than 3 s.")])
def test_what_report_raises_ends_the_inference_in_triton_too(
    server: TritonServer, engine: Any, error: JobInterrupted
) -> None:
    heard = server.server.log.read_text().count(CANCELLED)
    with ThreadPoolExecutor(1) as pool, napping(engine, error) as (job, interruption):
        behind = pool.submit(nap, engine, 0)
        interruption.told.set()

        assert job.exception(HEARD_S) is error
        # The model's only instance was busy for a minute.
        assert behind.result(HEARD_S)["outputs"]
    assert server.server.log.read_text().count(CANCELLED) == heard + 1


WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "model": ("none", tensor("FP32", 1), {}, "'none' is not found"),
    "version": ("every", tensor("FP32", 1), {"model_version": "7"}, "version 7 is not found"),
    "name": ("every", tensor("FP32", 1, name="X"), {}, "unexpected inference input 'X'"),
    "datatype": ("sleeping", tensor("INT32", 1, name="INPUT0"), {}, "data-type is 'INT32'"),
    "shape": ("sleeping", tensor("FP32", 1, name="INPUT0"), {}, "unexpected shape for input 'INPUT0'"),
    "output": ("every", tensor("FP32", 1), {"outputs": [{"name": "Y"}]}, "unexpected inference output 'Y'"),
    "streams": ("streaming", tensor("FP32", 1, name="INPUT0"), {}, "not supported"),
    "large": ("every", tensor("ORDER", "large"), {}, "5,000,000 elements"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_model_does_not_take_is_refused_in_tritons_words(engine: Any, case: str) -> None:
    model, given, more, said = WRONG[case]

    with pytest.raises(InvalidInput, match=said):
        infer(engine, model, given, **more)


@pytest.mark.parametrize(
    ("order", "error", "said"), [("oom", OutOfMemory, "20.00 GiB"), ("fail", EngineError, "this model fails")]
)
def test_a_failing_inference_fails_its_job_alone(engine: Any, order: str, error: type[EngineError], said: str) -> None:
    with pytest.raises(EngineError, match=said) as raised:
        infer(engine, "every", tensor("ORDER", order))

    assert type(raised.value) is error
    assert "model.py" not in raised.value.message
    assert infer(engine, "every", tensor("INT8", 1))["outputs"]


def test_a_server_that_dies_breaks_the_engine(tmp_path: Path) -> None:
    write_model(tmp_path / "models", "sleeping", "sleeping")
    own = TritonServer(tmp_path / "models", tmp_path / "triton.log")
    try:
        own.load("sleeping")
        engine = engine_of(own)
        with napping(engine, JobCancelled()) as (job, _):
            own.server.process.kill()

            assert isinstance(job.exception(HEARD_S), EngineBroken)
        engine.close()
    finally:
        own.close()


def test_a_server_that_freezes_breaks_the_engine(server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "PROBE_EVERY_S", 0.2)
    monkeypatch.setattr(triton, "PROBE_S", 0.5)
    engine = engine_of(server)
    with napping(engine, JobCancelled()) as (job, _):
        server.server.process.send_signal(signal.SIGSTOP)
        try:
            assert isinstance(job.exception(HEARD_S), EngineBroken)
        finally:
            server.server.process.send_signal(signal.SIGCONT)
    engine.close()


def test_a_closed_engine_ends_its_jobs_and_can_be_closed_again(server: TritonServer) -> None:
    engine = engine_of(server)
    with napping(engine, JobCancelled()) as (job, _):
        engine.close()
        engine.close()

        assert isinstance(job.exception(HEARD_S), EngineBroken)
    with pytest.raises(EngineBroken):
        nap(engine, 0)


def test_without_a_server_it_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "PATIENCE_S", 0.3)
    port = free_port()

    with pytest.raises(ServerAway, match=rf"127\.0\.0\.1:{port}.*GPU_TRITON_URL"):
        load(resolve(JobType.TRITON, f"grpc://127.0.0.1:{port}"), Device("cpu"))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://127.0.0.1:8000", ("127.0.0.1:8001", False)),
        ("http://gpu7", ("gpu7:8001", False)),
        ("grpc://gpu7", ("gpu7:8001", False)),
        ("grpc://[::1]:9000", ("[::1]:9000", False)),
        ("https://gpu7:9000", ("gpu7:9001", True)),
        ("grpcs://gpu7:443", ("gpu7:443", True)),
    ],
)
def test_grpc_is_the_port_beside_http_unless_it_is_named(url: str, found: tuple[str, bool]) -> None:
    assert triton.address(url) == found
