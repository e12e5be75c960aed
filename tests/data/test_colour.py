"""Claims about colour profiles, gamma, and the formats that plugins read."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from dojo.data import BadSample, formats, jxl, read_image
from dojo.data.colour import BAD_PROFILE, CONVERTED, GAMMA
from dojo.data.images import FIRST_FRAME, decode, has_alpha, read_alpha, read_mask
from tests.data.test_images import encoded, noise, pixel, png_of, quarters

# XYZ of red, green and blue, adapted to D50: Adobe RGB (1998), Display P3, ProPhoto.
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
PROPHOTO = ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82521))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 with these tags."""
    text = b"test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0" + text,
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249),
        **tags,
    }
    start = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = bytes(4) + struct.pack(">I", 0x02400000) + kind + space + pcs + bytes(12) + b"acsp"
    head = head + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return struct.pack(">I", start + len(body)) + head.ljust(124, b"\0") + table + body


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def matrix(primaries: tuple[tuple[float, ...], ...], gamma: float = 2.2) -> bytes:
    """A profile of RGB."""
    colorants = (b"XYZ \0\0\0\0" + fixed(*xyz) for xyz in primaries)
    tags = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True))
    return profile(
        b"RGB ", b"XYZ ", {**tags, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma))}
    )


def grey(gamma: float) -> bytes:
    return profile(b"GRAY", b"XYZ ", {b"kTRC": curve(gamma)})


def inks() -> bytes:
    """A profile of CMYK: the table of its 16 corners as Lab, and straight lines between them."""
    corners = np.indices((2, 2, 2, 2)).reshape(4, -1).T  # the last channel changes fastest
    c, m, y, k = corners.T.astype(float)
    light = (100 - 25 * c - 35 * m - 8 * y) * (1 - 0.9 * k)
    a, b = (70 * m - 35 * c) * (1 - k), (85 * y - 45 * c) * (1 - k)
    lab = np.stack([light * 2.55, a + 128, b + 128], axis=1).round().astype(np.uint8)
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut = table + 4 * ramp + lab.tobytes() + 3 * ramp
    return profile(b"CMYK", b"Lab ", {b"A2B0": lut})


def wanted(data: bytes) -> np.ndarray:
    """What littleCMS makes of a picture's own profile."""
    image = Image.open(io.BytesIO(data))
    source = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    converted = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
    assert converted is not None
    return np.asarray(converted, dtype=int)


def off(data: bytes, expected: np.ndarray) -> int:
    """How far what is read lies from what is expected, in levels."""
    return int(np.abs(np.asarray(read_image(data, "x"), dtype=int) - expected).max())


LOSSLESS = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("primaries", [ADOBE, P3, PROPHOTO])
def test_wide_gamut_pictures_are_read_as_srgb(form: str, primaries: tuple) -> None:
    gamma = 1.8 if primaries is PROPHOTO else 2.2
    options = {"icc_profile": matrix(primaries, gamma), **LOSSLESS.get(form, {})}
    data = encoded(noise(), form, **options)
    assert off(data, wanted(data)) <= 2
    found = decode(data, "x")
    assert found.notes == (CONVERTED,)
    assert "icc_profile" not in found.image.info  # it would be applied again


def test_grey_and_ink_profiles_are_applied() -> None:
    data = encoded(noise().convert("L"), "PNG", icc_profile=grey(1.0))
    assert off(data, wanted(data)) <= 2
    assert off(data, np.asarray(noise().convert("L").convert("RGB"), dtype=int)) > 40
    for form in ("TIFF", "JPEG"):
        data = encoded(noise().convert("CMYK"), form, icc_profile=inks())
        assert off(data, wanted(data)) <= 2
        assert decode(data, "x").notes == (CONVERTED,)
    # A grey picture with the profile of its colours.
    data = encoded(Image.new("L", (4, 4), 100), "PNG", icc_profile=matrix(ADOBE, 1.0))
    assert pixel(data) == pytest.approx((168, 168, 168), abs=2)
    # 16 bits of grey, and its alpha, which is no colour.
    deep = Image.fromarray(np.full((2, 2), 100 * 256, dtype=np.uint16))
    assert pixel(encoded(deep, "PNG", icc_profile=grey(1.0))) == pytest.approx((168,) * 3, abs=2)


