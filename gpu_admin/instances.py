"""The models of one host: what ought to run is in the file of orders, what does run is asked of the runners.

Several server processes share the orders; none of them remembers anything that the others must know.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_admin import guard, locks, sight
from gpu_admin.contract import (
    BadRequest,
    Conflict,
    HostError,
    InstanceStatus,
    NotFound,
    NotSupported,
    Runner,
    Seen,
    SupportedModel,
    Unavailable,
    Wanted,
)
from gpu_admin.gpus import Gpu, Gpus
from gpu_admin.keeper import Keeper
from gpu_admin.orders import Order, Orders, Phase
from gpu_admin.settings import near

#: A refusal cuts longer names of models.
LONGEST_NAME = 100
#: For a start to let go of what is to be stopped; runners look once a second whether they are abandoned.
LET_GO_S = 30.0


@dataclass(frozen=True, slots=True)
class Instance:
    """A model on a GPU, or on a set of them together: what was ordered and what is there."""

    runner: str
    wanted: Wanted
    seen: Seen
    #: As the settings state it, for each of its GPUs.
    memory_gib: float | None
    #: Measured, over all of its GPUs; models that share a server show what the server holds.
    memory_mib: float | None
    #: Unix seconds: when it was ordered, and when its phase last changed.
    created_at: float
    since: float
    #: The last lines of its server when it failed.
    log: tuple[str, ...] = ()


class Instances:
    """Starts and stops the models of one host, and says how they are. Raises HostError for what cannot be done."""

    def __init__(self, runners: Mapping[str, Runner], gpus: Gpus, folder: Path) -> None:
        """folder: where the orders are kept. No model is supported by two runners."""
        self._runners = runners
        self._gpus = gpus
        self._folder = folder
        self._orders = Orders(folder)
        self._by_model = {model_name: runner for runner in runners.values() for model_name in runner.models}
        #: By process: threads do not survive the fork of a server's worker.
        self._keepers: dict[int, Keeper] = {}

    def supported(self) -> list[tuple[str, SupportedModel]]:
        """Every model that can be started, with the name of its runner."""
        return [(name, model) for name, runner in self._runners.items() for model in runner.models.values()]

    def start(self, model_name: str, gpu_id: int, config: Mapping[str, Any], force: bool = False) -> Instance:
        """Order a model and begin to bring it up, in the background; of what is there already: how it is.

        force: without looking at the GPU's memory. Raises BadRequest, Conflict (other config, no memory left) and what
        the runner's check raises; nothing is started then.
        """
        runner = self._by_model.get(model_name)
        if runner is None:
            raise BadRequest(f"model_name: {self._unknown(model_name)}")
        self._check_gpus((gpu_id,))
        read = runner.read_config(model_name, gpu_id, config)
        # As the file of orders will have it, so that the two can be compared.
        wanted = replace(read, config=json.loads(json.dumps(dict(read.config))))
        self._check_gpus(wanted.gpu_ids)
        memory_gib = runner.models[model_name].memory_gib
        while True:
            orders = self._orders.read()
            there = _on(orders.values(), model_name, wanted.gpu_ids)
            for order in there:
                instance = self._standing(order, wanted)
                if instance is not None:
                    return instance
            runner.check(wanted)
            # All of it measured before the lock is taken, since it may take a while; whatever is ordered meanwhile has
            # all of its memory promised.
            guarded = memory_gib is not None and not force
            seen = sight.look(self._runners, orders.values()) if guarded else {}
            gpus = self._read_gpus() if guarded else []
            with self._orders.changing() as orders:
                if _on(orders.values(), model_name, wanted.gpu_ids) != there:
                    # Somebody got ahead of us.
                    continue
                order = Order(runner.name, wanted, memory_gib)
                others = [
                    guard.Neighbour(other, seen.get(key, Seen(InstanceStatus.STOPPED)))
                    for key, other in orders.items()
                    if key != order.key
                ]
                guard.check(order, gpus, others)
                orders[order.key] = order
            self._keeper.begin(order)
            return _instance(order, Seen(InstanceStatus.STARTING), None)

    def stop(self, model_name: str, gpu_id: int) -> Instance:
        """Take a model down; returns once it is gone. A GPU inside a set stops the whole set.

        Raises NotFound if it was not ordered there, Unavailable if the backend does not answer: it is then stopped as
        soon as that is back.
        """
        with self._orders.changing() as orders:
            # A model is ordered once for a GPU.
            order = next(iter(_on(orders.values(), model_name, (gpu_id,))), None)
            if order is None:
                raise NotFound(
                    f"{model_name} does not run on GPU {gpu_id}."
                    if model_name in self._by_model
                    else self._unknown(model_name)
                )
            if order.phase is not Phase.STOPPING:
                # Whoever is starting it sees this and lets go.
                order = orders[order.key] = order.now(Phase.STOPPING)
        end = time.monotonic() + LET_GO_S
        while not self._took_down(order):
            if time.monotonic() > end:
                raise Unavailable(f"{order.key} is still being worked on. It is stopped as soon as that ends.")
            time.sleep(0.05)
        return replace(_instance(order, Seen(InstanceStatus.STOPPED), None), since=time.time())

    def all(self) -> list[Instance]:
        """Every instance that ought to run, oldest order first."""
        return self._look(self._orders.read().values())

    def of(self, model_name: str) -> list[Instance]:
        """The instances of a model. Raises NotFound if it is not supported."""
        orders = _on(self._orders.read().values(), model_name)
        if not orders and model_name not in self._by_model:
            raise NotFound(self._unknown(model_name))
        return self._look(orders)

    def log(self, model_name: str, tail: int, gpu_id: int | None = None) -> list[str]:
        """The last lines of a model's server, oldest first: on that GPU, or of its first instance.

        Of a model that does not run, those of its last run, if they are still there. Raises NotFound.
        """
        gpu_ids = None if gpu_id is None else (gpu_id,)
        orders = _on(self._orders.read().values(), model_name, gpu_ids)
        if not orders:
            if model_name not in self._by_model:
                raise NotFound(self._unknown(model_name))
            return list(self._by_model[model_name].log(Wanted(model_name, gpu_ids or (0,)), tail))
        order = orders[0]
        runner = self._runners.get(order.runner)
        lines = list(runner.log(order.wanted, tail)) if runner is not None else []
        return lines or list(order.log[-tail:])

    def pids(self) -> frozenset[int]:
        """The processes of every instance."""
        seen = sight.look(self._runners, self._orders.read().values())
        return frozenset[int]().union(*(one.pids for one in seen.values()))

    def watch(self) -> None:
        """Look after the orders from now on, once a second, on a thread of this process; again after a fork."""
        self._keeper.watch()

    def close(self) -> None:
        """End this process's threads. What runs goes on, and what was starting is taken up by the next process."""
        self._keeper.close()

    @property
    def _keeper(self) -> Keeper:
        # One step for the interpreter, so that two threads get the same one. A lock might be held by a thread that did
        # not survive a fork.
        pid = os.getpid()
        there = self._keepers.get(pid)
        return there or self._keepers.setdefault(pid, Keeper(self._runners, self._orders, self._folder))

    def _standing(self, order: Order, wanted: Wanted) -> Instance | None:
        """What is there already in place of a wanted one; None if it is in ERROR and may be tried again."""
        where = f"{wanted.model_name} on GPU {' and '.join(map(str, order.wanted.gpu_ids))}"
        if order.phase is Phase.STOPPING:
            raise Conflict(f"{where} is being stopped. Start it again once it is gone.")
        (instance,) = self._look([order])
        failed = instance.seen.status is InstanceStatus.ERROR
        if (failed and order.key == wanted.key) or order.wanted == wanted:
            return None if failed else instance
        config = json.dumps(order.wanted.config)
        raise Conflict(f"{where} is there already, with the config {config}. Stop it first to start it otherwise.")

    def _took_down(self, order: Order) -> bool:
        """Stop it, if nobody else is at it."""
        with locks.if_free(self._keeper.lock_of(order)) as mine:
            if mine:
                now = self._orders.read().get(order.key)
                # Somebody else may have stopped it meanwhile, and started it again.
                if now is not None and now.phase is Phase.STOPPING:
                    self._keeper.take_down(now)
            return mine

    def _look(self, orders: Iterable[Order]) -> list[Instance]:
        asked = list(orders)
        seen = sight.look(self._runners, asked)
        gpus: dict[int, Gpu] = {}
        if any(one.pids for one in seen.values()):
            # How the models are matters more than what they hold.
            with contextlib.suppress(HostError):
                gpus = {gpu.id: gpu for gpu in self._read_gpus()}
        return [
            _instance(order, sight.shown(order, seen[order.key]), _held_mib(order, seen[order.key], gpus))
            for order in asked
        ]

    def _read_gpus(self) -> list[Gpu]:
        try:
            return self._gpus.read()
        except NotSupported:
            return []

    def _check_gpus(self, gpu_ids: Iterable[int]) -> None:
        count = self._gpus.count()
        for gpu_id in gpu_ids:
            if gpu_id < 0:
                raise BadRequest(f"gpu_id: {gpu_id} is less than 0.")
            if count is not None and gpu_id >= count:
                has = f"GPUs 0 to {count - 1}" if count > 1 else "GPU 0 alone" if count else "no GPU"
                raise BadRequest(f"gpu_id: {gpu_id} is not there; this host has {has}.")

    def _unknown(self, model_name: str) -> str:
        name = model_name[:LONGEST_NAME]
        return f"This host has no model {name!r}.{near(name, self._by_model)}"


def _on(orders: Iterable[Order], model_name: str, gpu_ids: tuple[int, ...] | None = None) -> list[Order]:
    """The orders of a model, or those that have one of these GPUs, oldest first."""
    return [
        order
        for order in orders
        if order.wanted.model_name == model_name and (gpu_ids is None or set(gpu_ids) & set(order.wanted.gpu_ids))
    ]


def _instance(order: Order, seen: Seen, memory_mib: float | None) -> Instance:
    return Instance(
        runner=order.runner,
        wanted=order.wanted,
        seen=seen,
        memory_gib=order.memory_gib,
        memory_mib=memory_mib,
        created_at=order.created_at,
        since=order.updated_at,
        log=order.log,
    )


def _held_mib(order: Order, seen: Seen, gpus: Mapping[int, Gpu]) -> float | None:
    held = [guard.held_mib(gpus[gpu_id], seen.pids) for gpu_id in order.wanted.gpu_ids if gpu_id in gpus]
    if not seen.pids or len(held) < len(order.wanted.gpu_ids) or None in held:
        return None
    return sum(mib for mib in held if mib is not None)
