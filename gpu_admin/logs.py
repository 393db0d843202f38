"""How the admin API logs: lines for people, or with LOG_FORMAT=json one JSON object a line.

tasks/logs.py says the same for the platform, which this package knows nothing of.
"""

import logging
from collections.abc import Mapping


def set_up(environ: Mapping[str, str]) -> None:
    """Log to standard error, as LOG_FORMAT says; what it does not know is taken for lines for people."""
    handler = logging.StreamHandler()
    if environ.get("LOG_FORMAT", "").strip().lower() == "json":
        # Only here: lines for people need nothing of it.
        from pythonjsonlogger.json import JsonFormatter

        renamed = {"levelname": "level", "name": "logger", "exc_info": "exception"}
        handler.setFormatter(
            JsonFormatter("%(levelname)s %(name)s %(message)s", timestamp="time", rename_fields=renamed)
        )
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
