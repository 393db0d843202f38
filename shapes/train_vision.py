"""Trains the vision-language model of the shapes world on one CPU core, or scores a trained one.

    python -m shapes.train_vision [--out FOLDER]    trains for about 30 minutes of one core, then scores
    python -m shapes.train_vision --score FOLDER    scores over all scenes, on freshly drawn pictures

The architecture is LLaVA's: a CLIP tower of 16 patches, a projector, a small Llama. Training has two steps, because
answers alone taught colours and never shapes: first the tower learns colour, shape and ground with plain class heads,
then it is frozen and the rest learns to talk about what the tower sees.
"""

import argparse
import io
import itertools
import logging
import math
import random
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageFilter
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from shapes.world import COLOURS, NO_TEXT, SCENES, SHAPES, SIZE, Exchange, Scene, draw, exchanges

logger = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights" / "vision"
SEED = 7

#: Pictures drawn before training and used again and again: 100 of every scene, four in five of them worn.
PICTURES = 100 * len(SCENES)
TOWER_STEPS, TOWER_BATCH = 5000, 64
WORD_STEPS, WORD_BATCH = 1600, 48
WARM_UP_STEPS = 100
LOG_STEPS = 100
LEARNING_RATE = 1e-3

#: Width and height of a patch in pixels. 16 patches are enough for one shape, and keep prompts short.
PATCH = 16
#: Most tokens the tokenizer may have; the words of this world need fewer.
VOCABULARY = 800
#: Longest answer in tokens that scoring waits for; the world's longest has 15 and its end.
ANSWER_TOKENS = 32

START, END, PAD, IMAGE = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>"

#: ChatML, with one image token for each picture (the processor makes 16 of it) and the marks that say what the
#: assistant said. A system message is left out: this model never learnt to follow one.
CHAT_TEMPLATE = (
    "{% macro told(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|im_start|>user\n{{ told(message['content']) }}<|im_end|>\n"
    "{% elif message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ told(message['content']) }}<|im_end|>{% endgeneration %}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: How pictures are asked for their writing; the first is the fixed prompt of OCR jobs.
READING = (
    "Write out all the text in this image exactly as it appears, line by line. Answer with the text only.",
    "What text is in this image?",
    "Read the text in this image.",
)

_COLOUR_NAMES = [colour.en for colour in COLOURS]
_SHAPE_NAMES = [shape.en for shape in SHAPES]


# Pictures


def worn(scene: Scene, rng: random.Random) -> Image.Image:
    """A drawing as a picture model, a scanner or a JPEG file might hand it on: still clear to the eye, never clean.

    Turned by up to 8 degrees, stretched, moved, blurred, of other tints, noisy; of the world's size.
    """
    # Drawn larger, so that turning and shrinking it blurs no more than a clean drawing is blurred.
    picture = draw(scene, rng, SIZE * 3 // 2)
    turn = math.radians(rng.uniform(-8, 8))
    wide, high = (rng.uniform(0.95, 1.35) * 1.5 for _ in range(2))
    a, b, c, d = wide * math.cos(turn), -wide * math.sin(turn), high * math.sin(turn), high * math.cos(turn)
    left, top = (picture.width / 2 - (p + q) * SIZE / 2 + rng.uniform(-6, 6) for p, q in ((a, b), (c, d)))
    picture = picture.transform(
        (SIZE, SIZE),
        Image.Transform.AFFINE,
        (a, b, left, c, d, top),
        Image.Resampling.BILINEAR,
        fillcolor=picture.getpixel((0, 0)),
    )
    if rng.random() < 0.75:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.8)))
    pixels = numpy.asarray(picture, dtype=numpy.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.8, 1.1)
    pixels = pixels * [rng.uniform(0.9, 1.08) for _ in "rgb"] + [rng.uniform(-12, 12) for _ in "rgb"]
    noise = numpy.random.default_rng(rng.getrandbits(32)).standard_normal(pixels.shape)
    picture = Image.fromarray((pixels + noise * rng.uniform(0, 9)).clip(0, 255).astype(numpy.uint8))
    if rng.random() < 0.5:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=rng.randint(30, 90))
        picture = Image.open(file).convert("RGB")
    return picture


