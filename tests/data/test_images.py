"""Claims about reading and fitting pictures."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from dojo.data import BadSample, cover_box, fit, fit_mask, images, read_image
from dojo.data.colour import BAD_PROFILE
from dojo.data.images import Seen, decode, examine, has_alpha, read_alpha, read_mask


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def quarters(width: int = 32, height: int = 16) -> Image.Image:
    """Red, green / blue, white: every turn and mirror image of it looks different."""
    image = Image.new("RGB", (width, height), "white")
    half_width, half_height = width // 2, height // 2
    image.paste("red", (0, 0, half_width, half_height))
    image.paste("lime", (half_width, 0, width, half_height))
    image.paste("blue", (0, half_height, half_width, height))
    return image


def pixel(data: bytes | Path | Image.Image, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = read_image(data, "sample")
    assert image.mode == "RGB"
    value = image.getpixel(at)
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    upright = quarters()
    # What a camera stores is the inverse of the turn that the tag asks for; each is its own
    # inverse but for the two quarter turns.
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    tag = Image.Exif()
    tag[0x0112] = inverse
    turned = io.BytesIO(encoded(upright, "PNG", exif=tag))
    stored = ImageOps.exif_transpose(Image.open(turned)).convert("RGB")
    stored.info.clear()
    tag[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {}
    options |= {"lossless": True} if form == "WEBP" else {}
    image = read_image(encoded(stored, form, exif=tag, **options), "photo")
    assert image.size == upright.size
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(upright, dtype=int))
    assert difference.mean() < 3


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\0\0garbage!!!!!!")
    assert pixel(data) == (254, 0, 0)


def test_transparency_lies_on_white() -> None:
    assert pixel(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")) == (127, 127, 127)
    assert pixel(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG")) == (255, 255, 255)
    assert pixel(encoded(Image.new("LA", (4, 4), (10, 255)), "PNG")) == (10, 10, 10)


def test_palettes_keep_colour_and_transparency() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert pixel(encoded(image, "PNG")) == (10, 200, 30)
    assert pixel(encoded(image, "GIF")) == (10, 200, 30)
    assert pixel(encoded(image, "PNG", transparency=1)) == (255, 255, 255)
    assert pixel(encoded(image, "GIF", transparency=1)) == (255, 255, 255)
    assert pixel(encoded(image, "PNG", transparency=bytes([255, 0]))) == (255, 255, 255)
    assert pixel(Image.new("PA", (4, 4))) == (255, 255, 255)


def test_transparent_colour_of_an_rgb_or_grey_picture_lies_on_white() -> None:
    red = Image.new("RGB", (4, 4), "red")
    assert pixel(encoded(red, "PNG", transparency=(255, 0, 0))) == (255, 255, 255)
    assert pixel(encoded(red, "PNG", transparency=(0, 255, 0))) == (255, 0, 0)
    assert pixel(encoded(Image.new("L", (4, 4), 7), "PNG", transparency=7)) == (255, 255, 255)


def test_cmyk_jpeg_has_the_right_colour() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.allclose(pixel(encoded(cyan, "JPEG")), (0, 255, 255), atol=3)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_high_byte(form: str) -> None:
    # Beside a white pixel, because what is dark all over is refused.
    for value, expected in [(0, 0), (255, 0), (256, 1), (0x80FF, 0x80), (65535, 255)]:
        values = np.array([[value, 65535]], dtype=np.uint16)
        data = encoded(Image.fromarray(values), form)
        assert pixel(data) == (expected,) * 3


def test_big_endian_and_32_bit_grey_keep_the_same_byte() -> None:
    big_endian = Image.frombytes("I;16B", (2, 2), b"\x80\x01" * 4)
    assert pixel(big_endian) == (0x80,) * 3
    assert pixel(encoded(big_endian, "TIFF")) == (0x80,) * 3
    assert pixel(Image.new("I", (2, 2), 0x8001)) == (0x80,) * 3
    assert pixel(Image.new("I", (2, 2), -5)) == (0, 0, 0)


@pytest.mark.parametrize("brightest", [1, 255, 1023, 4095])
@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_grey_that_would_come_out_black_is_refused_by_name(brightest: int, kind: type) -> None:
    values = np.linspace(0, brightest, 16).reshape(4, 4).astype(kind)
    with pytest.raises(BadSample, match=rf"scan\.tif: .* black, .* {brightest:,} of 65,535"):
        read_image(encoded(Image.fromarray(values), "TIFF"), "scan.tif")
    assert pixel(encoded(Image.fromarray(values * 0), "TIFF")) == (0, 0, 0)  # black indeed


def test_grey_of_32_bits_beyond_16_is_refused_by_name() -> None:
    with pytest.raises(BadSample, match=r"depth\.tif: grey of 32 bits, up to 1,048,576"):
        read_image(encoded(Image.new("I", (2, 2), 1 << 20), "TIFF"), "depth.tif")


def test_colours_of_16_bits_are_scaled_unless_they_hold_12() -> None:
    def rgb16(values: tuple[int, int, int]) -> bytes:
        rows = b"".join(b"\0" + struct.pack(">3H", *values) * 2 for _ in range(2))
        return png_of(struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0), rows)

    assert pixel(rgb16((65535, 0x8000, 300))) == (255, 128, 1)
    with pytest.raises(BadSample, match=r"raw\.png: .* black, .* 15 of 255"):
        read_image(rgb16((4095, 2000, 0)), "raw.png")


def test_one_bit_grey_and_8_bit_grey_read_as_grey() -> None:
    assert pixel(encoded(Image.new("1", (4, 4), 1), "PNG")) == (255, 255, 255)
    assert pixel(encoded(Image.new("1", (4, 4), 0), "PNG")) == (0, 0, 0)
    assert pixel(encoded(Image.new("L", (4, 4), 77), "PNG")) == (77, 77, 77)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(BadSample, match=r"depth\.tif.*floating-point"):
        read_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "depth.tif")


def test_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.allclose(pixel(data), (255, 0, 0), atol=4)


def test_paths_bytes_and_open_pictures_read_the_same(tmp_path: Path) -> None:
    data = encoded(quarters(), "PNG")
    path = tmp_path / "大 红.png"
    path.write_bytes(data)
    readings = [read_image(source, "x") for source in (path, data, Image.open(path))]
    assert len({reading.tobytes() for reading in readings}) == 1


def noise(size: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_a_bad_sample(form: str, kept: float) -> None:
    data = encoded(noise(), form)
    with pytest.raises(BadSample, match=r"^cut\.bin: .+"):
        read_image(data[: int(len(data) * kept)], "cut.bin")


def verdict(data: bytes, *, examined: bool) -> Seen | str:
    """The size and the notes, or what is wrong with a picture, by one of two ways."""
    try:
        if examined:
            return examine(data, "x")
        found = decode(data, "x")
    except BadSample as error:
        return str(error)
    return (found.image.height, found.image.width), found.notes


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0, "restart_marker_blocks": 3}],
    ids=["plain", "progressive", "restarts"],
)
def test_a_jpeg_is_examined_by_less_and_found_the_same(mode: str, options: dict[str, int]) -> None:
    picture = noise(96).crop((0, 0, 91, 62)).convert(mode)
    data = encoded(picture, "JPEG", **options)
    assert verdict(data, examined=True) == ((62, 91), ())
    places = np.random.default_rng(0)
    found: list[Seen | str] = []
    for case in range(60):
        spoilt = bytearray(data)
        if case % 3 == 0:
            del spoilt[places.integers(1, len(data)) :]
        elif case % 3 == 1:
            del spoilt[len(data) - 1 - case // 6 :]  # the end, of which a decoder may miss nothing
        else:
            for place in places.integers(0, len(data), 20):
                spoilt[place] = places.integers(0, 256)
        found.append(verdict(bytes(spoilt), examined=True))
        assert found[-1] == verdict(bytes(spoilt), examined=False)
    assert {type(one) for one in found} == {str, tuple}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_examined_picture_has_the_size_that_it_is_read_at(orientation: int) -> None:
    tag = Image.Exif()
    tag[0x0112] = orientation
    for form in ("JPEG", "PNG"):
        data = encoded(quarters(33, 15), form, exif=tag)
        assert examine(data, "x")[0] == ((33, 15) if orientation > 4 else (15, 33))


def test_an_examined_profile_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(quarters(), "JPEG", icc_profile=b"no profile")
    assert examine(data, "x") == ((16, 32), decode(data, "x").notes)
    assert examine(data, "x")[1] == (BAD_PROFILE,)
    monkeypatch.setattr(images, "MAX_PIXELS", 99)  # as it is, not as it is examined
    with pytest.raises(BadSample, match="more than 99 pixels"):
        examine(data, "x")


def test_files_that_are_no_pictures_are_bad_samples(tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("a red circle")
    empty = tmp_path / "empty.png"
    empty.touch()
    for path, reason in [
        (text, "not a picture"),
        (empty, "the file is empty"),
        (tmp_path / "absent.png", "no such file"),
        (tmp_path, ".+"),
        (Path("nul\0.png"), "null"),
    ]:
        with pytest.raises(BadSample, match=f"^the name: .*{reason}"):
            read_image(path, "the name")
    with pytest.raises(BadSample, match="the file is empty"):
        read_image(b"", "bytes")


def test_postscript_is_never_interpreted() -> None:
    with pytest.raises(BadSample, match="not a picture"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "x.jpg")


def png_of(header: bytes, rows: bytes, *others: tuple[bytes, bytes]) -> bytes:
    """A PNG of its IHDR, the unpacked rows, and other chunks before them."""
    chunks = [(b"IHDR", header), *others, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def png_that_claims(width: int, height: int) -> bytes:
    return png_of(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 50_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    # 9,500 squared is where Pillow only warns.
    with pytest.raises(BadSample, match=r"^bomb\.png: more than 89,478,485 pixels"):
        read_image(png_that_claims(side, side), "bomb.png")


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_the_bomb_is_named_where_warnings_are_errors() -> None:
    with pytest.raises(BadSample, match=r"^bomb\.png: more than"):
        read_image(png_that_claims(9_500, 9_500), "bomb.png")


def test_the_pixel_limit_is_ours_and_pillow_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(BadSample, match="more than 99 pixels"):
        read_image(Image.new("RGB", (10, 10)), "x")
    assert read_image(Image.new("RGB", (9, 11)), "x").size == (9, 11)
    after = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    assert after == before


def test_threads_read_alike() -> None:
    data = encoded(quarters(), "PNG")
    with ThreadPoolExecutor(8) as executor:
        readings = executor.map(lambda _: read_image(data, "x").tobytes(), range(64))
    assert len(set(readings)) == 1


def test_fit_gives_float32_in_minus_one_to_one() -> None:
    tensor = fit(Image.new("RGB", (30, 20), (0, 255, 51)), 8, 16)
    assert tensor.shape == (3, 8, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor[0].unique().tolist() == [-1.0]
    assert tensor[1].unique().tolist() == [1.0]
    assert tensor[2].unique().item() == pytest.approx(51 / 127.5 - 1)


def test_fit_of_a_picture_of_the_right_size_changes_nothing() -> None:
    image = noise(16)
    restored = (fit(image, 16, 16) + 1) * 127.5
    assert torch.equal(restored.round().byte(), torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(1, 1), (16, 900), (900, 16), (1, 4000), (3, 5), (641, 479)])
@pytest.mark.parametrize("target", [(64, 64), (48, 96), (7, 3)])
@pytest.mark.parametrize("anchor", [(0.0, 0.0), (0.5, 0.5), (0.3, 0.7), (1.0, 1.0)])
def test_any_picture_covers_the_target(
    size: tuple[int, int], target: tuple[int, int], anchor: tuple[float, float]
) -> None:
    left, top, right, bottom = cover_box(size, *target, anchor)
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    assert (right - left) / (bottom - top) == pytest.approx(target[1] / target[0])
    assert right - left == pytest.approx(size[0]) or bottom - top == pytest.approx(size[1])
    tensor = fit(Image.new("RGB", size, "red"), *target, anchor=anchor)
    assert torch.equal(tensor, torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, *target))


def test_the_anchor_chooses_the_end_of_a_strip() -> None:
    strip = Image.new("RGB", (10, 90), "red")
    strip.paste("lime", (0, 40, 10, 50))
    strip.paste("blue", (0, 80, 10, 90))
    for place, channel in [(0.0, 0), (0.5, 1), (1.0, 2)]:
        tensor = fit(strip, 10, 10, anchor=(place, 0.5))
        assert tensor.mean(dim=(1, 2)).argmax().item() == channel
        across = fit(strip.transpose(Image.Transpose.TRANSPOSE), 10, 10, anchor=(0.5, place))
        assert torch.equal(across, tensor.transpose(1, 2))


@pytest.mark.parametrize("size", [(64, 64), (37, 53), (200, 31)])
@pytest.mark.parametrize("horizontal", [0.0, 0.3, 0.5, 1.0])
def test_a_flip_is_the_exact_mirror(size: tuple[int, int], horizontal: float) -> None:
    image = noise(200).resize(size)
    plain = fit(image, 24, 20, anchor=(0.4, horizontal))
    mirrored = fit(image, 24, 20, anchor=(0.4, horizontal), flip=True)
    assert torch.equal(mirrored, plain.flip(-1))
    assert not torch.equal(mirrored, plain)


def test_fit_refuses_what_makes_no_sense() -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="anchor"):
        fit(image, 4, 4, anchor=(0.5, 1.5))
    with pytest.raises(ValueError, match="positive"):
        fit(image, 0, 4)
    with pytest.raises(ValueError, match="RGB"):
        fit(image.convert("L"), 4, 4)


# Masks


def test_an_alpha_channel_is_a_mask_and_an_opaque_picture_has_none() -> None:
    for mode, colour in [("RGBA", (255, 0, 0, 60)), ("LA", (9, 60))]:
        mask = read_alpha(encoded(Image.new(mode, (6, 4), colour), "PNG"), "x")
        assert mask is not None
        assert (mask.mode, mask.size, mask.getpixel((5, 3))) == ("L", (6, 4), 60)
    palette = encoded(Image.new("P", (4, 4), 1), "GIF", transparency=1)
    for data in (
        encoded(Image.new("RGB", (4, 4)), "JPEG"),
        encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 255)), "PNG"),
        encoded(Image.fromarray(np.full((4, 4), 4096, dtype=np.uint16)), "PNG"),
    ):
        assert read_alpha(data, "x") is None
    with pytest.raises(BadSample, match=r"^x: the picture is transparent everywhere"):
        read_alpha(palette, "x")
    with pytest.raises(BadSample, match=r"^x: the file is empty"):
        read_alpha(b"", "x")
    assert has_alpha(palette)
    assert not has_alpha(encoded(Image.new("RGB", (4, 4)), "PNG"))
    assert not has_alpha(b"no picture")
    assert not has_alpha(Path("absent.png"))


def test_alpha_masks_lie_as_their_pictures_do() -> None:
    image = Image.new("RGBA", (32, 16), (255, 255, 255, 255))
    image.paste((0, 0, 0, 128), (0, 0, 8, 4))
    for orientation in range(1, 9):
        tag = Image.Exif()
        tag[0x0112] = orientation
        data = encoded(image, "PNG", exif=tag)
        mask = read_alpha(data, "x")
        assert mask is not None
        dark = np.asarray(read_image(data, "x").convert("L")) < 255
        assert np.array_equal(dark, np.asarray(mask) < 255)


def test_masks_are_read_as_grey_whatever_their_format() -> None:
    brush = Image.new("RGBA", (4, 2), (255, 255, 255, 0))
    brush.putpixel((0, 0), (255, 255, 255, 255))
    deep = Image.fromarray(np.full((2, 4), 0x80FF, dtype=np.uint16))
    for image, expected in [
        (Image.new("RGB", (4, 2), (77, 77, 77)), [77, 77]),
        (Image.new("1", (4, 2), 1), [255, 255]),
        (deep, [0x80, 0x80]),
        (brush, [255, 0]),  # what the brush did not touch is not trained on
    ]:
        mask = read_mask(encoded(image, "PNG"), (2, 4), "x")
        assert (mask.mode, mask.size) == ("L", (4, 2))
        assert [mask.getpixel((column, 0)) for column in (0, 3)] == expected


def test_a_mask_is_scaled_to_its_picture_unless_it_lies_on_its_side() -> None:
    mask = Image.new("L", (20, 10), 0)
    mask.paste(255, (0, 0, 10, 10))
    data = encoded(mask, "PNG")
    scaled = read_mask(data, (30, 40), "x")
    assert scaled.size == (40, 30)
    assert [scaled.getpixel((column, 15)) for column in (0, 17, 22, 39)] == [255, 255, 0, 0]
    assert read_mask(data, (10, 20), "x").tobytes() == mask.tobytes()
    with pytest.raises(BadSample, match="lies on its side"):
        read_mask(data, (20, 10), "x")
    square = encoded(Image.new("L", (10, 10), 255), "PNG")
    assert read_mask(square, (10, 10), "x").size == (10, 10)


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def test_each_cell_of_a_fitted_mask_is_the_mean_over_its_area() -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 48))
    cells = fit_mask(grey(values), 32, 48, 8)
    assert (cells.shape, cells.dtype) == ((1, 4, 6), torch.float32)
    expected = values.reshape(4, 8, 6, 8).mean(axis=(1, 3)) / 255
    assert np.allclose(cells[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (37, 53), (200, 31), (5, 3)])
@pytest.mark.parametrize("anchor", [(0.0, 0.0), (0.5, 0.5), (0.3, 0.9), (1.0, 1.0)])
def test_white_stays_one_and_black_stays_zero(
    size: tuple[int, int], anchor: tuple[float, float]
) -> None:
    for value, expected in [(255, 1.0), (0, 0.0)]:
        cells = fit_mask(Image.new("L", size, value), 32, 24, 8, anchor=anchor)
        assert torch.equal(cells, torch.full((1, 4, 3), expected))


def test_pixels_that_a_cell_cuts_count_in_part() -> None:
    # Three pixels on two cells: the middle one is halved.
    cells = fit_mask(grey(np.array([[255, 0, 255]] * 3)), 16, 16, 8)
    assert torch.allclose(cells, torch.full((1, 2, 2), 2 / 3))
    cells = fit_mask(grey(np.array([[255, 255, 0]] * 3)), 16, 16, 8)
    assert torch.allclose(cells, torch.tensor([1.0, 1 / 3]).expand(1, 2, 2))


@pytest.mark.parametrize("size", [(96, 64), (50, 90), (301, 77)])
@pytest.mark.parametrize("anchor", [(0.0, 0.0), (0.5, 0.5), (0.8, 0.3)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_mask_is_cropped_and_mirrored_as_its_picture(
    size: tuple[int, int], anchor: tuple[float, float], flip: bool
) -> None:
    patches = np.random.default_rng(0).integers(0, 2, (7, 11)) * 255
    mask = grey(patches).resize(size, Image.Resampling.NEAREST)
    cells = fit_mask(mask, 48, 64, 8, anchor=anchor, flip=flip)
    picture = (fit(mask.convert("RGB"), 48, 64, anchor=anchor, flip=flip)[:1] + 1) / 2
    seen = torch.nn.functional.avg_pool2d(picture, 8)
    # Lanczos, which the picture is resized with, rings at edges and reaches over them.
    assert (cells - seen).abs().max() < 0.1
    assert (cells - seen.flip(-1)).abs().max() > 0.5


def test_fit_mask_refuses_what_makes_no_sense() -> None:
    mask = Image.new("L", (16, 16))
    with pytest.raises(ValueError, match="mode L"):
        fit_mask(mask.convert("RGB"), 16, 16, 8)
    with pytest.raises(ValueError, match="not a multiple of the step 8"):
        fit_mask(mask, 16, 12, 8)
    with pytest.raises(ValueError, match="anchor"):
        fit_mask(mask, 16, 16, 8, anchor=(0.0, 1.1))
