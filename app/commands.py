"""What the operator types: flask --app wsgi keys ..., audit, db upgrade."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime

import click
from flask import current_app
from flask.cli import AppGroup, with_appcontext
from sqlalchemy.exc import DBAPIError

from app.audit import Audit
from app.cli.quotas import quota_option
from app.keys import MOST_WEIGHT, Key, Keys, NotRotated, Quotas, Scope, id_of
from app.settings import Settings
from app.tables import upgrade

keys = AppGroup("keys", help="API keys.")
database = AppGroup("db", help="The database.")

_NO_TABLES = "The database cannot be used; if it is new: flask --app wsgi db upgrade"


_weight = click.option(
    "--weight",
    type=click.IntRange(1, MOST_WEIGHT),
    help="Turns for each turn of a key of weight 1, which is what a new key has.",
)
_quota = quota_option([field.name for field in fields(Quotas)])


@keys.command("create")
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, type=click.Choice([str(scope) for scope in Scope]), required=True)
@click.option("--expires-days", type=click.FloatRange(min=0, min_open=True), help="Left out, it never expires.")
@_weight
@_quota
def create_key(
    name: str,
    scopes: Sequence[str],
    expires_days: float | None,
    weight: int | None,
    quotas: dict[str, int | None],
) -> None:
    """Make a key and print it, this once."""
    if not 1 <= len(name) <= 128:
        raise click.BadParameter("A name has 1 to 128 characters.")
    try:
        text = _keys().create(
            name, map(Scope, scopes), expires_days=expires_days, weight=weight or 1, quotas=Quotas(**quotas)
        )
    except DBAPIError as error:
        raise click.ClickException(_NO_TABLES) from error
    _audit().command("keys.create", id_of(text))
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
        replaces = f"  (owner {key.owner})" if key.owner != key.id else ""
        scopes = ",".join(sorted(key.scopes))
        weight = f"  weight {key.weight}" if key.weight != 1 else ""
        quotas = "".join(f"  {name}={most}" for name, most in asdict(key.quotas).items() if most is not None)
        click.echo(
            f"{key.id}  {_state(key):20}  {scopes:20}  {_day(key.created_at)}  {key.name}{replaces}{weight}{quotas}"
        )


@keys.command("set")
@click.argument("key_id", metavar="ID")
@click.option("--name", help="Another name.")
@_weight
@_quota
def change_key(key_id: str, name: str | None, weight: int | None, quotas: dict[str, int | None]) -> None:
    """Change a key's name, weight or quotas; weight and quotas also of those that replace it."""
    key_id = id_of(key_id)
    if name is not None and not 1 <= len(name) <= 128:
        raise click.BadParameter("A name has 1 to 128 characters.")
    try:
        key = _keys().change(key_id, name=name, weight=weight, quotas=quotas)
    except DBAPIError as error:
        raise click.ClickException(_NO_TABLES) from error
    if key is None:
        raise click.ClickException(f"There is no key {key_id}.")
    _audit().command("keys.set", key_id)
    click.echo(f"{key_id}: weight {key.weight}, quotas {key.quotas.encode()}")


@keys.command("rotate")
@click.argument("key_id", metavar="ID")
@click.option(
    "--overlap-hours",
    type=click.FloatRange(min=0, max=24 * 366),
    default=24,
    show_default=True,
    help="How long the old key still works.",
)
@click.option(
    "--expires-days",
    type=click.FloatRange(min=0, min_open=True),
    help="Left out, the new key lives for as long as the old one was meant to.",
)
def rotate_key(key_id: str, overlap_hours: float, expires_days: float | None) -> None:
    """Make a second key with the same name, scopes and jobs, and let the old one expire."""
    key_id = id_of(key_id)
    try:
        text = _keys().rotate(key_id, overlap_s=overlap_hours * 3600, expires_days=expires_days)
    except NotRotated as error:
        raise click.ClickException(str(error)) from error
    except DBAPIError as error:
        raise click.ClickException(_NO_TABLES) from error
    _audit().command("keys.rotate", f"{key_id} to {id_of(text)}")
    click.echo(text)
    click.echo(f"Keep it: it cannot be shown again. {key_id} works for {overlap_hours:g} h more.", err=True)


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
def revoke_key(key_id: str) -> None:
    """Close a key for good; ID as `keys list` shows it."""
    key_id = id_of(key_id)
    try:
        done = _keys().revoke(key_id)
        admins = _keys().open_admins()
    except DBAPIError as error:
        raise click.ClickException(_NO_TABLES) from error
    if not done:
        raise click.ClickException(f"There is no open key {key_id}.")
    _audit().command("keys.revoke", key_id)
    click.echo(f"{key_id} is revoked.")
    if not admins:
        click.echo("No open key has scope admin now; over HTTP, nobody can manage keys or workers.", err=True)


@click.command("audit")
@click.option("--actor", help="A key's id, `local`, or `cli:<user>`.")
@click.option("--action", help="How its name begins: workers.drain, jobs., keys.")
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), help="Only what is not older.")
@click.option("--limit", type=click.IntRange(min=1, max=100_000), default=100, show_default=True)
@click.option("--prune-days", type=click.FloatRange(min=1), help="Show nothing; remove what is older.")
@with_appcontext
def audit(actor: str | None, action: str | None, hours: float | None, limit: int, prune_days: float | None) -> None:
    """Show who did what that only operators may: time, who, from where, what, result, on what."""
    log = _audit()
    try:
        if prune_days is not None:
            count = log.prune(prune_days)
            log.command("audit.prune", f"{count} rows older than {prune_days:g} days")
            click.echo(f"{count} rows are removed.")
            return
        events = log.newest(actor=actor, action=action, hours=hours, limit=limit)
    except DBAPIError as error:
        raise click.ClickException(_NO_TABLES) from error
    for event in events:
        when = datetime.fromtimestamp(event.at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        who, where = event.actor or "-", event.address or "-"
        click.echo(f"{when}  {who:12}  {where:15}  {event.action:16}  {event.result:20}  {event.target}")


@database.command("upgrade")
def upgrade_database() -> None:
    """Create the tables, or bring them up to date."""
    settings: Settings = current_app.extensions["settings"]
    upgrade(settings.database_url)
    click.echo("The database is up to date.")


def _keys() -> Keys:
    known: Keys = current_app.extensions["keys"]
    return known


def _audit() -> Audit:
    log: Audit = current_app.extensions["audit"]
    return log


def _state(key: Key) -> str:
    if key.revoked_at is not None:
        return f"revoked {_day(key.revoked_at)}"
    return "open" if key.expires_at is None else f"until {_day(key.expires_at)}"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
