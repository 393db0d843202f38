"""A picture file to pixels that a vision model can look at, or the reason why not."""

import io
import math
from dataclasses import dataclass

import numpy
from PIL import Image, ImageOps

from engines import media
from engines.contract import InvalidInput

#: Most pixels that a model is shown: about 5,400 tokens of 28 x 28 pixels, as Qwen2-VL and GLM-4V make them. Larger
#: pictures are reduced. It bounds the area, not a side: of a long scan, a bounded side would leave nothing to read.
MOST_SHOWN_PIXELS = 2048 * 2048

#: Shortest side that a model is shown; processors cannot tell sides of 1 or 3 pixels from colour channels.
LEAST_SIDE = 4

#: Longest side to shortest, at most. Source: transformers, smart_resize of Qwen2-VL, which takes no more.
MOST_RATIO = 200


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture."""

    #: RGB, upright, without transparency.
    image: Image.Image
    #: Width and height in pixels as they were sent.
    sent_size: tuple[int, int]
    #: It was reduced to MOST_SHOWN_PIXELS.
    reduced: bool
    #: What of the file is not shown, in sentences.
    warnings: tuple[str, ...]


def read(data: bytes) -> Picture:
    """The first frame of a picture file: turned upright by its EXIF data, on white where it is transparent.

    Grey of 16 bits keeps its upper 8; grey of 32 bits is stretched between its darkest and its brightest pixel. Raises
    InvalidInput for what is no picture, has too many pixels, is cut off, or is a mere line.
    """
    try:
        media.check_picture(data)
        with Image.open(io.BytesIO(data), formats=media.PICTURES) as file:
            warnings = _left_out(file)
            file.seek(0)
            file.load()
            image = to_rgb(ImageOps.exif_transpose(file))
    except media.BadMedia as error:
        raise InvalidInput(f"image_base64: {error}", code="invalid_image") from error
    except Exception as error:
        raise InvalidInput(
            f"image_base64: the file is damaged or cut off: {' '.join(str(error).split())[:200]}", code="invalid_image"
        ) from error
    if max(image.size) > MOST_RATIO * min(image.size):
        raise InvalidInput(
            f"image_base64: {image.width} x {image.height} pixels are too long and narrow: at most {MOST_RATIO} to 1.",
            code="invalid_image",
        )
    shown = fit(image)
    return Picture(shown, image.size, shown.width < image.width, warnings)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB."""
    if image.mode.startswith("I;16"):
        # convert() would cut at 255 instead of scaling: nearly every pixel white (Pillow#3159).
        image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    elif image.mode in ("I", "F"):
        values = numpy.nan_to_num(numpy.asarray(image, dtype=numpy.float64))
        span = values.max() - values.min() or 1
        image = Image.fromarray(((values - values.min()) * (255 / span)).astype(numpy.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def fit(image: Image.Image) -> Image.Image:
    """The picture between LEAST_SIDE and MOST_SHOWN_PIXELS, its proportions kept as far as whole pixels allow."""
    least = min(image.size)
    if least < LEAST_SIDE:
        times = math.ceil(LEAST_SIDE / least)
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    scale = math.sqrt(MOST_SHOWN_PIXELS / (image.width * image.height))
    if scale >= 1:
        return image
    width, height = (max(LEAST_SIDE, math.floor(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _left_out(file: Image.Image) -> tuple[str, ...]:
    # An MPO file's further frames are the camera's own: previews, depth, the other eye.
    if not getattr(file, "is_animated", False) or file.format == "MPO":
        return ()
    if file.format == "TIFF":
        return ("The file has several pages: only the first one was looked at.",)
    return ("The picture is animated: only its first frame was looked at.",)
