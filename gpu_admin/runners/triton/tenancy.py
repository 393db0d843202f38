"""Who uses the container: it is made for the first model, and removed after the last.

container.lock is held alone to make or remove it, and shared by everybody who loads something into it; pull.lock is
held by whoever has Docker fetch the image.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from gpu_admin import locks
from gpu_admin.contract import Conflict, StartFailed, Unavailable
from gpu_admin.runners.triton.container import Container, Found
from gpu_admin.runners.triton.repository import ANSWER_S, QUICK_S, NoAnswer, Repository
from gpu_admin.runners.triton.settings import TritonSettings
from gpu_admin.runners.triton.waits import LOOK_S, Look, deadline, turn

logger = logging.getLogger(__name__)

#: Times that the container may vanish between its making and its use.
ATTEMPTS = 5
#: How long others may be about to load something, before the container is left to them.
OTHERS_S = 10.0


class Tenancy:
    """The container as all service processes of this host share it."""

    def __init__(self, settings: TritonSettings, container: Container, repository: Repository, folder: Path) -> None:
        """folder: where the locks are."""
        self._settings = settings
        self._container = container
        self._repository = repository
        self._lock = folder / "container.lock"
        self._pull_lock = folder / "pull.lock"

    @contextlib.contextmanager
    def running(self, look: Look) -> Iterator[None]:
        """The container up and Triton answering in it, and kept from being removed.

        Raises StartFailed, Unavailable, Conflict.
        """
        for _ in range(ATTEMPTS):
            with turn(self._lock, look, shared=True):
                found = self._container.look()
                if found is not None and found.running:
                    self._wait_until_live(look)
                    yield
                    return
            if not self._container.has_image():
                with turn(self._pull_lock, look):
                    if not self._container.has_image():
                        self._container.pull(look)
            with turn(self._lock, look):
                self._make()
        log = self._container.log_end()
        raise StartFailed(f"The container {self._container.name} is gone as soon as it is made.", log)

    def check_name(self, found: Found | None) -> None:
        """Raises Conflict if somebody else's container that does not run has the name."""
        if found is not None and not found.running and not found.ours:
            raise Conflict(
                f"There is a stopped container {self._container.name} that was not made here. Remove it with "
                f"docker rm {self._container.name}, or set another triton.container_name."
            )

    def is_fetching(self) -> bool:
        """Whether Docker fetches the image, for any process of this service."""
        with locks.if_free(self._pull_lock, shared=True) as free:
            return not free

    def end(self, ignoring: str | None = None) -> None:
        """Remove the container unless somebody uses it. Raises Unavailable.

        ignoring: a model whose load hangs; the container does not stay for it, and is killed.
        """
        until = time.monotonic() + OTHERS_S
        while True:
            with locks.if_free(self._lock) as mine:
                found = self._container.look()
                if found is None or (found.running and self._is_used(ignoring)):
                    return
                if mine:
                    if found.ours:
                        self._container.remove(found, gently=ignoring is None)
                    else:
                        logger.warning("container %s was not made here, and stays", self._container.name)
                    return
            if time.monotonic() > until:
                return
            time.sleep(LOOK_S)

    def end_after_failure(self, model_name: str) -> None:
        """Remove the container unless something else than that model, which did not load, is in it."""
        try:
            entry = self._repository.index(ANSWER_S).get(model_name)
            ignoring = model_name if entry is not None and entry.busy else None
        except NoAnswer:
            ignoring = None
        try:
            self.end(ignoring)
        except Unavailable as error:
            logger.warning("container %s cannot be cleared away: %s", self._container.name, error.detail)

    def _make(self) -> None:
        """A new container in place of one of ours that ended; one that runs stays."""
        found = self._container.look()
        if found is not None and found.running:
            return
        self.check_name(found)
        if found is not None:
            self._container.remove(found)
        self._container.create()

    def _wait_until_live(self, look: Look) -> None:
        seconds = self._settings.api_timeout_s
        late = StartFailed(
            f"Triton does not answer on port {self._settings.port} after {seconds:.0f} s. "
            f"If its container was made with other settings, remove it: docker rm -f {self._container.name}"
        )
        in_time = deadline(seconds, late)
        while not self._repository.is_live(QUICK_S):
            look()
            in_time()
            self._container.check_running()
            time.sleep(LOOK_S)

    def _is_used(self, ignoring: str | None) -> bool:
        try:
            return self._repository.has_others(ignoring)
        except NoAnswer as error:
            # Who does not listen has nothing loaded; who listens and is silent may have.
            return not error.refused
