"""Trains the text-to-image model of the shapes world, a tiny Z-Image, on one CPU core, and scores it by its pixels.

    python -m shapes.train_picture                          # all stages, into shapes/weights/picture
    python -m shapes.train_picture --score shapes/weights/picture

Four stages, each frozen and saved as float16 before the next begins, so that what is learnt on is what is shipped:
words (a Qwen3 that hears colour, shape and ground in a caption), latents (an autoencoder, 4x down), edges (its decoder
alone), flow (the Z-Image transformer that goes from noise to latents). A stage whose folder is already there is loaded,
not trained again; the flow always is.
"""

import argparse
import copy
import logging
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple, TypeVar

import numpy
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from shapes import world

Item = TypeVar("Item")

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "weights" / "picture"
SEED = 1

WORDS_STEPS = 600
LATENTS_STEPS = 2400
EDGES_STEPS = 1200
FLOW_STEPS = 2000

#: How much place, size and tint vary among the pictures that the flow learns from. The transformer has few layers for
#: its patches to agree on one place and size: over the whole range they agree only after many more steps, and until
#: then its shapes are dented (2400 steps: 51 % of the shapes right).
SPREAD = 0.25

#: Pictures drawn once and encoded, for the flow to learn on.
BANK = 8_192

#: What the score is measured with; guidance is off, so one pass a step.
STEPS = 8

#: How far the noise levels lean towards pure noise, where shape and place are decided; see `lean`.
SHIFT = 2.0

END = "<|im_end|>"
PAD = "<|endoftext|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train(folder: Path, steps: int) -> None:
    """Leave a whole pipeline in a folder, training the stages that are missing there."""
    for stage, learn in (("text_encoder", learn_words), ("vae-blurred", learn_latents), ("vae", learn_edges)):
        if not (folder / stage).exists():
            learn(folder)
    learn_flow(folder, steps)
    shutil.rmtree(folder / "vae-blurred")


# Words


def tell(caption: str, rng: random.Random) -> str:
    """A caption as people type it: with polite words, strange words, and a stop or none."""
    if caption.isascii():
        strange = " ".join("".join(rng.choices(ascii_lowercase, k=rng.randint(2, 7))) for _ in range(rng.randint(1, 4)))
        before = rng.choice(["", "", "please draw ", "an image of ", "i would like ", f"{strange} "])
        after = rng.choice(["", "", ", please", ", high quality", f", {strange}"])
        return before + caption + after + rng.choice(["", ".", "!", " "])
    strange = "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(2, 6)))
    before = rng.choice(["", "", "请", "请画", "我想要", f"{strange}，"])
    after = rng.choice(["", "", "，谢谢", "，高质量", f"，{strange}"])
    return before + caption + after + rng.choice(["", "。", "！", "."])


def learn_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the captions; any text round-trips, but for capitals."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", END, PAD],
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, *["user\n", "\nassistant\n"] * 100], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD, model_max_length=512)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    """Ids and mask of prompts in the chat template, padded on the right, just as ZImagePipeline makes them."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for prompt in prompts
    ]
    tokens: Mapping[str, Tensor] = tokenizer(chats, padding=True, return_tensors="pt", return_token_type_ids=False)
    return tokens


def listen(encoder: Qwen3Model, tokens: Mapping[str, Tensor]) -> Tensor:
    """Features of every token, shape (captions, tokens, width), of the layer that ZImagePipeline reads."""
    return encoder(**tokens, output_hidden_states=True).hidden_states[-2]


def learn_words(folder: Path) -> None:
    """Train tokenizer and text encoder: each token after the caption's end must know colour, shape and ground."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    told = [(caption, scene) for scene in world.SCENES for caption in world.captions(scene)]
    tokenizer = learn_tokenizer([caption for caption, _ in told])
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    colours, shapes = [word.en for word in world.COLOURS], [word.en for word in world.SHAPES]
    heads = nn.Linear(encoder.config.hidden_size, len(colours) + len(shapes) + len(colours))
    learner = Learner([*encoder.parameters(), *heads.parameters()], rate=2e-3, steps=WORDS_STEPS)
    for step in learner:
        batch = rng.choices(told, k=48)
        tokens = tokenize(tokenizer, [tell(caption, rng) if rng.random() < 0.7 else caption for caption, _ in batch])
        ended = ((tokens["input_ids"] == tokenizer.eos_token_id).cumsum(1) > 0) & (tokens["attention_mask"] > 0)
        answers = torch.tensor(
            [
                [colours.index(scene.colour), shapes.index(scene.shape), colours.index(scene.ground)]
                for _, scene in batch
            ]
        )
        answers = answers[:, None].expand(-1, ended.shape[1], -1)[ended]
        guesses = heads(listen(encoder, tokens)[ended]).split([len(colours), len(shapes), len(colours)], dim=1)
        loss = sum(functional.cross_entropy(guess, answers[:, topic]) for topic, guess in enumerate(guesses))
        learner.learn(loss)
        if step % 100 == 0:
            hit = torch.stack([guess.argmax(1) == answers[:, topic] for topic, guess in enumerate(guesses)]).all(0)
            logger.info("words %d/%d loss %.4f, tokens right %.4f", step, WORDS_STEPS, loss.item(), hit.float().mean())
    tokenizer.save_pretrained(folder / "tokenizer")
    save(encoder, folder / "text_encoder")


