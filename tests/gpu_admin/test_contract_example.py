"""The example of docs/runners.md keeps the contract of runners. A file of its own, to run beside the others."""

from tests.gpu_admin.example_case import make_case
from tests.gpu_admin.runner_contract import Contract


class TestExample(Contract):
    make_case = staticmethod(make_case)
