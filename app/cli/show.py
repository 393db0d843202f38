"""What commands write: JSON, tables, and how far a job has come. The last on stderr, so that stdout is the answer."""

import base64
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unicodedata import east_asian_width

import click

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError:
    RICH = False
else:
    RICH = True

#: Without a terminal, how far a job has come is said this often at most.
LINE_EVERY_S = 5.0
#: Longer texts in a job that is shown, such as pictures, are cut.
MOST_SHOWN = 200

#: What a model may write and a terminal would obey.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def document(found: object) -> None:
    """One JSON document, or one of several, in a line of stdout."""
    click.echo(json.dumps(found, ensure_ascii=False))


def text(told: str, *, end: str = "\n") -> None:
    """What a model wrote, on stdout; on a terminal without what would steer it."""
    click.echo((_CONTROLS.sub("", told) if sys.stdout.isatty() else told) + end, nl=False)


def table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns under their names, as wide as what is in them."""
    cells = [list(names), *([_cell(value) for value in row] for row in rows)]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(names))]
    lines = (
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)) for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def job(shown: Mapping[str, Any]) -> str:
    """A job, a member a line, without what is empty."""
    lines = []
    for name, value in shown.items():
        if value in (None, [], {}):
            continue
        if isinstance(value, Mapping):
            inner = json.dumps(shortened(value), ensure_ascii=False, indent=2)
            lines.append(f"{name}:\n" + "\n".join(f"  {line}" for line in inner.splitlines()[1:-1]))
        else:
            lines.append(f"{name}: {_cell(value)}")
    return "\n".join(lines)


def shortened(value: Any) -> Any:
    """The same with long texts and lists cut."""
    match value:
        case Mapping():
            return {name: shortened(inner) for name, inner in value.items()}
        case list() if len(value) > 8:
            return [*map(shortened, value[:8]), f"... {len(value)} in all"]
        case list():
            return [shortened(inner) for inner in value]
        case str() if len(value) > MOST_SHOWN:
            return f"{value[:40]}... {len(value)} characters"
        case _:
            return value


def without_picture(shown: Mapping[str, Any], file: str) -> dict[str, Any]:
    """A job whose picture was written to a file, with the file's name instead."""
    rest = {name: value for name, value in shown["result"].items() if name != "image_base64"}
    return {**shown, "result": {**rest, "file": file}}


def write(shown: Mapping[str, Any], to: str) -> None:
    """Write a completed job's picture to a file, or to stdout for "-". Raises click.UsageError if it has none."""
    encoded = (shown.get("result") or {}).get("image_base64")
    if encoded is None:
        raise click.UsageError(f"Job {shown['job_id']} has no picture.")
    data = base64.b64decode(encoded)
    if to == "-":
        click.echo(data, nl=False)
    else:
        Path(to).write_bytes(data)


def seconds(number: float | None) -> str:
    """A time to wait, where it is known."""
    return "for a time not known" if number is None else f"{number:g} s"


class Bar:
    """Where a job is: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._told = ""
        self._told_at = time.monotonic()

    def __enter__(self) -> Self:
        if RICH and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[done]}"),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("sent", total=None, done="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take it away, as the answer begins."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        # A line after this would stand in the middle of the answer.
        self._told_at = float("inf")

    def status(self, data: Mapping[str, Any]) -> None:
        """Say what a status event says."""
        place, reason = data.get("queue_position"), data.get("queued_reason")
        told = str(data["status"]) + (f", {place} in the queue" if place else "") + (f": {reason}" if reason else "")
        if data.get("attempt", 1) > 1:
            told += f" (attempt {data['attempt']})"
        if self._progress is not None:
            self._progress.update(self._task, description=told, done="", total=None)
        elif told != self._told and self._told_at != float("inf") and data["status"] in ("queued", "running"):
            click.echo(told, err=True)
        self._told = told

    def move(self, data: Mapping[str, Any]) -> None:
        """Say what a progress event says."""
        done, total, unit = data["done"], data["total"], data["unit"]
        told = f"{done}/{total} {unit}s" if total else f"{done} {unit}s"
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total, done=told)
        elif time.monotonic() - self._told_at >= LINE_EVERY_S:
            self._told_at = time.monotonic()
            click.echo(told, err=True)


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:g}"
        case list() | tuple():
            return ",".join(map(str, value))
        case _:
            return str(value)


def _width(text: str) -> int:
    """Columns that it takes: characters of Chinese, Japanese and Korean take two."""
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)
