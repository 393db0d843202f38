"""The chaos harness fails if any one guard of the product is taken out."""

from dataclasses import replace

import pytest

from tests.chaos import guards, harness
from tests.chaos.harness import Plan


@pytest.mark.parametrize(
    ("guard", "kind", "seen", "workers"),
    [
        ("compare-and-set", "race", "double_terminal", 1),
        ("reconciler", "api-commit", "stuck", 1),
        ("attempt", "api-publish", "extra_runs", 1),
        # The one that is left would take over what the killed one held.
        ("lease", "worker-kill", "stuck", 2),
    ],
)
def test_the_harness_fails_without(guard, kind, seen, workers):
    plan = Plan(jobs=5, faults=1, seed=3, kinds=(kind,), without=guard, workers=workers, settle_s=8)

    # One fault finds it as a rule, and not always: a busy machine may be too late for it.
    reports = (harness.run(replace(plan, seed=seed)) for seed in range(3, 6))
    found = next((report for report in reports if not report.verdict.holds), None)

    assert found is not None
    assert found.verdict.broken[seen]


@pytest.mark.parametrize("guard", sorted(guards.GUARDS))
def test_every_guard_can_be_taken_out_of_the_product_as_it_is(guard):
    for file in {file for file, _, _ in guards.GUARDS[guard]}:
        source = (guards.ROOT / file).read_text()

        assert guards.without(guard, file, source) != source


def test_a_guard_whose_lines_have_changed_is_not_taken_for_taken_out():
    with pytest.raises(LookupError, match=r"app/control\.py"):
        guards.without("reconciler", "app/control.py", "pass\n")
