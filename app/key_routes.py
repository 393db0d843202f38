"""The keys resource: who may ask, what for, how much, and with what weight."""

import time
from dataclasses import asdict, fields
from typing import Any

from flask import current_app
from marshmallow import Schema, validate
from marshmallow import fields as field

from app.audit import note_target
from app.auth import requires
from app.errors import KeyNeeded, KeyNotFound
from app.keys import MOST_WEIGHT, Key, Keys, NotRotated, Quotas, Scope, id_of
from app.parsing import Blueprint
from app.schemas import Timestamp
from engines.fields import Int, Number, Text

blueprint = Blueprint("keys", __name__, url_prefix="/api/v1/keys", description="API keys: weights and quotas too.")

#: A quota's number; larger ones are no limit.
MOST_QUOTA = 10**15
LONGEST_DAYS = 36_500
LONGEST_OVERLAP_H = 24 * 366

_name: dict[str, Any] = {
    "validate": [
        validate.Length(min=1, max=128),
        validate.Regexp(r"^[^\x00-\x1f\x7f]*$", error="Must have no control characters."),
    ],
    "metadata": {"example": "team-search"},
}
_weight: dict[str, Any] = {
    "validate": validate.Range(min=1, max=MOST_WEIGHT),
    "metadata": {"description": "Turns for each turn of a key of weight 1, where jobs of the same priority wait."},
}
_scopes = field.List(
    field.Enum(Scope, by_value=True),
    required=True,
    validate=validate.Length(min=1, max=len(Scope)),
    metadata={"example": ["infer", "read"]},
)
_days = Number(
    load_default=None,
    allow_none=True,
    validate=validate.Range(min=0, min_inclusive=False, max=LONGEST_DAYS),
    metadata={"description": "Days until it expires. null: never; of a rotated key, as long as the old one lived."},
)

#: What a key may use in a day or a month of UTC; null is no limit.
QuotasView = Schema.from_dict(
    {
        one.name: Int(
            allow_none=True,
            validate=validate.Range(min=0, max=MOST_QUOTA),
            metadata={"description": f"Most {one.name.replace('_', ' ')}, by UTC; null is no limit."},
        )
        for one in fields(Quotas)
    },
    name="Quotas",
)


class KeyCreate(Schema):
    """A key that is to be made."""

    name = Text(required=True, **_name)
    scopes = _scopes
    expires_days = _days
    weight = Int(load_default=1, **_weight)
    quotas = field.Nested(QuotasView, load_default=dict)


class KeyChange(Schema):
    """What is to change. Weight and quotas change for every key of the same owner; a quota left out stays."""

    name = Text(load_default=None, **_name)
    weight = Int(load_default=None, **_weight)
    quotas = field.Nested(QuotasView, load_default=dict)


class KeyRotate(Schema):
    """How one key follows another."""

    overlap_hours = Number(
        load_default=24.0,
        validate=validate.Range(min=0, max=LONGEST_OVERLAP_H),
        metadata={"description": "How long the old key still works."},
    )
    expires_days = _days


class ForceQuery(Schema):
    """Whether to do what leaves nobody to manage keys over HTTP."""

    force = field.Boolean(
        load_default=False, metadata={"description": "true: do it even if no open key has scope admin then."}
    )


class KeyView(Schema):
    """A key without its secret."""

    id = field.String(metadata={"description": "What its text has after `gpi_`.", "example": "1a2b3c4d"})
    name = field.String()
    scopes = field.List(field.String())
    owner = field.String(metadata={"description": "Whom its jobs belong to; the same for keys that replace another."})
    state = field.String(validate=validate.OneOf(["open", "expired", "revoked"]))
    created_at = Timestamp()
    expires_at = Timestamp(allow_none=True)
    revoked_at = Timestamp(allow_none=True)
    weight = field.Integer()
    quotas = field.Nested(QuotasView)


class KeyMade(KeyView):
    """A new key with its text."""

    key = field.String(metadata={"description": "To be sent as X-API-Key. Shown this once."})


