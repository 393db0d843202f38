"""From a name to a loaded engine: which model is meant, where its weights are, on which device and in which dtype.

For workers only. torch is imported when a device is looked at, not when this module is.
"""

import dataclasses
import importlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from engines import catalogue, packaged
from engines.catalogue import MAIN, JobType, Model, UnknownModel
from engines.contract import DTYPES, GIB, Device, Engine, EngineLoadError


def resolve(job_type: JobType, name_or_path: str, trusted: Collection[str] = ()) -> Model:
    """The catalogue's row of that id or alias, or a row made up for a local folder or a server's URL.

    An id may have a commit behind it (id@commit), or id@main for whatever is newest: then that is read, and not what
    the row says. trusted: models, as id@commit, whose own code the operator lets run. Raises UnknownModel with the
    nearest names.
    """
    if "://" in name_or_path:
        return _served_at(job_type, name_or_path)
    if job_type in catalogue.SERVERS:
        try:
            return catalogue.find(job_type, name_or_path)
        except UnknownModel as error:
            raise UnknownModel(f"{error} It is no URL of a server either.") from None
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        return Model(folder.name, job_type, f"engines.{job_type}.engine:Engine", folder=str(folder))
    name, said = catalogue.split(name_or_path)
    try:
        row = catalogue.find(job_type, name)
    except UnknownModel as error:
        raise UnknownModel(f"{error} It is no local folder either.") from None
    return _at(row, said, dict(entry.rsplit("@", 1) for entry in trusted))


def _at(row: Model, said: str | None, trusted: Mapping[str, str]) -> Model:
    """The row at the commit that its operator says, and whether its code may run; as it is where he says none.

    Raises UnknownModel if another commit of it is trusted.
    """
    read = trusted.get(row.id)
    if read and said not in (None, read):
        raise UnknownModel(f"{row.id} is to be read at {said}, but GPU_TRUST_REMOTE_CODE lists it at {read}.")
    commit = said or read
    if commit is None:
        return row
    # Nobody knows of which commit a package's weights are.
    return dataclasses.replace(
        row, revision=None if commit == MAIN else commit, trusted=read is not None, packaged=None
    )


def hub_options(model: Model) -> dict[str, Any]:
    """What every from_pretrained() and download() of a model is told: which commit, and whether its code may run."""
    return {"trust_remote_code": model.trusted, **({"revision": model.revision} if model.revision else {})}


def _served_at(job_type: JobType, url: str) -> Model:
    """The type's row with the server of that URL. Raises UnknownModel."""
    schemes = catalogue.SERVERS.get(job_type)
    # The message does not repeat the URL: it may hold a password.
    if schemes is None:
        raise UnknownModel(f"{job_type} names a model, not the URL of a server; {' and '.join(catalogue.SERVERS)} do.")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
        # Messages and logs show the URL.
        valid = valid and not (parts.username or parts.password or parts.query or parts.fragment)
    except ValueError:
        valid = False
    row = catalogue.find(job_type, catalogue.DEFAULT_ON_CPU[job_type])
    if not valid:
        raise UnknownModel(f"{job_type} needs the URL of its server, without a user, such as {row.url}.")
    return dataclasses.replace(row, url=url.rstrip("/"))


def locate(model: Model) -> str:
    """Where a model's weights come from: a local folder, packaged weights that have been prepared, else its hub id.

    The one path for all weights. For hub ids the libraries follow HF_ENDPOINT, HF_TOKEN and HF_HOME by themselves.
    """
    if model.folder:
        return model.folder
    if model.packaged and (folder := packaged.prepared(model.packaged)):
        return str(folder)
    return model.id


def detect_device(
    device_id: int | None = None, dtype: str = "auto", max_memory_gib: float | None = None, offload: bool = False
) -> Device:
    """The GPU with that number among the visible ones (the first by default), or the CPU where torch sees no GPU.

    Raises EngineLoadError for a number that is not there, and for a card that the installed torch has no kernels for.
    """
    import torch

    if not torch.cuda.is_available():
        return Device("cpu", dtype, max_memory_gib, offload)
    index, count = device_id or 0, torch.cuda.device_count()
    if index >= count:
        raise EngineLoadError(f"There is no GPU {index}: this process sees {count}. Set CUDA_VISIBLE_DEVICES or fewer.")
    check_kernels(
        torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    )
    return Device(f"cuda:{index}", dtype, max_memory_gib, offload)


def describe(device: Device) -> tuple[str | None, float | None]:
    """A GPU's name and all its memory in GiB; None for the CPU."""
    if device.name == "cpu":
        return None, None
    import torch

    properties = torch.cuda.get_device_properties(device.name)
    return properties.name, round(properties.total_memory / GIB, 1)


def memory_used(device: Device) -> tuple[float, float | None]:
    """GiB that this process holds for its engines, and that everybody uses of the GPU; the latter None for the CPU."""
    if device.name == "cpu":
        return psutil.Process().memory_info().rss / GIB, None
    import torch

    free, total = torch.cuda.mem_get_info(device.name)
    return torch.cuda.memory_reserved(device.name) / GIB, (total - free) / GIB


def check_kernels(card: str, capability: tuple[int, int], architectures: list[str]) -> None:
    """Pass if a torch built for those architectures ("sm_86", "compute_90") can compute on that card.

    Binary kernels (sm_) run on cards of the same major version and at least the minor one; PTX (compute_) is compiled
    for every later card. Raises EngineLoadError otherwise.
    """
    for architecture in architectures:
        kind, _, digits = architecture.rstrip("af").partition("_")
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return
    raise EngineLoadError(
        f"The installed torch has no kernels for {card} (sm_{capability[0]}{capability[1]}; it was built for "
        f"{', '.join(architectures)}). Cards from Maxwell to Volta, such as a GTX 1080, need a CUDA 12.6 build: "
        "pip install torch --index-url https://download.pytorch.org/whl/cu126"
    )


def pick_dtype(device: Device) -> str:
    """The dtype to compute in: the one that is set, else the fastest that the device has arithmetic for."""
    import torch

    if device.dtype != "auto":
        if device.dtype not in DTYPES:
            raise EngineLoadError(f"Unknown dtype {device.dtype!r}. Set auto, {' or '.join(DTYPES)}.")
        return device.dtype
    if device.name == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bfloat16" if fast else "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device.name)[0] >= 8 else "float16"


def load(model: Model, device: Device) -> Engine:
    """The engine of a model, loaded and warm.

    Raises EngineLoadError: which model, why, and what to set.
    """
    # For a repository without safetensors, transformers would ask a public service to convert its pickled weights, and
    # read what that proposes.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        _cap_memory(device)
        module, _, name = model.engine.partition(":")
        engine: Engine = getattr(importlib.import_module(module), name)(model, device)
    except EngineLoadError:
        raise
    except Exception as error:
        raise EngineLoadError(
            f"{model.id} could not be loaded on {device.name}: {type(error).__name__}: {error}"
        ) from error
    return engine


def _cap_memory(device: Device) -> None:
    if device.max_memory_gib is not None and device.name != "cpu":
        import torch

        total = torch.cuda.get_device_properties(device.name).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, device.max_memory_gib * GIB / total), device.name)
