"""Answers that repeat the question, from no weights: for measurements and tests, never a default.

Asked for JSON, it gives the least that the schema allows. A whisper job's prompt is what it hears, in one segment of a
second.

A last user message, prompt, question, first text, first text input of a workflow or first BYTES element of one of
these forms is an instruction:

    sleep 2.5    takes that many seconds and reports progress every 20 ms, so that it can be cancelled
    hang 30      takes that many seconds and reports nothing: deaf to cancel and deadline
    die          ends the process at once, as a segmentation fault would
    fail         raises EngineError
    oom          raises OutOfMemory
    broken       raises EngineBroken
"""

import base64
import io
import json
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, assert_never

from PIL import Image

from engines.catalogue import JobType, Model
from engines.contract import Device, EngineBroken, EngineError, OutOfMemory, Progress, Report, Text
from engines.instance import instance

#: Seconds between two reports of a sleeping job.
BEAT_S = 0.02


class Engine:
    """Repeats what it is asked; words are its tokens."""

    slots = 64

    def __init__(self, model: Model, device: Device) -> None:
        self._model = model
        self._closed = threading.Event()

    def run(self, params: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """The type's result for its params; the answer repeats the last thing that was asked."""
        self._check_open()
        job_type = self._model.type
        asked = _asked(job_type, params)
        total = params.get("max_tokens", 1) * params.get("n", 1)
        report(Progress(0, total, _UNITS[job_type]))
        self._obey(asked, report)
        if job_type is JobType.LLM:
            return {**_chat(params, asked, report), "model": self._model.id}
        answer = " ".join(asked.split()[:total])
        if job_type is JobType.VISION:
            report(Text(answer))
        report(Progress(len(answer.split()) if "max_tokens" in params else 1, total, _UNITS[job_type]))
        return {**_ANSWERS[job_type](params, asked, answer), "model": self._model.id}

    def close(self) -> None:
        """Jobs that sleep end with EngineBroken."""
        self._closed.set()

    def _obey(self, question: str, report: Report) -> None:
        match question.split():
            case ["sleep", seconds]:
                self._sleep(float(seconds), report)
            case ["hang", seconds]:
                time.sleep(float(seconds))
            case ["die"]:
                os._exit(9)
            case ["fail"]:
                raise EngineError("The message said fail.")
            case ["oom"]:
                raise OutOfMemory("The message said oom.")
            case ["broken"]:
                raise EngineBroken("The message said broken.")

    def _sleep(self, seconds: float, report: Report) -> None:
        start = time.monotonic()
        while (passed := time.monotonic() - start) < seconds:
            report(Progress(int(passed * 1000), int(seconds * 1000), "millisecond"))
            self._closed.wait(min(BEAT_S, seconds - passed))
            self._check_open()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise EngineBroken(f"The engine of {self._model.id} was closed.")


def _asked(job_type: JobType, params: Mapping[str, Any]) -> str:
    """What a job asks for, in words."""
    match job_type:
        case JobType.LLM:
            turns = (turn["content"] for turn in reversed(params["messages"]) if turn["role"] == "user")
            return str(next(turns, ""))
        case JobType.IMAGE_GEN:
            return str(params["prompt"])
        case JobType.VISION:
            return str(params["question"] or params["task"])
        case JobType.WHISPER:
            return str(params["prompt"] or "")
        case JobType.EMBEDDING:
            return str(params["input"][0])
        case JobType.COMFYUI:
            inputs = (value for node in params["workflow"].values() for value in node["inputs"].values())
            return next((value for value in inputs if isinstance(value, str)), "")
        case JobType.TRITON:
            elements = (element for tensor in params["inputs"] for element in tensor["data"])
            return next((element for element in elements if isinstance(element, str)), "")
        case _:
            assert_never(job_type)


def _chat(params: Mapping[str, Any], asked: str, report: Report) -> dict[str, Any]:
    """The same answer as often as it is asked for, told word by word."""
    form, count = params["response_format"] or {"type": "text"}, params["n"]
    if form["type"] == "text":
        whole = " ".join(asked.split())
    else:
        whole = json.dumps(instance(form["json_schema"]["schema"]) if "json_schema" in form else {})
    words = re.findall(r"\s*\S+", whole)
    said = words[: params["max_tokens"]]
    logprobs = [_logprob(word, params["top_logprobs"]) for word in said] if params["logprobs"] else None
    for number, word in enumerate(said):
        for choice in range(count):
            report(Text(word, choice, logprobs[number : number + 1] if logprobs else ()))
    report(Progress(len(said) * count, params["max_tokens"] * count, _UNITS[JobType.LLM]))
    answer, reason = "".join(said), "stop" if len(said) == len(words) else "length"
    choices = [
        {"index": index, "response": answer, "finish_reason": reason, "logprobs": logprobs} for index in range(count)
    ]
    read = sum(len(turn["content"].split()) for turn in params["messages"])
    return {
        "response": answer,
        "finish_reason": reason,
        "usage": _usage(read, len(said) * count),
        **({"choices": choices} if count > 1 or params["logprobs"] else {}),
    }


def _logprob(word: str, top: int) -> dict[str, Any]:
    """A word that was certain, and others that were less so."""
    tokens = [word, *(f"{word}{number}" for number in range(1, top))]
    tops = [
        {"token": token, "logprob": -float(place), "bytes": list(token.encode())} for place, token in enumerate(tokens)
    ]
    return {**tops[0], "top_logprobs": tops[:top]}


def _usage(read: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _look(params: Mapping[str, Any], asked: str, answer: str) -> dict[str, Any]:
    return {
        "response": answer,
        "task": params["task"],
        "finish_reason": "stop" if answer == " ".join(asked.split()) else "length",
        "usage": _usage(len(asked.split()), len(answer.split())),
    }


def _picture(params: Mapping[str, Any], asked: str, answer: str) -> dict[str, Any]:
    width, height = params["width"] or 64, params["height"] or 64
    seed = params["seed"] if params["seed"] is not None else zlib.crc32(asked.encode())
    return {
        "image_base64": _png(width, height, seed),
        "width": width,
        "height": height,
        "seed": seed,
        "format": "png",
        "steps": params["steps"] or 1,
        "guidance_scale": params["guidance_scale"] or 0.0,
    }


def _png(width: int, height: int, seed: int) -> str:
    """A plain picture of a colour that the seed chooses, as Base64."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (seed & 255, seed >> 8 & 255, seed >> 16 & 255)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _speech(params: Mapping[str, Any], asked: str, answer: str) -> dict[str, Any]:
    words, length = asked.split(), 1.0 if asked else 0.0
    segment = {
        "id": 0,
        "start": 0.0,
        "end": length,
        "text": " ".join(words),
        "seek": 0,
        "tokens": list(range(len(words))),
        "temperature": params["temperature"],
        "avg_logprob": 0.0,
        "compression_ratio": 1.0,
        "no_speech_prob": 0.0,
    }
    times = [(number / len(words), (number + 1) / len(words)) for number in range(len(words))]
    spoken = [{"word": word, "start": start, "end": end} for word, (start, end) in zip(words, times, strict=True)]
    return {
        "text": " ".join(words),
        "language": params["language"] or "en",
        "duration": length,
        "segments": [segment] if words else [],
        **({"words": spoken} if params["word_timestamps"] else {}),
        "task": params["task"],
    }


def _vectors(params: Mapping[str, Any], asked: str, answer: str) -> dict[str, Any]:
    read = sum(len(text.split()) for text in params["input"])
    angles = [zlib.crc32(text.encode()) for text in params["input"]]
    return {
        "embeddings": [[math.cos(angle), math.sin(angle)] for angle in angles],
        "dimensions": 2,
        "usage": {"prompt_tokens": read, "total_tokens": read},
    }


def _workflow(params: Mapping[str, Any], asked: str, answer: str) -> dict[str, Any]:
    node = list(params["workflow"])[-1]
    picture = {"image_base64": _png(64, 64, zlib.crc32(asked.encode())), "format": "png", "width": 64, "height": 64}
    return {
        "images": [{"node": node, "filename": "echo.png", **picture}],
        "files": [],
        "texts": [{"node": node, "text": answer}] if answer else [],
    }


def _tensors(params: Mapping[str, Any], asked: str, answer: str) -> dict[str, Any]:
    return {
        "model_name": params["model_name"],
        "model_version": params["model_version"] or "1",
        "outputs": [dict(tensor) for tensor in params["inputs"]],
    }


_UNITS = {
    JobType.LLM: "token",
    JobType.IMAGE_GEN: "step",
    JobType.VISION: "token",
    JobType.WHISPER: "second",
    JobType.EMBEDDING: "text",
    JobType.COMFYUI: "node",
    JobType.TRITON: "inference",
}
_ANSWERS: Mapping[JobType, Callable[[Mapping[str, Any], str, str], dict[str, Any]]] = {
    JobType.IMAGE_GEN: _picture,
    JobType.VISION: _look,
    JobType.WHISPER: _speech,
    JobType.EMBEDDING: _vectors,
    JobType.COMFYUI: _workflow,
    JobType.TRITON: _tensors,
}