def test_transparency_is_no_colour() -> None:
    image = Image.new("RGBA", (4, 4), (60, 170, 70, 100))
    data = encoded(image, "PNG", icc_profile=matrix(ADOBE))
    alpha = read_alpha(data, "x")
    assert alpha is not None
    assert alpha.getpixel((0, 0)) == 100
    opaque = encoded(image.convert("RGB"), "PNG", icc_profile=matrix(ADOBE))
    mixed = (np.array(pixel(opaque)) * 100 + 255 * 155) / 255
    assert pixel(data) == pytest.approx(tuple(mixed), abs=1)


def test_pictures_that_are_srgb_already_are_left_alone() -> None:
    data = encoded(noise(), "PNG", icc_profile=SRGB.tobytes())
    assert off(data, np.asarray(noise(), dtype=int)) == 0
    assert decode(data, "x").notes == ()


@pytest.mark.parametrize(
    ("image", "damaged"),
    [
        (noise(), b"no profile"),
        (noise(), matrix(ADOBE)[:200]),
        (noise(), grey(2.2)),  # of another kind of picture
        (noise().convert("L"), inks()),
        (noise().convert("CMYK"), matrix(ADOBE)),
    ],
)
def test_a_profile_that_cannot_be_used_is_ignored_and_told(
    image: Image.Image, damaged: bytes
) -> None:
    data = encoded(image, "TIFF", icc_profile=damaged)
    assert off(data, np.asarray(image.convert("RGB"), dtype=int)) == 0
    assert decode(data, "x").notes == (BAD_PROFILE,)


def test_the_gamma_of_a_png_counts_where_nothing_better_is_told() -> None:
    def png(gamma: int, *others: tuple[bytes, bytes]) -> bytes:
        chunks = ((b"gAMA", struct.pack(">I", gamma)), *others)
        return png_of(
            struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0), bytes([0, 60, 170, 70]), *chunks
        )

    assert pixel(png(100_000)) == (133, 213, 143)  # linear light
    assert decode(png(100_000), "x").notes == (GAMMA,)
    for data in (png(45_455), png(0), png(100_000, (b"sRGB", b"\0"))):
        assert pixel(data) == (60, 170, 70)
        assert decode(data, "x").notes == ()
    # Linear light needs its 16 bits: the high byte alone would give 28.
    header = struct.pack(">IIBBBBB", 1, 1, 16, 0, 0, 0, 0)
    data = png_of(header, struct.pack(">BH", 0, 1000), (b"gAMA", struct.pack(">I", 100_000)))
    assert pixel(data) == (33, 33, 33)


# Frames and texts


def test_that_there_are_more_frames_is_told() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        found = decode(data, "x")
        assert found.notes == (FIRST_FRAME,), form
        assert np.allclose(np.asarray(found.image)[0, 0, :3], (255, 0, 0), atol=4)
        assert decode(encoded(frames[0], form), "x").notes == ()
    phone = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert decode(phone, "x").notes == ()  # a depth map, or another eye's view


def test_a_png_is_read_whatever_texts_it_carries() -> None:
    texts = PngImagePlugin.PngInfo()
    workflow = "{" + "x" * 3_000_000 + "}"
    texts.add_text("workflow", workflow, zip=True)
    texts.add_itxt("prompt", workflow, zip=True)
    assert pixel(encoded(quarters(), "PNG", pnginfo=texts)) == (255, 0, 0)


# Plugins


def turned(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


def test_heic_photographs_are_read_upright_and_as_srgb() -> None:
    pytest.importorskip("pillow_heif")
    assert "HEIF" in formats.readable()
    stored = quarters(64, 32).transpose(Image.Transpose.ROTATE_90)  # as the sensor saw it
    # The encoder turns the EXIF tag into HEIF's own turn, as telephones have it, and keeps both.
    data = encoded(stored, "HEIF", quality=-1, exif=turned(6).tobytes())
    assert b"irot" in data
    image = read_image(data, "IMG_1.HEIC")
    assert image.size == (64, 32)
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(quarters(64, 32), dtype=int))
    assert difference.mean() < 3
    data = encoded(noise(), "HEIF", quality=95, icc_profile=matrix(P3))
    assert off(data, wanted(data)) <= 2
    assert decode(data, "x").notes == (CONVERTED,)


