"""How quotas are typed: --quota jobs_per_day=1000, here and in `flask --app wsgi keys`."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import click


def quota_option(known: Collection[str] = ()) -> Callable[[Any], Any]:
    """The option --quota; it gives quotas by name, None for one that is lifted, {} where none was typed.

    known: the names that there are, where that is known here; otherwise the API says which are none.
    """
    names = f"; names: {', '.join(known)}" if known else ""

    def read(_: click.Context, __: click.Parameter, texts: Sequence[str]) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for text in texts:
            name, _equals, most = text.partition("=")
            is_number = most.isascii() and most.isdecimal()
            if (known and name not in known) or not (most == "none" or is_number):
                raise click.BadParameter(f"{text!r} is not NAME=NUMBER or NAME=none{names}.")
            found[name] = int(most) if is_number else None
        return found

    return click.option(
        "--quota",
        "quotas",
        multiple=True,
        callback=read,
        metavar="NAME=NUMBER",
        help="What it may use: jobs, tokens or gpu_seconds, _per_day or _per_month. NAME=none lifts the limit.",
    )
