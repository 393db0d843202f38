"""What the harness takes out of the product to see itself fail: each guard is some lines of its source, and others.

The product has no switches for this: tests/chaos/entry.py swaps the lines as it loads them. Lines that are not there
any more stop the process, so that no run goes on believing that a guard is off.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType

#: By guard: file from the root, the lines, and what stands there without the guard.
GUARDS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    # Every change of a row names the state that it expects.
    "compare-and-set": (
        (
            "app/rows.py",
            'jobs.c.id == bindparam("job"),\n        IS_LIVE,\n',
            'jobs.c.id == bindparam("job"),\n',
        ),
        ("app/rows.py", '.where(jobs.c.id == bindparam("job"), IS_LIVE)', '.where(jobs.c.id == bindparam("job"))'),
        (
            "app/rows.py",
            "jobs.c.id == job_id, IS_LIVE, status=str(JobState.CANCELLED)",
            "jobs.c.id == job_id, status=str(JobState.CANCELLED)",
        ),
        ("app/rows.py", "IS_LIVE,\n            *expected,", "*expected,"),
    ),
    # Somebody looks for what got stuck.
    "reconciler": (("app/control.py", "                reconciler.tick()\n", "                pass\n"),),
    # A worker that is gone stops counting as alive.
    "lease": (
        (
            "tasks/lua/begin.lua",
            "if redis.call('EXISTS', 'lease:' .. worker) == 1 then return {'BUSY'} end",
            "if true then return {'BUSY'} end",
        ),
        (
            "tasks/lua/orphans.lua",
            "if redis.call('EXISTS', 'lease:' .. worker) == 1 then return end",
            "if true then return end",
        ),
    ),
    # The attempt's number tells a message, an entry and an outcome that still count from those that do not.
    "attempt": (
        (
            "tasks/lua/put.lua",
            "if state and (attempt > tonumber(ARGV[2]) or (attempt == tonumber(ARGV[2]) and state ~= 'queued')) then",
            "if false then",
        ),
        ("tasks/lua/begin.lua", "if attempt ~= ARGV[2]", "if false"),
        (
            "tasks/lua/finish.lua",
            "(record[1] == 'running' and record[2] == ARGV[2] and record[3] == ARGV[3])",
            "(record[1] == 'running')",
        ),
    ),
}

ROOT = Path(__file__).resolve().parent.parent.parent


def without(guard: str, file: str, source: str) -> str:
    """A file's source without the guard. Raises LookupError if the lines are not there, or twice."""
    for path, lines, instead in GUARDS[guard]:
        if path == file:
            if source.count(lines) != 1:
                raise LookupError(f"{file} does not have these lines once, so {guard!r} cannot be taken out:\n{lines}")
            source = source.replace(lines, instead)
    return source


def take_out(guard: str) -> None:
    """Load this process's modules and scripts without the guard; to be called before anything else loads them."""
    read_text = Path.read_text

    def read_changed(path: Path, *args: str | None, **kwargs: str | None) -> str:
        text = read_text(path, *args, **kwargs)
        return without(guard, f"tasks/lua/{path.name}", text) if path.suffix == ".lua" else text

    Path.read_text = read_changed  # type: ignore[method-assign]
    sys.meta_path.insert(0, _Finder(guard))


class _Finder(MetaPathFinder):
    """Finds the modules that have to be changed, before anybody else does."""

    def __init__(self, guard: str) -> None:
        self._guard = guard
        files = {file for file, _, _ in GUARDS[guard] if file.endswith(".py")}
        self._files = {file.removesuffix(".py").replace("/", "."): file for file in files}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Of a module that has to be changed."""
        if name not in self._files:
            return None
        file = self._files[name]
        return spec_from_file_location(name, ROOT / file, loader=_Loader(name, self._guard, file))


class _Loader(SourceFileLoader):
    """Loads a module without the guard."""

    def __init__(self, name: str, guard: str, file: str) -> None:
        super().__init__(name, str(ROOT / file))
        self._guard = guard
        self._file = file

    def get_code(self, fullname: str) -> CodeType:
        """From the source, past what was compiled before."""
        source = self.get_data(self.path).decode()
        return compile(without(self._guard, self._file, source), self.path, "exec")
