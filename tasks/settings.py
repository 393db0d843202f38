"""Settings of regions and workers, built from a mapping such as os.environ.

`python -m tasks.settings` prints those of a worker that starts here.
"""

import difflib
import json
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from engines.catalogue import JobType
from tasks import config_file
from tasks.options import BY_VARIABLE, OPTIONS, Option, near
from tasks.options import EXIT_CONFIG as EXIT_CONFIG
from tasks.options import MODEL_VARIABLES as MODEL_VARIABLES
from tasks.options import DirectSettings as DirectSettings
from tasks.options import SettingsError as SettingsError
from tasks.options import WorkerSettings as WorkerSettings
from tasks.routing import Region

ROOT = Path(__file__).resolve().parent.parent

#: The seed's four regions; coordinates of a large data centre city in each.
PLACES: Mapping[str, tuple[float, float, tuple[str, ...]]] = {
    "asia-east": (31.2, 121.5, ("CN", "HK", "MO", "TW", "JP", "KR", "MN")),
    "asia-south": (1.35, 103.8, ("SG", "MY", "ID", "TH", "VN", "PH", "IN", "BD", "LK", "AU", "NZ")),
    "europe-west": (50.1, 8.7, ("DE", "FR", "GB", "IE", "NL", "BE", "ES", "PT", "IT", "CH", "AT", "PL", "SE", "NO")),
    "america-north": (39.0, -77.5, ("US", "CA", "MX")),
}


#: Variables of ours that config.yaml has no key for.
OTHER_VARIABLES = (
    "GPU_CONFIG",
    "GPU_DATA_DIR",
    "GPU_MODEL_DIR",
    "GPU_ALLOW_ANONYMOUS",
    "GPU_ADMIN_PORT",
)


#: What each key of a region in REGIONS must be.
_ENTRY: Mapping[str, tuple[Any, str]] = {
    **dict.fromkeys(("broker", "store", "worker_broker", "worker_store"), (str, "a URL, as text")),
    **dict.fromkeys(("latitude", "longitude"), ((int, float), "a number of degrees")),
    "countries": (list, "a list of country codes"),
}


def data_dir(environ: Mapping[str, str]) -> Path:
    """The folder for what this machine writes: database, store, logs."""
    return Path(environ.get("GPU_DATA_DIR") or ROOT / "var").resolve()


def default_store(environ: Mapping[str, str]) -> str:
    """The embedded Valkey that the Procfile starts."""
    return f"redis://127.0.0.1:{environ.get('STORE_PORT') or '6390'}"


def load_regions(environ: Mapping[str, str]) -> dict[str, Region]:
    """Every region by name.

    REGIONS is a JSON object of regions, each with any of broker, store, worker_broker, worker_store, latitude,
    longitude, countries; what is left out comes from GPU_BROKER_URL, GPU_STORE_URL and the seed's table. Without it:
    the seed's four on one broker and store. The names are not BROKER_URL and STORE_URL, since Celery's command line
    takes BROKER_URL for its own option.
    """
    broker = environ.get("GPU_BROKER_URL") or f"{default_store(environ)}/0"
    store = environ.get("GPU_STORE_URL") or f"{default_store(environ)}/1"
    given: dict[str, dict[str, Any]] = {name: {} for name in PLACES}
    if environ.get("REGIONS"):
        try:
            given = json.loads(environ["REGIONS"])
        except ValueError as error:
            raise SettingsError(f"REGIONS must be a JSON object of regions by name: {error}") from error
        if not isinstance(given, dict) or not given or not all(isinstance(entry, dict) for entry in given.values()):
            raise SettingsError("REGIONS must be a JSON object of at least one region, each an object.")
    regions = {}
    for name, entry in given.items():
        latitude, longitude, countries = PLACES.get(name, (0.0, 0.0, ()))
        known = {
            "broker": broker,
            "store": store,
            "latitude": latitude,
            "longitude": longitude,
            "countries": countries,
            "worker_broker": None,
            "worker_store": None,
        }
        if unknown := set(entry) - set(known):
            raise SettingsError(f"REGIONS: {name} has unknown keys {sorted(unknown)}; known are {sorted(known)}.")
        for key, value in entry.items():
            kind, rule = _ENTRY[key]
            if not isinstance(value, kind) or (kind is list and not all(isinstance(item, str) for item in value)):
                raise SettingsError(f"REGIONS: {key} of {name} must be {rule}.")
        regions[name] = Region(name=name, **{**known, **entry})
    return regions