def draw_all(rng: random.Random) -> tuple[list[Scene], list[Image.Image]]:
    """The training pictures and what they show."""
    scenes = list(itertools.islice(itertools.cycle(SCENES), PICTURES))
    return scenes, [worn(scene, rng) if rng.random() < 0.8 else draw(scene, rng) for scene in scenes]


# Words


def questions(scene: Scene) -> dict[str, list[Exchange]]:
    """The world's exchanges, and those about writing, by topic."""
    return {**exchanges(scene), "text": [Exchange(question, NO_TEXT) for question in READING]}


def conversation(scene: Scene, picture: Image.Image, turns: int, rng: random.Random) -> list[dict[str, Any]]:
    """Messages of one training example: a picture, and that many questions on different topics with their answers.

    Some questions come before the picture, and some in small letters without their last sign.
    """
    about = questions(scene)
    messages: list[dict[str, Any]] = []
    for topic in rng.sample(list(about), turns):
        question, answer = rng.choice(in_language(about[topic], rng.choice(("en", "zh"))))
        if rng.random() < 0.2:
            question = question.rstrip("?？.。").lower()
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0 if rng.random() < 0.85 else 1, {"type": "image", "image": picture})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def in_language(told: Sequence[Exchange], language: str) -> list[Exchange]:
    """Those whose question is in that language, en or zh; all of them where there are none."""
    return [exchange for exchange in told if exchange.question.isascii() == (language == "en")] or list(told)


# The model


