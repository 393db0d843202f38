"""One host, put together: its GPUs, its processes, the instances of its runners, and the audit log."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpu_admin.audit import Audit
from gpu_admin.contract import MODEL_NAME, Place, Runner
from gpu_admin.gpus import Gpus
from gpu_admin.instances import Instances
from gpu_admin.processes import Processes
from gpu_admin.settings import Section, Settings, SettingsError


@dataclass(frozen=True, slots=True)
class Host:
    """What the API shows and moves."""

    instances: Instances
    gpus: Gpus
    processes: Processes
    audit: Audit


def open_host(settings: Settings) -> Host:
    """The host as it was told to be; nothing is connected before it is needed, and no thread runs yet.

    Raises SettingsError for a runner whose library is missing or whose section is wrong, and for a model that two have.
    """
    gpus = Gpus()
    audit = Audit(settings.data_dir / "audit.log")
    instances = Instances(_runners(settings, gpus), gpus, settings.data_dir)
    return Host(instances, gpus, Processes(gpus, instances.pids, audit), audit)


def _runners(settings: Settings, gpus: Gpus) -> dict[str, Runner]:
    """Those that are not told to support nothing; each one's libraries are loaded with it."""
    runners: dict[str, Runner] = {}
    owners: dict[str, str] = {}
    for name, section in settings.runners.items():
        if not section.values.get("supported_models", True):
            continue
        place = Place(settings.data_dir / "runners" / name, gpus.memory_mib)
        runners[name] = _runner_class(name, section)(section.values, place)
        if runners[name].name != name:
            raise SettingsError(f"{name}: {section.runner} is named {runners[name].name}; name its section so.")
        for model in runners[name].models:
            if not MODEL_NAME.match(model):
                raise SettingsError(
                    f"{name}: {model!r} is no model name: 1 to 64 letters, digits, dots, dashes and underscores, "
                    "beginning with a letter or digit."
                )
            if owners.setdefault(model, name) != name:
                raise SettingsError(f"{model} is a supported model of {owners[model]} and of {name}; one has to go.")
    return runners


def _runner_class(name: str, section: Section) -> Callable[[Mapping[str, Any], Place], Runner]:
    module, _, attribute = section.runner.partition(":")
    try:
        found: Callable[[Mapping[str, Any], Place], Runner] = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise SettingsError(
            f"{name}: {section.runner} cannot be imported ({error}). "
            "What the runners need: pip install -r requirements/gpu_admin.txt. "
            f"To do without this one: GPU_ADMIN_{name.upper()}_SUPPORTED_MODELS='[]'"
        ) from error
    except AttributeError as error:
        raise SettingsError(f"{name}: module {module} has no {attribute}.") from error
    return found
