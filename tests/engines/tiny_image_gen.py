"""Tiny random text-to-image pipelines of the families in the catalogue."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

#: Pixels of a latent's side and channels of a latent, in all of them.
SCALE, LATENTS = 2, 4
#: Sides above it are decoded in tiles once tiling is on.
TILE = 64

CORPUS = ["a red circle on white", "the quick brown fox", "你好，画一个圆。", "blurry, ugly, low quality"] * 4
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """One token a byte, 77 at most."""
    tokens = [*ALPHABET, *(character + "</w>" for character in ALPHABET), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip(tokenizer: Any, kind: type) -> Any:
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_act="gelu",
            # Wide: with the usual initialisation a picture would hardly depend on its prompt.
            initializer_range=1.0,
            initializer_factor=5.0,
        )
    )


def t5() -> tuple[Any, Any]:
    """A T5 tokenizer and encoder."""
    unigram = tokenizers.Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator(CORPUS, trainer)
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=unigram, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return tokenizer, transformers.T5EncoderModel(config)


def autoencoder(**options: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=4,
        sample_size=TILE,
        **options,
    )


#: Those of the newer families.
FLOW: Mapping[str, Any] = {"shift_factor": 0.0, "use_quant_conv": False, "use_post_quant_conv": False}


def z_image() -> diffusers.DiffusionPipeline:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=ALPHABET, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=LATENTS,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    for name, weight in transformer.named_parameters():
        if "pad_token" in name:
            torch.nn.init.normal_(weight, std=0.02)  # they are made by torch.empty()
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(**FLOW),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def flux(guidance_embeds: bool) -> diffusers.DiffusionPipeline:
    tokenizer, (tokenizer_2, encoder_2) = clip_tokenizer(), t5()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=LATENTS * 4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(**FLOW),
        text_encoder=clip(tokenizer, transformers.CLIPTextModel),
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def sdxl() -> diffusers.DiffusionPipeline:
    tokenizer = clip_tokenizer()
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=4,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip(tokenizer, transformers.CLIPTextModel),
        text_encoder_2=clip(tokenizer, transformers.CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def sd3() -> diffusers.DiffusionPipeline:
    tokenizer, (tokenizer_3, encoder_3) = clip_tokenizer(), t5()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=96,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(**FLOW),
        text_encoder=clip(tokenizer, transformers.CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, transformers.CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )


FAMILIES: Mapping[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "z_image": z_image,
    "schnell": lambda: flux(guidance_embeds=False),
    "dev": lambda: flux(guidance_embeds=True),
    "sdxl": sdxl,
    "sd3": sd3,
}


def build(family: str, folder: Path) -> Path:
    """Save a random pipeline of a family."""
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder)
    return folder
