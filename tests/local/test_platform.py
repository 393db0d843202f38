"""When the parts of the local platform count as ready."""

from dataclasses import replace

from engines.catalogue import JobType
from local.platform import models_loaded
from tasks.fleet import Card, WorkerState


def test_a_worker_counts_once_it_has_loaded_and_one_of_an_earlier_run_never() -> None:
    loading = Card("w-1", "w", "asia-east", "host", "cpu", {JobType.LLM: "m"}, {}, 100.0, WorkerState.LOADING)
    ready = replace(loading, worker_id="w-2", state=WorkerState.READY)
    earlier = replace(ready, started_at=99.0)

    assert models_loaded([loading, earlier], since=100.0) == []
    assert models_loaded([loading, ready], since=100.0) == ["m"]