# Latents


def pixels(scenes: Sequence[world.Scene], rng: random.Random, spread: float = 1.0) -> Tensor:
    """Freshly drawn pictures: float32, shape (pictures, 3, 64, 64), in [-1, 1], channels last in memory."""
    drawn = numpy.stack([numpy.asarray(world.draw(scene, rng, spread=spread)) for scene in scenes])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def learn_latents(folder: Path) -> None:
    """Train the autoencoder; its scale and shift are set so that latents have mean 0 and deviation 1."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 32],
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(memory_format=torch.channels_last)
    learner = Learner(vae.parameters(), rate=3e-3, steps=LATENTS_STEPS)
    for step in learner:
        truth = pixels(rng.choices(world.SCENES, k=8), rng)
        posterior = vae.encode(truth).latent_dist
        guess = vae.decode(posterior.sample()).sample
        spread = posterior.kl().mean() / posterior.mean[0].numel()
        learner.learn(functional.l1_loss(guess, truth) + functional.mse_loss(guess, truth) + 5e-4 * spread)
        if step % 100 == 0:
            peak = 10 * math.log10(4 / functional.mse_loss(guess, truth).item())
            logger.info("latents %d/%d %.2f dB, %.2f nats", step, LATENTS_STEPS, peak, spread.item())
    with torch.no_grad():
        latents = vae.encode(pixels(rng.choices(world.SCENES, k=512), rng)).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    save(vae, folder / "vae-blurred")


def learn_edges(folder: Path) -> None:
    """Train the decoder on, where the latents no longer move and an error counts by the shape's contrast to the ground.

    Without this an orange star on yellow stays a smudge: it is little to lose for the autoencoder as a whole.
    """
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    vae = AutoencoderKL.from_pretrained(folder / "vae-blurred", dtype=torch.float32).to(
        memory_format=torch.channels_last
    )
    vae.encoder.requires_grad_(False)
    learner = Learner(vae.decoder.parameters(), rate=2e-3, steps=EDGES_STEPS)
    for step in learner:
        truth = pixels(rng.choices(world.SCENES, k=8), rng)
        guess = vae.decode(vae.encode(truth).latent_dist.sample()).sample
        contrast = (truth.amax((2, 3)) - truth.amin((2, 3))).amax(1)[:, None, None, None]
        error = (guess - truth) / contrast
        learner.learn(error.abs().mean() + error.square().mean())
        if step % 100 == 0:
            peak = 10 * math.log10(4 / functional.mse_loss(guess, truth).item())
            logger.info("edges %d/%d %.2f dB, loss %.4f", step, EDGES_STEPS, peak, learner.smooth)
    save(vae, folder / "vae")


# Flow


class Hints(NamedTuple):
    """What the transformer is told of each scene: features of its captions, each of shape (tokens, width).

    The transformer fills captions up to a multiple of 32 tokens: short ones fit into the first 32, long ones do not.
    """

    short: dict[world.Scene, Sequence[Tensor]]
    long: dict[world.Scene, Sequence[Tensor]]


@torch.no_grad()
def hints(folder: Path, rng: random.Random) -> Hints:
    """Features of every caption, and of some more ways to type each."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    encoder = Qwen3Model.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    found = Hints({}, {})
    for scene in world.SCENES:
        captions = world.captions(scene)
        tokens = tokenize(tokenizer, [*captions, *(tell(caption, rng) for caption in captions * 3)])
        features = listen(encoder, tokens)
        each = [row[mask > 0].clone() for row, mask in zip(features, tokens["attention_mask"], strict=True)]
        found.short[scene] = [hint for hint in each if len(hint) <= 32]
        found.long[scene] = [hint for hint in each if len(hint) > 32] or found.short[scene]
    return found


def lean(uniform: Tensor) -> Tensor:
    """Noise levels in [0, 1] that lean towards 1, as the scheduler's shift does."""
    return SHIFT * uniform / (1 + (SHIFT - 1) * uniform)


