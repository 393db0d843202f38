"""Sixteen chats at once: tokens per second through the platform, against the bare engine and the library alone.

    python -m engines.packaged smollm2-135m-instruct
    python -m bench.chat [--clients 16] [--tokens 32] [--rounds 2]

The three take turns, each alone on the machine, on the same prompts and weights, greedy. The machine's speed drifts:
read the ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from bench.rig import Client, Rig, rig

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SUBJECTS = ("the sea", "bread", "a small town in winter", "how a bicycle stays upright", "the number seven")


def main() -> None:
    """Measure and print; with --side, be one side in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=("engine", "library"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        speeds = engine(options) if options.side == "engine" else library(options)
        print(json.dumps(speeds))
        return
    names = ("platform, 1 client", f"platform, {options.clients} clients")
    figures: dict[str, list[float]] = {name: [] for name in (*names, "engine", "library")}
    for _ in range(options.rounds):
        with rig() as made:
            made.start_platform(GPU_LLM_MODEL=MODEL)
            ask(made, prompts(options.clients)[:2], 2, 4)
            figures[names[0]].append(ask(made, prompts(options.clients)[:4], 1, options.tokens))
            figures[names[1]].append(ask(made, prompts(options.clients), options.clients, options.tokens))
        for side in ("engine", "library"):
            figures[side].append(elsewhere(side, options))
    shown = {name: median(speeds) for name, speeds in figures.items()}
    print(f"{options.clients} prompts of {options.tokens} tokens, greedy, medians of {options.rounds} rounds")
    rows = (
        ("generate(), one at a time", "library"),
        ("bare engine, all at once", "engine"),
        *((name, name) for name in names),
    )
    for title, name in rows:
        by_engine, by_library = shown[name] / shown["engine"], shown[name] / shown["library"]
        print(f"{title:28}{shown[name]:8.1f} tokens/s{by_engine:8.2f} x engine{by_library:8.2f} x one at a time")


def prompts(count: int) -> list[str]:
    """So many questions, no two alike."""
    return [f"{n}. Tell me a long story about {SUBJECTS[n % len(SUBJECTS)]}." for n in range(count)]


def params(prompt: str, tokens: int) -> dict[str, object]:
    """LlmParams of one question."""
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}


def ask(made: Rig, questions: list[str], clients: int, tokens: int) -> float:
    """Tokens per second of the questions through the platform, so many at a time."""

    def work(question: str) -> int:
        body = {"type": "llm", "params": params(question, tokens)}
        job = Client(made.port).post("/api/v1/jobs/sync?timeout=600", body)
        result: dict[str, dict[str, int]] = job["result"]  # type: ignore[assignment]
        return result["usage"]["completion_tokens"]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        done = sum(pool.map(work, questions))
    return done / (time.perf_counter() - began)


def elsewhere(side: str, options: argparse.Namespace) -> float:
    """Tokens per second of another side, in a process of its own."""
    command = [sys.executable, "-m", "bench.chat", "--side", side]
    command += ["--clients", str(options.clients), "--tokens", str(options.tokens)]
    environ = {**os.environ, "GOMP_SPINCOUNT": "10000"}
    ran = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True)
    return float(ran.stdout.split()[-1])


def engine(options: argparse.Namespace) -> float:
    """The engine that the worker holds, called from as many threads, with nothing around it."""
    from engines.catalogue import JobType
    from engines.loading import detect_device, load, resolve
    from engines.schemas import load_params

    loaded = load(resolve(JobType.LLM, MODEL), detect_device())

    def work(prompt: str) -> int:
        filled = load_params(JobType.LLM, {**params(prompt, options.tokens), "top_p": 1.0})
        answer = loaded.run(filled, lambda _: None)
        return int(answer["usage"]["completion_tokens"])

    with ThreadPoolExecutor(options.clients) as pool:
        list(pool.map(work, prompts(options.clients)[:2]))
        began = time.perf_counter()
        done = sum(pool.map(work, prompts(options.clients)))
    return done / (time.perf_counter() - began)


def library(options: argparse.Namespace) -> float:
    """transformers' generate(), one prompt after the other; four of them tell the speed."""
    import torch

    from engines.catalogue import JobType
    from engines.loading import detect_device, resolve
    from engines.text.checkpoint import load

    checkpoint = load(resolve(JobType.LLM, MODEL), detect_device())

    def work(prompt: str) -> int:
        chat = [{"role": "user", "content": prompt}]
        encoded = checkpoint.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = checkpoint.network.generate(**encoded, do_sample=False, max_new_tokens=options.tokens)
        return int(out.shape[1] - encoded["input_ids"].shape[1])

    with torch.inference_mode():
        work(prompts(options.clients)[0])
        began = time.perf_counter()
        done = sum(work(prompt) for prompt in prompts(options.clients)[:4])
    return done / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
