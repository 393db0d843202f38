"""Models put onto GPUs of a running Triton, and taken off again.

For whoever has the model's turn. Where it is, is asked of Triton each time; the others of its GPUs go on serving.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from gpu_admin.contract import BadRequest, HostError, StartFailed, Unavailable
from gpu_admin.runners.triton import placement
from gpu_admin.runners.triton.container import Container
from gpu_admin.runners.triton.placement import ModelFolder, Placement
from gpu_admin.runners.triton.repository import ANSWER_S, Declined, IndexEntry, ModelState, NoAnswer, Repository
from gpu_admin.runners.triton.settings import TritonSettings
from gpu_admin.runners.triton.waits import LOOK_S, Look, deadline

logger = logging.getLogger(__name__)

#: For a request that waits behind a load that hangs: Triton does it when that load is over.
BEHIND_S = 0.5
#: Between a connection that broke and Docker's word that the container ended.
DEATH_S = 2.0


class Loads:
    """Changes of where models are."""

    def __init__(self, settings: TritonSettings, container: Container, repository: Repository) -> None:
        self._settings = settings
        self._container = container
        self._repository = repository

    def groups(self, model_name: str, placed: Placement) -> list[dict[str, Any]]:
        """Triton's instance groups for a placement. Raises BadRequest for a GPU that the container does not have."""
        cpu = self._settings.model(model_name).kind == "cpu"
        device = None if cpu else {gpu_id: self._settings.device(gpu_id) for gpu_id in placed}
        return placement.groups_of(placed, device)

    def placed(self, model_name: str, timeout_s: float) -> dict[int, int]:
        """Where a model that serves is now. Raises NoAnswer."""
        return placement.read_groups(self._repository.groups(model_name, timeout_s), self._settings.gpus)

    def put(self, model_name: str, gpu_id: int, copies: int, look: Look) -> None:
        """So many copies of the model on the GPU, beside those on others. Raises StartFailed, BadRequest, NoAnswer."""
        seconds = self._settings.load_timeout_s
        late = StartFailed(f"Triton has not ended an earlier load of {model_name} after {seconds:.0f} s more.")
        entry = self._settle(model_name, look, deadline(seconds, late))
        before = self.placed(model_name, ANSWER_S) if entry.state is ModelState.READY else {}
        if before.get(gpu_id) == copies:
            logger.info("%s is on GPU %d already", model_name, gpu_id)
            return
        try:
            self._load(model_name, {**before, gpu_id: copies}, look)
        except _Late as error:
            self._put_back(model_name, before)
            raise StartFailed(str(error)) from error
        except Declined as error:
            raise StartFailed(str(error)) from error

    def take(self, model_name: str, gpu_id: int) -> bool:
        """The model off the GPU; whether it is, and not a load of it that hangs with nothing else in the container.

        Raises Unavailable, NoAnswer.
        """
        seconds = self._settings.load_timeout_s
        busy = _Late(f"Triton still loads {model_name} after {seconds:.0f} s, and other models are in its container.")
        try:
            entry = self._settle(model_name, _nothing, deadline(seconds, busy))
            if entry.state is ModelState.READY:
                self._take(model_name, gpu_id)
        except _Late as error:
            if self._repository.has_others(model_name):
                self._put_back(model_name, {})
                raise Unavailable(str(error)) from error
            return False
        except (Declined, StartFailed, BadRequest) as error:
            raise Unavailable(f"{model_name} cannot be taken from GPU {gpu_id}: {message(error)}") from error
        return True

    def _take(self, model_name: str, gpu_id: int) -> None:
        rest = {gpu: count for gpu, count in self.placed(model_name, ANSWER_S).items() if gpu != gpu_id}
        if rest:
            # Even if it is not there by now: a load onto it that was abandoned may still be under way.
            self._load(model_name, rest, _nothing)
            return
        seconds = self._settings.api_timeout_s
        late = Unavailable(f"Triton still unloads {model_name} after {seconds:.0f} s.")
        self._repository.unload(model_name, ANSWER_S)
        self._settle(model_name, _nothing, deadline(seconds, late))

    def _settle(self, model_name: str, look: Look, in_time: Look) -> IndexEntry:
        """What Triton says of a model once it is not on its way to another state."""
        while True:
            entry = self._repository.index(ANSWER_S).get(model_name, IndexEntry())
            if not entry.busy:
                return entry
            look()
            in_time()
            time.sleep(LOOK_S)

    def _load(self, model_name: str, placed: Placement, look: Look) -> None:
        """Have Triton load a model there. Raises _Late, Declined, NoAnswer, BadRequest, StartFailed."""
        seconds = self._settings.load_timeout_s
        config = self._prepare(model_name, placed)
        loading = _in_background(lambda: self._repository.load(model_name, config, seconds))
        late = _Late(f"Triton did not end loading {model_name} within {seconds:.0f} s.")
        in_time = deadline(seconds, late)
        while True:
            try:
                loading.result(LOOK_S * 5)
            except TimeoutError:
                look()
                in_time()
                self._container.check_running()
            except NoAnswer as error:
                if error.refused:
                    self._report_death(error)
                raise late from error
            else:
                return

    def _prepare(self, model_name: str, placed: Placement) -> str | None:
        """What the load call has to carry for that placement. Raises BadRequest, StartFailed."""
        folder = ModelFolder(self._settings.model_repository, model_name)
        try:
            return folder.place(self.groups(model_name, placed))
        except OSError as error:
            raise StartFailed(f"The configuration of {model_name} cannot be written: {error}") from error

    def _put_back(self, model_name: str, before: Placement) -> None:
        """After a load that hangs: have Triton do, once it is over, what leads back to where the model was."""
        with contextlib.suppress(NoAnswer, Declined, BadRequest, StartFailed):
            if before:
                self._repository.load(model_name, self._prepare(model_name, before), BEHIND_S)
            else:
                self._repository.unload(model_name, BEHIND_S)

    def _report_death(self, error: NoAnswer) -> None:
        """Say why the connection broke: how the container ended, or else that error. Raises StartFailed."""
        end = time.monotonic() + DEATH_S
        while time.monotonic() < end:
            self._container.check_running()
            time.sleep(LOOK_S)
        raise StartFailed(f"Triton broke off: {error}") from error


class _Late(Exception):
    """Triton did not end a load in time."""


def message(error: Exception) -> str:
    """What an exception says to people."""
    if isinstance(error, StartFailed):
        return error.reason
    return error.detail if isinstance(error, HostError) else str(error)


def _nothing() -> None:
    """A look of one who waits in any case."""


def _in_background(work: Callable[[], None]) -> "Future[None]":
    """Work on a thread of its own that no ending process waits for."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 (it is raised again where the result is asked for)
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="triton-load", daemon=True).start()
    return future
