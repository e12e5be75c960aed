"""Preprocessing in torch against PIL and torchvision, which the official scorers use."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dojo.rewards import preprocess

# Heights and widths: square, wide, tall, odd, smaller than the target, hardly larger.
SIZES = [(512, 512), (512, 768), (300, 227), (224, 224), (64, 64), (227, 451), (1000, 333)]
NOT_VERY_TALL = [size for size in SIZES if size[0] <= 2 * size[1]]


def picture(height: int, width: int) -> np.ndarray:
    """Gradients, hard edges and noise: what makes bicubic overshoot."""
    rng = np.random.default_rng(height * 10_000 + width)
    rows, columns = np.mgrid[:height, :width]
    wave = 127 + 120 * np.sin(rows[..., None] / np.array([3.0, 17, 90]) + columns[..., None] / 29)
    wave[(rows // 16 + columns // 16) % 5 == 0] = 255
    wave[(rows - height / 2) ** 2 + (columns - width / 2) ** 2 < height * width / 60] = 0
    return np.clip(wave + rng.normal(0, 12, wave.shape), 0, 255).astype(np.uint8)


def pil(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """PIL's bicubic resize: width first, which Pillow 13 does not do with very tall pictures."""
    narrow = Image.fromarray(pixels).resize((width, len(pixels)), Image.Resampling.BICUBIC)
    return np.asarray(narrow.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [224, 64])
def test_resizing_equals_pil(size: tuple[int, int], target: int) -> None:
    pixels = picture(*size)
    height, width = preprocess.shortest_edge(*size, target)
    assert min(height, width) == target
    expected = pil(pixels, height, width)
    if size[0] <= 2 * size[1]:
        whole = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(expected, np.asarray(whole))
    ours = preprocess.resize(tensor(pixels), height, width)[0].permute(1, 2, 0).numpy() * 255
    difference = np.abs(ours - expected)
    assert difference.max() <= 2 + 1e-3
    assert difference.mean() <= 0.05
    np.testing.assert_allclose(ours, ours.round(), atol=1e-3)  # 8-bit levels


def test_plain_float_resizing_would_not_equal_pil() -> None:
    pixels = picture(512, 768)
    expected = pil(pixels, 224, 336)
    plain = torch.nn.functional.interpolate(
        tensor(pixels), (224, 336), mode="bicubic", antialias=True
    )
    difference = np.abs(plain[0].permute(1, 2, 0).numpy() * 255 - expected)
    assert difference.max() > 10


@pytest.mark.parametrize("size", NOT_VERY_TALL)
def test_the_crop_follows_torchvision(size: tuple[int, int]) -> None:
    pixels = picture(*size)
    official = v2.Compose(
        [v2.Resize(224, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)]
    )
    expected = np.asarray(official(Image.fromarray(pixels))).astype(np.float64)
    ours = preprocess.resize_and_crop(tensor(pixels), 224, "torchvision")
    assert ours.shape == (1, 3, 224, 224)
    difference = np.abs(ours[0].permute(1, 2, 0).numpy() * 255 - expected)
    assert difference.max() <= 2 + 1e-3
    assert difference.mean() <= 0.05


@pytest.mark.parametrize("size", NOT_VERY_TALL)
def test_the_crop_follows_transformers(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    pixels = picture(*size)
    processor = CLIPImageProcessorPil()
    expected = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    ours = preprocess.normalize(preprocess.resize_and_crop(tensor(pixels), 224, "transformers"))
    difference = (ours - expected).abs() * 255 * 0.2613
    assert difference.max() <= 2.2
    assert difference.mean() <= 0.05


def test_the_two_crops_differ_by_one_pixel_at_an_odd_rest() -> None:
    assert preprocess.corner(227, 229, 224, "torchvision") == (2, 2)
    assert preprocess.corner(227, 229, 224, "transformers") == (1, 2)


@pytest.mark.parametrize("size", [*SIZES, (160, 20), (20, 160), (90, 5), (4, 90), (1, 64), (64, 1)])
@pytest.mark.parametrize("crop", ["torchvision", "transformers"])
def test_the_crop_is_the_middle_of_the_whole_picture_resized(
    size: tuple[int, int], crop: preprocess.Crop
) -> None:
    images = tensor(picture(*size))
    height, width = preprocess.shortest_edge(*size, 24)
    top, left = preprocess.corner(height, width, 24, crop)
    expected = preprocess.resize(images, height, width)[..., top : top + 24, left : left + 24]
    ours = preprocess.resize_and_crop(images, 24, crop)
    if max(size) <= preprocess.ELONGATED * min(size):
        assert torch.equal(ours, expected)
    assert (ours - expected).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("size", [(512, 1), (1, 512), (513, 1), (2, 1023)])
def test_a_line_does_not_become_a_giant(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    real = preprocess._bicubic

    def spy(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        seen.append(size)
        return real(x, size)

    monkeypatch.setattr(preprocess, "_bicubic", spy)
    assert preprocess.resize_and_crop(torch.rand(1, 3, *size), 224, "torchvision").isfinite().all()
    assert max(map(max, seen)) <= 9 * 224


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("antialias", [True, False])
def test_the_letterbox_holds_the_whole_picture_in_black(
    size: tuple[int, int], antialias: bool
) -> None:
    images = tensor(picture(*size))
    ours = preprocess.letterbox(images, 224, antialias=antialias)
    scale = 224 / max(size)
    height, width = round(size[0] * scale), round(size[1] * scale)
    inside = v2.functional.resize(
        images, [height, width], v2.InterpolationMode.BICUBIC, antialias=antialias
    )
    top, left = (224 - height) // 2, (224 - width) // 2
    expected = torch.zeros(1, 3, 224, 224)
    expected[..., top : top + height, left : left + width] = inside
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda x: preprocess.resize_and_crop(x, 24, "torchvision"),
        lambda x: preprocess.letterbox(x, 24),
        preprocess.quantize,
    ],
)
def test_gradients_reach_every_pixel_that_is_seen(prepare) -> None:
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    images[0, :, :10] = 1.2  # a decoder's values may leave [0, 1]; they must find back
    images.requires_grad_(True)
    prepare(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad != 0).float().mean() > 0.99