def test_avif_is_read_upright_and_as_srgb() -> None:
    stored = quarters(64, 32).transpose(Image.Transpose.ROTATE_90)
    data = encoded(stored, "AVIF", quality=90, exif=turned(6).tobytes())
    assert b"irot" in data
    image = read_image(data, "x")
    assert image.size == (64, 32)
    assert np.allclose(np.asarray(image)[2, 2], (255, 0, 0), atol=12)
    data = encoded(noise(), "AVIF", icc_profile=matrix(P3))
    assert off(data, wanted(data)) <= 2


@pytest.mark.filterwarnings("ignore:Using JPEG reconstruction")
def test_jpeg_xl_is_read_upright_and_as_srgb(tmp_path: Path) -> None:
    pytest.importorskip("pillow_jxl")
    assert "JXL" in formats.readable()
    data = encoded(quarters(), "JXL", lossless=True)
    assert pixel(data) == (255, 0, 0)
    # A JPEG inside comes as it was stored: its EXIF tag and its profile count.
    photo = tmp_path / "photo.jpg"
    stored = quarters(64, 32).transpose(Image.Transpose.ROTATE_90)
    stored.save(photo, exif=turned(6), quality=95, icc_profile=matrix(P3))
    with Image.open(photo) as opened:
        data = encoded(opened, "JXL")
    found = decode(data, "x")
    assert found.image.size == (64, 32)
    assert found.image.tobytes() == read_image(photo, "x").tobytes()
    assert found.notes == (CONVERTED,)


@pytest.mark.parametrize(
    "size",
    [(64, 64), (8, 16), (640, 480), (641, 479), (1920, 1080), (3000, 1), (1, 700), (300, 250)],
)
@pytest.mark.parametrize("contained", [False, True])
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(
    size: tuple[int, int], contained: bool
) -> None:
    pytest.importorskip("pillow_jxl")
    formats.readable()
    data = encoded(Image.new("RGB", size), "JXL", use_container=contained, effort=1)
    assert jxl.size(data) == size


def test_a_jpeg_xl_that_claims_too_much_is_refused_before_it_is_decoded() -> None:
    pytest.importorskip("pillow_jxl")
    # Not small; a side of 18 bits; 50,000 pixels; ratio 1 to 1. Nothing follows.
    bits = 0 | 2 << 1 | (50_000 - 1) << 3 | 1 << 21
    data = b"\xff\x0a" + bits.to_bytes(16, "little")
    assert jxl.size(data) == (50_000, 50_000)
    with pytest.raises(BadSample, match=r"^bomb\.jxl: more than 89,478,485 pixels"):
        read_image(data, "bomb.jxl")


@pytest.fixture
def without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that has no plugin."""
    monkeypatch.setattr(formats, "_register", lambda module: None)
    plain = {k: v for k, v in Image.OPEN.items() if k not in ("HEIF", "JXL", "AVIF")}
    monkeypatch.setattr(Image, "OPEN", plain)
    uncached = formats.readable.__wrapped__, formats.picture_suffixes.__wrapped__
    monkeypatch.setattr(formats, "readable", uncached[0])
    monkeypatch.setattr(formats, "picture_suffixes", uncached[1])


@pytest.mark.usefixtures("without_plugins")
def test_what_would_read_a_file_is_told_without_the_plugin() -> None:
    heads = {
        "IMG.HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"HEIF .*\[photos\]"),
        "a.jxl": (b"\xff\x0a" + bytes(40), r"JXL .*\[photos\]"),
        "b.avif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "AVIF .*pillow-avif-plugin"),
    }
    for name, (content, words) in heads.items():
        with pytest.raises(BadSample, match=f"^{name}: {words}"):
            read_image(content, name)
    assert ".heic" not in formats.picture_suffixes()
    assert "[photos]" in formats.remedy(".heic")


def test_every_reader_sees_the_same_colours(tmp_path: Path) -> None:
    """Masks, alpha, and the pictures that rewards score."""
    from dojo.rewards.__main__ import read_picture

    light = Image.new("RGBA", (4, 4), (60, 170, 70, 100))
    path = tmp_path / "a.png"
    light.save(path, icc_profile=matrix(P3))
    read = read_picture(path)
    assert (read[0, :, 0, 0] * 255).round().tolist() == list(pixel(path))
    assert has_alpha(path)
    mask = tmp_path / "m.png"
    Image.new("L", (4, 4), 100).save(mask, icc_profile=grey(1.0))
    assert read_mask(mask, (4, 4), "m").getpixel((0, 0)) == pytest.approx(168, abs=2)
