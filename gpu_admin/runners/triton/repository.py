"""A running Triton and its models, by its v2 HTTP API. Every call has a deadline.

NoAnswer    Triton did not say, or nobody listens there
Declined    Triton said no, with its reason
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import requests


class NoAnswer(Exception):
    """Triton gave no answer; the message says where and why."""

    def __init__(self, message: str, *, refused: bool) -> None:
        """refused: nobody listens there, or the connection broke."""
        super().__init__(message)
        self.refused = refused


class Declined(Exception):
    """Triton's own words on why it did not do it."""


class ModelState(StrEnum):
    """What Triton says of a model."""

    #: It serves.
    READY = "READY"
    LOADING = "LOADING"
    UNLOADING = "UNLOADING"
    #: It is not there, or it was never loaded.
    UNAVAILABLE = "UNAVAILABLE"


#: For one question that somebody waits for.
QUICK_S = 0.8
#: For an answer in the middle of a start or a stop.
ANSWER_S = 5.0
#: Of several versions, the first of these that one of them is in.
PRECEDENCE = (ModelState.READY, ModelState.LOADING, ModelState.UNLOADING)


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A model in the index of the repository."""

    state: ModelState = ModelState.UNAVAILABLE
    #: Why it could not be loaded the last time; a model that serves may have one, too.
    reason: str | None = None

    @property
    def busy(self) -> bool:
        """Whether it is on its way to another state."""
        return self.state in (ModelState.LOADING, ModelState.UNLOADING)


class Repository:
    """The models of the Triton at an address, such as 127.0.0.1."""

    def __init__(self, address: str, port: int) -> None:
        self._where = f"{address}:{port}"

    def is_live(self, timeout_s: float) -> bool:
        """Whether Triton takes requests; models may be loading or unloading."""
        try:
            return self._ask("GET", "health/live", timeout_s).ok
        except NoAnswer:
            return False

    def index(self, timeout_s: float) -> dict[str, IndexEntry]:
        """Every model of the repository by its name. Raises NoAnswer."""
        found: dict[str, IndexEntry] = {}
        for row in self._json("POST", "repository/index", timeout_s):
            name, said = row["name"], row.get("state")
            state = ModelState(said) if said in tuple(ModelState) else ModelState.UNAVAILABLE
            reason = row.get("reason")
            entry = IndexEntry(state, None if reason == "unloaded" else reason)
            found[name] = min(found.get(name, entry), entry, key=_precedence)
        return found

    def has_others(self, model_name: str | None) -> bool:
        """Whether Triton has another model than that, or is on its way to one. Raises NoAnswer."""
        index = self.index(ANSWER_S)
        return any(entry.state is not ModelState.UNAVAILABLE for name, entry in index.items() if name != model_name)

    def groups(self, model_name: str, timeout_s: float) -> Sequence[Mapping[str, Any]]:
        """The instance groups of a model that serves; none of one that does not. Raises NoAnswer."""
        answer = self._ask("GET", f"models/{model_name}/config", timeout_s)
        if not answer.ok:
            return ()
        groups: Sequence[Mapping[str, Any]] = _decoded(answer, self._where).get("instance_group", ())
        return groups

    def load(self, model_name: str, config: str | None, timeout_s: float) -> None:
        """Load a model, or bring it to its new configuration; returns once it serves so.

        config: as JSON, in place of its config.pbtxt. What was asked goes on when the time is up.
        Raises NoAnswer, and Declined.
        """
        body = {} if config is None else {"parameters": {"config": config}}
        self._do(f"repository/models/{model_name}/load", body, timeout_s)

    def unload(self, model_name: str, timeout_s: float) -> None:
        """Begin to unload a model. Behind a load that goes on it waits. Raises NoAnswer, and Declined."""
        self._do(f"repository/models/{model_name}/unload", {}, timeout_s)

    def _do(self, path: str, body: Mapping[str, Any], timeout_s: float) -> None:
        answer = self._ask("POST", path, timeout_s, body)
        if not answer.ok:
            try:
                said = str(answer.json()["error"])
            except (ValueError, KeyError, TypeError):
                said = f"Triton answered {answer.status_code} {answer.text[:200]}"
            raise Declined(said)

    def _json(self, method: str, path: str, timeout_s: float) -> Any:
        answer = self._ask(method, path, timeout_s)
        if not answer.ok:
            raise NoAnswer(f"Triton at {self._where} answered {answer.status_code} {answer.text[:200]}", refused=False)
        return _decoded(answer, self._where)

    def _ask(
        self, method: str, path: str, timeout_s: float, body: Mapping[str, Any] | None = None
    ) -> requests.Response:
        try:
            with requests.Session() as session:
                # A proxy of the environment's has no business between this service and its own container.
                session.trust_env = False
                return session.request(
                    method,
                    f"http://{self._where}/v2/{path}",
                    data=json.dumps(body or {}) if method == "POST" else None,
                    # A connection that stays open keeps Triton from ending.
                    headers={"Connection": "close"},
                    timeout=timeout_s,
                    allow_redirects=False,
                )
        except requests.Timeout as error:
            raise NoAnswer(
                f"Triton at {self._where} did not answer within {timeout_s:.1f} s.", refused=False
            ) from error
        except requests.RequestException as error:
            raise NoAnswer(f"Triton at {self._where} does not answer: {_cause(error)}.", refused=True) from error


def _precedence(entry: IndexEntry) -> int:
    return PRECEDENCE.index(entry.state) if entry.state in PRECEDENCE else len(PRECEDENCE)


def _decoded(answer: requests.Response, where: str) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise NoAnswer(f"What answers at {where} is no Triton: {answer.text[:100]!r}", refused=False) from error


def _cause(error: requests.RequestException) -> str:
    """The system's own words at the bottom of an exception of requests."""
    bottom: BaseException = error
    while (below := bottom.__cause__ or bottom.__context__) is not None:
        bottom = below
    return bottom.strerror or str(bottom) if isinstance(bottom, OSError) else str(bottom)