def default_region(environ: Mapping[str, str], regions: Mapping[str, Region]) -> str:
    """GPU_REGION, else DEFAULT_REGION, else the first region. Raises SettingsError for one that is not configured."""
    name = environ.get("GPU_REGION") or environ.get("DEFAULT_REGION") or next(iter(regions))
    if name not in regions:
        raise SettingsError(f"Region {name!r} is not configured; there are {', '.join(regions)}.{near(name, regions)}")
    return name


def version() -> str:
    """Of our own code, as pyproject.toml states it; empty where that file was not brought along."""
    try:
        stated: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    except FileNotFoundError:
        return ""
    return stated


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that a worker was told."""

    option: Option
    #: As a variable states it; empty where the default holds.
    text: str
    #: Who said it, such as "GPU_REGION" or "config.yaml:2"; empty where the default holds.
    source: str

    @property
    def where(self) -> str:
        """How a message names it: by variable, or by line and key."""
        if self.source in ("", self.option.variable):
            return self.option.variable
        return f"{self.source}: {self.option.path}"


def gather(environ: Mapping[str, str]) -> list[Setting]:
    """Every option with what holds and who said it: the variable, else config.yaml, else nobody.

    A variable that is empty counts as left out; one that says null brings the default back over the file. What the
    environment says is not checked yet. Raises SettingsError for a file that cannot be used.
    """
    path = config_file.find(environ, ROOT)
    said = config_file.read(path) if path else {}
    settings = []
    for option in OPTIONS:
        text, source = environ.get(option.variable, "").strip(), option.variable
        if not text and option.variable in said:
            text, source = said[option.variable].text, said[option.variable].where
        settings.append(Setting(option, "", "") if text in ("", "null") else Setting(option, text, source))
    return settings


def where(environ: Mapping[str, str], variable: str) -> str:
    """How a message names an option that was set: by its variable, or by file, line and key."""
    return next(setting.where for setting in gather(environ) if setting.option.variable == variable)


def effective(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with what config.yaml says, under the variables' names. Raises SettingsError as gather does."""
    others = {name: value for name, value in environ.items() if name not in BY_VARIABLE}
    return {**others, **{setting.option.variable: setting.text for setting in gather(environ) if setting.source}}


def load_worker(environ: Mapping[str, str] = os.environ) -> WorkerSettings:
    """What the environment, config.yaml and the defaults tell a worker, in that order. Raises SettingsError."""
    settings = gather(environ)
    values: dict[str, Any] = {}
    for setting in settings:
        option = setting.option
        values[option.target] = option.read(setting.text, setting.where) if setting.source else option.default
    _both_or_neither(settings, "GPU_WORKING_HOURS_START", "GPU_WORKING_HOURS_END")
    return WorkerSettings(
        **{target: value for target, value in values.items() if "." not in target},
        models={job_type: value for job_type in JobType if (value := values[f"models.{job_type}"]) is not None},
        direct=DirectSettings(**{field.name: values[f"direct.{field.name}"] for field in fields(DirectSettings)}),
    )


def misspelled(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that are none of ours but look like one that is, with that one: nothing else would tell of a typo."""
    known = [*BY_VARIABLE, *OTHER_VARIABLES]
    strange = [name for name in environ if name.startswith("GPU_") and name not in known]
    return {name: close[0] for name in strange if (close := difflib.get_close_matches(name, known, n=1, cutoff=0.85))}


def _both_or_neither(settings: Iterable[Setting], *variables: str) -> None:
    pair = [setting for setting in settings if setting.option.variable in variables]
    told = [setting for setting in pair if setting.source]
    if told and len(told) < len(pair):
        missing = next(setting.option for setting in pair if not setting.source)
        raise SettingsError(
            f"{told[0].where} needs {missing.path} ({missing.variable}) beside it: set both or neither."
        )


if __name__ == "__main__":
    from tasks.listing import main

    sys.exit(main())
