"""The command line and the SDK's streams, on a platform with the echo engine; docs/client.md is run."""

import contextlib
import fcntl
import io
import itertools
import json
import os
import pty
import re
import runpy
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from app.cli import commands
from app.client import ApiError, GPUInferenceClient, Job, JobFailed, JobUnfinished, KeyRefused, NotFound, Stream
from app.keys import Keys, Scope
from app.tables import open_database
from tests.app.conftest import api_of
from tests.rig import ROOT, Platform, until

GUIDE = (ROOT / "docs" / "client.md").read_text()
#: For a process that has much company.
WAIT_S = 45
SLEEP = {"messages": [{"role": "user", "content": "sleep 30"}]}


class Served:
    """A platform's API, and a key for it."""

    def __init__(self, platform: Platform, url: str) -> None:
        self.platform = platform
        self.url = url
        self.key = Keys(open_database(platform.database_url)).create("tester", list(Scope))
        self.client = GPUInferenceClient(url, self.key)
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def environ(self) -> dict[str, str]:
        """What a user has set."""
        return {"GPU_API_URL": self.url, "GPU_API_KEY": self.key}

    def run(self, *arguments: str, told: str | bytes = "", **environ: str) -> Result:
        """The command line in this process; told is its stdin."""
        runner = CliRunner(env={**self.environ, **environ})
        return runner.invoke(commands.gpuctl, list(arguments), input=told, prog_name="gpuctl")

    def json(self, *arguments: str, exit_code: int = 0) -> list[dict]:
        """The documents that it prints with --json, which are all that it prints."""
        done = self.run(*arguments, "--json")
        assert done.exit_code == exit_code, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        """The command line in a process of its own."""
        command = [sys.executable, str(ROOT / "gpuctl"), *arguments]
        process = subprocess.Popen(command, env={**os.environ, **self.environ}, **options)
        self._started.append(process)
        return process

    def close(self) -> None:
        """End what was started."""
        for process in self._started:
            process.kill()
            process.wait()

    def running(self, before: Job | None) -> Job:
        """The job that was sent after that one, once it runs."""
        found: list[Job] = []

        def look() -> bool:
            found[:] = [job for job in self.newest() if before is None or job.id != before.id]
            return bool(found) and found[0].status == "running"

        until(look, WAIT_S)
        return found[0]

    def newest(self) -> list[Job]:
        """The job that was sent last, if there is one."""
        return list(itertools.islice(self.client.jobs(limit=1), 1))


