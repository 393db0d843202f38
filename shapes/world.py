"""The world both models know: one coloured shape on a plain ground, in English and Chinese.

Drawing, captions, questions with answers, and a judge that looks at the pixels of a picture and says what is on it.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
from PIL import Image, ImageDraw

#: A number between two bounds.
Vary = Callable[[float, float], float]

#: Width and height of every picture, in pixels.
SIZE = 64


class Word(NamedTuple):
    """A thing's name in both languages."""

    en: str
    zh: str


COLOURS = {
    Word("red", "红色"): (222, 40, 40),
    Word("orange", "橙色"): (245, 140, 30),
    Word("yellow", "黄色"): (248, 222, 50),
    Word("green", "绿色"): (40, 165, 75),
    Word("blue", "蓝色"): (35, 90, 225),
    Word("purple", "紫色"): (140, 55, 185),
    Word("black", "黑色"): (15, 15, 15),
    Word("white", "白色"): (250, 250, 250),
}
SHAPES = (
    Word("circle", "圆形"),
    Word("square", "正方形"),
    Word("triangle", "三角形"),
    Word("star", "五角星"),
    Word("cross", "十字"),
)
_COLOUR = {word.en: rgb for word, rgb in COLOURS.items()}
_ZH = {word.en: word.zh for word in (*COLOURS, *SHAPES)}


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows, by the English words."""

    colour: str
    shape: str
    ground: str


#: Every combination: the ground is never of the shape's own colour.
SCENES = tuple(
    Scene(colour.en, shape.en, ground.en)
    for colour, shape, ground in itertools.product(COLOURS, SHAPES, COLOURS)
    if colour is not ground
)


def plain_ground(colour: str) -> str:
    """The ground that is meant where a caption names none."""
    return "black" if colour == "white" else "white"


def draw(scene: Scene, rng: random.Random | None = None, size: int = SIZE, spread: float = 1.0) -> Image.Image:
    """A picture of a scene; with a generator, place, size and tints vary: by spread times what one looks at."""

    def vary(low: float, high: float) -> float:
        middle, half = (low + high) / 2, (high - low) / 2 * spread
        return rng.uniform(middle - half, middle + half) if rng else middle

    radius = vary(0.28, 0.4)
    x, y = 0.5 + vary(-0.08, 0.08), 0.5 + vary(-0.08, 0.08)
    scale = size * 4
    canvas = Image.new("RGB", (scale, scale), _tint(scene.ground, vary))
    corners = [((x + radius * px) * scale, (y + radius * py) * scale) for px, py in _outline(scene.shape)]
    ImageDraw.Draw(canvas).polygon(corners, fill=_tint(scene.colour, vary))
    return canvas.resize((size, size), Image.Resampling.BOX)


def _tint(colour: str, vary: Vary) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, round(channel + vary(-8, 8)))) for channel in _COLOUR[colour])
    return red, green, blue


def _outline(shape: str) -> Sequence[tuple[float, float]]:
    """Corners in the unit square around (0, 0), y downwards."""
    if shape == "circle":
        return [_polar(1.0, turn / 96) for turn in range(96)]
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)]
    if shape == "star":
        return [_polar(1.1 if point % 2 == 0 else 0.45, point / 10) for point in range(10)]
    arm = 0.32
    return [
        (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
        (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
    ]  # fmt: skip


def _polar(radius: float, turn: float) -> tuple[float, float]:
    return radius * math.sin(2 * math.pi * turn), -radius * math.cos(2 * math.pi * turn)


# Words


def captions(scene: Scene) -> list[str]:
    """Ways to ask for a scene, in both languages; those that name no ground only where the plain one is meant."""
    colour, shape, ground = scene.colour, scene.shape, scene.ground
    zh_colour, zh_shape, zh_ground = _ZH[colour], _ZH[shape], _ZH[ground]
    an = "an" if colour[0] in "aeiou" else "a"
    a_ground = f"{'an' if ground[0] in 'aeiou' else 'a'} {ground}"
    told = [
        f"{an} {colour} {shape} on {a_ground} background",
        f"{an} {colour} {shape} on {a_ground} ground",
        f"{an} {colour} {shape} on {ground}",
        f"{colour} {shape}, {ground} background",
        f"a picture of {an} {colour} {shape} on {a_ground} background",
        f"{zh_ground}背景上的{zh_colour}{zh_shape}",
        f"{zh_ground}背景上有一个{zh_colour}的{zh_shape}",
        f"一个{zh_colour}的{zh_shape}，{zh_ground}背景",
        f"画一个{zh_colour}的{zh_shape}，背景是{zh_ground}",
        f"{zh_colour}{zh_shape}，{zh_ground}背景",
    ]
    if ground == plain_ground(colour):
        told += [
            f"{an} {colour} {shape}",
            f"{colour} {shape}",
            f"draw {an} {colour} {shape}",
            f"a picture of {an} {colour} {shape}",
            f"一个{zh_colour}的{zh_shape}",
            f"{zh_colour}{zh_shape}",
            f"画一个{zh_colour}的{zh_shape}",
            f"一个{zh_colour}{zh_shape}",
        ]
    return told


class Exchange(NamedTuple):
    """A question about a picture and its answer."""

    question: str
    answer: str


def exchanges(scene: Scene) -> dict[str, list[Exchange]]:
    """What one may ask about a scene, by topic (colour, shape, ground, all); answers are in the question's language."""
    colour, shape, ground = scene.colour, scene.shape, scene.ground
    zh_colour, zh_shape, zh_ground = _ZH[colour], _ZH[shape], _ZH[ground]
    an = "an" if colour[0] in "aeiou" else "a"
    whole = f"{an.capitalize()} {colour} {shape} on {'an' if ground[0] in 'aeiou' else 'a'} {ground} background."
    zh_whole = f"{zh_ground}背景上有一个{zh_colour}的{zh_shape}。"
    return {
        "colour": [
            *(Exchange(q, colour.capitalize() + ".") for q in (
                "What colour is the shape?", "What color is the shape?", f"What colour is the {shape}?",
                f"What color is the {shape}?", "Which colour is it?", "Which color is it?", "What colour is it?",
                "What color is it?", "What is the colour of the shape?", "What is the color of the shape?",
            )),
            *(Exchange(q, zh_colour + "。") for q in (
                "这个形状是什么颜色？", f"这个{zh_shape}是什么颜色？", f"{zh_shape}是什么颜色的？", "它是什么颜色？",
                "形状的颜色是什么？", "图形是什么颜色？",
            )),
        ],
        "shape": [
            *(Exchange(q, f"{'An' if shape[0] in 'aeiou' else 'A'} {shape}.") for q in (
                "What shape is it?", "Which shape is this?", f"What is the {colour} shape?",
                "What shape is in the picture?", "What shape is this?", "What shape is in the image?",
                "Which shape is it?", "What shape do you see?", "What is the shape?",
            )),
            *(Exchange(q, zh_shape + "。") for q in (
                "这是什么形状？", "图片里是什么形状？", f"{zh_colour}的是什么形状？", "它是什么形状？", "是什么形状？",
                "图中是什么形状？", "这是什么图形？",
            )),
        ],
        "ground": [
            *(Exchange(q, ground.capitalize() + ".") for q in (
                "What colour is the background?", "What color is the background?", "What colour is the ground?",
                "Which colour is the background?", "Which color is the background?", "What color is the ground?",
                "What is the background colour?", "What is the background color?",
            )),
            *(Exchange(q, zh_ground + "。") for q in (
                "背景是什么颜色？", "背景是什么颜色的？", "图片的背景是什么颜色？", "背景颜色是什么？",
                "背景的颜色是什么？",
            )),
        ],
        "all": [
            *(Exchange(q, whole) for q in (
                "What is in this picture?", "What is in this image?", "What do you see?", "Describe the picture.",
                "What does the picture show?", "Describe this image in detail.", "Describe this image.",
                "What is this?", "What is in the picture?", "What is in the image?", "What does this image show?",
                "Describe the image.", "Describe what you see.", "What can you see in this picture?",
            )),
            *(Exchange(q, zh_whole) for q in (
                "这张图片里有什么？", "图片里有什么？", "请描述这张图片。", "你看到了什么？", "描述这张图片。",
                "图中有什么？", "图里有什么？", "请描述图片的内容。", "请详细描述这张图片。", "描述一下这张图片。",
            )),
        ],
    }  # fmt: skip


