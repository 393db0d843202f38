"""Every operation of both documents, with input that keeps to its document and input that does not."""

import pytest

from tests.fuzz.cases import run
from tests.fuzz.conftest import SEED

#: Random cases of each operation. `make fuzz` tries far more of them.
EXAMPLES = 2
#: The same views as those of gpu_admin, which has a run of its own here; `make fuzz` tries them in both places.
MOUNTED = "^/api/v1/hosts/"


# Some 4,000 requests: a minute of one core, and more where others use it too.
@pytest.mark.timeout(400)
def test_no_input_makes_an_answer_that_the_document_does_not_state(service):
    report = run(service, seed=SEED, examples=EXAMPLES, without=MOUNTED)

    assert not report.faults, "\n".join(f"{fault}\n    {command}" for fault, command in report.faults.items())
    assert report.cases > 250
    # Both kinds were among them.
    assert min(sum(count for status, count in report.statuses.items() if status // 100 == kind) for kind in (2, 4)) > 30
