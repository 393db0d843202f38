"""OpenAI's own clients against the running server: `python -m app.serve`, with workers that have the echo engine."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import openai
import pytest
import requests
from openai import OpenAI
from PIL import Image

from app.job_table import JobRow
from app.keys import Keys, Scope
from app.tables import open_database
from tasks.job import JobState
from tests.rig import ROOT, Platform, free_port, until

JS = ROOT / "tests" / "openai_js"
SPEECH = ROOT / "local" / "speech.ogg"
STARTED_S = 40


class Served:
    """A platform, and its API on a port."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        keys = Keys(open_database(platform.database_url))
        self.key = keys.create("client", [Scope.INFER, Scope.READ])
        self.worker_key = keys.create("worker", [Scope.WORKER])
        self.port = free_port()
        environ = {**platform.environ, "PORT": str(self.port), "BLOBS_URL": str(platform.folder / "blobs")}
        self._log = (platform.folder / "api.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app.serve"], cwd=ROOT, env=environ, stdout=self._log, stderr=subprocess.STDOUT
        )

    @property
    def url(self) -> str:
        """Of the server itself; clients of OpenAI's add /v1."""
        return f"http://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        """Whether it serves already."""
        try:
            return requests.get(f"{self.url}/health", timeout=2).ok
        except requests.ConnectionError:
            return False

    def client(self, key: str | None = None, **kwargs: object) -> OpenAI:
        """The official client, which does not retry."""
        options: dict[str, object] = {"max_retries": 0, "timeout": 30, **kwargs}
        return OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, **options)  # type: ignore[arg-type]

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait(timeout=15)
        self._log.close()


@pytest.fixture(scope="module")
def served(echo_platform: Callable[..., Platform]) -> Iterator[Served]:
    """The API as it is run, and one worker that serves every type."""
    started = Served(echo_platform())
    try:
        until(started.answers, STARTED_S)
        yield started
    finally:
        started.close()


@pytest.fixture
def client(served: Served) -> OpenAI:
    """The official client, with a good key."""
    return served.client()


def say(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def data_url(colour: str) -> str:
    """A small picture."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_a_chat_is_a_job_with_an_id_a_priority_a_region_and_usage(served, client):
    headers = {"X-Priority": "7", "X-Region": "asia-south", "X-Timeout": "20"}
    raw = client.chat.completions.with_raw_response.create(
        model="llm", messages=[{"role": "system", "content": "Be brief."}, *say("one two three")], extra_headers=headers
    )
    chat = raw.parse()

    row = served.platform.dispatch.look(raw.headers["x-job-id"])
    assert (row.priority, row.region_wanted, row.timeout_seconds, row.model) == (7, "asia-south", 20, None)
    assert chat.id == f"chatcmpl-{row.id}"
    assert (chat.object, chat.model, chat.created) == ("chat.completion", "echo", int(row.created_at))
    assert [(one.index, one.message.role, one.message.content, one.finish_reason) for one in chat.choices] == [
        (0, "assistant", "one two three", "stop")
    ]
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens) == (5, 3, 8)
    assert raw.headers["x-request-id"]
    assert int(raw.headers["x-ratelimit-remaining-requests"]) < int(raw.headers["x-ratelimit-limit-requests"])
    assert raw.headers["x-ratelimit-reset-requests"].endswith("s")


def test_content_in_parts_and_a_limit_of_tokens_are_taken(client):
    parts = [{"type": "text", "text": "one two"}, {"type": "text", "text": "three"}]

    chat = client.chat.completions.create(
        model="ECHO", messages=[{"role": "user", "content": parts}], max_tokens=1000, max_completion_tokens=2
    )

    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("one two", "length")


