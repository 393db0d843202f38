"""config.yaml: where it lies, and what it says, each with its line."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from tasks.options import BY_PATH, SettingsError, near

NAME = "config.yaml"
_NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True, slots=True)
class Said:
    """What the file says about one option."""

    text: str
    #: File and line, such as "config.yaml:7".
    where: str


def find(environ: Mapping[str, str], root: Path) -> Path | None:
    """The file that GPU_CONFIG names, else config.yaml of the working folder or of `root`; None if there is none.

    Raises SettingsError if GPU_CONFIG names a file that is not there.
    """
    if named := environ.get("GPU_CONFIG"):
        path = Path(named).expanduser()
        if not path.exists():
            raise SettingsError(f"GPU_CONFIG: there is no file {path}.")
        return path
    return next((path for path in (Path(NAME), root / NAME) if path.is_file()), None)


def read(path: Path) -> dict[str, Said]:
    """What the file says, by variable; what is null counts as left out. Every value has been checked.

    Raises SettingsError with the line and the rule, and for an unknown key with the near ones.
    """
    try:
        # Nodes and not values: they know their lines, and nothing is built from tags.
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{line}: this is not YAML: {error.problem or error.context}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    said: dict[str, Said] = {}
    if root is not None:
        _walk(root, "", path, said)
    return said


def _walk(node: yaml.Node, prefix: str, path: Path, said: dict[str, Said]) -> None:
    """Collect what a mapping says. prefix: the keys around it, each with a dot."""
    if node.tag == _NULL:
        return
    if not isinstance(node, yaml.MappingNode):
        section = prefix.rstrip(".") or "the file"
        raise SettingsError(f"{_at(path, node)}: {section} must hold keys: {', '.join(_keys_under(prefix))}.")
    seen: set[str] = set()
    for name, value in node.value:
        key, where = prefix + str(name.value), _at(path, name)
        if key in seen:
            raise SettingsError(f"{where}: {key} stands there twice.")
        seen.add(key)
        if _keys_under(f"{key}."):
            _walk(value, f"{key}.", path, said)
        elif key in BY_PATH:
            if text := _text(value, key, path):
                BY_PATH[key].read(text, f"{where}: {key}")
                said[BY_PATH[key].variable] = Said(text, where)
        else:
            raise SettingsError(f"{where}: unknown key {key}.{_near_key(key, prefix)}")


def _text(node: yaml.Node, key: str, path: Path) -> str:
    """A value as a variable would state it; empty for null."""
    if node.tag == _NULL:
        return ""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value).strip()
    if key == "supported_types" and isinstance(node, yaml.SequenceNode):
        return ",".join(_text(item, "an item of supported_types", path) for item in node.value)
    raise SettingsError(f"{_at(path, node)}: {key} must be one value, not a list or a mapping.")


def _at(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _keys_under(prefix: str) -> list[str]:
    """The keys that may stand in a section, each once."""
    inside = [key.removeprefix(prefix) for key in BY_PATH if key.startswith(prefix)]
    return list(dict.fromkeys(key.partition(".")[0] for key in inside))


def _near_key(key: str, prefix: str) -> str:
    """Those of the same section first, then a key of that name in another section."""
    name = key.removeprefix(prefix)
    if close := near(name, _keys_under(prefix)):
        return close
    elsewhere = [path for path in BY_PATH if path.rpartition(".")[2] == name]
    if elsewhere:
        return f" Did you mean {' or '.join(elsewhere)}?"
    return f" There are {', '.join(_keys_under(prefix))}."
