"""Whether a model's stated memory still fits on a GPU, beside what is in use there and what is promised to others."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpu_admin.contract import Conflict, InstanceStatus, Seen, Unavailable
from gpu_admin.gpus import Gpu
from gpu_admin.orders import Order, Phase

MIB_PER_GIB = 1024


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An order and what is seen of it."""

    order: Order
    seen: Seen


def check(order: Order, gpus: Iterable[Gpu], neighbours: Sequence[Neighbour]) -> None:
    """Refuse what cannot fit on one of its GPUs; one whose memory nobody knows is not checked.

    neighbours: every other order. Raises Conflict with the arithmetic, Unavailable for a lost GPU.
    """
    for gpu in gpus:
        if order.memory_gib is None or gpu.id not in order.wanted.gpu_ids:
            continue
        total_mib, used_mib = gpu.memory_total_mib, gpu.memory_used_mib
        if gpu.error is not None and total_mib is None:
            why = gpu.error.rstrip(".")
            raise Unavailable(f'GPU {gpu.id} cannot be read: {why}. Send "force": true to start there nevertheless.')
        if total_mib is None or used_mib is None:
            continue
        promised = promises(gpu, neighbours)
        left_mib = total_mib - used_mib - sum(promised.values())
        if order.memory_gib * MIB_PER_GIB > left_mib:
            taken = [f"{_gib(used_mib)} are in use"]
            for names, mib in promised.items():
                have = "have" if " and " in names else "has"
                taken.append(f"{_gib(mib)} more are promised to {names}, which {have} not taken them yet")
            # Once somebody forced a start, less than nothing may be left.
            raise Conflict(
                f"{order.wanted.model_name} needs {order.memory_gib:.1f} GiB on GPU {gpu.id}. "
                f"Of its {_gib(total_mib)} GiB, {_listed(taken)}: {_gib(max(left_mib, 0.0))} are left. "
                'Stop something first, or send "force": true.'
            )


def promises(gpu: Gpu, neighbours: Iterable[Neighbour]) -> dict[str, float]:
    """The MiB on that GPU which were promised to models and are not taken yet, by the models that share a server."""
    promised = {}
    for group in _by_server(one for one in neighbours if _will_take(one) and gpu.id in one.order.wanted.gpu_ids):
        stated_mib = sum(one.order.memory_gib or 0.0 for one in group) * MIB_PER_GIB
        pids = frozenset[int]().union(*(one.seen.pids for one in group))
        rest_mib = stated_mib - (held_mib(gpu, pids) or 0.0)
        if rest_mib > 0:
            promised[" and ".join(one.order.wanted.model_name for one in group)] = rest_mib
    return promised


def held_mib(gpu: Gpu, pids: frozenset[int]) -> float | None:
    """The MiB that those processes hold on a GPU; None where the card does not say."""
    held = [process.memory_mib for process in gpu.processes if process.pid in pids]
    if None in held or (gpu.error is not None and not gpu.processes):
        return None
    return float(sum(mib or 0 for mib in held))


def _will_take(one: Neighbour) -> bool:
    return one.order.phase is Phase.STARTING or one.seen.status is InstanceStatus.RUNNING


def _by_server(neighbours: Iterable[Neighbour]) -> list[list[Neighbour]]:
    """Those that share a process together: their memory cannot be told apart."""
    groups: list[list[Neighbour]] = []
    for one in neighbours:
        same = [group for group in groups if any(one.seen.pids & other.seen.pids for other in group)]
        groups = [group for group in groups if group not in same]
        groups.append([*(other for group in same for other in group), one])
    return groups


def _gib(mib: float) -> str:
    return f"{mib / MIB_PER_GIB:.1f}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
