"""A server that throws away what it holds is refused; a full one is known as such."""

import dataclasses
import logging

import pytest

from tasks import memory
from tasks.settings import SettingsError, load_regions
from tests.tasks.test_boot import start

POLICY = "allkeys-lru"


@pytest.fixture
def evicting(valkey):
    """The server, with a limit and a policy that evicts, until the test ends."""
    client = valkey.client()
    client.config_set("maxmemory", 100 * 1024**2, "maxmemory-policy", POLICY)
    yield valkey
    client.config_set("maxmemory", 0, "maxmemory-policy", memory.KEEPS)


@pytest.fixture
def user(valkey):
    """Makes a user that may not run some commands; the URL with its name."""
    client = valkey.client()

    def make(*forbidden: str) -> str:
        client.acl_setuser(
            "limited", enabled=True, passwords=["+secret"], commands=["+@all", *(f"-{word}" for word in forbidden)]
        )
        return f"redis://limited:secret@127.0.0.1:{valkey.port}/1"

    yield make
    client.acl_deluser("limited")


def regions(url):
    return load_regions({"GPU_STORE_URL": url, "GPU_BROKER_URL": "amqp://127.0.0.1:1//"}).values()


@pytest.mark.parametrize("forbidden", [(), ("config",), ("info",)])
def test_a_server_that_evicts_is_refused_with_the_setting_to_change(evicting, user, forbidden):
    with pytest.raises(SettingsError) as refused:
        memory.check(regions(user(*forbidden)))

    assert str(refused.value).endswith(f"maxmemory-policy {memory.KEEPS}")
    assert str(refused.value).startswith("The store of asia-east evicts keys")
    assert "secret" not in str(refused.value)


def test_a_server_that_says_nothing_of_its_policy_is_warned_of(evicting, user, caplog):
    with caplog.at_level(logging.WARNING, "tasks.memory"):
        memory.check(regions(user("config", "info")))

    assert [record.getMessage() for record in caplog.records] == [
        "the store of asia-east does not say its maxmemory-policy: make sure that it is noeviction"
    ]


def test_a_server_without_a_limit_or_that_is_away_is_let_pass(valkey, caplog):
    valkey.client().config_set("maxmemory-policy", POLICY)
    try:
        memory.check(regions(f"{valkey.url}/1"))
    finally:
        valkey.client().config_set("maxmemory-policy", memory.KEEPS)
    memory.check(regions("redis://127.0.0.1:1/1"))

    assert caplog.records == []


def test_a_worker_does_not_start_on_a_server_that_evicts(evicting):
    code, output = start(evicting, "asia-east.llm")

    assert code == 78
    assert f"maxmemory-policy {memory.KEEPS}" in output


def test_a_server_is_full_before_its_last_byte_so_that_workers_can_go_on(valkey):
    limited = dataclasses.replace(memory.read(valkey.client()), most=100)

    assert [dataclasses.replace(limited, used=used).full for used in (0, 89, 90, 100)] == [False, False, True, True]
    assert not memory.read(valkey.client()).full
