"""Tiny random encoders of the families in the catalogue, with their tokenizers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers

#: Tokens of the longest text that they read.
LONGEST = 128
WORDS = ("hello", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "query", "passage", "今天", "你好", "介绍")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}


def bert_tokenizer() -> Any:
    """As BGE-large-zh, E5 and MiniLM have: WordPiece, lower case."""
    pieces = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    pieces.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return transformers.BertTokenizer(tokenizer_object=pieces)


def xlm_tokenizer() -> Any:
    """As BGE-M3 has: Unigram, whose padding token is not the first one."""
    pieces = tokenizers.Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    pieces.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return transformers.XLMRobertaTokenizer(tokenizer_object=pieces)


def bert(folder: Path, change: Callable[[Any, Any], None] = lambda network, tokenizer: None, **sizes: int) -> Path:
    """Save a BERT. change: what to do to network and tokenizer first."""
    tokenizer = bert_tokenizer()
    config = transformers.BertConfig(
        **{**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": LONGEST, **sizes}
    )
    return _save(folder, transformers.BertModel, config, tokenizer, change)


def xlm_roberta(folder: Path) -> Path:
    """Save an XLM-RoBERTa: two of its positions are behind the padding token's number and never used."""
    tokenizer = xlm_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": 2}
    config = transformers.XLMRobertaConfig(
        **SIZES, **ids, vocab_size=len(tokenizer), max_position_embeddings=LONGEST + tokenizer.pad_token_id + 1
    )
    return _save(folder, transformers.XLMRobertaModel, config, tokenizer, lambda network, tokenizer: None)


def _save(folder: Path, kind: Any, config: Any, tokenizer: Any, change: Callable[[Any, Any], None]) -> Path:
    torch.manual_seed(0)
    network = kind(config)
    change(network, tokenizer)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
