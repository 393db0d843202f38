"""The chaos harness in small: nothing breaks under a handful of faults, and what is broken on purpose is seen.

Larger runs are `make chaos`; docs/chaos.md.
"""

import pytest

from tests.chaos import harness
from tests.chaos.harness import Plan
from tests.chaos.parts import Gone, Run
from tests.chaos.scene import Strike

#: Those that need no patience: the others are in the large runs, and each by itself in the tests beside this one.
QUICK = ("worker-kill", "api-commit", "control-kill", "store-kill", "store-flush", "sql-lock", "wire-cut", "race")


def test_no_invariant_breaks_under_faults_of_every_part(tmp_path):
    plan = Plan(jobs=60, faults=8, seed=1, kinds=QUICK, workers=2, every_s=1.2)

    report = harness.run(plan, keep=tmp_path / "evidence")

    assert report.verdict.holds, report.table()
    assert {kind: made for kind, (made, _, _) in report.recovered.items()} == dict.fromkeys(QUICK, 1)
    assert report.accepted >= plan.jobs


@pytest.mark.parametrize(
    ("gone", "strikes", "extra"),
    [
        ([], [], 1),
        ([Gone("worker0", 7, 2.0, -9)], [], 0),
        # It ended as it was told to: what it held had time to end.
        ([Gone("worker0", 7, 2.0, 0)], [], 1),
        ([Gone("worker1", 8, 2.0, -9)], [], 1),
        # It gave its jobs back before it left, since one of them hung in its engine.
        ([Gone("worker0", 7, 8.5, 70)], [], 0),
        ([Gone("worker0", 7, 8.5, -9)], [], 1),
        ([], [Strike("store-flush", 2.0, 2.1, spoils_runs=True)], 0),
        ([], [Strike("sql-lock", 2.0, 2.1)], 1),
    ],
    ids=[
        "nothing",
        "killed",
        "told to go",
        "another one killed",
        "left",
        "killed later",
        "store emptied",
        "database locked",
    ],
)
def test_a_second_run_of_a_job_needs_a_fault_that_explains_it(gone, strikes, extra):
    runs = [Run("job", 7, 1.0, None), Run("job", 8, 5.0, 6.0)]

    verdict = harness.check(harness.Evidence([], {}, [], runs, strikes, gone))

    assert len(verdict.broken["extra_runs"]) == extra
    assert verdict.repeated_runs == 1
