"""vLLM keeps the contract of runners. A file of its own, to run beside the others."""

from tests.gpu_admin.runner_contract import Contract
from tests.gpu_admin.vllm_case import make_case


class TestVLLM(Contract):
    make_case = staticmethod(make_case)
