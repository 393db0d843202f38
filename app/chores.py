"""What the leading control process does beside reconciling, each chore in a thread of its own."""

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from engines.failure import frames

logger = logging.getLogger(__name__)


class Chore(Protocol):
    """What the leader does beside."""

    def run(self, leads: threading.Event, stopped: threading.Event) -> None:
        """Do it for as long as this process leads, until stopped is set."""


def while_leading(
    turn: Callable[[], float],
    leads: threading.Event,
    stopped: threading.Event,
    *,
    pause_s: float,
    away: str,
    failed: str,
    away_s: float = 1.0,
    failed_s: float = 5.0,
) -> None:
    """Call turn() again and again while this process leads, until stopped is set; it says when the next one comes.

    turn: does some of the work; seconds until the next turn. pause_s: before the first turn, and while another process
    leads. away, failed: what the log says while the database is away, and when the turn fails otherwise; away_s and
    failed_s until it is tried again, since nobody else does the work.
    """
    wait_s = pause_s
    while not stopped.wait(wait_s):
        wait_s = pause_s
        if not leads.is_set():
            continue
        try:
            wait_s = turn()
        except SQLAlchemyError as error:
            logger.warning("%s: %s", away, type(error).__name__)
            wait_s = away_s
        except Exception as error:  # noqa: BLE001 - logged without its own words
            logger.error("%s: %s", failed, frames(error))
            wait_s = failed_s
