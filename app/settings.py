"""Settings of the API, built from a mapping such as os.environ."""

import ipaddress
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from app import gpu_hosts
from app.backlog import MAX_UNSENT
from app.gpu_hosts import GpuHost
from tasks import transport
from tasks.reading import MOST_BODY_BYTES, near
from tasks.routing import Region
from tasks.settings import SettingsError, data_dir, default_region, load_regions

HOST = "127.0.0.1"
PORT = 8000
#: A sync request holds a thread for as long as it waits; 1,100 idle ones take 62 MB (research/reliability.md 3).
THREADS = 1100
#: Threads that never wait for a job, so that health checks, submits and cancels are always answered.
SPARE_THREADS = 100
DIRECT_TOKEN_S = 60
#: Rates are counted in windows of this length.
RATE_WINDOW_S = 10
#: Requests of one key in a window, by what they do; 0 is no limit (research/reliability.md 3).
RATE_SUBMIT = 1000
RATE_SYNC = 2000
RATE_READ = 2000
RATE_CANCEL = 100
#: Jobs of one owner that may be queued at a time; 0 is no cap.
MAX_QUEUED = 1000
RESULT_RETENTION_HOURS = 24
ROW_RETENTION_DAYS = 30
#: Jobs of a queue that are sent ahead of the workers at the least; 0 lets keys take no turns (app/turns.py).
FAIR_WINDOW = 64
#: A year of usage, and a month to look at it.
USAGE_RETENTION_DAYS = 400
#: For ever: where the database lets nobody delete from it, to try would be an error each hour.
AUDIT_RETENTION_DAYS = 0
#: Where a control process shows its metrics.
CONTROL_METRICS_HOST = "127.0.0.1"
CONTROL_METRICS_PORT = 9109
WEBHOOK_DISABLE_DAYS = 5

