"""What every command shares: where the API is, who asks, --json, and which exit code says what."""

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
import requests

from app.cli import show
from app.client import ApiError, GPUInferenceClient, JobCancelled, JobFailed, JobTimedOut, JobUnfinished

EXIT_JOB_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_REFUSED = 4
EXIT_TIMED_OUT = 5
EXIT_INTERRUPTED = 130

URL = "http://localhost:8000"
#: Somebody waits: with these, a server that is away is given up after about two seconds.
TRIES = 4


class Setup:
    """What the environment and the options say."""

    def __init__(self) -> None:
        self.url = os.environ.get("GPU_API_URL") or URL
        self.json = False
        self.tries = TRIES

    @property
    def client(self) -> GPUInferenceClient:
        """The platform. Raises click.UsageError for a key that cannot be one."""
        # It is no option: others could read it in the list of processes.
        key = os.environ.get("GPU_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise click.UsageError("GPU_API_KEY: a key has visible ASCII characters only.")
        return GPUInferenceClient(self.url, key, tries=self.tries)


class Command(click.Command):
    """A command with the options that all have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            _setting("--json", is_flag=True, help="JSON on stdout, and nothing else."),
            _setting("--url", metavar="URL", help=f"The API; else GPU_API_URL, else {URL}."),
            _setting(
                "--tries",
                type=click.IntRange(1, 20),
                help=f"How often to ask while the API is away or asks to come back later; {TRIES} unless said.",
            ),
        ]


class Group(click.Group):
    """Commands that belong together."""

    command_class = Command


class Root(Group):
    """All commands; what they raise becomes a message and an exit code."""

    group_class = Group

    def invoke(self, ctx: click.Context) -> Any:
        """As click does it. Raises click's Exit and UsageError."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except ApiError as error:
            _tell(ctx.obj, error)
            ctx.exit(_code_of(error))
        except requests.JSONDecodeError:
            _fail(ctx.obj, f"What {ctx.obj.url} answers is not JSON: is that the URL of the API?")
            ctx.exit(EXIT_UNREACHABLE)
        except requests.RequestException as error:
            if isinstance(error, ValueError):
                raise click.UsageError(f"{error} (GPU_API_URL, GPU_API_KEY)") from error
            _fail(ctx.obj, f"The API at {ctx.obj.url} cannot be reached: {_cause(error)}")
            ctx.exit(EXIT_UNREACHABLE)


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def gpuctl(ctx: click.Context) -> None:
    """Send jobs to the platform, follow them, and look after it.

    GPU_API_URL says where the API is, GPU_API_KEY who asks.
    """
    ctx.obj = Setup()


#: Gives a command the Setup as its first argument.
pass_setup: Callable[[Callable[..., Any]], Callable[..., Any]] = click.make_pass_decorator(Setup)


def known(kind: str) -> Sequence[str]:
    """Workers, models, regions, jobs or keys, to complete arguments with; [] while the API is away."""
    setup = Setup()
    setup.tries = 1
    try:
        client = setup.client
        match kind:
            case "workers":
                return [worker["name"] for worker in client.workers()["items"] or ()]
            case "models":
                return [model["id"] for model in client.models(live="true")]
            case "regions":
                return list(client.stats()["by_region"])
            case "keys":
                keys = client.keys()
                return [key["id"] for key in keys if key["state"] == "open"]
            case _:
                return [job.id for job in itertools.islice(client.jobs(limit=20), 20)]
    except (requests.RequestException, click.UsageError, LookupError):
        return []


def completing(kind: str) -> Any:
    """For shell_complete: what the API knows of that kind and begins as was typed."""
    return lambda ctx, param, typed: [name for name in known(kind) if name.startswith(typed)]


def _setting(name: str, **attributes: Any) -> click.Option:
    attribute = name.removeprefix("--")

    def keep(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        setup = ctx.find_object(Setup)
        if value and setup is not None:
            setattr(setup, attribute, value)

    return click.Option([name], expose_value=False, callback=keep, **attributes)


def _code_of(error: ApiError) -> int:
    match error:
        case JobFailed() | JobCancelled():
            return EXIT_JOB_FAILED
        case JobTimedOut() | JobUnfinished():
            return EXIT_TIMED_OUT
        case _:
            return EXIT_UNREACHABLE if error.status >= 500 else EXIT_REFUSED


def _tell(setup: Setup, error: ApiError) -> None:
    """Why, on stderr; with --json the job, or the problem, on stdout."""
    click.echo(f"{error.code or error.status}: {error.detail}", err=True)
    for path, messages in error.errors.items():
        click.echo(f"  {path}: {' '.join(messages)}", err=True)
    if error.code == "key_required":
        click.echo("  Set GPU_API_KEY.", err=True)
    if isinstance(error, JobUnfinished) and error.job is not None:
        click.echo(f"  gpuctl jobs follow {error.job['job_id']}", err=True)
    if setup.json:
        show.document(error.job or {"error": {"status": error.status, "code": error.code, "detail": error.detail}})


def _fail(setup: Setup, message: str) -> None:
    click.echo(message, err=True)
    if setup.json:
        show.document({"error": {"status": None, "code": "unreachable", "detail": message}})


def _cause(error: requests.RequestException) -> str:
    """The innermost reason, without the names of pools and objects."""
    if isinstance(error, requests.Timeout):
        return "it does not answer in time."
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    while isinstance(reason, Exception) and reason.__cause__ is not None:
        reason = reason.__cause__
    return str(reason or error)


def interactive() -> bool:
    """Whether somebody types, and reads what is written."""
    return sys.stdin.isatty() and sys.stdout.isatty()