@pytest.fixture(scope="module")
def served(echo_platform: Callable[..., Platform]) -> Iterator[Served]:
    """The API on a port, and one worker that serves every type."""
    platform = echo_platform()
    with api_of(platform) as url:
        made = Served(platform, url)
        yield made
        made.close()


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of one's own, with a photo, a sound and a workflow."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), (255, 140, 0)).save("photo.jpg")
    shutil.copy(ROOT / "local" / "speech.ogg", "speech.ogg")
    workflow = {"1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}}}
    Path("params.json").write_text(json.dumps({"workflow": workflow}))


def test_every_type_has_a_command(served):
    assert served.run("chat", "one two three", "--max-tokens", "2").stdout == "one two\n"
    assert served.run("chat", told="from stdin").stdout == "from stdin\n"
    assert served.run("image", "a cat", "-o", "cat.png", "--seed", "7").stdout == "cat.png\n"
    assert Path("cat.png").read_bytes().startswith(b"\x89PNG")
    assert served.run("image", "a cat", "-o", "-").stdout_bytes.startswith(b"\x89PNG")
    assert served.run("describe", "photo.jpg", "What is it?").stdout == "What is it?\n"
    assert served.run("describe", "photo.jpg", "--ocr").stdout == "ocr\n"
    assert served.run("describe", "-", told=Path("photo.jpg").read_bytes()).stdout == "image_caption\n"
    assert served.run("transcribe", "speech.ogg", "--prompt", "so it is", "--times").stdout == "0.00\t1.00\tso it is\n"
    assert len(served.run("embed", told="a text\nanother\n").stdout.splitlines()) == 2
    done = served.run("submit", "comfyui", "@params.json", "--wait")
    assert "status: completed" in done.stdout


def test_json_is_one_document_and_nothing_else(served):
    (job,) = served.json("chat", "hello")
    assert (job["status"], job["result"]["response"]) == ("completed", "hello")
    (job,) = served.json("image", "a cat", "-o", "cat.png")
    assert job["result"]["file"] == "cat.png"
    assert "image_base64" not in job["result"]
    assert [event["event"] for event in served.json("jobs", "follow", job["job_id"])] == ["status", "result"]
    assert served.json("jobs", "list", "--limit", "1")[0]["items"][0]["job_id"] == job["job_id"]
    assert served.json("submit", "llm", json.dumps(SLEEP), "--dry-run")[0]["region"] == "asia-east"
    assert served.json("models", "--live", "--type", "llm")[0]["items"][0]["id"] == "echo"
    assert served.json("workers", "list")[0]["by_state"] == {"ready": 1}
    assert served.json("watch", "--once")[0]["queues"]["total_queued"] == 0
    assert "total" in served.json("usage")[0]
    assert "gpuctl" in served.json("completion", "bash")[0]["script"]


@pytest.mark.parametrize(
    ("arguments", "environ", "code", "said"),
    [
        (["chat", "fail"], {}, 1, "The message said fail."),
        (["chat"], {"GPU_API_URL": "no url"}, 2, "GPU_API_URL"),
        (["chat"], {"GPU_API_KEY": "钥匙"}, 2, "GPU_API_KEY"),
        (["submit", "llm", "{"], {}, 2, "PARAMS"),
        (["jobs", "list", "--tries", "1"], {"GPU_API_URL": "http://127.0.0.1:1"}, 3, "cannot be reached"),
        (["jobs", "list"], {"GPU_API_KEY": ""}, 4, "GPU_API_KEY"),
        (["jobs", "show", "nothing"], {}, 4, "not_found"),
        (["chat", "hello", "--max-tokens", "0"], {}, 4, "params.max_tokens"),
        (["chat", "sleep 30", "--timeout", "0.3"], {}, 5, "gpuctl jobs follow"),
    ],
    ids=["failed", "no_url", "no_key_text", "no_json", "unreachable", "no_key", "unknown", "invalid", "too_late"],
)
def test_what_goes_wrong_has_its_exit_code_and_a_reason(served, arguments, environ, code, said):
    done = served.run(*arguments, told="hello", **environ)

    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert done.stdout == ""


def test_with_json_a_failed_job_and_a_refusal_are_documents(served):
    assert served.json("chat", "fail", exit_code=1)[0]["status"] == "failed"
    (refused,) = served.json("chat", "hello", "--priority", "3", "--region", "nowhere", exit_code=4)
    assert (refused["error"]["status"], refused["error"]["code"]) == (422, "validation_failed")


def test_of_several_jobs_those_that_can_be_are_cancelled(served):
    running = served.client.submit("llm", SLEEP)
    ended = served.client.chat([{"role": "user", "content": "hi"}])

    (told,) = served.json("jobs", "cancel", ended.id, running.id, exit_code=4)

    assert [item.get("error", {}).get("code") for item in told["items"]] == ["job_ended", None]
    assert running.refresh().status == "cancelled"


def test_a_key_is_made_changed_followed_by_another_and_closed(served):
    made = served.run("keys", "create", "team", "--scope", "infer", "--quota", "jobs_per_day=1")
    assert made.exit_code == 0, made.output
    text = made.stdout.strip()
    key_id = next(key["id"] for key in served.json("keys", "list")[0]["items"] if key["name"] == "team")

    assert served.run("chat", "first", GPU_API_KEY=text).stdout == "first\n"
    refused = served.run("chat", "second", "--tries", "1", GPU_API_KEY=text)
    assert (refused.exit_code, "quota" in refused.stderr) == (4, True)
    assert served.json("keys", "set", key_id, "--quota", "jobs_per_day=none")[0]["quotas"]["jobs_per_day"] is None
    assert served.run("keys", "list", GPU_API_KEY=text).exit_code == 4
    (second,) = served.json("keys", "rotate", key_id)
    assert served.json("keys", "revoke", key_id)[0]["state"] == "revoked"
    assert served.run("jobs", "list", GPU_API_KEY=text).exit_code == 4
    assert served.run("jobs", "list", GPU_API_KEY=second["key"]).exit_code == 0


def test_arguments_are_completed_by_what_the_api_has(served):
    def completed(words: str) -> list[str]:
        environ = {"_GPUCTL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()))}
        return [line.partition(",")[2] for line in served.run(**environ).stdout.splitlines()]

    (name,) = [worker["name"] for worker in served.client.workers()["items"]]
    assert completed("gpuctl workers drain ") == [name]
    assert "drain" in completed("gpuctl workers ")


def test_the_module_of_the_sdk_is_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["client.py", "--help"])
    monkeypatch.delitem(sys.modules, "app.client")

    with pytest.raises(SystemExit) as ended:
        runpy.run_module("app.client", run_name="__main__")

    assert (ended.value.code, "transcribe" in capsys.readouterr().out) == (0, True)


def test_ctrl_c_cancels_a_job_of_which_no_answer_has_come(served):
    proxy, before = CuttingProxy(served.url, held=1), next(iter(served.newest()), None)
    process = served.start("chat", "sleep 30", "--url", proxy.url, stderr=subprocess.DEVNULL)
    job = served.running(before)
    process.send_signal(signal.SIGINT)

    assert process.wait(WAIT_S) == 130
    assert job.refresh().status == "cancelled"
    assert served.newest()[0].id == job.id
    proxy.close()


def test_on_a_terminal_a_chat_is_a_conversation_and_ctrl_c_stops_an_answer(served):
    with Screen() as screen:
        process = screen.start(served, "chat")
        screen.expect(b"> ")
        screen.type(b"hello there\n")
        screen.expect(rb"hello there\r\n(?s:.*)hello there\r\n(?s:.*)> ")
        before = served.newest()[0]
        screen.type(b"sleep 30\n")
        served.running(before)
        process.send_signal(signal.SIGINT)
        screen.expect(rb"is cancelled(?s:.*)> ")
        screen.type(b"\x04")
        assert process.wait(WAIT_S) == 0


def test_on_a_terminal_queues_and_workers_are_watched_until_ctrl_c(served):
    (worker,) = served.client.workers()["items"]

    with Screen() as screen:
        process = screen.start(served, "watch", "--interval", "0.2")
        screen.expect(
            b"asia-east(?s:.*)" + worker["name"].encode() + b"(?s:.*)asia-east(?s:.*)" + worker["name"].encode()
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130


class Screen:
    """A terminal, and what it shows."""

    def __init__(self) -> None:
        self._near, self._far = pty.openpty()
        fcntl.ioctl(self._far, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 200, 0, 0))
        self._shown = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._near)
        os.close(self._far)

    def start(self, served: Served, *arguments: str) -> subprocess.Popen[bytes]:
        """The command line on it."""
        return served.start(*arguments, stdin=self._far, stdout=self._far, stderr=self._far, start_new_session=True)

    def type(self, keys: bytes) -> None:
        """As from the keyboard."""
        self._shown = b""
        os.write(self._near, keys)

    def expect(self, pattern: bytes) -> None:
        """Wait until it is shown."""
        end = time.monotonic() + WAIT_S
        while not re.search(pattern, self._shown):
            ready, _, _ = select.select([self._near], [], [], max(end - time.monotonic(), 0))
            assert ready, self._shown
            self._shown += os.read(self._near, 65_536)


