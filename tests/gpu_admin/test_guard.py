"""The arithmetic of a GPU's memory."""

import pytest

from gpu_admin import guard
from gpu_admin.contract import Conflict, InstanceStatus, Seen, Unavailable, Wanted
from gpu_admin.gpus import Gpu, GpuProcess
from gpu_admin.orders import Order, Phase

GIB = 1024


def _order(name: str, memory_gib: float | None, phase: Phase = Phase.UP, gpu_ids: tuple[int, ...] = (0,)) -> Order:
    return Order("triton", Wanted(name, gpu_ids), memory_gib, phase)


def _beside(
    name: str,
    memory_gib: float | None,
    *pids: int,
    phase: Phase = Phase.UP,
    status: InstanceStatus = InstanceStatus.RUNNING,
    gpu_ids: tuple[int, ...] = (0,),
) -> guard.Neighbour:
    return guard.Neighbour(_order(name, memory_gib, phase, gpu_ids), Seen(status, pids=frozenset(pids)))


def _gpu(used_gib: float, held: dict[int, float], number: int = 0) -> Gpu:
    processes = tuple(GpuProcess(pid, "server", int(gib * GIB)) for pid, gib in held.items())
    return Gpu(number, memory_total_mib=24 * GIB, memory_used_mib=int(used_gib * GIB), processes=processes)


def test_what_is_in_use_and_what_is_promised_leave_too_little() -> None:
    with pytest.raises(Conflict) as refused:
        guard.check(_order("FastFitAll", 20), [_gpu(9.5, {7: 1.5})], [_beside("MAM", 6, 7)])

    assert refused.value.detail == (
        "FastFitAll needs 20.0 GiB on GPU 0. Of its 24.0 GiB, 9.5 are in use and 4.5 more are promised to MAM, "
        'which has not taken them yet: 10.0 are left. Stop something first, or send "force": true.'
    )


def test_what_just_fits_is_let_through() -> None:
    guard.check(_order("FastFitAll", 10), [_gpu(9.5, {7: 1.5})], [_beside("MAM", 6, 7)])


def test_models_in_one_server_are_counted_together() -> None:
    together = [_beside("MAM", 6, 7, 8), _beside("FastFitAll", 4, 8, 9)]

    # One of them took more than it was to: the other one's part is taken, too.
    assert guard.promises(_gpu(12, {7: 1, 8: 8, 9: 1}), together) == {}
    assert guard.promises(_gpu(9, {8: 9}), together) == {"MAM and FastFitAll": GIB}


@pytest.mark.parametrize(
    ("phase", "status", "promised"),
    [
        # Nothing of it is there yet.
        (Phase.STARTING, InstanceStatus.STOPPED, {"MAM": 6 * GIB}),
        (Phase.UP, InstanceStatus.ERROR, {}),
        (Phase.FAILED, InstanceStatus.STOPPED, {}),
        # It came back by itself.
        (Phase.FAILED, InstanceStatus.RUNNING, {"MAM": 6 * GIB}),
        (Phase.STOPPING, InstanceStatus.STARTING, {}),
    ],
    ids=["starting", "gone", "failed", "there again", "stopping"],
)
def test_memory_is_promised_to_what_will_take_it(
    phase: Phase, status: InstanceStatus, promised: dict[str, float]
) -> None:
    assert guard.promises(_gpu(0, {}), [_beside("MAM", 6, phase=phase, status=status)]) == promised


def test_a_set_of_gpus_needs_its_memory_on_each_of_them() -> None:
    gpus = [_gpu(0, {}), _gpu(0, {}, 1), _gpu(0, {}, 2)]
    beside = [_beside("MAM", 6, gpu_ids=(1,)), _beside("FastFitAll", 20, gpu_ids=(2,))]

    with pytest.raises(Conflict, match="on GPU 1"):
        guard.check(_order("Qwen", 20, gpu_ids=(0, 1)), gpus, beside)


def test_a_lost_gpu_is_refused_and_one_that_hides_its_memory_is_not_checked() -> None:
    guard.check(_order("MAM", 6), [Gpu(0, name="Orin"), Gpu(1, error="GPU is lost")], [])

    with pytest.raises(Unavailable, match=r"GPU 1 cannot be read: GPU is lost\. "):
        guard.check(_order("MAM", 6, gpu_ids=(1,)), [Gpu(0, name="Orin"), Gpu(1, error="GPU is lost")], [])