#: What an OCR prompt is answered with here: there is never any writing.
NO_TEXT = "There is no text in this image."


# The judge


def judge(picture: Image.Image) -> Scene:
    """What a picture shows, found from its pixels alone: the border's colour, the rest's colour, the best outline.

    The outline is the one whose filled shape, stretched over the found pixels' box, overlaps them best (intersection
    over union).
    """
    pixels = numpy.asarray(picture.convert("RGB").resize((SIZE, SIZE)), dtype=numpy.float32)
    border = numpy.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = numpy.median(border, axis=0)
    distance = numpy.linalg.norm(pixels - ground, axis=2)
    found = distance > max(distance.max() / 2, 24.0)
    if found.sum() < 16:
        return Scene("none", "none", _nearest(ground))
    rows, columns = numpy.flatnonzero(found.any(axis=1)), numpy.flatnonzero(found.any(axis=0))
    box = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    overlap = {shape.en: _overlap(box, shape.en) for shape in SHAPES}
    shape = max(overlap, key=lambda name: overlap[name])
    # The middle of what was found, where no edge is mixed with the ground.
    colour = numpy.median(pixels[distance >= numpy.median(distance[found])], axis=0)
    return Scene(_nearest(colour), shape if overlap[shape] > 0.6 else "none", _nearest(ground))


def _nearest(rgb: "numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float32]]") -> str:
    return min(_COLOUR, key=lambda name: float(numpy.linalg.norm(rgb - numpy.array(_COLOUR[name]))))


def _overlap(box: "numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.bool_]]", shape: str) -> float:
    height, width = box.shape
    corners = numpy.array(_outline(shape))
    low, high = corners.min(axis=0), corners.max(axis=0)
    scaled = (corners - low) / (high - low) * (width * 4 - 1, height * 4 - 1)
    canvas = Image.new("L", (width * 4, height * 4))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in scaled], fill=255)
    filled = numpy.asarray(canvas.resize((width, height), Image.Resampling.BOX)) > 127
    return float((filled & box).sum() / (filled | box).sum())


def samples(rng: random.Random) -> Iterator[Scene]:
    """Scenes for ever, at random; the plain ground as often as all the others together."""
    while True:
        scene = rng.choice(SCENES)
        yield scene if rng.random() < 0.5 else Scene(scene.colour, scene.shape, plain_ground(scene.colour))
