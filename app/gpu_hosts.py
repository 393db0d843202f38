"""GPU hosts whose admin API (gpu_admin) is reached through this one: where they are, and one request to one of them.

Nothing of a client's request goes there but what a view passes on, and nothing is sent to an address that the settings
do not state: no redirect is followed, no proxy is asked.

    HostFailure
    ├── Unreachable    nothing answered
    ├── TimedOut       no whole answer within the deadline
    └── Unusable       what answered is no gpu_admin, or does not take our key
"""

import json
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from tasks import transport
from tasks.settings import SettingsError

#: The host that the API itself runs on, where its admin API is mounted (app/hosts.py).
LOCAL = "local"
#: Where gpu_admin has its resources.
PREFIX = "/api/v1"
CONNECT_S = 5.0
#: For a look at whether a host is there, and for whatever it answers from what it knows.
LOOK_S = 5.0
READ_S = 15.0
#: Whole logs are the longest answers.
MOST_ANSWER_BYTES = 16 * 2**20
#: Hosts that are looked at at once.
MOST_AT_ONCE = 16

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
_KEY = re.compile(r"[\x21-\x7e]+")


class HostFailure(Exception):
    """A host gave no answer that can be passed on; the message says why."""


class Unreachable(HostFailure):
    """Nothing answered."""


class TimedOut(HostFailure):
    """No whole answer within the deadline; what was asked may have been done."""


class Unusable(HostFailure):
    """What answered is no gpu_admin, or does not take our key."""


@dataclass(frozen=True, slots=True)
class GpuHost:
    """A host of the settings."""

    name: str
    #: Of its gpu_admin, without a slash at the end.
    url: str
    key: str | None = field(default=None, repr=False)
    #: A file of certificates to trust; None is the usual ones.
    certificates: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a host answered: a status and JSON."""

    status: int
    body: Any


def ask(
    host: GpuHost,
    method: str,
    path: str,
    *,
    query: Mapping[str, Any] | None = None,
    body: Mapping[str, Any] | None = None,
    deadline_s: float = READ_S,
) -> Answer:
    """Send one request to the host's gpu_admin. Raises Unreachable, TimedOut or Unusable.

    path: below PREFIX, with its names quoted.
    """
    end = time.monotonic() + deadline_s
    headers = {"Accept": "application/json", **({"X-API-Key": host.key} if host.key else {})}
    try:
        with requests.Session() as session:
            # Neither the environment's proxies nor its .netrc: the key is for the host alone.
            session.trust_env = False
            response = session.request(
                method,
                f"{host.url}{PREFIX}/{path}",
                params=query,
                json=body,
                headers=headers,
                timeout=(min(CONNECT_S, deadline_s), deadline_s),
                verify=host.certificates or True,
                allow_redirects=False,
                stream=True,
            )
            return _checked(host, response.status_code, _read(response, end))
    except (requests.ReadTimeout, ReadTimeoutError, TimeoutError) as error:
        raise TimedOut(f"Host {host.name} did not answer within {deadline_s:g} s.") from error
    except requests.exceptions.SSLError as error:
        raise Unreachable(f"Host {host.name} has no certificate that is trusted.") from error
    except (requests.RequestException, HTTPError) as error:
        # Not the error's text: it names addresses of the inside.
        raise Unreachable(f"Host {host.name} cannot be reached ({type(error).__name__}).") from error


def look(hosts: Iterable[GpuHost]) -> dict[str, str | None]:
    """Why each host cannot be used now, by name; None for one that can. Takes LOOK_S at the most for MOST_AT_ONCE."""
    known = list(hosts)
    if not known:
        return {}
    with ThreadPoolExecutor(min(len(known), MOST_AT_ONCE)) as pool:
        return dict(zip((host.name for host in known), pool.map(_trouble, known), strict=True))


def load(environ: Mapping[str, str]) -> dict[str, GpuHost]:
    """The hosts that an environment states, by name. Raises SettingsError."""
    urls = _pairs("GPU_HOSTS", environ.get("GPU_HOSTS", ""))
    keys = _keys(environ)
    if strange := next((name for name in keys if name not in urls), None):
        raise SettingsError(f"GPU_HOST_KEYS: there is no host {strange!r} in GPU_HOSTS.")
    for name, url in urls.items():
        if name == LOCAL:
            raise SettingsError(f"GPU_HOSTS: {LOCAL} is this host (GPU_ADMIN_MOUNT); call it otherwise.")
        if not _NAME.fullmatch(name):
            raise SettingsError(f"GPU_HOSTS: {name!r} is no name: letters, digits, dots, dashes and underscores.")
        if not _URL.fullmatch(url):
            # Not the URL itself: a password may stand in it.
            raise SettingsError(
                f"GPU_HOSTS: {name} must have a URL like https://gpu-7.example.com:6004, without user or query."
            )
        if urlsplit(url).scheme == "http" and transport.is_exposed(url) and not transport.allowed(environ):
            raise SettingsError(
                f"GPU_HOSTS: {name} is not on this machine and not behind TLS: its key would cross the network in "
                f"plain text. Use https://, or set {transport.VARIABLE}=1 where that network is trusted."
            )
    certificates = environ.get("REQUESTS_CA_BUNDLE") or None
    return {name: GpuHost(name, url.rstrip("/"), keys.get(name), certificates) for name, url in urls.items()}


def _keys(environ: Mapping[str, str]) -> dict[str, str]:
    text, path = environ.get("GPU_HOST_KEYS", ""), environ.get("GPU_HOST_KEYS_FILE", "")
    if text and path:
        raise SettingsError("GPU_HOST_KEYS and GPU_HOST_KEYS_FILE: set one of them.")
    if path:
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"GPU_HOST_KEYS_FILE: {path} cannot be read: {error}.") from error
    keys = _pairs("GPU_HOST_KEYS", text)
    if wrong := next((name for name, key in keys.items() if not _KEY.fullmatch(key)), None):
        raise SettingsError(f"GPU_HOST_KEYS: the key of {wrong!r} is none.")
    return keys


def _pairs(variable: str, text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in re.split(r"[,\n]", text))):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value):
            # Not the pair: it may be a key.
            raise SettingsError(f"{variable} must be NAME=VALUE, with commas or new lines between.")
        if found.setdefault(name, value) != value:
            raise SettingsError(f"{variable}: {name} stands there twice.")
    return found


def _trouble(host: GpuHost) -> str | None:
    try:
        # It needs a key, and asks neither Docker nor NVML.
        answer = ask(host, "GET", "models/supported", deadline_s=LOOK_S)
    except HostFailure as error:
        return str(error)
    return None if answer.status == HTTPStatus.OK else f"Host {host.name} answered with status {answer.status}."


def _read(response: requests.Response, end: float) -> bytes:
    """The body, within the deadline. Raises TimeoutError and Unusable."""
    data = bytearray()
    while chunk := response.raw.read1(64 * 1024, decode_content=True):
        data += chunk
        if len(data) > MOST_ANSWER_BYTES:
            raise Unusable(f"A host's answer may have at most {MOST_ANSWER_BYTES} bytes.")
        if time.monotonic() > end:
            raise TimeoutError
    return bytes(data)


def _checked(host: GpuHost, status: int, data: bytes) -> Answer:
    if status == HTTPStatus.UNAUTHORIZED:
        raise Unusable(f"Host {host.name} does not take the platform's key; see GPU_HOST_KEYS.")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, list | dict) or 300 <= status < 400:
        raise Unusable(f"What answers at the address of host {host.name} is no gpu_admin: status {status}, no JSON.")
    return Answer(status, body)
