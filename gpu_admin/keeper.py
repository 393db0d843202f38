"""The background work of one server process: orders are carried out, and what they became is written down.

Any process may take up any order; whoever holds an order's lock is at it. A process that ends lets go of its locks, and
the others, or the next one, go on where it was.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from gpu_admin import locks, sight
from gpu_admin.contract import HostError, InstanceStatus, Runner, StartFailed, Unavailable
from gpu_admin.orders import Order, Orders, Phase, boot_id

logger = logging.getLogger(__name__)

LOOK_S = 1.0
#: After something went wrong: a look, the stop of what cannot be stopped now, an order that cannot be written.
PAUSE_S = 5.0
#: For threads to let go at the end: runners look once a second whether they are abandoned.
CLOSE_S = 5.0
#: For what a start needs to come back, since it was ordered or the host was started.
AWAY_S = 120.0
LOG_LINES = 40

#: Phases in which there is something to do.
TO_DO = (Phase.STARTING, Phase.STOPPING)


class Keeper:
    """Carries out orders on threads of its own, all of them of the process that made it.

    They are daemons: a process that is told to end does not wait for a model to load.
    """

    def __init__(self, runners: Mapping[str, Runner], orders: Orders, folder: Path) -> None:
        self._runners = runners
        self._orders = orders
        self._folder = folder
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._watching: threading.Thread | None = None
        self._lock = threading.Lock()
        #: Of an order that went wrong: when to try again, by the monotonic clock.
        self._not_before: dict[str, float] = {}
        #: What was up and was not seen at the last look.
        self._missed: dict[str, Order] = {}

    def watch(self) -> None:
        """Look once a second for what is to do, from now on."""
        with self._lock:
            if self._watching is None:
                self._watching = threading.Thread(target=self._watch, name="keeper", daemon=True)
                self._watching.start()

    def close(self) -> None:
        """Let go of everything: what is starting stays ordered, and what runs goes on running."""
        self._closing.set()
        end = time.monotonic() + CLOSE_S
        for thread in (*self._threads, *filter(None, [self._watching])):
            thread.join(max(0.0, end - time.monotonic()))

    def begin(self, order: Order) -> None:
        """Work on an order in the background, if nobody does."""
        self._not_before.pop(order.key, None)
        thread = threading.Thread(target=self._work, args=(order,), name=f"order-{order.key}", daemon=True)
        thread.start()
        with self._lock:
            self._threads = [*(one for one in self._threads if one.is_alive()), thread]

    def lock_of(self, order: Order) -> Path:
        """The file whose lock is held by whoever works on an order."""
        return self._folder / "locks" / f"{order.runner}-{order.key}.lock"

    def take_down(self, order: Order) -> None:
        """Stop what was ordered and forget it; for whoever holds its lock.

        Raises HostError with the reason, which the order then has too; it stays to be stopped.
        """
        try:
            self._stop(order)
            self._orders.change(order, None)
        except HostError as error:
            self._pause(order)
            if error.detail != order.reason:
                logger.warning("%s cannot be stopped: %s", order.key, error.detail)
                self._orders.change(order, order.now(Phase.STOPPING, error.detail))
            raise
        logger.info("%s of runner %s is stopped", order.key, order.runner)

    def _work(self, first: Order) -> None:
        """Do what is to do for an order until there is nothing more, or somebody else is at it."""
        key = first.key
        try:
            # Whoever is told that the lock is taken leaves; so who held it looks once more after letting go.
            while not self._closing.is_set() and self._is_due(key):
                with locks.if_free(self.lock_of(first)) as mine:
                    if not mine:
                        return
                    self._step(key)
        except Exception as error:
            self._pause(first)
            logger.error("the work on %s pauses: %s", key, error, exc_info=not isinstance(error, HostError))

    def _is_due(self, key: str) -> bool:
        order = self._orders.read().get(key)
        return order is not None and order.phase in TO_DO and time.monotonic() >= self._not_before.get(key, 0.0)

    def _step(self, key: str) -> None:
        # Read under the lock: who held it before may have done it.
        order = self._orders.read().get(key)
        if order is None:
            return
        if order.phase is Phase.STARTING:
            self._bring_up(order)
        elif order.phase is Phase.STOPPING:
            # It has said why, and stays to be stopped.
            with contextlib.suppress(HostError):
                self.take_down(order)

    def _bring_up(self, order: Order) -> None:
        began = time.monotonic()
        logger.info("%s of runner %s is being started", order.key, order.runner)
        abandoned = self._abandoned(order)
        runner = self._runners.get(order.runner)
        try:
            if runner is None:
                raise StartFailed(f"The settings have no runner {order.runner} any more.")
            runner.start(order.wanted, abandoned)
            became = order.now(Phase.UP)
        except StartFailed as error:
            became = order.now(Phase.FAILED, error.reason, error.log[-LOG_LINES:])
        except HostError as error:
            became = order.now(Phase.FAILED, error.detail, self._log(order))
        except Exception as error:
            logger.exception("start of %s failed", order.key)
            became = order.now(Phase.FAILED, f"{type(error).__name__}: {error}", self._log(order))
        # An abandoned start says nothing: whoever takes the order up next asks the backend.
        if abandoned():
            return
        if became.phase is Phase.FAILED and self._awaits(order):
            return
        if self._orders.change(order, became):
            if became.phase is Phase.UP:
                logger.info("%s is up after %.1f s", order.key, time.monotonic() - began)
            else:
                logger.error("%s did not start: %s", order.key, became.reason)

    def _awaits(self, order: Order) -> bool:
        """Whether its start failed for something that is away and may come: a host that boots starts Docker late."""
        if time.time() - order.updated_at > AWAY_S:
            return False
        try:
            self._runners[order.runner].check(order.wanted)
        except Unavailable as error:
            self._pause(order)
            if error.detail != order.reason:
                logger.warning("%s waits: %s", order.key, error.detail)
                # Its time goes on from when it was first tried.
                self._orders.change(order, replace(order, reason=error.detail))
            return True
        except Exception as error:  # noqa: BLE001  the start has said already what is wrong
            logger.debug("the check of %s after its start: %s", order.key, error)
        return False

    def _stop(self, order: Order) -> None:
        runner = self._runners.get(order.runner)
        if runner is None:
            raise HostError(f"The settings have no runner {order.runner} any more, which alone can stop {order.key}.")
        try:
            runner.stop(order.wanted)
        except HostError:
            raise
        except Exception as error:
            logger.exception("stop of %s failed", order.key)
            raise HostError(f"{order.key} could not be stopped: {type(error).__name__}: {error}") from error

    def _abandoned(self, order: Order) -> Callable[[], bool]:
        def abandoned() -> bool:
            if self._closing.is_set():
                return True
            try:
                now = self._orders.read().get(order.key)
            except HostError:
                # A disk that cannot be read is no order to stop.
                return False
            return now is None or now.phase is not Phase.STARTING

        return abandoned

    def _watch(self) -> None:
        wait_s = 0.0
        while not self._closing.wait(wait_s):
            wait_s = LOOK_S
            try:
                self._look()
            except HostError as error:
                wait_s = PAUSE_S
                logger.error("the orders are not looked after: %s", error.detail)
            except Exception:
                wait_s = PAUSE_S
                logger.exception("a look at the orders failed")

    def _look(self) -> None:
        orders = self._orders.read()
        settled = []
        for order in orders.values():
            if order.phase not in TO_DO and order.boot_id != boot_id():
                # The host was restarted, which ended what ran and may have mended what failed.
                self._orders.change(order, order.now(Phase.STARTING))
            elif order.phase not in TO_DO:
                settled.append(order)
            elif self._is_due(order.key):
                with locks.if_free(self.lock_of(order)) as free:
                    pass
                if free:
                    self.begin(order)
        missed = {}
        for key, seen in sight.look(self._runners, settled).items():
            order = orders[key]
            if order.phase is Phase.FAILED:
                if seen.status is InstanceStatus.RUNNING and self._orders.change(order, order.now(Phase.UP)):
                    logger.warning("%s had failed and is there again", key)
            elif seen.status not in sight.ALIVE:
                # Twice in a row: a busy backend may miss one deadline.
                if self._missed.get(key) != order:
                    missed[key] = order
                elif self._orders.change(order, order.now(Phase.FAILED, seen.reason or sight.GONE, self._log(order))):
                    logger.error("%s is gone: %s", key, seen.reason or sight.GONE)
        self._missed = missed

    def _log(self, order: Order) -> tuple[str, ...]:
        try:
            return tuple(self._runners[order.runner].log(order.wanted, LOG_LINES))
        except Exception as error:  # noqa: BLE001  the reason matters more than the log
            logger.warning("the log of %s cannot be read: %s", order.key, error)
            return ()

    def _pause(self, order: Order) -> None:
        self._not_before[order.key] = time.monotonic() + PAUSE_S
