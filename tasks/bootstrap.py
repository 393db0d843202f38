"""Where a worker belongs: its region, with the broker and store to use there.

They are settings of the worker's own, or what the platform's API answers to one request, so that one URL and one key
are enough on a GPU host.
"""

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import requests

from tasks import settings, transport
from tasks.options import SettingsError, WorkerSettings, mask_url, near
from tasks.routing import Region

logger = logging.getLogger(__name__)

PATH = "/api/v1/workers/bootstrap"
#: How long an API that cannot be reached is asked again, before the worker gives up and its supervisor starts it anew.
PATIENCE_S = 120.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0

#: The same request may be answered later.
_PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


class ServerAway(Exception):
    """The platform's API could not be reached for as long as we tried."""


def asks_server(environ: Mapping[str, str], worker: WorkerSettings) -> bool:
    """Whether broker and store come from server.url; REGIONS, or both addresses in the settings, win."""
    given = worker.broker_url and worker.store_url
    return worker.server_url is not None and not given and not environ.get("REGIONS")


def home(
    environ: Mapping[str, str], worker: WorkerSettings, wanted: str | None = None, *, patience_s: float = PATIENCE_S
) -> Region:
    """The region that the worker serves, with the broker and store that workers use there.

    wanted: the region that the command line names; else the settings' own, else the platform's default.
    Raises SettingsError for what will not get better by itself, ServerAway otherwise.
    """
    if asks_server(environ, worker):
        told = fetch(worker, wanted or worker.region, patience_s=patience_s)
        return replace(told, broker=worker.broker_url or told.broker, store=worker.store_url or told.store)
    told_environ = settings.effective(environ)
    regions = settings.load_regions(told_environ)
    name = wanted or worker.region or settings.default_region(told_environ, regions)
    if name not in regions:
        where = "-Q" if wanted else settings.where(environ, "GPU_REGION")
        known = ", ".join(regions)
        raise SettingsError(f"{where}: region {name!r} is not configured; there are {known}.{near(name, regions)}")
    return regions[name].for_workers()


def fetch(worker: WorkerSettings, region: str | None, *, patience_s: float = PATIENCE_S) -> Region:
    """What the API at server.url says about a region, or about its default one.

    Raises SettingsError if it refuses, and ServerAway if it cannot be reached for patience_s.
    """
    url = f"{worker.server_url}{PATH}"
    shown = mask_url(url)
    if transport.is_exposed(url) and not worker.allow_plaintext:
        # Not refused: the user's own example is such a URL.
        logger.warning(
            "%s is not on this machine and not behind TLS: this worker's key, and the passwords of broker and store in "
            "the answer, cross the network in plain text. Set server.url (GPU_SERVER_URL) to https://, or "
            "server.allow_plaintext (%s) to true where that network is trusted.",
            shown,
            transport.VARIABLE,
        )
    ends = time.monotonic() + patience_s
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            answer = _ask(url, worker, region)
        except requests.exceptions.SSLError as error:
            raise SettingsError(
                f"{shown}: its certificate is not trusted: {_reason(error)}. Set REQUESTS_CA_BUNDLE to the file of its "
                "authority, or server.verify_ssl (GPU_SERVER_VERIFY_SSL) to false where you trust the network."
            ) from error
        except (requests.ConnectionError, requests.Timeout) as error:
            trouble = _reason(error)
        except requests.RequestException as error:
            raise SettingsError(f"{shown} cannot be asked: {_reason(error)}. Look at server.url.") from error
        else:
            if answer.status_code < HTTPStatus.INTERNAL_SERVER_ERROR and answer.status_code not in _PASSING:
                told = _read(answer, shown)
                for address in (told.broker, told.store):
                    if _is_here(address) and not _is_here(url):
                        logger.warning(
                            "%s says that %s is to be used, on this very machine; if it is not here, set worker_broker "
                            "and worker_store of %s in the API's REGIONS",
                            *(shown, mask_url(address), told.name),
                        )
                logger.info("%s says: region %s, broker %s", shown, told.name, mask_url(told.broker))
                return told
            trouble = f"it answers {answer.status_code}"
        if time.monotonic() + pause_s > ends:
            within = f" within {patience_s:g} s" if patience_s else ""
            raise ServerAway(f"{shown} could not be asked{within}: {trouble}.")
        logger.warning("%s cannot be asked: %s; trying again in %g s", shown, trouble, pause_s)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _ask(url: str, worker: WorkerSettings, region: str | None) -> requests.Response:
    return requests.get(
        url,
        params={"region": region} if region else {},
        headers={"X-API-Key": worker.api_key} if worker.api_key else {},
        timeout=worker.server_timeout_s,
        verify=worker.verify_ssl,
        # It would take the key along to wherever it leads.
        allow_redirects=False,
    )


def _read(answer: requests.Response, shown: str) -> Region:
    """The region of an answer. Raises SettingsError for any other."""
    try:
        body: Any = answer.json()
    except requests.JSONDecodeError:
        body = None
    said = body if isinstance(body, dict) else {}
    if answer.is_redirect:
        raise SettingsError(
            f"{shown} leads to {mask_url(answer.headers['Location'])}: set server.url (GPU_SERVER_URL) accordingly."
        )
    if answer.status_code == HTTPStatus.OK and all(
        isinstance(said.get(name), str) for name in ("region", "broker", "store")
    ):
        return Region(
            name=said["region"],
            broker=said["broker"],
            store=said["store"],
            latitude=float(said.get("latitude") or 0),
            longitude=float(said.get("longitude") or 0),
        )
    if answer.status_code == HTTPStatus.OK or "code" not in said:
        raise SettingsError(
            f"{shown} answers {answer.status_code}, but not as this platform's API does. Look at server.url "
            "(GPU_SERVER_URL): it is the API's address without a path, such as https://gpu.example.com."
        )
    refused_key = answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
    hint = (
        " Set server.api_key (GPU_API_KEY) to one made there with `flask --app wsgi keys create NAME --scope worker`."
        if refused_key
        else ""
    )
    raise SettingsError(f"{shown} refuses with {answer.status_code}: {said.get('detail')}{hint}")


def _is_here(url: str) -> bool:
    """Whether a URL means the machine that reads it."""
    return (urlsplit(url).hostname or "localhost") in ("localhost", "127.0.0.1", "::1")


def _reason(error: requests.RequestException) -> str:
    """The innermost cause, without the pools and retries around it."""
    cause: Any = error
    while nested := getattr(cause, "reason", None) or next(
        (inner for inner in getattr(cause, "args", ()) if isinstance(inner, Exception)), None
    ):
        if not isinstance(nested, Exception):
            break
        cause = nested
    return re.sub(r"^HTTPS?Connection(Pool)?\([^)]*\): ", "", str(cause)).strip(". ")
