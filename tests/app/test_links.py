"""What the API remembers of a store for a moment, and who waits while it is read anew."""

import threading

import pytest

from app import links
from app.links import Breaker, Down, Recent


class Slow:
    """A store that answers when a test says so."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.answers = threading.Event()
        self.reads = 0

    def read(self) -> int:
        self.reads += 1
        self.asked.set()
        if not self.answers.wait(10):
            raise OSError("no answer")
        return self.reads


@pytest.fixture
def slow():
    store = Slow()
    yield store
    store.answers.set()


def test_while_one_caller_reads_the_others_go_on_with_the_last_value(slow, monkeypatch):
    monkeypatch.setattr(links, "FRESH_S", 0.0)
    monkeypatch.setattr(links, "STALE_S", 60.0)
    recent = Recent(slow.read, Breaker("store", OSError))
    slow.answers.set()
    assert recent.get() == 1
    slow.answers.clear()
    reader = threading.Thread(target=recent.get)
    slow.asked.clear()
    reader.start()
    assert slow.asked.wait(5)

    assert [recent.get(), recent.get()] == [1, 1]
    slow.answers.set()
    reader.join()
    assert (slow.reads, recent.get()) == (2, 3)


def test_while_one_caller_tries_a_dead_store_the_others_are_told_at_once(slow, monkeypatch):
    monkeypatch.setattr(links, "REST_S", 0.0)
    breaker = Breaker("store", OSError)
    recent = Recent(slow.read, breaker)
    with pytest.raises(Down), breaker:
        raise OSError("dead")
    reader = threading.Thread(target=recent.get)
    reader.start()
    assert slow.asked.wait(5)

    with pytest.raises(Down, match="The store does not answer"):
        recent.get()
    slow.answers.set()
    reader.join()
    assert (slow.reads, breaker.tripped, recent.get()) == (1, False, 1)
