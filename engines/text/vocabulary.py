"""How the tokens of a model are spelled."""

import logging
from collections.abc import Collection
from typing import Any

from llguidance import LLTokenizer

from engines.contract import InvalidInput

logger = logging.getLogger(__name__)


class Vocabulary:
    """The bytes that each token stands for, and the tree of them that grammars walk."""

    def __init__(self, model: str, tokenizer: Any, end_tokens: Collection[int]) -> None:
        """model: its id, for errors. tokenizer: a fast tokenizer of transformers."""
        self._model = model
        self._trie: LLTokenizer | None = None
        try:
            self._trie = LLTokenizer(tokenizer.backend_tokenizer.to_str(), eos_token=sorted(end_tokens) or None)
        except ValueError as error:
            # Such as WordPiece: it has no bytes, and so cannot write every text. Whoever needs them is told.
            logger.warning("%s answers without response_format and logprobs: %s", model, error)

    @property
    def trie(self) -> LLTokenizer:
        """The vocabulary as grammars read it.

        Raises InvalidInput where the kind of tokenizer does not say which bytes a token stands for.
        """
        if self._trie is None:
            raise InvalidInput(
                f"response_format, logprobs: the tokenizer of {self._model} does not say which bytes its tokens stand "
                "for. Leave both out or choose another model.",
                code="tokenizer_unsupported",
            )
        return self._trie

    def spell(self, token: int) -> bytes:
        """The bytes of a token, which may be a part of a character. Raises InvalidInput as `trie` does."""
        return bytes(self.trie.decode_bytes([token]))