def test_a_broken_stream_goes_on_where_it_was(served):
    proxy = CuttingProxy(served.url)
    client = GPUInferenceClient(proxy.url, served.key)
    stream = client.stream("llm", {"messages": [{"role": "user", "content": "sleep 0.8"}]})

    events = []
    for event in stream:
        events.append(event)
        # What was told already is not told again, and the rest is.
        if event.data.get("status") == "running" or (event.name == "progress" and proxy.cuts < 2):
            proxy.cut()

    assert proxy.cuts
    ids = [event.id for event in events]
    assert len(ids) == len(set(ids))
    assert (events[-1].name, stream.text, stream.job.text) == ("result", "sleep 0.8", "sleep 0.8")
    assert sum(job.id == stream.job.id for job in served.client.jobs()) == 1
    proxy.close()


class CuttingProxy:
    """Forwards connections to a server, until they are cut; of the first `held` ones no answer comes back."""

    def __init__(self, target: str, held: int = 0) -> None:
        self._target = int(target.rpartition(":")[2])
        self._held = held
        self._open: list[socket.socket] = []
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection."""
        self.cuts += 1
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        """No more of it."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                held, self._held = self._held > 0, self._held - 1
                for source, sink in ((near, far), (far, None if held else near)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if sink is not None:
                    sink.sendall(data)


def test_tokens_progress_and_results_reach_callbacks(served):
    tokens, progress = [], []
    messages = [{"role": "user", "content": "one two"}]

    job = served.client.chat(messages, n=2, on_token=tokens.append, timeout=30)
    picture = served.client.generate_image("sleep 0.6", on_progress=progress.append, timeout=30)

    for choice in job["result"]["choices"]:
        assert "".join(token for token in tokens if token.choice == choice["index"]) == choice["response"] == "one two"
    assert all(not token.anew for token in tokens)
    assert {one["unit"] for one in progress} <= {"millisecond", "step"}
    assert progress
    assert (picture.save("cat.png").read_bytes(), picture.about["width"]) == (picture, 64)


def test_an_answer_that_begins_anew_says_so(served):
    stream = Stream(served.client, "x", Said(RESTARTED))

    tokens = [(str(token), token.attempt, token.anew) for token in stream.tokens()]

    assert tokens == [("one ", 1, False), ("two", 1, False), ("three", 2, True), (" four", 2, False)]
    assert (stream.text, stream.job.text, stream.last_id) == ("three four", "three four", "end")


#: A job whose worker was lost; the second token comes in two pieces, between them a ping.
RESTARTED = (
    'id: a\nevent: status\ndata: {"status":"running","attempt":1}\n\n'
    'id: b\nevent: token\ndata: {"delta":"one ","choice":0,"attempt":1}\n\n: ping\n\n'
    'id: c\nevent: token\ndata: {"delta":"two","choice":0,"attempt":1}\r\n\r\n'
    'id: d\nevent: status\ndata: {"status":"running","attempt":2}\n\n'
    'id: e\nevent: token\ndata: {"delta":"three","choice":0,"attempt":2}\n\n'
    'id: f\nevent: token\ndata: {"delta":" four","choice":0,"attempt":2}\n\n'
    "id: end\nevent: result\n"
    'data: {"job_id":"x","type":"llm","status":"completed","result":{"response":"three four"}}\n\n'
)


class Said(io.BytesIO):
    """An answer of a server, seven bytes at a time."""

    def __init__(self, text: str) -> None:
        super().__init__(text.encode())
        self.raw = self
        self.chunked = True

    def iter_content(self, _: int | None) -> Iterator[bytes]:
        return iter(lambda: self.read(7), b"")


def test_a_job_is_a_handle(served):
    job = served.client.submit("llm", {"messages": [{"role": "user", "content": "sleep 0.6"}]})
    seen = [progress["percent"] for progress in job.progress(timeout=30)]

    assert seen == sorted(seen)
    assert job.result()["response"] == job.text == "sleep 0.6"
    with pytest.raises(JobFailed) as failed:
        list(served.client.submit("llm", {"messages": [{"role": "user", "content": "fail"}]}).progress())
    assert failed.value.job["status"] == "failed"
    slow = served.client.submit("llm", SLEEP)
    with pytest.raises(TimeoutError) as late:
        slow.result(timeout=0.2)
    assert isinstance(late.value, JobUnfinished)
    slow.cancel()
    retried = slow.retry()
    assert retried.refresh()["retry_of"] == slow.id
    retried.cancel()


def test_refusals_have_types_of_their_own(served):
    with pytest.raises(NotFound):
        served.client.get("nothing")
    with pytest.raises(KeyRefused) as refused:
        GPUInferenceClient(served.url, "gpi_wrong").workers()
    assert (refused.value.status, isinstance(refused.value, ApiError)) == (401, True)


def test_the_python_of_the_guide_runs(served, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "client", sys.modules["app.client"])
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)

    for block in blocks:
        code = block.replace("http://localhost:8000", served.url).replace('"gpi_..."', repr(served.key))
        exec(compile(code, "docs/client.md", "exec"), names)

    assert len(blocks) >= 4
    assert "engine_error The message said fail." in capsys.readouterr().out
    assert Path("lighthouse.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_of_the_guide_run(served):
    chat = [{"role": "user", "content": "hello"}]
    cancelled = served.client.submit("llm", SLEEP)
    cancelled.cancel()
    known = {
        "JOB": served.client.chat(chat).id,
        "CANCELLED": cancelled.id,
        "RUNNING": served.client.submit("llm", SLEEP).id,
        "WORKER": served.client.workers()["items"][0]["name"],
        "KEY": served.client.create_key("for-the-guide", ["read"])["id"],
    }
    lines = [line for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]

    for line in lines:
        program, *arguments = shlex.split(re.sub(r"\$(\w+)", lambda name: known[name[1]], line))
        done = served.run(*arguments)
        assert (program, done.exit_code) == ("gpuctl", 0), (line, done.output)

    assert len(lines) >= 25
    retried = next(job for job in served.client.jobs() if job["retry_of"] == cancelled.id)
    retried.cancel()
