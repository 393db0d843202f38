"""The effective settings of a worker that starts here, each with who said it; and the table of all options."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dotenv import dotenv_values, find_dotenv, load_dotenv

from tasks import bootstrap, settings
from tasks.options import EXIT_AWAY, EXIT_CONFIG, OPTIONS, SettingsError, WorkerSettings
from tasks.routing import Region
from tasks.settings import Setting

#: What is shown for an option that nobody set and that has no default of its own.
NOTHING = "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print; the exit code is 0 if a worker could start with these settings, else the one that it would end with."""
    parser = argparse.ArgumentParser(prog="python -m tasks.settings", description="What a worker here is told.")
    parser.add_argument("--markdown", action="store_true", help="print the table of all options instead")
    if parser.parse_args(arguments).markdown:
        _print(markdown())
        return 0
    path = find_dotenv(usecwd=True)
    from_dotenv = {name for name in dotenv_values(path) if name not in os.environ} if path else set()
    load_dotenv(path)
    for name, known in settings.misspelled(os.environ).items():
        sys.stderr.write(f"{name} is no variable of ours; did you mean {known}?\n")
    code, home = 0, None
    try:
        worker = settings.load_worker(os.environ)
        try:
            home = bootstrap.home(os.environ, worker, patience_s=0)
        except (SettingsError, bootstrap.ServerAway) as error:
            sys.stderr.write(f"A worker cannot start: {error}\n")
            code = EXIT_CONFIG if isinstance(error, SettingsError) else EXIT_AWAY
        _print(listing(os.environ, worker, home, from_dotenv))
    except SettingsError as error:
        sys.stderr.write(f"A worker cannot start: {error}\n")
        code = EXIT_CONFIG
    return code


def listing(
    environ: Mapping[str, str], worker: WorkerSettings, home: Region | None, from_dotenv: set[str]
) -> list[str]:
    """One line for each option: key, value, who said it.

    home: the region that the worker serves; None where that could not be found out.
    from_dotenv: variables that .env set.
    """
    # What holds where nobody said anything is for the region and its servers no constant.
    found = {"region": home.name, "server.broker_url": home.broker, "server.store_url": home.store} if home else {}
    somebody = "REGIONS" if environ.get("REGIONS") else "default"
    if bootstrap.asks_server(environ, worker):
        somebody = "server"
    rows = []
    for setting in settings.gather(environ):
        option = setting.option
        if setting.source:
            value, source = option.show(setting.text), _source(setting, from_dotenv)
        elif option.path in found:
            value, source = option.show(found[option.path]), somebody
        else:
            value = _written(worker.served_types if option.path == "supported_types" else option.default)
            source = "default"
        rows.append((option.path, value, source))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{path:{widths[0]}}  {value:{widths[1]}}  {source}" for path, value, source in rows]


def markdown() -> list[str]:
    """The table of docs/configuration.md."""
    lines = ["| key | variable | must be | default | what it does |", "|---|---|---|---|---|"]
    for option in OPTIONS:
        default = "" if option.default in (None, ()) else f"`{_written(option.default)}`"
        lines.append(f"| `{option.path}` | `{option.variable}` | {option.rule} | {default} | {option.help} |")
    return lines


def _source(setting: Setting, from_dotenv: set[str]) -> str:
    if setting.source != setting.option.variable:
        return setting.source
    return f"{setting.source} in .env" if setting.source in from_dotenv else f"environment variable {setting.source}"


def _written(value: Any) -> str:
    """A default as config.yaml would have it."""
    match value:
        case None | ():
            return NOTHING
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case tuple():
            return ",".join(value)
        case _:
            return str(value)


def _print(lines: Sequence[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
