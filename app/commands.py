"""What the operator types: flask --app wsgi keys ..., flask --app wsgi db upgrade."""

from collections.abc import Sequence
from datetime import UTC, datetime

import click
from flask import current_app
from flask.cli import AppGroup
from sqlalchemy.exc import DBAPIError

from app.keys import Key, Keys, Scope
from app.settings import Settings
from app.tables import upgrade

keys = AppGroup("keys", help="API keys.")
database = AppGroup("db", help="The database.")

_NO_TABLES = "The database cannot be used; if it is new: flask --app wsgi db upgrade"


@keys.command("create")
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, type=click.Choice([str(scope) for scope in Scope]), required=True)
@click.option("--expires-days", type=click.FloatRange(min=0, min_open=True), help="Left out, it never expires.")
def create_key(name: str, scopes: Sequence[str], expires_days: float | None) -> None:
    """Make a key and print it, this once."""
    if not 1 <= len(name) <= 128:
        raise click.BadParameter("A name has 1 to 128 characters.")
    try:
        text = _keys().create(name, map(Scope, scopes), expires_days=expires_days)
    except DBAPIError as error:
        raise click.ClickException(_NO_TABLES) from error
    click.echo(text)
    click.echo("Keep it: it cannot be shown again. From now on every request needs a key.", err=True)


@keys.command("list")
def list_keys() -> None:
    """Show every key without its secret."""
    try:
        known = _keys().all()
    except DBAPIError as error:
        raise click.ClickException(_NO_TABLES) from error
    for key in known:
        click.echo(f"{key.id}  {_state(key):20}  {','.join(sorted(key.scopes)):20}  {_day(key.created_at)}  {key.name}")


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
def revoke_key(key_id: str) -> None:
    """Close a key for good; ID as `keys list` shows it."""
    # The whole key is what people have at hand, though only its id is needed.
    key_id = key_id.removeprefix("gpi_")[:8]
    try:
        done = _keys().revoke(key_id)
    except DBAPIError as error:
        raise click.ClickException(_NO_TABLES) from error
    if not done:
        raise click.ClickException(f"There is no open key {key_id}.")
    click.echo(f"{key_id} is revoked.")


@database.command("upgrade")
def upgrade_database() -> None:
    """Create the tables, or bring them up to date."""
    settings: Settings = current_app.extensions["settings"]
    upgrade(settings.database_url)
    click.echo("The database is up to date.")


def _keys() -> Keys:
    known: Keys = current_app.extensions["keys"]
    return known


def _state(key: Key) -> str:
    if key.revoked_at is not None:
        return f"revoked {_day(key.revoked_at)}"
    return "open" if key.expires_at is None else f"until {_day(key.expires_at)}"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
