"""How much memory a model needs, how much the device has, and so where the weights go."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate.utils import compute_module_sizes
from transformers import AutoModelForCausalLM

from engines.contract import GIB, Device, EngineLoadError

#: Room for keys and values that a model must find beside its weights to be worth loading: 16 rows of 256 tokens.
LEAST_TOKENS = 4096

#: Share of the memory left after the weights that keys and values may take. On a GPU the rest is for activations and
#: what CUDA's libraries allocate for themselves; on a CPU it is for everyone else on the host.
CACHE_SHARE = {"cuda": 0.85, "cpu": 0.5}


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes."""

    weights_bytes: int
    #: Beside the weights, at least: keys and values, activations.
    working_bytes: int
    #: What for, for people: "a cache of 4096 tokens".
    working: str

    @property
    def bytes(self) -> int:
        """Both, and a tenth for what nobody counts."""
        return int((self.weights_bytes + self.working_bytes) * 1.1)


def need_of(config: Any, dtype: torch.dtype, auto: Any = AutoModelForCausalLM) -> Need:
    """What a model of that configuration takes, without loading it: built on torch's meta device, in 0.1 s for 70B.

    auto: the transformers class that makes it from a configuration.
    """
    with torch.device("meta"):
        network = auto.from_config(config, dtype=dtype)
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    values = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width
    weights = int(compute_module_sizes(network)[""])
    return Need(weights, values * dtype.itemsize * LEAST_TOKENS, f"a cache of {LEAST_TOKENS} tokens")


def free_bytes(device: Device, index: int = 0, loaded: int = 0) -> int:
    """Memory that may still be used on a device, its cap considered.

    index: which of the visible GPUs. loaded: what this process took already, on a CPU, where torch does not count it.
    """
    if device.name == "cpu":
        free, mine = psutil.virtual_memory().available, loaded
    else:
        free, mine = torch.cuda.mem_get_info(index)[0], torch.cuda.memory_allocated(index)
    if device.max_memory_gib is None:
        return int(free)
    return int(min(free, device.max_memory_gib * GIB - mine))


def placement(name: str, need: Need, device: Device) -> dict[str, Any]:
    """Arguments of from_pretrained that put the weights where they fit: one device, all GPUs, or host memory too.

    Raises EngineLoadError with the arithmetic if there is no such place.
    """
    if device.name == "cpu":
        if need.bytes <= free_bytes(device):
            return {}
        raise EngineLoadError(does_not_fit(name, need, device, {"cpu": free_bytes(device)}))
    gpus = {index: free_bytes(device, index) for index in range(torch.cuda.device_count())}
    if need.bytes <= gpus[0]:
        return {"device_map": {"": device.name}}
    if need.bytes <= sum(gpus.values()):
        return {"device_map": "auto", "max_memory": gpus}
    if device.offload:
        # What it works in must stay free on the GPU: accelerate fills it to the brim otherwise.
        working = need.bytes - need.weights_bytes
        return {
            "device_map": "auto",
            "max_memory": {**{index: max(0, free - working) for index, free in gpus.items()}, "cpu": _host_bytes()},
        }
    raise EngineLoadError(does_not_fit(name, need, device, gpus))


def _host_bytes() -> int:
    return int(psutil.virtual_memory().available * 0.9)


def does_not_fit(name: str, need: Need, device: Device, free: Mapping[Any, int], *, spreads: bool = True) -> str:
    """The arithmetic of a model that does not fit, and what would help.

    free: bytes, by place. spreads: the engine can use several GPUs.
    """
    rooms = ", ".join(f"{size / GIB:.2f} GiB on {where}" for where, size in free.items())
    cap = f", capped by max_memory_gib={device.max_memory_gib:g}" if device.max_memory_gib is not None else ""
    ways = ["choose a smaller model"]
    if device.max_memory_gib is not None:
        ways.append("raise max_memory_gib")
    if device.name != "cpu":
        if spreads:
            ways.append("let the worker see more GPUs")
        if not device.offload:
            ways.append("enable offloading to host memory (slow)")
    return (
        f"{name} does not fit: weights {need.weights_bytes / GIB:.2f} GiB + {need.working} "
        f"{need.working_bytes / GIB:.2f} GiB + 10 % = {need.bytes / GIB:.2f} GiB; "
        f"free: {rooms}{cap}. To go on: {' or '.join(ways)}."
    )