class KeyList(Schema):
    """Every key, oldest first."""

    items = field.List(field.Nested(KeyView))


@blueprint.get("")
@requires(Scope.ADMIN)
@blueprint.response(200, KeyList)
def index() -> dict[str, Any]:
    """Every key, without its secret; revoked ones too."""
    return {"items": [_view(key) for key in _keys().all()]}


@blueprint.post("")
@requires(Scope.ADMIN)
@blueprint.arguments(ForceQuery(), location="query")
@blueprint.arguments(KeyCreate())
@blueprint.response(201, KeyMade)
@blueprint.alt_response(409, description="The first key, and it is not for admins.")
def create(query: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Make a key. Its text is in this answer and nowhere else.

    While there is none, a program on the server itself may make the first; from then on every request needs one.
    """
    if Scope.ADMIN not in wanted["scopes"] and not query["force"] and not _keys().all():
        detail = (
            "From the first key on every request needs one, and one without scope admin can make no others. Make one "
            "with scope admin first; or send force=true, and make the others on the server: flask --app wsgi keys."
        )
        raise KeyNeeded("no_admin_left", detail)
    text = _keys().create(**{**wanted, "quotas": Quotas(**wanted["quotas"])})
    note_target(f" {id_of(text)}")
    return _made(text)


@blueprint.patch("/<key_id>")
@requires(Scope.ADMIN)
@blueprint.arguments(KeyChange())
@blueprint.response(200, KeyView)
@blueprint.alt_response(404, description="No such key.")
def change(wanted: dict[str, Any], key_id: str) -> dict[str, Any]:
    """Change a key's name, weight or quotas; the last two also of the keys that replace it. They hold at once."""
    key = _keys().change(key_id, **wanted)
    if key is None:
        raise KeyNotFound(key_id)
    return _view(key)


@blueprint.post("/<key_id>/rotate")
@requires(Scope.ADMIN)
@blueprint.arguments(KeyRotate())
@blueprint.response(201, KeyMade)
@blueprint.alt_response(404, description="No such key.")
@blueprint.alt_response(409, description="It is not open, or another key of its owner is open too.")
def rotate(wanted: dict[str, Any], key_id: str) -> dict[str, Any]:
    """Make a second key that is like this one and has its jobs; this one works for a while longer."""
    _find(key_id)
    try:
        text = _keys().rotate(key_id, overlap_s=wanted["overlap_hours"] * 3600, expires_days=wanted["expires_days"])
    except NotRotated as error:
        raise KeyNeeded("key_not_rotated", str(error)) from error
    note_target(f" to {id_of(text)}")
    return _made(text)


@blueprint.delete("/<key_id>")
@requires(Scope.ADMIN)
@blueprint.arguments(ForceQuery(), location="query")
@blueprint.response(200, KeyView)
@blueprint.alt_response(404, description="No such key.")
@blueprint.alt_response(409, description="It is the last open one with scope admin.")
def revoke(query: dict[str, Any], key_id: str) -> dict[str, Any]:
    """Close a key for good, at once. To close it again is fine."""
    key = _find(key_id)
    if not query["force"] and _keys().open_admins() == [key.id]:
        detail = (
            "This is the last open key with scope admin: without it nobody can manage keys or workers over HTTP. "
            "Make another first, or send force=true."
        )
        raise KeyNeeded("no_admin_left", detail)
    _keys().revoke(key_id)
    return _view(_find(key_id))


def _keys() -> Keys:
    keys: Keys = current_app.extensions["keys"]
    return keys


def _find(key_id: str) -> Key:
    key = _keys().find(key_id)
    if key is None:
        raise KeyNotFound(key_id)
    return key


def _view(key: Key) -> dict[str, Any]:
    """What KeyView takes."""
    state = "revoked" if key.revoked_at is not None else "open" if key.is_open(time.time()) else "expired"
    return {**asdict(key), "scopes": sorted(key.scopes), "state": state}


def _made(text: str) -> dict[str, Any]:
    return {**_view(_find(id_of(text))), "key": text}
