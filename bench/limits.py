"""What counting requests costs each of them: the same request with limits and without, in turn, in one process.

    python -m bench.limits [--requests 1000] [--rounds 7]

Each app answers GET of a job that is not there, to a key, on SQLite and an embedded Valkey; read the difference.
"""

import argparse
import time
from dataclasses import replace
from statistics import median

from flask import Flask
from flask.testing import FlaskClient

from app import create_app
from app.keys import Keys, Scope
from app.settings import Settings
from app.tables import upgrade
from bench.rig import rig

PATH = "/api/v1/jobs/00000000-0000-4000-8000-000000000000"
#: Never reached.
MANY = 1_000_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with rig() as made:
        made.start_store()
        upgrade(made.environ["DATABASE_URL"])
        settings = Settings.from_environ(made.environ)
        apps = {most: create_app(replace(settings, rate_read=most)) for most in (MANY, 0)}
        keys: Keys = apps[0].extensions["keys"]
        headers = {"X-API-Key": keys.create("bench", [Scope.READ])}
        clients = {most: app.test_client() for most, app in apps.items()}
        for client in clients.values():
            ask(client, headers, 50)
        rounds = [
            {most: ask(client, headers, options.requests) for most, client in clients.items()}
            for _ in range(options.rounds)
        ]
        for name, figure in (("waited, median", 0), ("waited, p99", 1), ("processor, mean", 2)):
            without = median(one[0][figure] for one in rounds)
            more = median(one[MANY][figure] - one[0][figure] for one in rounds)
            print(f"{name:16} {without * 1e3:6.2f} ms a request, {more * 1e3:+.2f} ms counted")
        for app in apps.values():
            close(app)


def ask(client: FlaskClient, headers: dict[str, str], requests: int) -> tuple[float, float, float]:
    """Median and 99th percentile of the seconds of so many requests, and their mean on the processor.

    Raises RuntimeError if one is not answered as it should be.
    """
    waits, began_cpu = [], time.thread_time()
    for _ in range(requests):
        began = time.perf_counter()
        status = client.get(PATH, headers=headers).status_code
        waits.append(time.perf_counter() - began)
        if status != 404:
            raise RuntimeError(f"{status} instead of 404")
    cpu = (time.thread_time() - began_cpu) / requests
    return median(waits), sorted(waits)[int(requests * 0.99)], cpu


def close(app: Flask) -> None:
    """Drop its connections."""
    app.extensions["dispatch"].close()
    app.extensions["database"].dispose()


if __name__ == "__main__":
    main()