_ORIGIN = re.compile(r"https?://[a-z0-9._-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:.]+\](:[0-9]{1,5})?")

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Settings:
    """What the API was told."""

    database_url: str
    #: Where params and results that are too large for a row lie: a folder, or a URL of fsspec's.
    blobs_url: str
    regions: Mapping[str, Region]
    #: Where a job goes whose client names no region.
    default_region: str
    host: str = HOST
    port: int = PORT
    threads: int = THREADS
    #: Serve other hosts although no key exists.
    allow_anonymous: bool = False
    #: Largest request body.
    max_body_bytes: int = MOST_BODY_BYTES
    #: How many jobs are held for a region whose broker or store takes none.
    max_unsent: int = MAX_UNSENT
    #: Proxies whose word on the client's address and region is taken.
    trusted_proxies: Sequence[Network] = ()
    #: Regions of the operator's own networks.
    client_regions: Mapping[Network, str] = field(default_factory=dict)
    #: Seconds for which a token of direct mode lets its job in; at most what the ledger remembers of a job.
    direct_token_s: int = DIRECT_TOKEN_S
    #: Hours after its end for which a job's params and result are kept, and days for which its row is.
    result_retention_hours: int = RESULT_RETENTION_HOURS
    row_retention_days: int = ROW_RETENTION_DAYS
    #: Days for which it is known what each key used.
    usage_retention_days: int = USAGE_RETENTION_DAYS
    #: Days for which rows of the audit log are kept; 0 is for ever.
    audit_retention_days: int = AUDIT_RETENTION_DAYS
    #: Where a control process serves /metrics; port 0 is nowhere.
    control_metrics_host: str = CONTROL_METRICS_HOST
    control_metrics_port: int = CONTROL_METRICS_PORT
    #: Serve the admin API of this host too; its settings are gpu_admin's own.
    gpu_admin_mount: bool = False
    #: Other GPU hosts, whose admin API is reached through this one.
    gpu_hosts: Mapping[str, GpuHost] = field(default_factory=dict)
    #: Requests of one key in RATE_WINDOW_S seconds: creates, sync ones, reads, cancels. 0 is no limit.
    rate_submit: int = RATE_SUBMIT
    rate_sync: int = RATE_SYNC
    rate_read: int = RATE_READ
    rate_cancel: int = RATE_CANCEL
    #: Jobs of one owner that may be queued at a time. 0 is no cap.
    max_queued_per_key: int = MAX_QUEUED
    #: The fewest jobs of a queue that are sent before others wait for their key's turn. 0: all are sent at once.
    fair_window: int = FAIR_WINDOW
    #: Sites whose pages may call the API from a browser, as https://app.example.com.
    cors_origins: Sequence[str] = ()
    #: Internal networks that webhooks may be sent to, and whether they may go without TLS.
    webhook_networks: Sequence[Network] = ()
    webhook_http: bool = False
    #: A webhook that nothing has reached for so many days is disabled.
    webhook_disable_days: int = WEBHOOK_DISABLE_DAYS
    #: Where clients reach the API, as https://gpu.example.com; webhooks name jobs by it. Empty: by their path alone.
    public_url: str = ""
    #: For how long browsers are told to come by TLS alone; 0 tells them nothing. Only where TLS stands in front.
    hsts_s: int = 0

    @property
    def sync_waiters(self) -> int:
        """How many requests may wait for their job at once."""
        return max(self.threads - SPARE_THREADS, self.threads // 2)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """The settings that an environment states. Raises SettingsError."""
        regions = load_regions(environ)
        transport.check(regions.values(), allowed=transport.allowed(environ))
        return cls(
            database_url=_database(environ),
            blobs_url=environ.get("BLOBS_URL") or str(data_dir(environ) / "blobs"),
            regions=regions,
            default_region=default_region(environ, regions),
            host=environ.get("HOST") or HOST,
            port=_whole(environ, "PORT", PORT, least=1, most=65_535),
            threads=_whole(environ, "API_THREADS", THREADS, least=4, most=20_000),
            allow_anonymous=_truth(environ, "GPU_ALLOW_ANONYMOUS"),
            max_body_bytes=_whole(environ, "MAX_BODY_BYTES", MOST_BODY_BYTES, least=1024, most=1024**3),
            max_unsent=_whole(environ, "MAX_UNSENT", MAX_UNSENT, least=1, most=10_000_000),
            trusted_proxies=_network_list(environ, "TRUSTED_PROXIES"),
            client_regions=_networks(environ, regions),
            direct_token_s=_whole(environ, "DIRECT_TOKEN_SECONDS", DIRECT_TOKEN_S, least=5, most=300),
            **_retention(environ),
            # Quotas count a month.
            usage_retention_days=_whole(environ, "USAGE_RETENTION_DAYS", USAGE_RETENTION_DAYS, least=32, most=36_500),
            audit_retention_days=_whole(environ, "AUDIT_RETENTION_DAYS", AUDIT_RETENTION_DAYS, least=0, most=36_500),
            control_metrics_host=environ.get("CONTROL_METRICS_HOST") or CONTROL_METRICS_HOST,
            control_metrics_port=_whole(environ, "CONTROL_METRICS_PORT", CONTROL_METRICS_PORT, least=0, most=65_535),
            gpu_admin_mount=_truth(environ, "GPU_ADMIN_MOUNT"),
            gpu_hosts=gpu_hosts.load(environ),
            rate_submit=_whole(environ, "RATE_SUBMIT", RATE_SUBMIT, least=0, most=1_000_000),
            rate_sync=_whole(environ, "RATE_SYNC", RATE_SYNC, least=0, most=1_000_000),
            rate_read=_whole(environ, "RATE_READ", RATE_READ, least=0, most=1_000_000),
            rate_cancel=_whole(environ, "RATE_CANCEL", RATE_CANCEL, least=0, most=1_000_000),
            max_queued_per_key=_whole(environ, "MAX_QUEUED_PER_KEY", MAX_QUEUED, least=0, most=10_000_000),
            fair_window=_whole(environ, "FAIR_WINDOW", FAIR_WINDOW, least=0, most=1_000_000),
            cors_origins=_origins(environ),
            webhook_networks=_network_list(environ, "WEBHOOK_ALLOWED_NETWORKS"),
            webhook_http=_truth(environ, "WEBHOOK_ALLOW_HTTP"),
            webhook_disable_days=_whole(environ, "WEBHOOK_DISABLE_DAYS", WEBHOOK_DISABLE_DAYS, least=1, most=365),
            public_url=_public_url(environ),
            hsts_s=_whole(environ, "HSTS_SECONDS", 0, least=0, most=2**31),
        )


def _database(environ: Mapping[str, str]) -> str:
    url = environ.get("DATABASE_URL") or f"sqlite:///{data_dir(environ) / 'jobs.db'}"
    try:
        make_url(url)
    except ArgumentError:
        # Without the cause: its message would show the URL's password.
        raise SettingsError("DATABASE_URL must be like sqlite:///path or postgresql://user@host/name.") from None
    return url


def _whole(environ: Mapping[str, str], name: str, default: int, *, least: int, most: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or not least <= int(text) <= most:
        raise SettingsError(f"{name} must be a whole number from {least} to {most}, not {text!r}.")
    return int(text)


def _retention(environ: Mapping[str, str]) -> dict[str, int]:
    hours = _whole(environ, "RESULT_RETENTION_HOURS", RESULT_RETENTION_HOURS, least=1, most=87_600)
    # An idempotency key lives as long as its row, and clients may count on a day.
    days = _whole(environ, "ROW_RETENTION_DAYS", ROW_RETENTION_DAYS, least=1, most=3650)
    if hours > 24 * days:
        raise SettingsError(
            f"RESULT_RETENTION_HOURS={hours} is longer than ROW_RETENTION_DAYS={days}: a result goes with its row."
        )
    return {"result_retention_hours": hours, "row_retention_days": days}


def _truth(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


def _network_list(environ: Mapping[str, str], name: str) -> list[Network]:
    texts = [text.strip() for text in environ.get(name, "").split(",")]
    return [_network(name, text) for text in texts if text]


def _public_url(environ: Mapping[str, str]) -> str:
    url = environ.get("PUBLIC_URL", "").strip().rstrip("/")
    if url and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
        raise SettingsError(f"PUBLIC_URL must be like https://gpu.example.com, not {url!r}.")
    return url


def _origins(environ: Mapping[str, str]) -> list[str]:
    texts = [text.strip() for text in environ.get("CORS_ORIGINS", "").split(",")]
    for text in filter(None, texts):
        if not _ORIGIN.fullmatch(text):
            raise SettingsError(
                f"CORS_ORIGINS: {text!r} is no origin as a browser sends it, such as https://app.example.com or "
                "http://localhost:5173: a scheme and a host in lower case, a port where it is not the scheme's own, "
                "and nothing behind it. `*` is not taken."
            )
    return [text for text in texts if text]


def _networks(environ: Mapping[str, str], regions: Mapping[str, Region]) -> dict[Network, str]:
    text = environ.get("CLIENT_REGIONS", "").strip()
    if not text:
        return {}
    rule = 'CLIENT_REGIONS must be a JSON object of regions by network, such as {"10.1.0.0/16": "asia-east"}'
    try:
        given = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{rule}: {error}") from error
    if not isinstance(given, dict):
        raise SettingsError(f"{rule}.")
    found: dict[Network, str] = {}
    for name, region in given.items():
        network = _network("CLIENT_REGIONS", name)
        if not isinstance(region, str) or region not in regions:
            hint = near(str(region), regions)
            raise SettingsError(f"CLIENT_REGIONS: {name} has {region!r}, which is no configured region. {hint}")
        if found.setdefault(network, region) != region:
            raise SettingsError(f"CLIENT_REGIONS: {network} has two regions, {found[network]} and {region}.")
    return found


def _network(variable: str, text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        rule = "is no address and no network such as 10.1.0.0/16 or 2001:db8::/32"
        raise SettingsError(f"{variable}: {text!r} {rule}: {error}.") from error
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped and network.prefixlen >= 96:
        # Addresses of this form are read as the IPv4 address that they carry.
        return ipaddress.ip_network((int(network.network_address.ipv4_mapped), network.prefixlen - 96))
    return network