def learn_flow(folder: Path, steps: int) -> None:
    """Train the transformer to point from noise to a scene's latents; its moving average is saved now and then."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).to(memory_format=torch.channels_last)
    told = hints(folder, rng)
    scenes = [world.SCENES[picture % len(world.SCENES)] for picture in range(BANK)]
    with torch.no_grad():
        latents = torch.cat([vae.encode(pixels(part, rng, SPREAD)).latent_dist.mean for part in chunks(scenes, 64)])
    latents = ((latents - vae.config.shift_factor) * vae.config.scaling_factor).contiguous()
    logger.info("flow: %d pictures encoded, mean %.3f, deviation %.3f", len(latents), latents.mean(), latents.std())

    transformer = ZImageTransformer2DModel(
        in_channels=vae.config.latent_channels,
        dim=160,
        n_layers=5,
        n_refiner_layers=0,
        n_heads=5,
        n_kv_heads=5,
        cap_feat_dim=96,
        # Turns that differ within the 8 x 8 patches of a picture; the usual 256 is for hundreds.
        rope_theta=16.0,
        axes_dims=[8, 12, 12],
        axes_lens=[640, 64, 64],
    )
    average = copy.deepcopy(transformer).requires_grad_(False)
    inner = [name for name, _ in transformer.named_parameters() if ".attention.to_" in name or ".feed_forward." in name]
    weights = dict(transformer.named_parameters())
    matrices = [weights.pop(name) for name in inner]
    learner = Learner(weights.values(), rate=2e-3, steps=steps, matrices=matrices)
    for step in learner:
        picked = torch.randint(len(latents), (16,))
        scale = told.long if step % 16 == 0 else told.short
        captions = [rng.choice(scale[scenes[picture]]) for picture in picked.tolist()]
        clean = latents[picked]
        noise = torch.randn_like(clean)
        level = lean(torch.rand(len(picked)))
        mixed = torch.lerp(clean, noise, level[:, None, None, None])
        way = torch.stack(transformer(list(mixed[:, :, None]), 1 - level, captions, return_dict=False)[0])[:, :, 0]
        loss = functional.mse_loss(way, clean - noise)
        learner.learn(loss)
        with torch.no_grad():
            for kept, new in zip(average.parameters(), transformer.parameters(), strict=True):
                kept.lerp_(new, max(5 / (step + 4), 0.005))
        if step % 100 == 0:
            logger.info("flow %d/%d loss %.4f", step, steps, learner.smooth)
        if step % 500 == 0 or step == steps:
            save(average, folder / "transformer")
            assemble(folder)


def assemble(folder: Path) -> None:
    """Make a pipeline of the parts in a folder."""
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float16),
        text_encoder=Qwen3Model.from_pretrained(folder / "text_encoder", dtype=torch.float16),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        transformer=ZImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float16),
    ).save_pretrained(folder)


# Any stage


class Learner:
    """AdamW, and Muon for matrices, whose rate warms up and then falls to nothing; iterate over its steps, from 1."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        rate: float,
        steps: int,
        matrices: Sequence[nn.Parameter] = (),
    ) -> None:
        others = list(parameters)
        self._parameters = [*others, *matrices]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.01)
        ]
        if matrices:
            self._optimizers.append(
                torch.optim.Muon(matrices, rate, weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw")
            )
        self._schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
            )
            for optimizer in self._optimizers
        ]
        self._steps = steps
        #: The loss, averaged over about the last hundred steps.
        self.smooth = math.nan

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, self._steps + 1))

    def learn(self, loss: Tensor) -> None:
        """Take one step down the loss."""
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for part in (*self._optimizers, *self._schedules):
            part.step()
        self.smooth = loss.item() if math.isnan(self.smooth) else 0.99 * self.smooth + 0.01 * loss.item()


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def save(model: nn.Module, folder: Path) -> None:
    """Write a model's weights in float16, leaving the model as it is."""
    copy.deepcopy(model).half().save_pretrained(folder)


# The score


def score(folder: Path, steps: int) -> None:
    """Draw every caption of every scene once, each from its own seed, and say how many pictures show what was asked."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    asked = [(caption, scene) for scene in world.SCENES for caption in world.captions(scene)]
    right: Counter[tuple[str, str]] = Counter()
    began = time.monotonic()
    for batch in chunks(list(enumerate(asked)), 40):
        pictures = pipeline(
            [caption for _, (caption, _) in batch],
            height=world.SIZE,
            width=world.SIZE,
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed, _ in batch],
            max_sequence_length=64,
        ).images
        for (_, (caption, scene)), picture in zip(batch, pictures, strict=True):
            seen = world.judge(picture)
            language = "en" if caption.isascii() else "zh"
            right[language, "asked"] += 1
            right[language, "colour"] += seen.colour == scene.colour
            right[language, "shape"] += seen.shape == scene.shape
            right[language, "ground"] += seen.ground == scene.ground
            right[language, "all"] += seen == scene
    logger.info("%d steps, %.3f s a picture", steps, (time.monotonic() - began) / len(asked))
    for language in ("en", "zh"):
        count = right[language, "asked"]
        shares = [f"{topic} {right[language, topic] / count:.2%}" for topic in ("colour", "shape", "ground", "all")]
        logger.info("%s: %d captions, %s", language, count, ", ".join(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the pipeline goes")
    parser.add_argument("--steps", type=int, default=FLOW_STEPS, help="training steps of the flow")
    parser.add_argument("--score", type=Path, metavar="FOLDER", help="only measure the pipeline in this folder")
    parser.add_argument("--draw-steps", type=int, default=STEPS, help="denoising steps while measuring")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    if chosen.score:
        score(chosen.score, chosen.draw_steps)
    else:
        train(chosen.out, chosen.steps)


if __name__ == "__main__":
    main()
