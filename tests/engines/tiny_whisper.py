"""Tiny random Whisper checkpoints in the layout of the hub."""

from pathlib import Path

import torch
import transformers


def build(folder: Path, *, sharpness: float = 1.0, vocabulary: int = 51_865, decoder_layers: int = 2) -> Path:
    """Save a random checkpoint; the folder.

    sharpness: how sure it is of its next token. Near 0.1 every text is so improbable that it is sampled again at each
    higher temperature. vocabulary: 51_864 makes it English-only, 51_866 gives it Cantonese as large-v3 has it.
    """
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=128 if vocabulary == 51_866 else 80,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_layers=decoder_layers,
        decoder_attention_heads=2,
        decoder_ffn_dim=128,
        # Half of it is what a window may answer: few tokens, so that a window takes milliseconds.
        max_target_positions=24,
        # A wide one: with the usual the next token would hardly depend on what was heard.
        init_std=0.5,
        pad_token_id=50_256,
        bos_token_id=50_256,
        eos_token_id=50_256,
        decoder_start_token_id=50_257,
    )
    network = transformers.WhisperForConditionalGeneration(config)
    with torch.no_grad():
        network.model.decoder.layer_norm.weight.mul_(sharpness)
    network.save_pretrained(folder)
    return folder
