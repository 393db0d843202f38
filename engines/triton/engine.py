"""Inferences, run by the host's Triton server: one gRPC call for each job.

gRPC and not HTTP, since only a gRPC call can be cancelled: the server goes on with what an HTTP client has left
(triton-inference-server/server#8030). What a cancelled call was doing stops as soon as its model looks: backends that
schedule drop it from their queue, models of the Python backend ask `request.is_cancelled()`.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from engines.catalogue import Model
from engines.contract import (
    Device,
    EngineBroken,
    EngineError,
    InvalidInput,
    JobInterrupted,
    OutOfMemory,
    Progress,
    Report,
    ServerAway,
)
from engines.triton import tensors

logger = logging.getLogger(__name__)

#: How long a Triton that is started beside its worker may take to answer.
PATIENCE_S = 10.0
#: How often report() is looked at.
POLL_S = 0.1
#: So often a server is asked whether it lives while it computes, and so long it may take to say so: a host that went
#: away without a word would be waited for until the job's own time is over.
PROBE_EVERY_S = 5.0
PROBE_S = 10.0
#: For small questions; and for those that a cancelled job asks.
ASK_S, ASK_BRIEFLY_S = 2.0, 0.5
#: How long a cancelled job keeps its slot while Triton still computes it. With two brief questions this is less than a
#: worker that stops waits for its jobs to be given back.
LET_GO_S = 1.5
#: The deadline of a call: a job may run for a day.
CALL_S = 2 * 86_400.0
#: How often a call is made again that a living server says it cannot take now.
MOST_TRIES = 3
RETRY_S = 0.5
MOST_ANSWER_BYTES = 64 * 2**20
UNIT = "inference"

#: Triton's ports where nobody says otherwise: HTTP, and gRPC beside it.
HTTP_PORT, GRPC_PORT = 8000, 8001

_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MOST_ANSWER_BYTES),
    # The host's own server: no proxy of the environment stands between.
    ("grpc.enable_http_proxy", 0),
    # Else engines of one process share a connection, and with it how long it waits before it tries again.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_JOBS_FAULT = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.OUT_OF_RANGE,
)
#: What says, in lower case, that a device or the host had no memory left: of torch, CUDA, TensorRT and ONNX Runtime,
#: and of the Python backend's own.
_NO_MEMORY = (
    "out of memory",
    "out_of_memory",
    "alloc_failed",
    "bad_alloc",
    "failed to allocate",
    "unable to allocate",
    "shared memory pool",
)
_QUEUE_FULL = "maximum queue size"
_TOO_LARGE = "message larger than max"


class Engine:
    """Asks the Triton server at the model's URL."""

    #: Triton queues and batches by itself: enough to fill its batches, and few enough that what waits can still go to
    #: another host.
    slots = 16

    def __init__(self, model: Model, device: Device) -> None:
        """Returns once the server answers. Raises ServerAway."""
        assert model.url is not None
        self._model = model
        self._target, secure = address(model.url)
        credentials = grpc.ssl_channel_credentials() if secure else None
        self._channel = (
            grpc.secure_channel(self._target, credentials, options=_OPTIONS)
            if credentials
            else grpc.insecure_channel(self._target, options=_OPTIONS)
        )
        self._server = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._closed = threading.Event()
        try:
            self._await_server()
        except BaseException:
            self._channel.close()
            raise

    def run(self, params: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """The model's outputs; numbers that are not finite are null, bytes that are no text are Base64, with a warning.

        Raises InvalidInput in Triton's words for a model that is not loaded and for inputs that it does not take.
        """
        request = tensors.to_request(params)
        report(Progress(0, 1, UNIT))
        tries = 0
        while (response := self._try(request, report, tries)) is None:
            tries += 1
        result, warnings = tensors.to_result(response)
        report(Progress(1, 1, UNIT))
        return {**result, "model": self._model.id, **({"warnings": warnings} if warnings else {})}

    def close(self) -> None:
        """Cancel what still runs; those jobs end with EngineBroken."""
        self._closed.set()
        self._channel.close()

    def _await_server(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._server.ServerLive(service_pb2.ServerLiveRequest(), timeout=ASK_S)
                return
            except grpc.RpcError as error:
                if time.monotonic() > end:
                    raise ServerAway(
                        f"No Triton server answers gRPC at {self._target}: {_words(error)}. Start it, or set "
                        "GPU_TRITON_URL: to its HTTP address where gRPC is the next port, else to grpc://host:port."
                    ) from error
            time.sleep(POLL_S)

    def _try(self, request: Any, report: Report, tries: int) -> Any | None:
        """Triton's answer to one call; None where the call should be made again."""
        call = self._send(request)
        try:
            self._wait(call, report)
        except JobInterrupted:
            self._let_go(call, request.model_name)
            raise
        finally:
            call.cancel()
        if self._closed.is_set():
            raise self._gone()
        if call.code() is grpc.StatusCode.OK:
            return call.result()
        words, code = _words(call), call.code()
        if code is not grpc.StatusCode.UNAVAILABLE:
            raise _verdict(code, words)
        if not self._lives():
            # Without its words: the server's last ones may name what the client asked for.
            raise EngineBroken(f"The Triton server at {self._target} went away.")
        # It lives: its model's queue is full, or it was started again meanwhile. An inference can be made twice.
        if tries >= MOST_TRIES and _QUEUE_FULL not in words:
            raise EngineError(f"Triton cannot take the inference now: {words}.", code="triton_unavailable")
        end = time.monotonic() + RETRY_S
        while time.monotonic() < end:
            report(Progress(0, 1, UNIT))
            self._closed.wait(POLL_S)
        return None

    def _send(self, request: Any) -> Any:
        try:
            if not self._closed.is_set():
                return self._server.ModelInfer.future(request, timeout=CALL_S)
        except ValueError as error:
            # What a closed channel raises.
            raise self._gone() from error
        raise self._gone()

    def _wait(self, call: Any, report: Report) -> None:
        """Until the call has ended. Raises what report() raises, and EngineBroken once the server does not answer."""
        done = threading.Event()
        call.add_done_callback(lambda _: done.set())
        probe, asked = None, time.monotonic()
        while not done.wait(POLL_S):
            report(Progress(0, 1, UNIT))
            if self._closed.is_set():
                raise self._gone()
            if probe is None and time.monotonic() > asked + PROBE_EVERY_S:
                probe = self._server.ServerLive.future(service_pb2.ServerLiveRequest(), timeout=PROBE_S)
            elif probe is not None and probe.done():
                if probe.code() is not grpc.StatusCode.OK:
                    raise EngineBroken(f"The Triton server at {self._target} does not answer: {_words(probe)}.")
                probe, asked = None, time.monotonic()

    def _let_go(self, call: Any, model_name: str) -> None:
        """Cancel the call, and wait until Triton counts one more ended inference of the model, but not for long.

        A job that is interrupted in Triton's queue need not be waited for, and a model may be deaf to a cancel.
        """
        ended = self._ended(model_name)
        call.cancel()
        end = time.monotonic() + LET_GO_S
        while ended is not None and time.monotonic() < end:
            now = self._ended(model_name)
            if now is None or now > ended:
                return
            self._closed.wait(POLL_S / 2)
        logger.info("Triton may still compute a cancelled inference of %s", model_name)

    def _ended(self, model_name: str) -> int | None:
        """Inferences of the model that succeeded or failed since it was loaded; None where Triton does not say."""
        try:
            answer = self._server.ModelStatistics(
                service_pb2.ModelStatisticsRequest(name=model_name), timeout=ASK_BRIEFLY_S
            )
        except (grpc.RpcError, ValueError):
            return None
        counts = [entry.inference_stats for entry in answer.model_stats]
        return sum(int(count.success.count) + int(count.fail.count) for count in counts)

    def _lives(self) -> bool:
        try:
            return bool(self._server.ServerLive(service_pb2.ServerLiveRequest(), timeout=ASK_S).live)
        except (grpc.RpcError, ValueError):
            return False

    def _gone(self) -> EngineBroken:
        return EngineBroken(f"The engine of {self._model.id} was closed.")


def address(url: str) -> tuple[str, bool]:
    """host:port of Triton's gRPC, and whether by TLS.

    grpc:// and grpcs:// name it themselves; http:// and https:// name Triton's HTTP, and gRPC is the next port.
    """
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    port = parts.port or GRPC_PORT if parts.scheme.startswith("grpc") else (parts.port or HTTP_PORT) + 1
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}", parts.scheme.endswith("s")


def _words(error: Any) -> str:
    """What Triton says, on one line, without paths of its host."""
    # A Python model's traceback follows "At:".
    said = str(error.details() or error.code()).removeprefix("[request id: <id_unknown>] ").split("\n\nAt:")[0]
    return " ".join(said.split())[:500].rstrip(".")


def _verdict(code: grpc.StatusCode, words: str) -> EngineError:
    """What a status means for the job that got it."""
    if _TOO_LARGE in words:
        return InvalidInput(
            f"The outputs take more than {MOST_ANSWER_BYTES // 2**20} MiB. Name fewer in `outputs`, or let the model "
            "give less."
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED or any(sign in words.lower() for sign in _NO_MEMORY):
        return OutOfMemory(f"Triton is out of memory: {words}.")
    if "decoupled" in words:
        return InvalidInput(f"Models that stream their answers (decoupled) are not supported: {words}.")
    if "correlation ID" in words:
        return InvalidInput(f"Models that keep state between inferences (sequences) are not supported: {words}.")
    if code in _JOBS_FAULT:
        return InvalidInput(f"Triton refuses the inference: {words}.")
    return EngineError(f"The inference failed in Triton: {words}.", code="triton_error")
