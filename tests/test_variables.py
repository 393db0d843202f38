"""docs/configuration.md and .env.example name every variable that the code reads, with the defaults that hold."""

import ast
import re
from collections.abc import Mapping

from app.settings import Settings
from tasks.options import BY_VARIABLE
from tests.rig import ROOT

PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Not settings of ours: the shell's, or set by one process of ours for another.
FOREIGN = {"PATH", "PYTHONPATH", "NO_PROXY", "DISABLE_SAFETENSORS_CONVERSION"}
#: Read by libraries, which documents of theirs explain; docs/configuration.md names them, .env.example need not.
LIBRARIES = {"CUDA_VISIBLE_DEVICES", "OTEL_SDK_DISABLED", "OTEL_SERVICE_NAME", "REQUESTS_CA_BUNDLE"}
#: Of whoever calls the API, on another machine.
CLIENTS = {"GPU_API_URL"}


def variables_read() -> dict[str, str]:
    """Every variable of the environment that the code asks for by its name, and a file that does."""
    found: dict[str, str] = dict.fromkeys(BY_VARIABLE, "tasks/options.py")
    files = [path for room in ("app", "tasks", "engines", "gpu_admin", "local") for path in (ROOT / room).rglob("*.py")]
    for path in [*files, ROOT / "celeryconfig.py", ROOT / "gunicorn.conf.py", ROOT / "wsgi.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asked: list[ast.expr] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_environ(node.func.value):
                asked = node.args[:1] if node.func.attr == "get" else []
            elif isinstance(node, ast.Call) and any(map(_is_environ, node.args)):
                asked = node.args
            elif isinstance(node, ast.Subscript) and _is_environ(node.value):
                asked = [node.slice]
            for name in asked:
                if isinstance(name, ast.Constant) and re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", str(name.value)):
                    found.setdefault(name.value, str(path.relative_to(ROOT)))
    return found


def _is_environ(node: ast.expr | None) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name == "environ"


def test_every_variable_that_is_read_is_documented_and_in_the_example():
    read = variables_read()
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    example = set(re.findall(r"^#(\w+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE))

    assert {"DATABASE_URL", "FAIR_WINDOW", "GPU_ALLOW_PLAINTEXT", "GPU_HOSTS", "LOG_FORMAT", "PORT"} <= read.keys()
    assert {name: file for name, file in read.items() if name not in FOREIGN and f"`{name}`" not in page} == {}
    assert {n: file for n, file in read.items() if n not in FOREIGN | LIBRARIES | CLIENTS | example} == {}
    assert {name for name in example if f"`{name}`" not in page} == set()


class Asked(dict[str, str]):
    """An environment that remembers what it was asked for."""

    def __init__(self, *args: Mapping[str, str]) -> None:
        super().__init__(*args)
        self.names: set[str] = set()

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]
        self.names.add(name)
        return super().get(name, default)


def test_the_documented_defaults_of_the_api_are_those_that_hold():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows: dict[str, str] = {}
    for names, cell in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]*) \|", page, re.MULTILINE):
        variables, defaults = re.findall(r"`(\w+)`", names), re.findall(r"`([^`]+)`", cell)
        stated = defaults if len(defaults) == len(variables) and "in `" not in cell else [""] * len(variables)
        rows.update(zip(variables, stated, strict=True))
    asked = Asked()
    told = Settings.from_environ(asked)

    assert asked.names - rows.keys() - BY_VARIABLE.keys() == set()
    for name in asked.names & {name for name, default in rows.items() if default} - BY_VARIABLE.keys():
        assert Settings.from_environ({name: rows[name]}) == told, name
        if rows[name].isdecimal():
            assert Settings.from_environ({name: _other(rows[name])}) != told, name


def _other(number: str) -> str:
    return str(int(number) + 7) if int(number) > 1 else str(1 - int(number))


def test_what_is_called_a_variable_of_ours_is_one():
    known = variables_read().keys() | {"GPU_ADMIN_PORT", "GPU_ADMIN_HOST"}
    for page in PAGES:
        for name in re.findall(r"`(GPU_[A-Z_]+)[`=]", page.read_text(encoding="utf-8")):
            assert name in known or name.startswith("GPU_ADMIN_"), (page.name, name)
