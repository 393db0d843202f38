"""The answers of one job: rows that are computed beside each other and report as one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engines.contract import JobInterrupted, Progress, Report, Text
from engines.text.row import Row


class Choices:
    """What a job's answers tell together, and the result that they are."""

    def __init__(self, count: int, max_tokens: int, report: Report) -> None:
        """count: answers. max_tokens: of each. report: of the job; called by the engine thread alone."""
        #: Set by whoever makes them, each with the report that is its own.
        self.rows: Sequence[Row] = ()
        self._done = [0.0] * count
        self._total = count * max_tokens
        self._report = report
        #: What ended the first answer that has failed.
        self._cause: Exception | None = None

    def report_of(self, choice: int) -> Report:
        """What one answer tells: its text by its number, its progress as a part of the whole job's."""

        def report(event: Progress | Text) -> None:
            self._cause = self._cause or next((row.error for row in self.rows if row.error), None)
            if self._cause:
                # Nobody waits for the others any more.
                raise JobInterrupted
            if isinstance(event, Text):
                self._report(replace(event, choice=choice))
            else:
                self._done[choice] = event.done
                self._report(Progress(sum(self._done), self._total, event.unit))

        return report

    def result(self) -> dict[str, Any]:
        """An LlmResult but for the model's name. Raises what ended the first answer that failed."""
        cause = self._cause or next((row.error for row in self.rows if row.error), None)
        if cause:
            raise cause
        first = self.rows[0]
        written = sum(row.completion_tokens for row in self.rows)
        choices = [
            {
                "index": index,
                "response": row.answer.text,
                "finish_reason": row.finish_reason,
                "logprobs": row.logprobs.shown if row.logprobs else None,
            }
            for index, row in enumerate(self.rows)
        ]
        return {
            "response": first.answer.text,
            "finish_reason": first.finish_reason,
            "usage": {
                "prompt_tokens": first.prompt_tokens,
                "completion_tokens": written,
                "total_tokens": first.prompt_tokens + written,
            },
            **({"choices": choices} if len(choices) > 1 or first.logprobs else {}),
        }
