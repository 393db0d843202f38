import io
import struct
import zlib
from typing import Any

import numpy
import pytest
from PIL import Image

from engines import media
from engines.contract import InvalidInput
from engines.vision import picture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen(image: Image.Image, kind: str = "PNG", **options: Any) -> picture.Picture:
    return picture.read(file_of(image, kind, **options))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=numpy.uint8))


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidInput, match="image_base64") as refused:
        picture.read(data)
    assert refused.value.code == "invalid_image"
    return refused.value.message


# --- what it looks like


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_a_plain_picture_comes_out_as_it_is(kind: str) -> None:
    image = noise(30, 20)

    result = seen(image, kind, **({"lossless": True} if kind == "WEBP" else {}))

    assert result.image.mode == "RGB"
    assert result.image.tobytes() == image.tobytes()
    assert (result.sent_size, result.reduced, result.warnings) == ((30, 20), False, ())


def test_a_photo_is_turned_upright_by_its_exif_data() -> None:
    lying = Image.new("RGB", (16, 8), RED)
    lying.paste(BLUE, (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6

    result = seen(lying, exif=exif)

    assert result.sent_size == result.image.size == (8, 16)
    assert [result.image.getpixel(at) for at in ((4, 2), (4, 13))] == [RED, BLUE]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L"])
def test_what_is_transparent_is_white(mode: str) -> None:
    options: dict[str, Any] = {}
    if mode in ("P", "L"):
        image = Image.new("RGB", (8, 8), "black").convert(mode)
        options["transparency"] = image.getpixel((0, 0))
    else:
        image = Image.new("RGBA", (8, 8), (255, 0, 0, 0)).convert(mode)

    shown = picture.to_rgb(image) if mode == "PA" else seen(image, **options).image

    assert shown.getpixel((3, 3)) == WHITE


def test_half_transparent_red_on_white_is_pink() -> None:
    assert seen(Image.new("RGBA", (8, 8), (255, 0, 0, 128))).image.getpixel((3, 3)) == (255, 127, 127)


def test_grey_of_16_bits_keeps_its_shades() -> None:
    shades = numpy.arange(64, dtype=numpy.uint16).reshape(8, 8) * 1024

    for kind in ("PNG", "TIFF"):
        shown = numpy.asarray(seen(Image.fromarray(shades), kind).image)
        assert (shown[..., 0] == shades >> 8).all()
        assert (shown == shown[..., :1]).all()


@pytest.mark.parametrize("dtype", [numpy.int32, numpy.float32])
def test_grey_of_32_bits_is_stretched(dtype: Any) -> None:
    shades = (numpy.arange(64).reshape(8, 8) * 1e6 - 5e6).astype(dtype)

    shown = numpy.asarray(seen(Image.fromarray(shades), "TIFF").image)

    assert (shown.min(), shown.max()) == (0, 255)
    assert (numpy.diff(shown[..., 0].ravel().astype(int)) > 0).all()


def test_other_modes_become_rgb() -> None:
    assert seen(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF").image.getpixel((0, 0)) == RED
    assert seen(Image.new("RGB", (8, 8), RED).convert("P")).image.getpixel((0, 0)) == RED
    assert seen(Image.new("1", (8, 8), 1)).image.getpixel((0, 0)) == WHITE
    jpeg = seen(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG").image.getpixel((0, 0))
    assert numpy.abs(numpy.subtract(jpeg, RED)).max() < 10


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_seen_with_a_warning(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]

    result = seen(frames[0], kind, save_all=True, append_images=frames[1:])

    assert numpy.abs(numpy.subtract(result.image.getpixel((0, 0)), RED)).max() < 10
    assert result.warnings == ("The picture is animated: only its first frame was looked at.",)


def test_of_several_pages_the_first_is_seen_with_a_warning() -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]

    result = seen(pages[0], "TIFF", save_all=True, append_images=pages[1:])

    assert result.image.getpixel((0, 0)) == RED
    assert "pages" in result.warnings[0]


def test_the_further_pictures_of_a_camera_s_mpo_file_are_no_news() -> None:
    result = seen(Image.new("RGB", (8, 8), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])

    assert result.warnings == ()


# --- its size


def test_one_pixel_is_enlarged_to_what_processors_can_read() -> None:
    result = seen(Image.new("RGB", (1, 1), GREEN))

    assert result.image.size == (4, 4)
    assert result.image.getpixel((3, 3)) == GREEN
    assert result.sent_size == (1, 1)


def test_a_large_picture_is_reduced_to_an_area_and_keeps_its_proportions() -> None:
    scan = picture.fit(Image.new("L", (1000, 20_000)))

    assert picture.MOST_SHOWN_PIXELS * 0.99 < scan.width * scan.height <= picture.MOST_SHOWN_PIXELS
    assert scan.height / scan.width == pytest.approx(20, rel=0.01)
    assert seen(Image.new("L", (3000, 2000))).reduced


# --- what is refused


def test_a_mere_line_is_refused() -> None:
    assert "201 x 1 pixels" in refusal(file_of(Image.new("L", (201, 1)), "PNG"))
    assert seen(Image.new("L", (1, 200))).image.size == (4, 800)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_that_was_cut_off_is_refused_not_filled_with_grey(kind: str) -> None:
    whole = file_of(noise(120, 90), kind)

    for share in (0.3, 0.9):
        refusal(whole[: int(len(whole) * share)])


def test_a_damaged_png_is_refused() -> None:
    data = bytearray(file_of(noise(60, 60), "PNG"))
    data[len(data) // 2] ^= 0xFF

    assert "damaged" in refusal(bytes(data))


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert "Not a picture" in refusal(data)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 20_000, 100_000])
def test_a_small_file_that_claims_too_many_pixels_is_refused_before_it_is_decoded(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    rows = zlib.compress(bytes(10_000))

    assert f"at most {media.MOST_PIXELS}" in refusal(png(side, side, chunk(b"IDAT", rows)))


@pytest.mark.parametrize("before", [True, False])
def test_a_png_whose_text_unpacks_to_twenty_megabytes_is_refused(before: bool) -> None:
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000), 9))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0" * 8))

    refusal(png(8, 8, *((text, pixels) if before else (pixels, text))))
