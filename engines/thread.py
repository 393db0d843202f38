"""The one thread of a loaded model: it makes every torch call, and job threads wait for it.

Two threads on one model broke in every library that was tried: transformers, diffusers, openai-whisper.
"""

import gc
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

import torch

from engines.contract import GIB, Device, EngineBroken, EngineError, OutOfMemory
from engines.failure import frames
from engines.memory import free_bytes
from engines.request import Request

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Request)


#: What says that memory is short without being a torch.OutOfMemoryError: torch on a CPU; CUDA and its libraries, which
#: allocate beside torch. A CUDA context goes on after these.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class NoRoom(Exception):
    """A step needs more memory than the engine may take; fewer requests at once help."""


class Way(Protocol[R]):
    """How requests are computed."""

    #: Those that are being computed, or keep memory between two turns.
    rows: list[R]
    #: Those that the present pass computes: if it raises, these have failed.
    stepping: Sequence[R]

    def turn(self, waiting: deque[R]) -> None:
        """Take requests from the waiting ones as there is room, and compute a little."""

    def make_room(self) -> Sequence[R]:
        """After a pass ran out of memory: take out who is to wait for a smaller one; nobody if it cannot be smaller."""

    def reap(self) -> None:
        """Take out the requests that have ended."""


class EngineThread(Generic[R]):
    """Computes what is submitted, until it is closed or its device is broken."""

    def __init__(self, name: str, device: Device, load: Callable[[Callable[[], bool]], Way[R]]) -> None:
        """load: makes the way, in the thread; it is given a function to call between two steps, which looks after the
        requests that wait meanwhile and is false once the engine is to end.

        Raises what load raises.
        """
        self._name = name
        self._device = device
        self._way: Way[R] | None = None
        #: To be computed, in their order; the engine thread's own.
        self._waiting: deque[R] = deque()
        # What job threads and the engine thread share, under the condition's lock.
        self._news = threading.Condition()
        self._inbox: list[R] = []
        self._closing = False
        self._broken: str | None = None
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, args=(load, ready), name=f"engine {name}", daemon=True)
        self._thread.start()
        ready.result()

    def submit(self, request: R) -> R:
        """Wait until the request has ended; the request. Raises what ended it, if that was no result."""
        self.submit_all([request])
        if request.error:
            raise request.error
        return request

    def submit_all(self, requests: Sequence[R]) -> None:
        """Wait until all of them have ended, however that was. Raises EngineBroken if none could begin."""
        with self._news:
            if self._broken:
                raise EngineBroken(self._broken)
            self._inbox.extend(requests)
            self._news.notify()
        for request in requests:
            request.ended.wait()

    @property
    def batch(self) -> int:
        """How many requests are being computed together now; any thread may ask."""
        way = self._way
        return 0 if way is None else len(way.rows)

    def close(self) -> None:
        """Free the device. What still waits or is computed ends with EngineBroken."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join()

    # From here on: the engine thread.

    def _live(self, load: Callable[[Callable[[], bool]], Way[R]], ready: "Future[None]") -> None:
        with torch.inference_mode():
            try:
                way = load(self._look_after_waiting)
            except BaseException as error:  # noqa: BLE001 - the constructor raises it
                ready.set_exception(error)
                return
            self._way = way
            ready.set_result(None)
            try:
                self._serve(way)
            except Exception as error:  # noqa: BLE001 - logged without its own words
                # A dead device fails even the clearing up after a failure.
                logger.error("the engine thread of %s ends: %s", self._name, frames(error))
                self._broken = verdict(error, alone=False).message
            finally:
                self._end(way)
                self._way = None
        del way
        # Closed, not broken: a dead device cannot even do that.
        if self._closing:
            empty_cache(self._device)

    def _serve(self, way: Way[R]) -> None:
        while self._wait_for_work(way):
            self._look_after_waiting()
            short, failure = None, None
            try:
                if self._waiting or way.rows:
                    way.turn(self._waiting)
            except Exception as error:  # noqa: BLE001 - logged without its own words
                if isinstance(error, NoRoom) or is_out_of_memory(error):
                    short = " ".join(str(error).split())[:300]
                else:
                    logger.error("a step of %s failed: %s", self._name, frames(error))
                    failure = verdict(error, alone=len(_unended(way.stepping)) == 1)
            # Only out here: as long as the error's traceback lives, so do the tensors of its frames (pytorch#18853).
            if short is not None:
                self._make_room(way, short)
            if failure:
                self._fail(way, failure)

    def _wait_for_work(self, way: Way[R]) -> bool:
        """True once there is something to do, false once the engine is to end."""
        with self._news:
            self._news.wait_for(lambda: self._closing or self._broken or self._inbox or self._waiting or way.rows)
            return not (self._closing or self._broken)

    def _look_after_waiting(self) -> bool:
        """Take in new requests, and let report() stop those that still wait. False once the engine is to end."""
        with self._news:
            self._waiting.extend(self._inbox)
            self._inbox.clear()
        for request in self._waiting:
            request.poll()
        for request in [request for request in self._waiting if request.ended.is_set()]:
            self._waiting.remove(request)
        return not self._closing

    def _make_room(self, way: Way[R], short: str) -> None:
        """Out of memory: put some back to the waiting ones, or fail the only one."""
        empty_cache(self._device)
        together = len(way.rows)
        put_back = way.make_room()
        if put_back:
            logger.warning("%s is out of memory with %d jobs: %d wait again", self._name, together, len(put_back))
            self._waiting.extendleft(reversed(put_back))
            return
        for request in way.rows:
            request.end(
                OutOfMemory(
                    f"{request.size} of {self._name} does not fit {self._device.name} even alone, where "
                    f"{free_bytes(self._device) / GIB:.2f} GiB are free: {short}. {request.advice}"
                )
            )
        way.reap()

    def _fail(self, way: Way[R], failure: EngineError) -> None:
        """End the requests of the step that failed, or the engine if that is broken or the failure is nobody's."""
        failed = _unended(way.stepping)
        for request in failed:
            request.end(type(failure)(failure.message, code=failure.code))
        way.reap()
        if isinstance(failure, EngineBroken) or not failed:
            self._broken = failure.message

    def _end(self, way: Way[R]) -> None:
        """Let nobody wait for an engine that computes no more."""
        with self._news:
            self._broken = self._broken or f"The engine of {self._name} was closed."
            left = [*self._inbox, *self._waiting, *way.rows]
            self._inbox.clear()
        for request in left:
            request.end(EngineBroken(self._broken))


def _unended(requests: Sequence[R]) -> list[R]:
    return [request for request in requests if not request.ended.is_set()]


def empty_cache(device: Device) -> None:
    """Give back the memory of tensors that nobody holds any more."""
    gc.collect()
    if device.name != "cpu":
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch raises no other kind for them; words of other errors may be a client's.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def is_broken(error: Exception) -> bool:
    """Whether the device answers every later call with the same error: a CUDA context does until its process ends."""
    if isinstance(error, torch.AcceleratorError | EngineBroken):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def verdict(error: Exception, *, alone: bool) -> EngineError:
    """What a failed step means for its jobs. Keeps the text alone: the error's frames hold tensors.

    alone: one job alone is told. Libraries quote what they choked on, and that is for nobody but its own client.
    """
    if isinstance(error, EngineError):
        return type(error)(error.message, code=error.code)
    broken = is_broken(error)
    text = type(error).__name__
    if alone or broken:
        text = f"{text}: {' '.join(str(error).split())[:300]}"
    if broken:
        return EngineBroken(f"The GPU is unusable until the worker is started again. {text}")
    return EngineError(f"A step of the model failed. {text}")
