"""What orders look like at this moment: every runner is asked, none is waited for."""

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import assert_never

from gpu_admin.contract import InstanceStatus, Runner, Seen
from gpu_admin.orders import Order, Phase

logger = logging.getLogger(__name__)

#: Runners answer within two seconds each; one that hangs must not take the others with it.
ANSWER_S = 5.0
THREADS = 32
#: The states of a backend that is there.
ALIVE = (InstanceStatus.STARTING, InstanceStatus.RUNNING)


def look(runners: Mapping[str, Runner], orders: Iterable[Order]) -> dict[str, Seen]:
    """What the runners see of those orders now, by key. Takes ANSWER_S at most, and raises nothing."""
    asked = list(orders)
    if not asked:
        return {}
    pool = ThreadPoolExecutor(min(THREADS, len(asked)), "runner-status")
    try:
        answers = {order.key: pool.submit(_ask, runners, order) for order in asked}
        done = wait(answers.values(), ANSWER_S).done
        late = Seen(InstanceStatus.ERROR, f"Its runner did not say within {ANSWER_S:.0f} s how it is.")
        return {key: answer.result() if answer in done else late for key, answer in answers.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def shown(order: Order, seen: Seen) -> Seen:
    """What a caller is told of an order, from its phase and what its runner sees of it."""
    match order.phase:
        case Phase.STARTING:
            if seen.status is InstanceStatus.RUNNING:
                return seen
            return replace(seen, status=InstanceStatus.STARTING, reason=order.reason or seen.reason)
        case Phase.UP:
            if seen.status in ALIVE:
                return seen
            return replace(seen, status=InstanceStatus.ERROR, reason=seen.reason or GONE)
        case Phase.FAILED:
            if seen.status is InstanceStatus.RUNNING:
                return seen
            return replace(seen, status=InstanceStatus.ERROR, reason=order.reason)
        case Phase.STOPPING:
            return replace(seen, reason=order.reason or "It is being stopped.")
        case _:
            assert_never(order.phase)


#: The reason of what served and is not there any more, where its runner knows no better one.
GONE = "It served and is gone; nobody stopped it here. Its log has its last lines."


def _ask(runners: Mapping[str, Runner], order: Order) -> Seen:
    runner = runners.get(order.runner)
    if runner is None:
        return Seen(InstanceStatus.ERROR, f"The settings have no runner {order.runner} any more.")
    try:
        return runner.status(order.wanted)
    except Exception as error:
        # A runner of somebody else's must not hide the other instances.
        logger.exception("runner %s failed to look at %s", order.runner, order.key)
        return Seen(InstanceStatus.ERROR, f"{type(error).__name__}: {error}")
