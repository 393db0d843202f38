"""Random vision checkpoints of the architectures in the catalogue, a few hundred kilobytes each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engines.vision import processors

MARKS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CORPUS = ["What is in this image? It is a red box.", "Describe this image in detail.", "这张图片里有什么？"]
#: ChatML; @ is what the model reads as a picture.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}@{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: A wide initialisation: with the usual one the next token would hardly depend on what attention reads.
TEXT: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
WIDE: Mapping[str, Any] = {"initializer_range": 0.2}
#: Processor and configuration.
Parts = tuple[Any, Any]


def byte_tokenizer(picture: str, extra: list[str], **named: Any) -> Any:
    """A byte-level tokenizer with the special tokens of an architecture. picture: what its template writes for one."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[*MARKS, *extra], show_progress=False
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[*MARKS[:1], *extra],
        **named,
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace("@", picture)
    return tokenizer


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {**TEXT, "vocab_size": len(tokenizer), **special, **more}


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 1e4, **more}


def qwen2_vl() -> Parts:
    """Positions in three dimensions; as many tokens as a picture has patches."""
    tokenizer = byte_tokenizer(
        "<|vision_start|><|image_pad|><|vision_end|>",
        ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    )
    token = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2VLConfig(
        text_config=_text(tokenizer, rope_parameters=_rope(2, 3, 3)),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "patch_size": 14,
            "mlp_ratio": 2,
            **WIDE,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    pictures = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    processor = transformers.Qwen2VLProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    return processor, config


def glm4v() -> Parts:
    """Positions in three dimensions, GLM's marks around a picture."""
    tokenizer = byte_tokenizer(
        "<|begin_of_image|><|image|><|end_of_image|>",
        ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>"],
    )
    tokenizer.image_token, tokenizer.video_token = "<|image|>", "<|video|>"
    token = tokenizer.convert_tokens_to_ids
    config = transformers.Glm4vConfig(
        text_config=_text(tokenizer, rope_parameters=_rope(2, 1, 1, partial_rotary_factor=0.5)),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "image_size": 112,
            **WIDE,
        },
        image_token_id=token("<|image|>"),
        video_token_id=token("<|video|>"),
        image_start_token_id=token("<|begin_of_image|>"),
        image_end_token_id=token("<|end_of_image|>"),
        video_start_token_id=token("<|begin_of_video|>"),
        video_end_token_id=token("<|end_of_video|>"),
    )
    pictures = transformers.Glm4vImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 32})
    processor = transformers.Glm4vProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    return processor, config


def internvl() -> Parts:
    """As many tiles as the picture's shape asks for, of equally many tokens."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer("<IMG_CONTEXT>\n", [*named.values()], model_specific_special_tokens=named)
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            **WIDE,
        },
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    pictures = transformers.GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, max_patches=4)
    processor = transformers.InternVLProcessor(
        pictures, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    )
    return processor, config


def llava_next() -> Parts:
    """As many tiles as fit the picture's shape, padded among the pictures of a batch."""
    tokenizer = byte_tokenizer("<image>\n", ["<image>"])
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    config = transformers.LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "initializer_factor": 5.0,
        },
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
    )
    processor = transformers.LlavaNextProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return processor, config


FAMILIES: Mapping[str, Callable[[], Parts]] = {
    "qwen2_vl": qwen2_vl,
    "glm4v": glm4v,
    "internvl": internvl,
    "llava_next": llava_next,
}

#: Their network classes, where a test stands in for the device.
NETWORKS: Mapping[str, type] = {
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "glm4v": transformers.Glm4vForConditionalGeneration,
    "internvl": transformers.InternVLForConditionalGeneration,
    "llava_next": transformers.LlavaNextForConditionalGeneration,
}


def build(family: str, folder: Path) -> Path:
    """Save a random checkpoint that never ends an answer by itself, and whose generation config asks for chance."""
    if not transformers.utils.is_torchvision_available():
        processors._leave_out_videos()
    torch.manual_seed(0)
    processor, config = FAMILIES[family]()
    network = NETWORKS[family](config)
    # The highest of 400 logits is never one that is 0.
    network.lm_head.weight.data[[processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id]] = 0
    settings = network.generation_config
    settings.eos_token_id, settings.pad_token_id = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = True, 0.8, 0.6, 2
    settings.repetition_penalty = 1.05
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
