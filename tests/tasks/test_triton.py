"""Inferences that a Triton server runs for a worker of the queue asia-east.triton."""

import json

from app.request import Request
from engines.catalogue import JobType
from engines.schemas import RESULTS, load_params
from tasks.job import JobState
from tests.gpu_admin.triton_server import CANCELLED, TritonServer, write_model

HEARD_S = 45


def submit(platform, model, *values):
    given = {"name": "INPUT0", "datatype": "FP32", "shape": [len(values)], "data": list(values)}
    params = load_params(JobType.TRITON, {"model_name": model, "inputs": [given]})
    return platform.dispatch.submit("tester", Request(JobType.TRITON, None, None, params, 0, None, True, 60, None)).row


def test_a_worker_asks_its_triton_and_a_cancelled_job_ends_there_too(platform, tmp_path):
    repository = tmp_path / "models"
    write_model(repository, "sleeping", "sleeping")
    server = TritonServer(repository, tmp_path / "triton.log")
    try:
        server.load("sleeping")
        platform.start_worker(queues="asia-east.triton", GPU_TRITON_URL=f"grpc://127.0.0.1:{server.grpc_port}")
        long = submit(platform, "sleeping", 60)
        platform.until(lambda: platform.dispatch.progress(platform.row(long)) is not None, HEARD_S)
        behind, unknown = submit(platform, "sleeping", 0, 21), submit(platform, "none", 1)
        platform.dispatch.cancel(long)

        answered, refused = platform.ended(behind, HEARD_S), platform.ended(unknown, HEARD_S)
        platform.until(lambda: CANCELLED in server.server.log.read_text(), HEARD_S)
    finally:
        server.close()

    assert platform.status(long) is JobState.CANCELLED
    result = json.loads(answered.result)
    assert RESULTS[JobType.TRITON].validate(result) == {}
    assert result["outputs"] == [{"name": "OUTPUT0", "shape": [2], "datatype": "FP32", "data": [0.0, 42.0]}]
    assert refused.status is JobState.FAILED
    assert "'none' is not found" in refused.error_message
