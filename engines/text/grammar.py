"""Answers that are JSON: at each step only tokens that may follow can be drawn.

llguidance compiles a JSON schema and says which tokens of the vocabulary those are. Every bound below counts its steps,
so that a schema made to be slow ends in an error and not in a stall.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits

from engines.contract import InvalidInput
from engines.text.vocabulary import Vocabulary

#: Compiled grammars that an engine keeps.
KEPT = 32

#: Between two tokens of JSON: nothing, a space, or a new line with its indentation. Without a bound a model may write
#: white space until max_tokens ends it.
SPACE = r"[ ]|\n[ ]{0,32}"

#: How JSON is written, whatever the schema's own x-guidance says.
STYLE: Mapping[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": SPACE,
    "whitespace_flexible": True,
    "coerce_one_of": False,
    "lenient": False,
}

#: About 20 ms to compile what the words look like and 15 ms for a step (llguidance's own figures), 40 MB of states.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class Grammar:
    """What one answer may go on with. Used by the engine thread alone."""

    def __init__(self, matcher: LLMatcher) -> None:
        #: The answer is complete: nothing can follow.
        self.complete = False
        self._matcher = matcher

    def restrict(self, logits: torch.Tensor) -> None:
        """Make what may not follow impossible, in place.

        logits: float32, shape (vocabulary,), which may be longer than the tokenizer's. Raises InvalidInput if the
        schema leads to more possibilities than a step may look at.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise InvalidInput(_refusal(self._matcher.get_error()), code="schema_too_complex")
        allowed = torch.zeros(logits.shape, dtype=torch.bool)
        known = torch.from_numpy(np.unpackbits(bits, count=min(len(bits) * 8, len(logits)), bitorder="little"))
        allowed[: len(known)] = known.bool()
        logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Go on behind a token that was possible."""
        self._matcher.consume_token(token)
        self.complete = self._matcher.is_stopped() and not self._matcher.is_error()


class Grammars:
    """The grammars that jobs of one model have asked for. Used by job threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        #: One at a time, so that only one hostile schema takes its memory.
        self._compiling = threading.Lock()
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()

    def grammar(self, response_format: Mapping[str, Any]) -> Grammar:
        """A grammar for one answer of a format that is not "text".

        Raises InvalidInput, naming the rule, for a schema that cannot be kept to, and where the tokenizer does not
        say what its tokens are.
        """
        wrapped = response_format.get("json_schema")
        # The order of its properties is that of the answer's.
        schema = json.dumps(wrapped["schema"] if wrapped else {"type": "object"})
        with self._compiling:
            matcher = self._kept.pop(schema, None) or self._compile(schema)
            self._kept[schema] = matcher
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return Grammar(matcher.deep_copy())

    def _compile(self, schema: str) -> LLMatcher:
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=STYLE)  # type: ignore[arg-type]
        except ValueError as error:
            raise InvalidInput(_refusal(str(error)), code="schema_refused") from error
        matcher = LLMatcher(self._vocabulary.trie, grammar, log_level=0, limits=LIMITS)
        # Some bounds are met by the first step alone; and nothing at all may be what may follow.
        matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidInput(_refusal(matcher.get_error()), code="schema_refused")
        return matcher


def _refusal(said: str) -> str:
    reason = " ".join(said.replace("<non-verbose/>", "").split())[:400]
    return f"response_format.json_schema.schema: answers cannot be kept to it: {reason}"
