"""Whatever happens in whatever order, no accepted job is lost, doubled, stuck or taken back."""

import pytest

from tests.fuzz import machine

#: Of each of five; `make fuzz` makes 500 others.
RUNS, STEPS = 100, 50


@pytest.mark.parametrize("number", range(5))
def test_a_job_has_one_outcome_whatever_happens_in_whatever_order(valkey, database_url, tmp_path, number):
    with machine.platform(valkey.url, database_url, str(tmp_path / "blobs")) as dispatch:
        assert machine.run(dispatch, runs=RUNS, steps=STEPS, number=number) > RUNS