def test_several_answers_with_logprobs(client):
    asked = {"model": "echo", "messages": say("one two"), "n": 2, "logprobs": True, "top_logprobs": 1}

    chat = client.chat.completions.create(**asked)
    streamed = list(client.chat.completions.create(**asked, stream=True))

    for index in range(2):
        told = chat.choices[index].logprobs.content
        said = [chunk.choices[0] for chunk in streamed if chunk.choices[0].index == index]
        assert "".join(entry.token for entry in told) == chat.choices[index].message.content == "one two"
        assert all(entry.logprob <= 0 and entry.bytes and len(entry.top_logprobs) == 1 for entry in told)
        assert "".join(choice.delta.content or "" for choice in said) == "one two"
        entries = [entry for choice in said if choice.logprobs for entry in choice.logprobs.content]
        assert [entry.token for entry in entries] == [entry.token for entry in told]
        assert [choice.finish_reason for choice in said][-1] == "stop"


def test_a_chat_streams_its_text_its_usage_and_its_end(served, client):
    stream = client.chat.completions.create(
        model="echo", messages=say("one two three"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)

    first, *_, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "one two three"
    assert (last.choices[0].finish_reason, usage.choices, usage.usage.total_tokens) == ("stop", [], 6)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.id for chunk in chunks} == {f"chatcmpl-{stream.response.headers['x-job-id']}"}


def test_a_picture_in_a_message_goes_to_a_vision_model(served, client):
    picture = {"type": "image_url", "image_url": {"url": data_url("red"), "detail": "low"}}
    asked = [{"type": "text", "text": "What is it?"}, picture]

    raw = client.chat.completions.with_raw_response.create(
        model="vision", messages=[{"role": "user", "content": asked}]
    )

    assert raw.parse().choices[0].message.content == "What is it?"
    assert served.platform.dispatch.look(raw.headers["x-job-id"]).type == "vision"
    elsewhere = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
    with pytest.raises(openai.BadRequestError, match="Only data: URLs") as refused:
        client.chat.completions.create(model="vision", messages=[{"role": "user", "content": [elsewhere]}])
    assert refused.value.param == "messages.0.content"


def test_completions_answer_a_prompt_several_and_in_a_stream(client):
    one = client.completions.create(model="echo", prompt="one two", max_tokens=1)
    several = client.completions.with_raw_response.create(model="echo", prompt=["one", "two three"])
    stream = list(client.completions.create(model="echo", prompt="one two", stream=True))

    assert (one.object, one.choices[0].text, one.choices[0].finish_reason) == ("text_completion", "one", "length")
    both = several.parse()
    assert [(choice.index, choice.text) for choice in both.choices] == [(0, "one"), (1, "two three")]
    assert both.usage.total_tokens == 6
    assert len(several.headers["x-job-id"].split(", ")) == 2
    assert "".join(chunk.choices[0].text for chunk in stream) == "one two"
    assert stream[-1].choices[0].finish_reason == "stop"


def test_embeddings_come_as_base64_by_default_and_as_numbers(client):
    packed = client.embeddings.create(model="embedding", input=["a", "b"])
    plain = client.embeddings.create(model="echo", input="a", encoding_format="float")

    assert [entry.index for entry in packed.data] == [0, 1]
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert (packed.model, packed.usage.prompt_tokens, packed.usage.total_tokens) == ("echo", 2, 2)


def test_pictures_have_the_size_the_number_and_the_seeds_that_were_asked_for(client):
    made = client.images.generate(prompt="a cat", n=2, size="128x64", extra_body={"seed": 5, "steps": 2})

    pictures = [Image.open(io.BytesIO(base64.b64decode(entry.b64_json))) for entry in made.data]
    assert [picture.size for picture in pictures] == [(128, 64)] * 2
    assert [entry.seed for entry in made.data] == [5, 6]


@pytest.mark.parametrize("form", ["json", "text", "srt", "vtt", "verbose_json"])
def test_speech_is_written_down_in_every_format(client, form):
    heard = client.audio.transcriptions.create(model="whisper", file=SPEECH, language="en", response_format=form)

    if form == "verbose_json":
        assert (heard.task, heard.language, heard.segments) == ("transcribe", "en", [])
    elif form == "json":
        assert (heard.text, heard.usage.type) == ("", "duration")
    else:
        assert heard.startswith("WEBVTT" if form == "vtt" else "")


