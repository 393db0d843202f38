"""Whatever happens in whatever order, no accepted job is lost, doubled, stuck or taken back."""

from tests.fuzz import machine

#: `make fuzz` makes 500 runs of 50 steps.
RUNS, STEPS = 100, 50


def test_a_job_has_one_outcome_whatever_happens_in_whatever_order(valkey, database_url, tmp_path):
    with machine.platform(valkey.url, database_url, str(tmp_path / "blobs")) as dispatch:
        assert machine.run(dispatch, runs=RUNS, steps=STEPS) > RUNS
