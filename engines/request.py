"""One job inside an engine, from its submission to its end."""

import logging
import threading
from typing import Any

from engines.contract import JobInterrupted, Progress, Report, Text
from engines.failure import frames

logger = logging.getLogger(__name__)


class Request:
    """One job: how its thread waits for it, and how it ended.

    Made by a job thread, which then waits for `ended`; everything else is done by the engine thread. No method raises:
    what report() raises ends this request and no other.
    """

    #: What its owner can do when it does not fit the device.
    advice = "Ask for less at once."

    def __init__(self, report: Report) -> None:
        self.ended = threading.Event()
        self.result: dict[str, Any] | None = None
        #: Why there is no result, if there is none.
        self.error: Exception | None = None
        #: It shared a batch that failed: it is computed without others.
        self.alone = False
        self._report = report
        self._progress = Progress(0, None, "step")

    @property
    def size(self) -> str:
        """What of it takes memory, for people: "512 tokens"."""
        return "A job"

    def tell(self, event: Progress | Text) -> None:
        """Report an event; ends the request if its job must stop."""
        if self.ended.is_set():
            return
        if isinstance(event, Progress):
            self._progress = event
        try:
            self._report(event)
        except JobInterrupted as interruption:
            self.end(interruption)
        except Exception as error:  # noqa: BLE001 - logged without its own words
            logger.error("a job failed while its progress was reported: %s", frames(error))
            self.end(error)

    def poll(self) -> None:
        """Let report() stop a request that is not being computed."""
        self.tell(self._progress)

    def finish(self, result: dict[str, Any]) -> None:
        """End with a result; the first end counts."""
        if not self.ended.is_set():
            self.result = result
            self.ended.set()

    def end(self, error: Exception) -> None:
        """End without a result; the first end counts."""
        if not self.ended.is_set():
            # Its frames hold tensors of the engine thread, which would live as long as the job's traceback.
            self.error = error.with_traceback(None)
            self.ended.set()
