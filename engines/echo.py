"""Answers that repeat the question, from no weights: for measurements and tests, never a default.

A last user message of one of these forms is an instruction:

    sleep 2.5    takes that many seconds and reports progress every 20 ms, so that it can be cancelled
    hang 30      takes that many seconds and reports nothing: deaf to cancel and deadline
    die          ends the process at once, as a segmentation fault would
    fail         raises EngineError
    oom          raises OutOfMemory
    broken       raises EngineBroken
"""

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from engines.catalogue import Model
from engines.contract import Device, EngineBroken, EngineError, OutOfMemory, Progress, Report, Text

#: Seconds between two reports of a sleeping job.
BEAT_S = 0.02


class Engine:
    """Repeats the last user message; its words are its tokens."""

    slots = 64

    def __init__(self, model: Model, device: Device) -> None:
        self._model = model
        self._closed = threading.Event()

    def run(self, params: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """An LlmResult for LlmParams."""
        self._check_open()
        messages = params["messages"]
        question = next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), "")
        report(Progress(0, params["max_tokens"], "token"))
        self._obey(question, report)

        words = question.split()
        answer = words[: params["max_tokens"]]
        response = " ".join(answer)
        report(Text(response))
        report(Progress(len(answer), params["max_tokens"], "token"))
        prompt_tokens = sum(len(turn["content"].split()) for turn in messages)
        return {
            "response": response,
            "finish_reason": "stop" if len(answer) == len(words) else "length",
            "model": self._model.id,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(answer),
                "total_tokens": prompt_tokens + len(answer),
            },
        }

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
