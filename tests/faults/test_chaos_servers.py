"""The chaos harness in small on the servers of others: Redis or RabbitMQ as the broker, PostgreSQL as the database."""

import pytest

from tests.chaos import harness
from tests.chaos.harness import Plan

#: By backend, those that its servers answer for.
KINDS = {
    "postgres": ("worker-kill", "api-publish", "store-kill", "sql-away", "store-flush"),
    "rabbitmq": ("worker-kill", "api-commit", "broker-freeze", "sql-lock", "store-flush"),
}


@pytest.mark.parametrize("backend", KINDS)
def test_no_invariant_breaks_on_other_servers(tmp_path, backend):
    plan = Plan(backend=backend, jobs=40, faults=5, seed=1, kinds=KINDS[backend], workers=2, every_s=1.2)

    report = harness.run(plan, keep=tmp_path / "evidence")

    assert report.verdict.holds, report.table()
    assert {kind: made for kind, (made, _, _) in report.recovered.items()} == dict.fromkeys(KINDS[backend], 1)
    assert report.accepted >= plan.jobs