def test_speech_is_translated(client):
    assert client.audio.translations.create(model="echo", file=SPEECH, response_format="verbose_json").text == ""


def test_models_are_those_that_workers_serve(client):
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").model_extra["types"][0] == "comfyui"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("Qwen/Qwen2.5-7B-Instruct")


def test_errors_are_those_classes_of_the_client_that_their_names_say(served, client):
    refusals = [
        (openai.AuthenticationError, "invalid_api_key", served.client(key="gpi_00000000_none"), {}),
        (openai.PermissionDeniedError, "scope_missing", served.client(key=served.worker_key), {}),
        (openai.NotFoundError, "model_not_found", client, {"model": "gpt-4o"}),
        (openai.BadRequestError, "validation_failed", client, {"temperature": 9}),
        (openai.InternalServerError, "engine_error", client, {"messages": say("fail")}),
        (openai.InternalServerError, "no_worker", client, {"model": "Qwen/Qwen2.5-7B-Instruct"}),
    ]
    for kind, code, who, changes in refusals:
        with pytest.raises(kind) as refused:
            who.chat.completions.create(**{"model": "echo", "messages": say("hi"), **changes})
        assert (refused.value.code, type(refused.value)) == (code, kind)
        assert refused.value.request_id
    with pytest.raises(openai.APIError) as broken:
        list(client.chat.completions.create(model="echo", messages=say("fail"), stream=True))
    assert broken.value.code == "engine_error"


def test_a_call_that_takes_too_long_is_not_sent_again_and_names_its_job(served):
    client = served.client(max_retries=2)
    before = len(served.platform.dispatch.rows.page(None, limit=100))

    with pytest.raises(openai.InternalServerError) as late:
        client.chat.completions.create(model="echo", messages=say("sleep 20"), extra_headers={"X-Timeout": "0.5"})

    assert late.value.status_code == 504
    assert late.value.response.headers["x-should-retry"] == "false"
    row = served.platform.dispatch.look(late.value.response.headers["x-job-id"])
    assert len(served.platform.dispatch.rows.page(None, limit=100)) == before + 1
    assert served.platform.ended(row).status is JobState.TIMEOUT


@pytest.mark.parametrize("how", ["whole", "stream"])
def test_a_client_that_hangs_up_cancels_its_job(served, how):
    rows = served.platform.dispatch.rows
    known = {row.id for row in rows.page(None, limit=200)}
    body = json.dumps({"model": "echo", "messages": say("sleep 60"), "stream": how == "stream"})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.key}\r\n"

    def new() -> list[JobRow]:
        return [row for row in rows.page(None, limit=200) if row.id not in known]

    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(
            f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        until(lambda: new() and served.platform.status(new()[0]) is JobState.RUNNING)

    until(lambda: served.platform.status(new()[0]) is JobState.CANCELLED)


def test_the_javascript_client_keeps_the_same_contract(served):
    node = shutil.which("node")
    missing = "node is missing" if node is None else "" if (JS / "node_modules").is_dir() else "npm install has not run"
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{missing}: see tests/openai_js")

    done = subprocess.run(
        [node, "contract.mjs", f"{served.url}/v1", served.key, "gpi_00000000_none", str(SPEECH)],
        cwd=JS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def test_langchain_chats_streams_and_embeds(served):
    # Loaded here: it takes a second or two, and the other tests need nothing of it.
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    address = {"base_url": f"{served.url}/v1", "api_key": served.key, "max_retries": 0}
    chat = ChatOpenAI(model="echo", **address)
    # Texts, not token ids of OpenAI's own vocabulary.
    embeddings = OpenAIEmbeddings(model="echo", check_embedding_ctx_length=False, **address)

    answer = chat.invoke([("system", "Be brief."), ("user", "one two three")])
    assert (answer.content, answer.usage_metadata["total_tokens"]) == ("one two three", 8)
    assert "".join(str(chunk.content) for chunk in chat.stream("four five")) == "four five"
    assert len(embeddings.embed_documents(["a", "b"])) == 2
