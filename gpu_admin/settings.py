"""What the admin API of a host is told: gpu_admin.yaml, and the environment over it.

The file has the keys of `Top` and a section for each runner, whose keys the runner itself checks (read_section). A
variable GPU_ADMIN_<KEY> or GPU_ADMIN_<SECTION>_<KEY> wins over the file; its value is read as YAML, so that lists and
mappings can be given: GPU_ADMIN_TRITON_SUPPORTED_MODELS='[MAM, FastFitAll]'.
"""

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from marshmallow import RAISE, Schema, ValidationError, fields, validate

ROOT = Path(__file__).resolve().parent.parent
NAME = "gpu_admin.yaml"
PREFIX = "GPU_ADMIN_"

#: Where each runner's class is. A section of the file may name another one by its key `class`, or a new runner.
RUNNERS: Mapping[str, str] = {
    "triton": "gpu_admin.runners.triton:Runner",
    "comfyui": "gpu_admin.runners.comfyui:Runner",
    "vllm": "gpu_admin.runners.vllm:Runner",
}


class SettingsError(ValueError):
    """A setting has a value that cannot be used; the message names it and the rule."""


class Strict(Schema):
    """Settings of which an unknown one is a mistake."""

    class Meta:
        unknown = RAISE


class Top(Strict):
    """The keys outside of every section."""

    host = fields.String(load_default="127.0.0.1", validate=validate.Length(min=1))
    port = fields.Integer(load_default=6004, strict=True, validate=validate.Range(min=1, max=65_535))
    data_dir = fields.String(load_default=None, allow_none=True)
    allow_anonymous = fields.Boolean(load_default=False)


@dataclass(frozen=True, slots=True)
class Section:
    """What one runner was told."""

    #: Its class, as "module:Class".
    runner: str
    #: Its settings; the runner checks them.
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the admin API of a host was told."""

    #: What is kept: orders, pid files, logs, keys, the audit log.
    data_dir: Path
    #: By the runner's name. Those without a supported model are there too.
    runners: Mapping[str, Section]
    host: str = "127.0.0.1"
    port: int = 6004
    #: Answer other hosts although no key exists.
    allow_anonymous: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """The settings that the file and an environment state, the environment over the file. Raises SettingsError."""
        said = _read_file(environ)
        sections: dict[str, dict[str, Any]] = {name: {} for name in RUNNERS}
        top: dict[str, Any] = {}
        for key, value in said.items():
            if isinstance(value, Mapping):
                sections[key] = dict(value)
            elif value is None and key in sections:
                continue
            else:
                top[key] = value
        for name, text in environ.items():
            if not name.startswith(PREFIX) or not text.strip() or name in _NO_SETTINGS:
                continue
            section, key = _place(name.removeprefix(PREFIX).lower(), sections)
            (sections[section] if section else top)[key] = _value(name, text)
        known = read_section(Top(), "", top)
        data_dir = known.pop("data_dir") or Path(environ.get("GPU_DATA_DIR") or ROOT / "var") / "gpu_admin"
        return cls(
            data_dir=Path(data_dir).expanduser().absolute(),
            runners={name: _section(name, values) for name, values in sections.items()},
            **known,
        )


#: Variables that begin like ours and are read elsewhere.
_NO_SETTINGS = ("GPU_ADMIN_CONFIG", "GPU_ADMIN_MOUNT")


def read_section(schema: Schema, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A runner's settings as its schema loads them.

    Raises SettingsError with the key, its variable, the rule, and for an unknown key the near ones.
    """
    try:
        loaded: dict[str, Any] = schema.load(values)
    except ValidationError as error:
        messages = error.messages if isinstance(error.messages, Mapping) else {"_schema": error.messages}
        key, message = next(iter(messages.items()))
        where = ".".join(filter(None, (name, str(key))))
        variable = PREFIX + "_".join(filter(None, (name, str(key)))).upper()
        rule = _sentence(message)
        if rule == "Unknown field.":
            rule = f"There is no such setting.{near(str(key), schema.fields)}"
        raise SettingsError(f"{where} ({NAME}, or {variable}): {rule}") from error
    return loaded


def near(name: str, known: Iterable[str]) -> str:
    """A sentence with the known names that look like `name`, after a space; nothing where none does."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _section(name: str, values: Mapping[str, Any]) -> Section:
    runner = values.get("class", RUNNERS.get(name))
    if not isinstance(runner, str) or ":" not in runner:
        raise SettingsError(
            f"{name}: there is no such runner.{near(name, RUNNERS)} One of your own has a key `class: module:Runner`."
        )
    return Section(runner, {key: value for key, value in values.items() if key != "class"})


def _read_file(environ: Mapping[str, str]) -> dict[str, Any]:
    named = environ.get("GPU_ADMIN_CONFIG")
    path = Path(named).expanduser() if named else next((p for p in (Path(NAME), ROOT / NAME) if p.is_file()), None)
    if path is None:
        return {}
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    if said is not None and not isinstance(said, Mapping):
        raise SettingsError(f"{path} must be a mapping of settings.")
    return {str(key): value for key, value in (said or {}).items()}


def _place(key: str, sections: Mapping[str, Any]) -> tuple[str | None, str]:
    """The section that a variable's name begins with, and the key in it."""
    section = next((name for name in sections if key.startswith(f"{name}_")), None)
    return section, key.removeprefix(f"{section}_") if section else key


def _value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{name} must be YAML, such as 8000, [a, b] or {{a: 1}}: {error}") from error


def _sentence(message: Any) -> str:
    """The first of marshmallow's nested messages, with the path to it."""
    path = []
    while isinstance(message, Mapping):
        key, message = next(iter(message.items()))
        if key not in ("_schema", "key", "value"):
            path.append(str(key))
    first = message[0] if isinstance(message, list) and message else message
    return f"{'.'.join(path)}: {first}" if path else str(first)
