"""What ought to run on this host: one small file that all server processes share.

The file is read without a lock, since it is only ever replaced whole, and changed under one.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from gpu_admin import locks, proc, whole_file
from gpu_admin.contract import HostError, Wanted

logger = logging.getLogger(__name__)

#: Inode, time in nanoseconds, and size of a file.
Mark = tuple[int, int, int]
#: A file that changed less long ago may change once more and look the same.
NEW_S = 0.1
#: For whoever writes the file by hand to get to its end.
HAND_S = 0.2


class Phase(StrEnum):
    """How far an order has come."""

    #: Its backend is to be brought up; whoever holds its lock is at it.
    STARTING = "starting"
    #: It served when it was last brought up.
    UP = "up"
    #: It did not come up, or it was up and is gone.
    FAILED = "failed"
    #: It is to be taken down; whoever holds its lock is at it.
    STOPPING = "stopping"


@functools.cache
def boot_id() -> str:
    """What tells this run of the host's system from the one before its last start; nothing where it does not say."""
    try:
        return proc.boot_id()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Order:
    """A model that ought to run, and how far that has come."""

    runner: str
    wanted: Wanted
    #: As the settings state it for each of its GPUs.
    memory_gib: float | None = None
    phase: Phase = Phase.STARTING
    #: Why it failed, or why it cannot be started or stopped yet.
    reason: str | None = None
    #: The last lines of its server when it failed.
    log: tuple[str, ...] = ()
    #: Unix seconds: when it was ordered, and when its phase last changed.
    created_at: float = field(default_factory=time.time)
    updated_at: float = field(default_factory=time.time)
    #: The run of the host's system in which its phase last changed.
    boot_id: str = field(default_factory=boot_id)

    def now(self, phase: Phase, reason: str | None = None, log: tuple[str, ...] = ()) -> "Order":
        """The same order in another phase, from now on."""
        return replace(self, phase=phase, reason=reason, log=log, updated_at=time.time(), boot_id=boot_id())

    @property
    def key(self) -> str:
        """Its name among the orders: a model is ordered once for a GPU."""
        return self.wanted.key


class Orders:
    """The file of orders."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "wanted.json"
        self._lock = folder / "locks" / "wanted.lock"
        #: What the file held last, and by what it is known again.
        self._known: tuple[Mark | None, dict[str, Order]] | None = None

    def read(self) -> dict[str, Order]:
        """Every order by its key, oldest first. Costs one stat while the file stays as it is. Raises HostError."""
        try:
            return dict(self._load())
        except _Broken:
            with self.changing() as orders:
                return orders

    @contextlib.contextmanager
    def changing(self) -> Iterator[dict[str, Order]]:
        """Every order by its key, to be changed in place; written when the block ends, unless it raises.

        Only one thread of one process on this host is inside at a time. Raises HostError if the file cannot be read or
        written; it is then as it was.
        """
        try:
            with locks.held(self._lock):
                orders = self._load_or_mend()
                before = dict(orders)
                yield orders
                if orders != before:
                    self._write(orders)
        except OSError as error:
            raise HostError(f"The list of what ought to run cannot be changed: {error}.") from error

    def change(self, seen: Order, changed: Order | None) -> bool:
        """Replace an order, or remove it, if it still is as the caller saw it; whether it was."""
        with self.changing() as orders:
            if orders.get(seen.key) != seen:
                return False
            if changed is None:
                del orders[seen.key]
            else:
                orders[seen.key] = changed
        return True

    def _load(self) -> dict[str, Order]:
        known = self._known
        try:
            if known is not None and known[0] is not None and known[0] == _mark(self._path.stat()):
                return known[1]
            with self._path.open(encoding="utf-8") as file:
                mark = _mark(os.fstat(file.fileno()))
                orders = [_from_json(said) for said in json.load(file)["instances"]]
        except FileNotFoundError:
            self._known = None
            return {}
        except OSError as error:
            raise HostError(f"The list of what ought to run cannot be read: {error}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise _Broken(f"cannot be understood ({type(error).__name__}: {error})") from error
        loaded = {order.key: order for order in orders}
        self._known = (mark, loaded)
        return loaded

    def _load_or_mend(self) -> dict[str, Order]:
        """The orders; of a file that cannot be understood, what this process last read from it."""
        try:
            return dict(self._load())
        except _Broken:
            # Somebody may be writing it by hand.
            time.sleep(HAND_S)
        try:
            return dict(self._load())
        except _Broken as error:
            # It stays for whoever wants to look. Without a memory of it the service goes on with an empty list: what
            # runs then goes on running, and a start of the same model adopts it.
            known = dict(self._known[1]) if self._known is not None else {}
            aside = self._path.with_name("wanted.broken.json")
            shutil.copyfile(self._path, aside)
            self._write(known)
            logger.error("%s: %s. It is in %s now; %d orders are kept", self._path, error, aside, len(known))
            return known

    def _write(self, orders: Mapping[str, Order]) -> None:
        said = {"instances": [_to_json(order) for order in orders.values()]}
        whole_file.write(self._path, json.dumps(said, indent=1) + "\n")


def _mark(stat: os.stat_result) -> Mark | None:
    """What tells a file from the one that replaces it; None while it is too new for that.

    Inodes are used again at once, and file times go on in steps of some milliseconds.
    """
    if time.time() - stat.st_mtime < NEW_S:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


class _Broken(Exception):
    """The file cannot be understood."""


def _to_json(order: Order) -> dict[str, Any]:
    return {
        "runner": order.runner,
        "model_name": order.wanted.model_name,
        "gpu_ids": order.wanted.gpu_ids,
        "config": dict(order.wanted.config),
        "memory_gib": order.memory_gib,
        "phase": order.phase,
        "reason": order.reason,
        "log": order.log,
        "created_at": order.created_at,
        "updated_at": order.updated_at,
        "boot_id": order.boot_id,
    }


def _from_json(said: Any) -> Order:
    gpu_ids = tuple(int(gpu_id) for gpu_id in said["gpu_ids"])
    if not gpu_ids:
        raise ValueError("an order without a GPU")
    return Order(
        runner=str(said["runner"]),
        wanted=Wanted(str(said["model_name"]), gpu_ids, dict(said["config"])),
        memory_gib=None if said["memory_gib"] is None else float(said["memory_gib"]),
        phase=Phase(said["phase"]),
        reason=None if said["reason"] is None else str(said["reason"]),
        log=tuple(str(line) for line in said["log"]),
        created_at=float(said["created_at"]),
        updated_at=float(said["updated_at"]),
        boot_id=str(said["boot_id"]),
    )
