"""How one asks: the public API."""

import threading
from typing import Any

from flask import Flask
from flask.json.provider import DefaultJSONProvider

from app import (
    audit,
    bootstrap,
    commands,
    cors,
    direct,
    docs,
    doctor,
    errors,
    headers,
    health,
    jobs,
    key_routes,
    metrics,
    models,
    openai,
    usage_routes,
    webhooks,
    workers,
)
from app.auth import Guard
from app.console import routes as console
from app.deliveries import Deliveries
from app.destinations import Destinations
from app.dispatch import open_dispatch
from app.keys import Keys
from app.limits import QueueCap, limit_requests
from app.origin import Origins
from app.quotas import QuotaCap
from app.settings import Settings
from app.streams import Streams
from app.tables import open_database
from app.usage import Usage


class JsonProvider(DefaultJSONProvider):
    """Compact JSON in the schemas' order, with Chinese readable and a third of the size."""

    ensure_ascii = False
    sort_keys = False
    compact = True


def create_app(settings: Settings | None = None) -> Flask:
    """The API; nothing is connected before it is needed. Without settings, those of the environment."""
    settings = settings or Settings.from_environ()
    app = Flask(__name__, static_folder=None)
    app.json = JsonProvider(app)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes

    engine = open_database(settings.database_url)
    keys = Keys(engine)
    usage = Usage(engine)
    quotas = QuotaCap(usage)
    extensions: dict[str, Any] = {
        "settings": settings,
        "database": engine,
        "keys": keys,
        "dispatch": open_dispatch(
            engine,
            settings.regions,
            settings.default_region,
            settings.blobs_url,
            max_unsent=settings.max_unsent,
            fair_window=settings.fair_window,
        ),
        "origins": Origins(settings),
        "sync_turns": threading.BoundedSemaphore(settings.sync_waiters),
        "queue_cap": QueueCap(engine, settings.max_queued_per_key, quotas),
        "quotas": quotas,
        "usage": usage,
        "audit": audit.register(app, engine),
        "deliveries": Deliveries(engine, public_url=settings.public_url),
        "destinations": Destinations(settings.webhook_networks, http=settings.webhook_http),
        "api": docs.open_api(app),
    }
    extensions["streams"] = Streams(extensions["dispatch"])
    app.extensions.update(extensions)

    metrics.register(app, extensions["dispatch"].metering)
    errors.register(app, {f"{openai.PREFIX}/": openai.shape})
    headers.register(app, hsts_s=settings.hsts_s)
    cors.register(app, settings.cors_origins)
    app.before_request(Guard(keys, allow_anonymous=settings.allow_anonymous).admit)
    limit_requests(app, settings)
    for blueprint in (
        jobs.blueprint,
        models.blueprint,
        health.blueprint,
        bootstrap.blueprint,
        direct.blueprint,
        workers.blueprint,
        webhooks.blueprint,
        key_routes.blueprint,
        usage_routes.blueprint,
        openai.blueprint,
    ):
        extensions["api"].register_blueprint(blueprint)
    # Loaded here: by itself the API needs nothing of gpu_admin.
    if settings.gpu_admin_mount:
        from app import hosts

        hosts.mount(app, extensions["api"])
    if settings.gpu_admin_mount or settings.gpu_hosts:
        from app import host_routes

        extensions["api"].register_blueprint(host_routes.blueprint)
    app.register_blueprint(docs.blueprint)
    app.register_blueprint(metrics.blueprint)
    console.register(app, extensions["dispatch"], engine)
    app.cli.add_command(commands.keys)
    app.cli.add_command(commands.audit)
    app.cli.add_command(commands.database)
    app.cli.add_command(doctor.doctor)
    return app
