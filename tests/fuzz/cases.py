"""schemathesis over a service's whole OpenAPI document: cases that keep to it and cases that do not."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import schemathesis
from schemathesis.checks import CheckContext
from schemathesis.config import (
    CacheConfig,
    ChecksConfig,
    GenerationConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
)
from schemathesis.config._checks import NotAServerErrorConfig, PositiveDataAcceptanceConfig, SimpleCheckConfig
from schemathesis.core.failures import Failure, ServerError
from schemathesis.core.transport import Response
from schemathesis.engine import Status, from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished
from schemathesis.transport.wsgi import WSGITransport

from app.examples import JOBS
from tests.fuzz.services import Service

JOB_PATHS = ("/api/v1/jobs", "/api/v1/jobs/sync")
#: By job type, the param that no other type has.
KNOWN_BY = {
    "llm": "messages",
    "image_gen": "prompt",
    "vision": "image_base64",
    "whisper": "audio_base64",
    "embedding": "input",
    "comfyui": "workflow",
    "triton": "inputs",
}
#: Files that are what they should be.
FILES = {name: JOBS[kind]["value"]["params"][name] for kind, name in KNOWN_BY.items() if name.endswith("_base64")}


@dataclass
class Report:
    """What came of a run."""

    #: Requests by the status of their answer, and by the phase that made them.
    statuses: Counter[int] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    #: Each fault once, with the command that shows it.
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        """How many requests were answered."""
        return sum(self.statuses.values())

    def add(self, other: "Report") -> None:
        """Count another run's too."""
        self.statuses += other.statuses
        self.phases += other.phases
        self.faults = {**other.faults, **self.faults}

    def __str__(self) -> str:
        by_status = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        return f"{self.cases} cases ({by_status}), {len(self.faults)} faults"


def run(service: Service, *, seed: int, examples: int, without: str | None = None) -> Report:
    """Try every operation of the service's document, with so many random cases each beside those that are enumerated.

    The same seed makes the same cases. without: a pattern of paths that are left out.
    """
    config = SchemathesisConfig(
        seed=seed,
        cache=CacheConfig(enabled=False),
        projects=ProjectsConfig(
            default=ProjectConfig(
                headers=dict(service.headers),
                continue_on_failure=True,
                checks=_checks(),
                generation=GenerationConfig(max_examples=examples, database="none", no_shrink=True),
            )
        ),
    )
    schema = schemathesis.openapi.from_wsgi("/openapi.json", service.app, config=config)
    if without is not None:
        schema = schema.exclude(path_regex=without)
    report = Report()
    with mock.patch.object(WSGITransport, "send", _send):
        for event in from_schema(schema).execute():
            if isinstance(event, FatalError):
                raise event.exception
            if isinstance(event, NonFatalError):
                report.faults.setdefault(f"{event.label}: {event.value!r}"[:500], "")
            if isinstance(event, ScenarioFinished):
                _count(event, report)
    return report


@schemathesis.check
def documented_server_error(ctx: CheckContext, response: Response, case: schemathesis.Case) -> bool | None:
    """5xx only where the document names the status, and never for a view that failed.

    The document's `default` stands for refusals; a job that failed is shown with 500 by the sync route, as it says.
    """
    if response.status_code < 500:
        return None
    named = case.operation.definition.raw["responses"]
    if str(response.status_code) in named and b"internal_error" not in response.content:
        return None
    raise ServerError(operation=case.operation.label, status_code=response.status_code)


@schemathesis.hook
def map_case(context: schemathesis.HookContext, case: schemathesis.Case) -> schemathesis.Case:
    """Let most bodies that keep to the document be jobs that run: the rules that it cannot state are kept too."""
    valid = case.meta is not None and case.meta.generation.mode.is_positive
    if (
        valid
        and case.operation.path in JOB_PATHS
        and isinstance(case.body, dict)
        and isinstance(case.body.get("params"), dict)
    ):
        params = case.body["params"]
        job_type = next((kind for kind, name in KNOWN_BY.items() if name in params), None)
        if job_type is not None:
            case.body["type"] = job_type
        for name, file in FILES.items():
            if name in params:
                params[name] = file
        for side in ("width", "height"):
            if isinstance(params.get(side), int):
                params[side] -= params[side] % 8
        for name in ("model", "region"):
            case.body.pop(name, None)
    return case


def _checks() -> ChecksConfig:
    """Every check but those whose rule is not ours."""
    return ChecksConfig(
        # documented_server_error stands for it.
        not_a_server_error=NotAServerErrorConfig(enabled=False),
        # Rules between fields (params by type, width and height, a GPU that is there) are beyond the document.
        positive_data_acceptance=PositiveDataAcceptanceConfig(enabled=False),
        # A job that is deleted is cancelled, and shown as such.
        use_after_free=SimpleCheckConfig(enabled=False),
        # /jobs/sync is also a path of /jobs/{job_id}, whose methods it allows: there is no such job.
        allow_header_conformance=SimpleCheckConfig(enabled=False),
    )


_sent = WSGITransport.send


def _send(self: WSGITransport, case: schemathesis.Case, **kwargs: Any) -> Response:
    # schemathesis 4.32 leaves settings of sockets in the requests of its probes, which werkzeug does not know.
    for name in ("max_redirects", "verify", "cert", "proxies"):
        kwargs.pop(name, None)
    return _sent(self, case, **kwargs)


def _count(event: ScenarioFinished, report: Report) -> None:
    for interaction in event.recorder.interactions.values():
        if interaction.response is not None:
            report.statuses[interaction.response.status_code] += 1
            report.phases[str(event.phase.value)] += 1
    for checks in event.recorder.checks.values():
        for check in checks:
            if check.status is Status.FAILURE and check.failure_info is not None:
                failure: Failure = check.failure_info.failure
                report.faults.setdefault(
                    f"{failure.operation}: {failure.title}: {_brief(failure)}", check.failure_info.code_sample
                )


def _brief(failure: Failure) -> str:
    return " ".join(failure.message.split())[:300]
