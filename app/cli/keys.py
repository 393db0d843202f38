"""Keys and what they used."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from app.cli import show
from app.cli.quotas import quota_option
from app.cli.root import Command, Group, Setup, completing, pass_setup

_key_id = click.argument("key_id", metavar="ID", shell_complete=completing("keys"))
_name = click.option("--name", help="Another name.")
_weight = click.option("--weight", type=click.IntRange(min=1), help="Turns for each turn of a key of weight 1.")
_quota = quota_option()
_expires = click.option(
    "--expires-days", type=click.FloatRange(min=0, min_open=True), help="Left out, it never expires."
)


@click.group(cls=Group)
def keys() -> None:
    """API keys; for scope admin."""


@keys.command("list")
@pass_setup
def list_keys(setup: Setup) -> None:
    """List every key, without its secret."""
    found = setup.client.keys()
    if setup.json:
        show.document({"items": found})
        return
    rows = (
        (key["id"], key["state"], key["name"], key["scopes"], key["weight"], _limits(key["quotas"]), key["expires_at"])
        for key in found
    )
    click.echo(show.table(("ID", "STATE", "NAME", "SCOPES", "WEIGHT", "QUOTAS", "EXPIRES"), rows))


@keys.command()
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, required=True, help="infer, read, admin or worker; may be repeated.")
@_expires
@_weight
@_quota
@pass_setup
def create(setup: Setup, name: str, scopes: Sequence[str], **options: Any) -> None:
    """Make a key and print its text, this once."""
    _made(setup, setup.client.create_key(name, scopes, **_given(options)))


@keys.command()
@_key_id
@click.option("--overlap-hours", type=click.FloatRange(min=0), help="How long this one still works; 24 unless said.")
@_expires
@pass_setup
def rotate(setup: Setup, key_id: str, **options: Any) -> None:
    """Make a second key like this one, which works for a while longer; prints the new one's text."""
    _made(setup, setup.client.rotate_key(key_id, **_given(options)))


@keys.command("set")
@_key_id
@_name
@_weight
@_quota
@pass_setup
def change(setup: Setup, key_id: str, **changes: Any) -> None:
    """Change a key's name, weight or quotas."""
    if not _given(changes):
        raise click.UsageError("Say what to change: --name, --weight, --quota.")
    _show(setup, setup.client.change_key(key_id, **_given(changes)))


@keys.command()
@_key_id
@click.option("--force", is_flag=True, help="Even the last one of an admin.")
@pass_setup
def revoke(setup: Setup, key_id: str, force: bool) -> None:
    """Close a key for good, at once."""
    _show(setup, setup.client.revoke_key(key_id, force=force))


@click.command(cls=Command)
@click.option("--from", "first", metavar="DAY", help="2026-01-31; else 30 days.")
@click.option("--to", "last", metavar="DAY", help="Else today.")
@click.option("--by", "group_by", default="day", show_default=True, help="day, type, model, key; with commas between.")
@click.option("--key", metavar="ID", help="Of this key alone, for scope admin.", shell_complete=completing("keys"))
@pass_setup
def usage(setup: Setup, **query: str | None) -> None:
    """Show what one's jobs used, and how one's quotas stand; for scope admin, everybody's."""
    found = setup.client.usage(**query)
    if setup.json:
        show.document(found)
        return
    split = str(query["group_by"]).replace(" ", "").split(",")
    sums = ("jobs", "failed", "prompt_tokens", "completion_tokens", "images", "audio_seconds", "gpu_seconds")
    rows = [[item[name] for name in (*split, *sums)] for item in found["items"]]
    total = ["total", *[""] * (len(split) - 1), *(found["total"][name] for name in sums)]
    names = [name.upper().replace("_", " ") for name in (*split, *sums)]
    click.echo(f"{found['from']} to {found['to']}\n{show.table(names, [*rows, total])}")
    if found["quotas"]:
        quotas = ((quota["name"], quota["used"], quota["limit"], quota["resets_at"]) for quota in found["quotas"])
        click.echo("\n" + show.table(("QUOTA", "USED", "LIMIT", "RESETS"), quotas))


def _made(setup: Setup, key: Mapping[str, Any]) -> None:
    if setup.json:
        show.document(key)
        return
    click.echo(key["key"])
    click.echo(f"Key {key['id']}. Keep its text: it cannot be shown again.", err=True)


def _show(setup: Setup, key: Mapping[str, Any]) -> None:
    if setup.json:
        show.document(key)
        return
    shown = {**key, "quotas": _limits(key["quotas"])}
    click.echo(show.job(shown))


def _limits(quotas: Mapping[str, int | None]) -> str:
    return " ".join(f"{name}={most}" for name, most in quotas.items() if most is not None)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were typed."""
    return {name: value for name, value in options.items() if value not in (None, {})}
