"""Jobs from the command line: chat, image, describe, transcribe, embed; submit for every type."""

import base64
import contextlib
import functools
import json
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import requests

from app.cli import show
from app.cli.root import Command, Setup, completing, interactive, pass_setup
from app.client import GPUInferenceClient, Job, Stream, Token

Options = dict[str, Any]


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every job; they reach the command together, as `options`."""

    @functools.wraps(command)
    def gather(*args: Any, **given: Any) -> Any:
        options: Options = {
            name: given.pop(name) for name in ("model", "region", "priority", "timeout") if name in given
        }
        options["allow_cross_region"] = not given.pop("no_cross_region")
        return command(*args, **given, options=_given(options))

    for option in (
        click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Give up after so many seconds."),
        click.option("--no-cross-region", is_flag=True, help="Do not let it run in another region."),
        click.option("--priority", type=click.IntRange(0, 9), help="Higher is sooner; 0 unless said."),
        click.option("--region", help="Where it is to run.", shell_complete=completing("regions")),
        click.option("--model", help="Which model; any unless said.", shell_complete=completing("models")),
    ):
        gather = option(gather)
    return gather


@click.command(cls=Command)
@click.argument("prompt", required=False)
@click.option("--system", help="What the model is told first.")
@click.option("--max-tokens", type=int)
@click.option("--temperature", type=float)
@click.option("--seed", type=int)
@job_options
@pass_setup
def chat(setup: Setup, prompt: str | None, system: str | None, options: Options, **params: Any) -> None:
    """Ask a language model; its answer comes as it is written.

    PROMPT is read from stdin where it is left out; on a terminal the conversation goes on until Ctrl-D. Ctrl-C stops an
    answer.
    """
    messages = [{"role": "system", "content": system}] if system else []
    if prompt is None and interactive():
        _converse(setup, messages, {**_given(params), **options})
        return
    messages.append({"role": "user", "content": sys.stdin.read() if prompt is None else prompt})
    _answer(setup, messages, {**_given(params), **options})


@click.command(cls=Command)
@click.argument("prompt")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="The file, - for stdout; else the job's id .png.")
@click.option("--negative-prompt", help="What it should not show.")
@click.option("--width", type=int, help="In pixels.")
@click.option("--height", type=int, help="In pixels.")
@click.option("--steps", type=int)
@click.option("--guidance-scale", type=float)
@click.option("--seed", type=int)
@job_options
@pass_setup
def image(setup: Setup, prompt: str, output: str | None, options: Options, **params: Any) -> None:
    """Draw a picture, a PNG; prints the name of its file."""
    if output == "-" and setup.json:
        raise click.UsageError("--json and the picture cannot both go to stdout.")
    job = run(setup, "image_gen", {"prompt": prompt, **_given(params)}, options)
    file = output or f"{job.id}.png"
    show.write(job, file)
    if setup.json:
        show.document(show.without_picture(job, file))
    elif file != "-":
        click.echo(file)


@click.command(cls=Command)
@click.argument("picture", type=click.File("rb"))
@click.argument("question", required=False)
@click.option("--ocr", is_flag=True, help="Write down the text in it.")
@click.option("--max-tokens", type=int)
@job_options
@pass_setup
def describe(
    setup: Setup, picture: Any, question: str | None, ocr: bool, options: Options, max_tokens: int | None
) -> None:
    """Say what the file PICTURE shows, or answer a QUESTION about it. - is stdin."""
    task = "ocr" if ocr else "image_qa" if question else "image_caption"
    params = {"task": task, "question": question, "max_tokens": max_tokens}
    job = run(setup, "vision", {"image_base64": _encoded(picture.read()), **_given(params)}, options)
    _print(setup, job, job.text)


@click.command(cls=Command)
@click.argument("sound", type=click.File("rb"))
@click.option("--language", help="A code such as zh; found out unless said.")
@click.option("--translate", is_flag=True, help="Into English.")
@click.option("--prompt", help="Names and words to expect.")
@click.option("--times", is_flag=True, help="A line for each stretch, with the seconds at which it begins and ends.")
@job_options
@pass_setup
def transcribe(
    setup: Setup,
    sound: Any,
    language: str | None,
    translate: bool,
    prompt: str | None,
    times: bool,
    options: Options,
) -> None:
    """Write down what is said in the file SOUND. - is stdin."""
    params = {"language": language, "task": "translate" if translate else "transcribe", "prompt": prompt}
    job = run(setup, "whisper", {"audio_base64": _encoded(sound.read()), **_given(params)}, options)
    segments = job["result"]["segments"]
    stretches = (f"{one['start']:.2f}\t{one['end']:.2f}\t{one['text'].strip()}" for one in segments)
    _print(setup, job, "\n".join(stretches) if times else job.text)


@click.command(cls=Command)
@click.argument("texts", nargs=-1)
@click.option("--query", is_flag=True, help="They are searched for, not found: some models read these otherwise.")
@job_options
@pass_setup
def embed(setup: Setup, texts: Sequence[str], query: bool, options: Options) -> None:
    """Make vectors of TEXTS, or of each line of stdin: a JSON array a line."""
    given = list(texts) or sys.stdin.read().splitlines()
    job = run(setup, "embedding", {"input": given, "input_type": "query" if query else "passage"}, options)
    _print(setup, job, "\n".join(map(json.dumps, job["result"]["embeddings"])))


@click.command(cls=Command)
@click.argument("job_type", metavar="TYPE")
@click.argument("params", required=False)
@click.option("--file", "files", multiple=True, metavar="NAME=PATH", help="A param that is a file, as Base64.")
@click.option("--wait", is_flag=True, help="Until it has ended; prints the job.")
@click.option("--follow", is_flag=True, help="Print its events as they happen.")
@click.option("--dry-run", is_flag=True, help="Only say where it would go, and why.")
@job_options
@pass_setup
def submit(
    setup: Setup,
    job_type: str,
    params: str | None,
    files: Sequence[str],
    wait: bool,
    follow: bool,
    dry_run: bool,
    options: Options,
) -> None:
    """Send a job of any TYPE and print its id.

    PARAMS is its params as JSON, @FILE with such, or - for stdin: submit llm '{"messages": [...]}'
    """
    if wait + follow + dry_run > 1:
        raise click.UsageError("Only one of --wait, --follow and --dry-run.")
    given = {**_params(params), **dict(_file(text) for text in files)}
    if wait:
        show_job(setup, run(setup, job_type, given, options))
    elif follow:
        stream = _send(setup.client, job_type, given, options)
        with cancelled_by_ctrl_c(stream.job):
            tell(setup, stream)
    elif "timeout" in options:
        raise click.UsageError("--timeout goes with --wait or --follow.")
    else:
        sent = (setup.client.dry_run if dry_run else setup.client.submit)(job_type, given, **options)
        if setup.json:
            show.document(sent)
        else:
            click.echo(show.job(sent) if dry_run else sent["job_id"])


def run(
    setup: Setup,
    job_type: str,
    params: Mapping[str, Any],
    options: Options,
    on_token: Callable[[Token], object] | None = None,
) -> Job:
    """The completed job; Ctrl-C cancels it. Raises as Stream.finish()."""
    return attend(_send(setup.client, job_type, params, options), on_token)


def attend(stream: Stream, on_token: Callable[[Token], object] | None = None) -> Job:
    """The completed job, with a bar until it is; Ctrl-C cancels it. Raises as Stream.finish()."""
    with cancelled_by_ctrl_c(stream.job), show.Bar() as bar:
        for event in stream:
            match event.name:
                case "status":
                    bar.status(event.data)
                case "progress":
                    bar.move(event.data)
                case "token" if on_token is not None:
                    bar.stop()
                    on_token(stream.token(event))
    return stream.finish()


def tell(setup: Setup, stream: Stream) -> None:
    """Print the events as they happen. Raises as Stream.finish()."""
    for event in stream:
        if setup.json:
            show.document({"id": event.id, "event": event.name, "data": event.data})
        else:
            click.echo(f"{event.name}: {json.dumps(show.shortened(event.data), ensure_ascii=False)}")
    if stream.job.status != "completed":
        # Said already: only the exit code is wanted.
        setup.json = False
        stream.finish()


@contextlib.contextmanager
def cancelled_by_ctrl_c(job: Job) -> Iterator[None]:
    """Whoever interrupts what is done meanwhile wants the job no more."""
    try:
        yield
    except KeyboardInterrupt:
        stop(job)
        raise


def stop(job: Job) -> None:
    """Cancel a job that nobody waits for any more."""
    try:
        job.cancel()
        click.echo(f"Job {job.id} is cancelled.", err=True)
    except requests.RequestException as error:
        click.echo(f"Job {job.id} may go on: {error}", err=True)


def _send(client: GPUInferenceClient, job_type: str, params: Mapping[str, Any], options: Options) -> Stream:
    key = str(uuid.uuid4())
    try:
        return client.stream(job_type, params, idempotency_key=key, **options)
    except KeyboardInterrupt:
        # It may have been accepted, or not: the same key names it in either case.
        body = {name: value for name, value in options.items() if name != "timeout"}
        if "timeout" in options:
            body["queue_timeout_seconds"] = options["timeout"]
        client.tries = 1
        stop(client.submit(job_type, params, idempotency_key=key, **body))
        raise


def _converse(setup: Setup, messages: list[dict[str, str]], options: Options) -> None:
    """Questions and answers until Ctrl-D."""
    with contextlib.suppress(ImportError):
        # Arrows and history in input(), where the system has them.
        import readline  # noqa: F401
    click.echo("Ctrl-C stops an answer, Ctrl-D ends.", err=True)
    while True:
        try:
            asked = input("> ").strip()
        except EOFError:
            click.echo()
            return
        if not asked:
            continue
        messages.append({"role": "user", "content": asked})
        try:
            answer = _answer(setup, messages, options)
        except KeyboardInterrupt:
            click.echo()
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(setup: Setup, messages: Sequence[Mapping[str, str]], options: Options) -> str:
    """A chat's answer, printed as it comes."""

    written = ""

    def write(token: Token) -> None:
        nonlocal written
        if token.anew:
            click.echo("\n[its worker was lost; once more from the beginning]", err=True)
            written = ""
        written += token
        show.text(token, end="")

    params = {"messages": list(messages)}
    job = run(setup, "llm", params, options, None if setup.json else write)
    if setup.json:
        show.document(job)
    else:
        # Of a job that ended before it was listened to, only the result is told.
        show.text(job.text.removeprefix(written))
    return job.text


def _print(setup: Setup, job: Job, told: str) -> None:
    if setup.json:
        show.document(job)
    else:
        show.text(told)


def show_job(setup: Setup, job: Job) -> None:
    """Print all of a job."""
    if setup.json:
        show.document(job)
    else:
        click.echo(show.job(job))


def _given(options: Mapping[str, Any]) -> Options:
    """Those that were typed: what is left out is the server's default."""
    return {name: value for name, value in options.items() if value is not None}


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _params(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text()
        params = json.loads(text)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"PARAMS: {error}") from error
    if not isinstance(params, dict):
        raise click.UsageError("PARAMS: must be a JSON object.")
    return params


def _file(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise click.UsageError(f"--file: {error}") from error
    if not (name and equals):
        raise click.UsageError("--file: must be NAME=PATH.")
    return name, _encoded(data)
