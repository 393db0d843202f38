"""The memory of a Redis or Valkey server: how full it is, and that it throws nothing away when it is full."""

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import redis

from tasks.routing import Region
from tasks.settings import SettingsError
from tasks.store import open_store

logger = logging.getLogger(__name__)

#: What a server says that has no room left and evicts nothing.
OutOfMemory = redis.OutOfMemoryError
#: New jobs are entered up to here. The rest is for what workers write; without it nobody could begin or hand in a job,
#: and the server would stay full for ever.
FULL_SHARE = 0.9
KEEPS = "noeviction"
#: A server that is away is none of this module's business; whoever needs it finds out.
CHECK_TIMEOUT_S = 1.0


@dataclass(slots=True)
class Memory:
    """What a server says of its memory, in bytes."""

    used: int
    #: 0 if it has no limit, or does not say.
    most: int
    #: Its maxmemory-policy; None if it does not say.
    policy: str | None

    @property
    def full(self) -> bool:
        """Whether it should get no new jobs."""
        return 0 < self.most * FULL_SHARE <= self.used

    def grow(self, size: int) -> None:
        """So many bytes were written since it was asked."""
        self.used += size


def read(server: redis.Redis) -> Memory:
    """Ask a server. Raises redis.RedisError if it does not answer; one that may not be asked has no limit."""
    said: Mapping[str, Any] = {}
    try:
        said = server.info("memory")
    except redis.ResponseError as error:
        logger.debug("INFO memory is refused: %s", error)
    policy = said.get("maxmemory_policy")
    if policy is None:
        try:
            found = cast(dict[str, str], server.config_get("maxmemory*"))
        except redis.ResponseError as error:
            logger.debug("CONFIG GET is refused: %s", error)
        else:
            said = {"maxmemory": found.get("maxmemory", 0), **said}
            policy = found.get("maxmemory-policy")
    return Memory(int(said.get("used_memory", 0)), int(said.get("maxmemory", 0)), policy)


def is_server(url: str) -> bool:
    """Whether there is a Redis or Valkey behind a broker's or store's URL."""
    return url.startswith(("redis:", "rediss:", "unix:"))


def check(regions: Iterable[Region]) -> None:
    """Raises SettingsError if a broker or store of the regions evicts what it holds; one that is away is passed over.

    Evicted keys are jobs that nobody runs, leases of workers that are alive, outcomes that nobody sees.
    """
    servers: dict[str, str] = {}
    for region in regions:
        for kind, url in (("store", region.store), ("broker", region.broker)):
            if is_server(url):
                servers.setdefault(url, f"{kind} of {region.name}")
    if not servers:
        return
    with ThreadPoolExecutor(max_workers=min(len(servers), 32)) as pool:
        for complaint in pool.map(_complaint, servers.values(), servers):
            if complaint:
                raise SettingsError(complaint)


def _complaint(name: str, url: str) -> str | None:
    try:
        with open_store(url, timeout_s=CHECK_TIMEOUT_S) as server:
            memory = read(server)
    except (redis.RedisError, OSError, ValueError) as error:
        # Not the error itself: it may quote the URL, which may hold a password.
        logger.debug("the %s was not asked for its maxmemory-policy: %s", name, type(error).__name__)
        return None
    if memory.policy is None:
        logger.warning("the %s does not say its maxmemory-policy: make sure that it is %s", name, KEEPS)
    elif memory.policy != KEEPS and memory.most:
        return (
            f"The {name} evicts keys when its memory is full (maxmemory-policy {memory.policy}), which would lose "
            f"jobs. Set there: maxmemory-policy {KEEPS}"
        )
    return None
