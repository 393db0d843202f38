"""What the contract suite knows of a runner: settings under which its real backend runs here, and how to look at it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpu_admin.instances import Instance


@dataclass(frozen=True, slots=True)
class Case:
    """One runner with a real backend. Each runner's tests provide `make_case(folder: Path) -> Case`.

    The folder is the test's own; settings are for GPUs 0 and 1, ports are free ones.
    """

    #: Its name among the settings: "triton".
    runner: str
    #: Its part of the settings, with both models and the broken one supported.
    section: Mapping[str, Any]
    #: Two models that start, on GPU 0 and on GPU 1, both beside each other on one.
    model: str
    other: str
    #: A supported model whose start fails, within a few seconds.
    broken: str
    #: A regular expression found in the reason of that failure.
    broken_reason: str
    #: Ends its backend from outside, hard, as the system's OOM killer would.
    kill: Callable[[Instance], None]
    #: How many server processes or containers of this case exist now.
    servers: Callable[[], int]
    #: Ends everything that the case started, whatever state it is in.
    close: Callable[[], None]
    #: Its class, as "module:Class", where the settings do not know it.
    runner_class: str | None = None
    #: What a service process needs beside: DOCKER_HOST, LD_LIBRARY_PATH.
    environ: Mapping[str, str] = field(default_factory=dict)