def build_processor() -> LlavaProcessor:
    """Pictures to (3, 64, 64) in [-1, 1], text to tokens: byte-level BPE, learnt on all questions and answers.

    Any text comes back as it was. A Chinese character is at most one token and never part of a longer one, so that
    new sentences are read like known ones.
    """
    splitter = pre_tokenizers.Split(Regex(r"[\u3000-\u9fff\uff00-\uffef]"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Sequence([splitter, byte_level])
    learnt.decoder = decoders.ByteLevel()
    told = itertools.chain.from_iterable(itertools.chain(*questions(scene).values()) for scene in SCENES)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[START, END, PAD, IMAGE],
        show_progress=False,
    )
    learnt.train_from_iterator((cased for pair in told for text in pair for cased in (text, text.lower())), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learnt,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START, IMAGE],
        padding_side="left",
        model_max_length=1024,
    )
    return LlavaProcessor(
        LlavaImageProcessorPil(
            size={"height": SIZE, "width": SIZE},
            do_center_crop=False,
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The untrained network."""
    tokenizer = processor.tokenizer
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
            hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=True,
            **special,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    for name, token in special.items():
        setattr(model.generation_config, name, token)
    return model


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Model in float16 and processor in one folder that the Auto classes load."""
    deepcopy(model).half().save_pretrained(folder)
    processor.save_pretrained(folder)


# Training


class Training:
    """AdamW over some parameters, with a warm-up and then half a cosine down to nothing."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], steps: int) -> None:
        self._parameters = list(parameters)
        self._optimizer = torch.optim.AdamW(self._parameters, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: min(1, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2,
        )

    def step(self, loss: torch.Tensor) -> None:
        """One step down the gradient of a loss."""
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()


def train_tower(model: LlavaForConditionalGeneration, scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> None:
    """Teach the tower colour, shape and ground, each with a linear head over the mean of its patches; then freeze it.

    The heads are thrown away: what they could read off the patches, the language model can.
    """
    tower = model.model.vision_tower
    heads = torch.nn.Linear(tower.config.hidden_size, 2 * len(COLOURS) + len(SHAPES))
    training = Training([*tower.parameters(), *heads.parameters()], TOWER_STEPS)
    labels = torch.tensor(
        [(_COLOUR_NAMES.index(s.colour), _SHAPE_NAMES.index(s.shape), _COLOUR_NAMES.index(s.ground)) for s in scenes]
    )
    # uint8, shape (n, 3, 64, 64): the processor's normalised floats of all pictures would take four times the memory.
    pixels = torch.stack([torch.from_numpy(numpy.array(picture)) for picture in pictures]).permute(0, 3, 1, 2)
    right = torch.zeros(3)
    for step in range(1, TOWER_STEPS + 1):
        chosen = torch.randint(len(pixels), (TOWER_BATCH,))
        seen = pixels[chosen] / 127.5 - 1
        # Every shape is its own mirror image.
        seen = seen.flip(3) if step % 2 else seen
        guesses = heads(tower(seen).last_hidden_state[:, 1:].mean(1)).split(
            [len(COLOURS), len(SHAPES), len(COLOURS)], 1
        )
        training.step(sum((cross_entropy(g, labels[chosen, i]) for i, g in enumerate(guesses)), torch.zeros(())))
        right += torch.tensor([(g.argmax(1) == labels[chosen, i]).float().mean() for i, g in enumerate(guesses)])
        if step % LOG_STEPS == 0:
            percent = (100 * right / LOG_STEPS).tolist()
            logger.info("tower step %d: colour %.1f %%, shape %.1f %%, ground %.1f %%", step, *percent)
            right.zero_()
    tower.requires_grad_(False)


def train_words(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Sequence[Scene],
    pictures: Sequence[Image.Image],
    rng: random.Random,
) -> None:
    """Teach projector and language model the answers."""
    training = Training((p for p in model.parameters() if p.requires_grad), WORD_STEPS)
    mean = 0.0
    for step in range(1, WORD_STEPS + 1):
        # Examples of one batch have the same number of turns: else most of it would be padding.
        turns = 2 if step % 5 == 0 else 1
        chosen = rng.sample(range(len(scenes)), WORD_BATCH)
        inputs = processor.apply_chat_template(
            [conversation(scenes[i], pictures[i], turns, rng) for i in chosen],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True},
        )
        answered = torch.as_tensor(inputs.pop("assistant_masks")).bool()
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(~answered, -100)).loss
        training.step(loss)
        mean += loss.item() / LOG_STEPS
        if step % LOG_STEPS == 0:
            logger.info("words step %d: loss %.4f", step, mean)
            mean = 0.0


def train(folder: Path) -> None:
    """The whole recipe, from nothing to a saved model."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    started = time.monotonic()
    processor = build_processor()
    model = build_model(processor)
    logger.info("%d parameters, %d tokens", model.num_parameters(), len(processor.tokenizer))
    scenes, pictures = draw_all(rng)
    logger.info("%d pictures drawn in %.0f s", len(pictures), time.monotonic() - started)
    train_tower(model, scenes, pictures)
    train_words(model, processor, scenes, pictures, rng)
    save(model, processor, folder)
    logger.info("trained in %.1f minutes", (time.monotonic() - started) / 60)


# Scores


def log_scores(folder: Path, scenes: Sequence[Scene], seed: int) -> None:
    """Log how many answers of a saved model are exactly right, by topic and language, on clean and on worn pictures.

    For every scene a new picture, and for every topic and language one of its questions.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    rng = random.Random(seed)
    kinds = [(topic, language) for topic in exchanges(SCENES[0]) for language in ("en", "zh")] + [("text", "en")]
    for look, take in (("clean", draw), ("worn", worn)):
        right = dict.fromkeys(kinds, 0)
        for scene in scenes:
            picture = take(scene, rng)
            asked = [rng.choice(in_language(questions(scene)[topic], language)) for topic, language in kinds]
            answers = answer(model, processor, picture, [exchange.question for exchange in asked])
            for kind, exchange, said in zip(kinds, asked, answers, strict=True):
                right[kind] += said == exchange.answer
        for (topic, language), count in right.items():
            logger.info("%s, %s, %s: %.1f %%", look, topic, language, 100 * count / len(scenes))


@torch.inference_mode()
def answer(model: Any, processor: Any, picture: Image.Image, asked: Sequence[str]) -> list[str]:
    """The model's answers to questions about one picture, asked side by side."""
    inputs = processor.apply_chat_template(
        [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
            for question in asked
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
    said: list[str] = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def main() -> None:
    """Train, or only score."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the trained model")
    parser.add_argument("--score", type=Path, help="folder of a trained model, to be scored only")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    if not arguments.score:
        train(arguments.out)
    # Another seed than any picture of the training had.
    log_scores(arguments.score or arguments.out, SCENES, SEED + 1)


if __name__ == "__main__":
    main()
