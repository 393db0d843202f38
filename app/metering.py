"""What one process counts for /metrics, each thing where it happens once; docs/metrics.md has every name.

Nobody but the process that changed something counts it, so that a sum over all processes is right: requests and
accepted jobs by whoever took them, ends by the leading control process, which is handed each of them once.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection

from app.job_table import JobRow
from app.usage import Meter

logger = logging.getLogger(__name__)

#: Seconds; from a cached embedding to an hour of video.
JOB_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TICK_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.25, 1, 5, 30)
#: Names of models come from workers; beyond so many they count as one.
MOST_MODELS = 100
OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# One more series for each, which nobody asks for.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class Metering:
    """The metrics of this process. Threads may share it."""

    def __init__(self) -> None:
        #: What /metrics shows; whoever knows more adds its collector.
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        registry = self.registry
        kind = ("region", "type")
        self._requests = Counter(
            "gpu_http_requests",
            "HTTP requests, by view, method and status.",
            ("endpoint", "method", "status"),
            registry=registry,
        )
        self._request_s = Histogram(
            "gpu_http_request_duration_seconds",
            "Seconds until an HTTP request was answered; of a stream, until it began.",
            ("endpoint", "method"),
            buckets=HTTP_BUCKETS,
            registry=registry,
        )
        self._accepted = Counter(
            "gpu_jobs_accepted", "Jobs that were accepted, by the region they went to.", kind, registry=registry
        )
        self._ended = Counter(
            "gpu_jobs_ended", "Jobs that have ended, by outcome.", (*kind, "outcome"), registry=registry
        )
        self._dropped = Counter(
            "gpu_jobs_late_outcomes", "Outcomes of jobs that had ended otherwise.", kind, registry=registry
        )
        self._lost = Counter("gpu_jobs_worker_lost", "Attempts that ended with their worker.", kind, registry=registry)
        self._queued_s = Histogram(
            "gpu_job_queue_duration_seconds",
            "Seconds from a job's acceptance to the start of its first attempt, of jobs that have ended.",
            kind,
            buckets=JOB_BUCKETS,
            registry=registry,
        )
        self._ran_s = Histogram(
            "gpu_job_run_duration_seconds",
            "Seconds from the start of a job's first attempt to its end, of jobs that have begun and ended.",
            kind,
            buckets=JOB_BUCKETS,
            registry=registry,
        )
        self._whole_s = Histogram(
            "gpu_job_duration_seconds",
            "Seconds from a job's acceptance to its end.",
            kind,
            buckets=JOB_BUCKETS,
            registry=registry,
        )
        self._tokens = Counter(
            "gpu_tokens", "Tokens of jobs that have ended.", ("type", "model", "kind"), registry=registry
        )
        self._images = Counter("gpu_images", "Pictures that were made.", ("type", "model"), registry=registry)
        self._audio_s = Counter(
            "gpu_audio_seconds", "Seconds of sound that were heard.", ("type", "model"), registry=registry
        )
        self._models: set[str] = set()
        self._ticks = Counter("gpu_control_ticks", "Rounds of the reconciler that went through.", registry=registry)
        self._tick_s = Histogram(
            "gpu_control_tick_duration_seconds", "Seconds of one round.", buckets=TICK_BUCKETS, registry=registry
        )
        self._ticked_at = Gauge(
            "gpu_control_last_tick_timestamp_seconds",
            "When the last round went through, in unix seconds.",
            registry=registry,
        )

    def requested(self, endpoint: str | None, method: str, status: int, seconds: float) -> None:
        """An HTTP request was answered; endpoint: the view's name, None where there is none."""
        endpoint, method = endpoint or "none", method if method in METHODS else OTHER
        self._requests.labels(endpoint, method, str(status)).inc()
        if status != HTTPStatus.NOT_FOUND or endpoint != "none":
            self._request_s.labels(endpoint, method).observe(seconds)

    def accepted(self, row: JobRow) -> None:
        """A job was accepted."""
        self._accepted.labels(row.region, row.type).inc()

    def dropped(self, row: JobRow) -> None:
        """An outcome came for a job that has another one."""
        self._dropped.labels(row.region, row.type).inc()

    def lost(self, row: JobRow) -> None:
        """An attempt's worker was lost."""
        self._lost.labels(row.region, row.type).inc()

    def ticked(self, seconds: float) -> None:
        """The reconciler went round."""
        self._ticks.inc()
        self._tick_s.observe(seconds)
        self._ticked_at.set_to_current_time()

    def follow(self, deliveries: Mapping[str, int]) -> None:
        """Show what somebody else counts: tries to deliver a webhook, by outcome."""
        self.registry.register(_Deliveries(deliveries))

    def account(self, _: Connection, ended: Sequence[JobRow]) -> None:
        """Count jobs that have just ended; one of the accounts of app/ends.py."""
        for row in ended:
            kind = (row.region, row.type)
            self._ended.labels(*kind, row.status).inc()
            if row.completed_at is not None:
                self._whole_s.labels(*kind).observe(max(row.completed_at - row.created_at, 0.0))
                if row.started_at is not None:
                    self._queued_s.labels(*kind).observe(max(row.started_at - row.created_at, 0.0))
                    self._ran_s.labels(*kind).observe(max(row.completed_at - row.started_at, 0.0))
            if row.meter:
                self._used(row)

    def _used(self, row: JobRow) -> None:
        meter = Meter(**json.loads(row.meter or "{}"))
        kind = (row.type, self._known(meter.model or row.model or ""))
        self._tokens.labels(*kind, "prompt").inc(meter.prompt_tokens)
        self._tokens.labels(*kind, "completion").inc(meter.completion_tokens)
        self._images.labels(*kind).inc(meter.images)
        self._audio_s.labels(*kind).inc(meter.audio_s)

    def _known(self, model: str) -> str:
        if model not in self._models and len(self._models) >= MOST_MODELS:
            return OTHER
        self._models.add(model)
        return model


class _Deliveries(Collector):
    def __init__(self, counted: Mapping[str, int]) -> None:
        self._counted = counted

    def collect(self) -> Iterator[Metric]:
        """The counts as they are."""
        family = CounterMetricFamily("gpu_webhook_deliveries", "Tries to deliver a webhook.", labels=("outcome",))
        for outcome, count in list(self._counted.items()):
            family.add_metric((outcome,), count)
        yield family
