"""The scorers with networks, on small random weights, each against a computation of its own."""

import inspect
import json
import math
import shutil
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModelWithProjection,
)

from dojo import rewards
from dojo.cli import UserError
from dojo.rewards import aesthetic, clip, hps, loading, preprocess, scorer, weights

ROOT = Path(__file__).resolve().parents[2]
POCKET_CLIP = ROOT / "models" / "pocket-clip"
HEADS = ROOT.parent / "shared" / "data" / "improved-aesthetic-predictor"
PROMPTS = ["a red star", "two blue circles on a gray background", "a ring"]
LONG = "a small red star on a gray background and " * 5


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP for 32 pixels with the pocket CLIP's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "projection_dim": 48,
    }
    tokens = {
        "vocab_size": 631,
        "max_position_embeddings": 20,
        "eos_token_id": 630,
        "bos_token_id": 629,
    }
    model: Any = CLIPModel(
        CLIPConfig(
            text_config={**shape, **tokens},
            vision_config={**shape, "image_size": 32, "patch_size": 8},
            projection_dim=48,
            logit_scale_init_value=3.1,
        )
    )
    for parameter in model.parameters():  # initial weights are too small to tell pictures apart
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(POCKET_CLIP)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pixels() -> list[np.ndarray]:
    """Three 8-bit pictures of 60 x 81: at 32 x 43 the two rules of cropping differ by a pixel."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 7, 9, 3), dtype=np.uint8)
    return [
        np.asarray(Image.fromarray(p).resize((81, 60), Image.Resampling.BICUBIC)) for p in coarse
    ]


def tensor(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255


def official_embeds(folder: Path, pixels: list[np.ndarray], prompts: list[str]) -> tuple[Any, Any]:
    """Unit embeddings through transformers' own processor and `CLIPModel.forward`."""
    model: Any = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    seen = processor(images=[Image.fromarray(p) for p in pixels], return_tensors="pt")
    text = tokenizer(prompts, padding=True, truncation=True, max_length=20, return_tensors="pt")
    with torch.no_grad():
        output = model(**text, pixel_values=seen["pixel_values"])
    return output.image_embeds, output.text_embeds


# -- CLIP -------------------------------------------------------------------------------------


def test_clip_is_the_cosine_of_transformers_own_output(
    tiny_clip: Path, pixels: list[np.ndarray]
) -> None:
    image, text = official_embeds(tiny_clip, pixels, PROMPTS)
    output = rewards.load(f"clip[model={tiny_clip}]")(tensor(pixels), PROMPTS)
    expected = (image * text).sum(-1)
    assert expected.std() > 0.01
    torch.testing.assert_close(output.scores, expected, atol=2e-4, rtol=0)


def test_pickscore_is_the_cosine_times_the_learned_scale(
    tiny_clip: Path, pixels: list[np.ndarray]
) -> None:
    image, text = official_embeds(tiny_clip, pixels, PROMPTS)
    output = rewards.load(f"pickscore[model={tiny_clip}]")(tensor(pixels), PROMPTS)
    expected = math.exp(3.1) * (image * text).sum(-1)
    torch.testing.assert_close(output.scores, expected, atol=5e-3, rtol=0)


def test_clip_iqa_is_the_share_of_good(tiny_clip: Path, pixels: list[np.ndarray]) -> None:
    image, text = official_embeds(
        tiny_clip, [*pixels, pixels[0]][:2], ["Good photo.", "Bad photo."]
    )
    output = rewards.load(f"clip_iqa[model={tiny_clip}]")(tensor(pixels[:2]), ["", ""])
    good, bad = (100 * image @ text.T).unbind(-1)
    torch.testing.assert_close(output.scores, torch.sigmoid(good - bad), atol=2e-2, rtol=0)


def test_a_long_prompt_keeps_its_end_token(tiny_clip: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_clip)
    ids = tokenizer(LONG).input_ids
    assert len(ids) > 20
    model: Any = CLIPModel.from_pretrained(tiny_clip).eval()
    with torch.no_grad():
        cut = torch.tensor([[*ids[:19], tokenizer.eos_token_id]])
        expected = F.normalize(model.get_text_features(input_ids=cut).pooler_output)
    backbone = clip.backbone(str(tiny_clip), scorer.Place())
    torch.testing.assert_close(backbone.texts([LONG]), expected, atol=1e-5, rtol=0)


def test_scorers_of_one_clip_share_its_network_and_its_embeddings(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(linear_head(48, [1]), tmp_path / "head.safetensors")
    at = f"model={tiny_clip}"
    reward = rewards.load(
        f"clip[{at}],clip_iqa[{at}],aesthetic[head={tmp_path}/head.safetensors,clip={tiny_clip}]"
    )
    backbones = {id(one.scorer.backbone): one.scorer.backbone for one in reward.components}  # type: ignore[attr-defined]
    assert len(backbones) == 1
    (shared,) = backbones.values()
    pictures: list[int] = []
    texts: list[str] = []
    encode_pictures, encode_text = shared._encode_pictures, shared._encode_text
    monkeypatch.setattr(
        shared, "_encode_pictures", lambda x: pictures.append(len(x)) or encode_pictures(x)
    )
    monkeypatch.setattr(shared, "_encode_text", lambda x: texts.append(x) or encode_text(x))
    images = torch.rand(4, 3, 32, 32)
    first = reward(images, ["a", "b", "a", "a"])
    assert pictures == [4]
    assert sorted(texts) == ["Bad photo.", "Good photo.", "a", "b"]
    second = reward(images.flip(0), ["a", "a", "b", "a"])
    assert pictures == [4, 4]  # other pictures are embedded anew
    assert len(texts) == 4  # known prompts are not
    torch.testing.assert_close(second.scores, first.scores.flip(0))


def test_micro_batches_give_the_scores_of_one_batch(tiny_clip: Path) -> None:
    images = torch.rand(5, 3, 40, 32)
    text = f"clip[model={tiny_clip}]"
    whole = rewards.load(text, batch_size=5)(images, PROMPTS + PROMPTS[:2])
    parts = rewards.load(text, batch_size=2)(images, PROMPTS + PROMPTS[:2])
    alone = rewards.load(text)(images[:1], PROMPTS[:1])
    torch.testing.assert_close(parts.scores, whole.scores)
    torch.testing.assert_close(alone.scores, whole.scores[:1])


def test_an_embedding_does_not_hang_on_the_prompts_before_it(tiny_clip: Path) -> None:
    def fresh() -> clip.HubClip:
        return clip.backbone(str(tiny_clip), scorer.Place())

    together = fresh().texts([*PROMPTS, LONG])
    for prompt, embed in zip([*PROMPTS, LONG], together, strict=True):
        assert torch.equal(fresh().texts([prompt])[0], embed)


def test_old_texts_make_room_for_new_ones(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "KEPT_TEXTS", 3)
    backbone = clip.backbone(str(tiny_clip), scorer.Place())
    for i in range(5):
        backbone.texts([str(i), "again"])
    assert len(backbone._texts) <= 3


def test_half_precision_weights_give_float32_scores_nearby(tiny_clip: Path) -> None:
    images = torch.rand(3, 3, 32, 32)
    exact = rewards.load(f"clip[model={tiny_clip}]")(images, PROMPTS).scores
    half = rewards.load(f"clip[model={tiny_clip},dtype=bf16]")(images, PROMPTS).scores
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.05


def test_the_training_around_it_does_not_change_a_score(tiny_clip: Path) -> None:
    images = torch.rand(3, 3, 32, 32)
    reward = rewards.load(f"clip[model={tiny_clip}]")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        around = reward(images, PROMPTS)
    images.requires_grad_(True)
    plain = reward(images, PROMPTS)  # with the texts that were embedded above
    plain.scores.sum().backward()
    assert around.scores.tolist() == plain.scores.tolist()


def test_the_pocket_clip_prefers_the_right_caption() -> None:
    import random

    from dojo.pocket import scenes

    rng = random.Random(1)
    drawn = [scenes.sample(rng) for _ in range(24)]
    images = torch.stack([torch.from_numpy(scenes.draw(scene)) for _, scene in drawn])
    images = images.permute(0, 3, 1, 2) / 255
    prompts = [caption for caption, _ in drawn]
    reward = rewards.load(f"clip[model={POCKET_CLIP}]")
    right = reward(images, prompts).scores
    wrong = reward(images, prompts[1:] + prompts[:1]).scores
    assert (right > wrong).float().mean() > 0.8


def test_pictures_that_are_gone_leave_no_graph_behind(tiny_clip: Path) -> None:
    clip: Any = rewards.load(f"clip[model={tiny_clip}]").components[0].scorer
    images = torch.rand(2, 3, 32, 32, requires_grad=True) * 1  # as a decoder's
    first = clip.backbone.pictures(images, "torchvision")
    assert clip.backbone.pictures(images, "torchvision") is first  # one network for two scorers
    nodes = weakref.ref(first)
    first.sum().backward()
    del images, first
    assert nodes() is None


def test_what_is_no_clip_is_refused(tmp_path: Path, tiny_clip: Path) -> None:
    with pytest.raises(UserError, match="no/such-model cannot be read"):
        rewards.load("clip[model=no/such-model]")
    tensors = load_file(tiny_clip / "model.safetensors")
    del tensors["visual_projection.weight"]
    for path in tiny_clip.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="visual_projection"):
        rewards.load(f"clip[model={tmp_path}]")


def _noise(state: dict[str, Tensor]) -> None:
    name = next(name for name in sorted(state) if state[name].dim() > 1)
    state[name] = torch.full_like(state[name], torch.nan)


def _fewer(state: dict[str, Tensor]) -> None:
    del state[max(state)]


@pytest.mark.parametrize("change", [_noise, _fewer])
@pytest.mark.parametrize(
    "name", ["clip", "pickscore", "clip_iqa", "hpsv2", "aesthetic", "aesthetic_v1", "imagereward"]
)
def test_no_scorer_works_with_half_of_its_weights(
    name: str,
    change: Callable[[dict[str, Tensor]], None],
    tiny_clip: Path,
    official: tuple[Path, Any, Any, Any],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    file, write = folder / "model.safetensors", partial(save_file, metadata={"format": "pt"})
    tensors, text = load_file(file), f"{name}[model={folder}]"
    if name.startswith("aesthetic"):  # a folder with a CLIP's picture half and a head
        vision: Any = CLIPVisionModelWithProjection.from_pretrained(tiny_clip)
        (folder / "config.json").write_text(json.dumps(vision.config.to_dict()))
        head = {f"predictor.{key}": value for key, value in linear_head(48, [1]).items()}
        tensors, text = {**vision.state_dict(), **head}, f"{name}[head={folder}]"
    elif name == "imagereward":
        file, write = tmp_path / "ImageReward.pt", torch.save
        tensors = torch.load(official[0], weights_only=True)
        text = f"imagereward[model={file},tokenizer={tiny_clip}]"
    write(tensors, file)
    rewards.load(text)
    change(tensors)
    write(tensors, file)
    says = r"^--reward: .*(has no|not finite|other weights|no weights)"
    with pytest.raises(UserError, match=says):
        rewards.load(text)


@pytest.mark.parametrize("name", ["clip", "hpsv2"])
def test_no_scorer_reads_prompts_without_its_words(
    name: str, tiny_clip: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"--reward: {folder} is incomplete: a tokenizer needs"):
        rewards.load(f"{name}[model={folder}]")


# -- aesthetic --------------------------------------------------------------------------------


def linear_head(width: int, widths: list[int], numbers: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Random weights of a head: one linear map, or layers with the numbers given."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, out in enumerate(widths):
        prefix = f"layers.{numbers[i]}." if numbers else ""
        tensors[f"{prefix}weight"] = torch.randn(out, width, generator=generator) / width**0.5
        tensors[f"{prefix}bias"] = torch.randn(out, generator=generator)
        width = out
    return tensors


LINEAR, RELU = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11)
WIDTHS = [20, 16, 12, 8, 1]


@pytest.mark.parametrize("numbers", [LINEAR, RELU])
def test_the_improved_head_equals_its_layers_one_by_one(
    numbers: tuple[int, ...], tiny_clip: Path, pixels: list[np.ndarray], tmp_path: Path
) -> None:
    tensors = linear_head(48, WIDTHS, numbers)
    torch.save(tensors, tmp_path / "head.pth")
    reward = rewards.load(f"aesthetic[head={tmp_path}/head.pth,clip={tiny_clip}]")
    output = reward(tensor(pixels[:2]), ["", ""])
    # The official predictor: OpenAI's preprocessing with torchvision on PIL pictures.
    prepare = v2.Compose([v2.Resize(32, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)])
    seen = tensor([np.asarray(prepare(Image.fromarray(p))) for p in pixels[:2]])
    model: Any = CLIPModel.from_pretrained(tiny_clip).eval()
    with torch.no_grad():
        inputs = preprocess.normalize(seen)
        x = model.visual_projection(model.vision_model(pixel_values=inputs).pooler_output)
        x = x / x.norm(dim=-1, keepdim=True)
        for i, number in enumerate(numbers):
            x = x @ tensors[f"layers.{number}.weight"].T + tensors[f"layers.{number}.bias"]
            x = x.relu() if numbers is RELU and i < 4 else x
    torch.testing.assert_close(output.scores, x[:, 0], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "prefix", "widths", "numbers"),
    [
        ("aesthetic_v1", "predictor.", [1], ()),
        ("aesthetic", "", WIDTHS, LINEAR),
        ("aesthetic", "", WIDTHS, RELU),
    ],
)
@pytest.mark.parametrize("safe", [True, False])
def test_a_predictor_folder_is_read_without_its_remote_code(
    name: str,
    prefix: str,
    widths: list[int],
    numbers: tuple[int, ...],
    safe: bool,
    tiny_clip: Path,
    pixels: list[np.ndarray],
    tmp_path: Path,
) -> None:
    vision: Any = CLIPVisionModelWithProjection.from_pretrained(tiny_clip)
    head = linear_head(48, widths, numbers)
    tensors = {
        **vision.state_dict(),
        **{f"{prefix}{key}": value for key, value in head.items()},
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    if safe:
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    config = {
        **vision.config.to_dict(),
        "model_type": "aesthetics_predictor",
        "auto_map": {"AutoModel": "modeling_v1.Predictor"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_v1.py").write_text("raise SystemExit('remote code was run')")
    output = rewards.load(f"{name}[head={tmp_path}]")(tensor(pixels), [""] * 3)
    image, _ = official_embeds(tiny_clip, pixels, PROMPTS)
    expected = image
    for i in range(len(widths)):
        key = f"layers.{numbers[i]}." if numbers else ""
        expected = F.linear(expected, head[f"{key}weight"], head[f"{key}bias"])
        expected = expected.relu() if numbers == RELU and i < 4 else expected
    torch.testing.assert_close(output.scores, expected[:, 0], atol=3e-4, rtol=0)


def test_a_head_that_does_not_fit_its_clip_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    save_file(linear_head(47, [1]), tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="takes 47 numbers, its CLIP gives 48"):
        rewards.load(f"aesthetic[head={tmp_path}/head.safetensors,clip={tiny_clip}]")
    for i, name in enumerate(("scale", "mlp.proj.weight", "layers.0.weight", "weight")):
        path = tmp_path / f"{i}.safetensors"
        save_file({name: torch.ones(1, 1)}, path)
        with pytest.raises(UserError, match="no weights of an aesthetic head"):
            rewards.load(f"aesthetic[head={path},clip={tiny_clip}]")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no named tensors"):
        rewards.load(f"aesthetic[head={tmp_path}/list.pth,clip={tiny_clip}]")


def test_a_missing_head_says_how_to_fetch_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"dojo\.download improved-aesthetic-heads"):
        rewards.load("aesthetic")


def test_a_pickle_that_would_run_code_is_not_loaded(tiny_clip: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return (tmp_path / "ran").touch, ()

    torch.save({"weight": Evil()}, tmp_path / "head.pth")
    with pytest.raises(UserError, match="cannot be read"):
        rewards.load(f"aesthetic[head={tmp_path}/head.pth,clip={tiny_clip}]")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not HEADS.is_dir(), reason="the published heads are not here")
@pytest.mark.parametrize("name", aesthetic.HEADS)
def test_the_published_heads_give_what_their_layers_give(name: str) -> None:
    tensors = weights.read(HEADS / f"{name}.pth")
    numbers = RELU if "relu" in name else LINEAR
    x = y = F.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(0)))
    for i, number in enumerate(numbers):
        x = F.linear(x, tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"])
        x = x.relu() if numbers is RELU and i < 4 else x
    head = aesthetic.make_head(tensors)
    torch.testing.assert_close(head(y), x, atol=1e-4, rtol=0)
    if name == "sac+logos+ava1-l14-linearMSE":
        assert len(head) == 1
        assert float(head[0].weight.norm()) == pytest.approx(18.0, abs=0.05)  # type: ignore[operator]
        assert float(head[0].bias) == pytest.approx(5.2366, abs=1e-3)  # type: ignore[arg-type]


# -- HPS v2 -----------------------------------------------------------------------------------


@pytest.fixture
def tiny_hps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A random open_clip network under the name that the HPS scorers build."""
    shape = {"width": 32, "layers": 2}
    config = {
        "embed_dim": 24,
        "vision_cfg": {**shape, "image_size": 32, "patch_size": 8, "head_width": 8},
        "text_cfg": {**shape, "context_length": 77, "vocab_size": 49408, "heads": 4},
    }
    (tmp_path / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    monkeypatch.setattr(hps, "ARCHITECTURE", "tiny-hps")
    torch.manual_seed(0)
    return open_clip.create_model("tiny-hps").eval()


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
@pytest.mark.parametrize("antialias", [True, False])
def test_hps_is_the_cosine_of_the_boxed_picture(
    name: str, antialias: bool, tiny_hps: Any, pixels: list[np.ndarray], tmp_path: Path
) -> None:
    torch.save({"epoch": 1, "state_dict": tiny_hps.state_dict()}, tmp_path / "hps.pt")
    option = "" if antialias else ",antialias=false"
    reward = rewards.load(f"{name}[model={tmp_path}/hps.pt{option}]")
    output = reward(tensor(pixels), [*PROMPTS[:2], "word " * 100])
    small = v2.functional.resize(
        tensor(pixels), [24, 32], v2.InterpolationMode.BICUBIC, antialias=antialias
    )
    boxed = v2.functional.pad(small, [0, 4, 0, 4])
    tokens = open_clip.get_tokenizer("tiny-hps")([*PROMPTS[:2], "word " * 100])  # type: ignore[misc]
    assert tokens[2].max() == tokens[2, -1]  # the end token is there
    with torch.no_grad():
        image = tiny_hps.encode_image(preprocess.normalize(boxed), normalize=True)
        text = tiny_hps.encode_text(tokens, normalize=True)
    torch.testing.assert_close(output.scores, (image * text).sum(-1), atol=1e-5, rtol=0)


def test_hps_reads_the_mirror_and_the_hub_layout(
    tiny_hps: Any, tiny_clip: Path, tmp_path: Path
) -> None:
    tensors = tiny_hps.state_dict()
    torch.save(tensors, tmp_path / "hps.pt")
    save_file({f"model.{k}": v for k, v in tensors.items()}, tmp_path / "mirror.safetensors")
    images = torch.rand(3, 3, 32, 32)
    plain = rewards.load(f"hpsv2[model={tmp_path}/hps.pt]")(images, PROMPTS)
    mirror = rewards.load(f"hpsv2[model={tmp_path}/mirror.safetensors]")(images, PROMPTS)
    assert torch.equal(plain.scores, mirror.scores)
    hub = rewards.load(f"hpsv2[model={tiny_clip}],clip[model={tiny_clip}]")(images, PROMPTS)
    torch.testing.assert_close(hub.components["hpsv2"], hub.components["clip"])  # square: no box
    del tensors["logit_scale"]
    torch.save(tensors, tmp_path / "less.pt")
    with pytest.raises(UserError, match="logit_scale"):
        rewards.load(f"hpsv2[model={tmp_path}/less.pt]")


# -- ImageReward ------------------------------------------------------------------------------

WIDTH, TEXT_WIDTH = 128, 64


class OfficialText(nn.Module):
    """MED's text encoder in its multimodal mode, written from its description: BERT, after the
    norm, with cross-attention to the picture between self-attention and the feed-forward part.
    """

    def __init__(self) -> None:
        super().__init__()

        def part(**parts: nn.Module) -> nn.ModuleDict:
            return nn.ModuleDict(parts)

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(TEXT_WIDTH, eps=1e-12)

        def attention(width: int) -> nn.ModuleDict:
            inner = part(
                query=nn.Linear(TEXT_WIDTH, TEXT_WIDTH),
                key=nn.Linear(width, TEXT_WIDTH),
                value=nn.Linear(width, TEXT_WIDTH),
            )
            outer = part(dense=nn.Linear(TEXT_WIDTH, TEXT_WIDTH), LayerNorm=norm())
            return nn.ModuleDict({"self": inner, "output": outer})

        self.embeddings = part(
            word_embeddings=nn.Embedding(631, TEXT_WIDTH),
            position_embeddings=nn.Embedding(40, TEXT_WIDTH),
            LayerNorm=norm(),
        )
        layers = [
            part(
                attention=attention(TEXT_WIDTH),
                crossattention=attention(WIDTH),
                intermediate=part(dense=nn.Linear(TEXT_WIDTH, 96)),
                output=part(dense=nn.Linear(96, TEXT_WIDTH), LayerNorm=norm()),
            )
            for _ in range(2)
        ]
        self.encoder = part(layer=nn.ModuleList(layers))

    def forward(self, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        def attend(block: Any, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
            inner = block["self"]
            weights = inner["query"](x) @ inner["key"](context).mT / TEXT_WIDTH**0.5
            weights = (weights if bias is None else weights + bias).softmax(-1)
            out = block["output"]
            return out["LayerNorm"](x + out["dense"](weights @ inner["value"](context)))

        parts: Any = self.embeddings
        x = parts["word_embeddings"](ids) + parts["position_embeddings"].weight[: ids.shape[1]]
        x = parts["LayerNorm"](x)
        bias = (1.0 - mask[:, None].float()) * -1e9
        for layer in self.encoder["layer"]:  # type: ignore[union-attr]
            x = attend(layer["attention"], x, x, bias)
            x = attend(layer["crossattention"], x, seen, None)
            inner = F.gelu(layer["intermediate"]["dense"](x))
            x = layer["output"]["LayerNorm"](x + layer["output"]["dense"](inner))
        return x[:, 0]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    """A file with the official names, and the networks it comes from: timm's ViT, the text
    encoder above and the head."""
    torch.manual_seed(0)
    vit: Any = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=0,
        global_pool="", norm_layer=lambda width, **_: nn.LayerNorm(width, eps=1e-6),
    ).eval()  # fmt: skip
    text = OfficialText().eval()
    head = nn.Sequential(
        nn.Linear(TEXT_WIDTH, 48), nn.Dropout(0.2), nn.Linear(48, 32), nn.Dropout(0.2),
        nn.Linear(32, 16), nn.Dropout(0.1), nn.Linear(16, 8), nn.Linear(8, 1),
    ).eval()  # fmt: skip
    for network in (vit, text, head):
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    tensors = {
        **{f"blip.visual_encoder.{k}": v for k, v in vit.state_dict().items()},
        **{f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()},
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.vision_proj.weight": torch.zeros(2, WIDTH),
        "blip.text_proj.bias": torch.zeros(2),
        **{f"mlp.layers.{k}": v for k, v in head.state_dict().items()},
    }
    path = tmp_path_factory.mktemp("models") / "ImageReward.pt"
    torch.save(tensors, path)
    return path, vit, text, head


def test_imagereward_equals_the_official_network(
    official: tuple[Path, Any, Any, Any], pixels: list[np.ndarray]
) -> None:
    path, vit, text, head = official
    reward = rewards.load(f"imagereward[model={path},tokenizer={POCKET_CLIP}]")
    prompts = [*PROMPTS[:2], LONG]
    output = reward(tensor(pixels), prompts)
    prepare = v2.Compose([v2.Resize(32, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)])
    seen = tensor([np.asarray(prepare(Image.fromarray(p))) for p in pixels])
    tokenizer: Any = AutoTokenizer.from_pretrained(POCKET_CLIP)
    expected = []
    with torch.no_grad():
        features = vit.forward_features(preprocess.normalize(seen))
        for feature, prompt in zip(features, prompts, strict=True):
            ids = tokenizer(prompt, truncation=True, max_length=35, return_tensors="pt").input_ids
            score = head(text(ids, torch.ones_like(ids), feature[None]))
            expected.append((float(score) - 0.16717362830052426) / 1.0333394966054072)
    assert np.std(expected) > 0.02
    torch.testing.assert_close(output.scores, torch.tensor(expected), atol=2e-3, rtol=1e-3)


def test_another_file_is_no_imagereward(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no ImageReward"):
        rewards.load(f"imagereward[model={tmp_path}/other.pt]")


# -- gradients --------------------------------------------------------------------------------


def test_every_differentiable_scorer_hands_gradients_to_the_pixels(
    tiny_clip: Path, tiny_hps: Any, official: tuple[Path, Any, Any, Any], tmp_path: Path
) -> None:
    torch.save(tiny_hps.state_dict(), tmp_path / "hps.pt")
    save_file(linear_head(48, WIDTHS, RELU), tmp_path / "head.safetensors")
    head = f"head={tmp_path}/head.safetensors,clip={tiny_clip}"
    texts = {
        "clip": f"clip[model={tiny_clip}]",
        "clip_iqa": f"clip_iqa[model={tiny_clip}]",
        "pickscore": f"pickscore[model={tiny_clip}]",
        "hpsv2": f"hpsv2[model={tmp_path}/hps.pt]",
        "hpsv2.1": f"hpsv2.1[model={tmp_path}/hps.pt]",
        "aesthetic": f"aesthetic[{head}]",
        "aesthetic_v1": f"aesthetic_v1[{head}]",
        "imagereward": f"imagereward[model={official[0]},tokenizer={POCKET_CLIP}]",
    }
    for name, source in loading.SCORERS.items():
        if not loading.scorer_class(name).differentiable:  # type: ignore[attr-defined]
            continue
        reward = rewards.load(texts[name])
        reward.require_differentiable()
        images = torch.rand(2, 3, 40, 44, requires_grad=True)
        reward(images, PROMPTS[:2]).scores.sum().backward()
        assert images.grad is not None, source
        assert images.grad.isfinite().all(), source
        assert (images.grad[:, :, 4:-4, 4:-4] != 0).float().mean() > 0.95, source


def test_no_scorer_loads_the_libraries_of_another() -> None:
    import subprocess

    program = (
        "import sys; from dojo import rewards; rewards.load('pocket,jpeg_compressibility');"
        "print([m for m in ('transformers', 'open_clip', 'rapidocr') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# -- published numbers ------------------------------------------------------------------------

# The test picture of the repository simple-aesthetics-predictor and the scores it states there.
ASTRONAUT = ROOT / "datas" / "a-photo-of-an-astronaut-riding-a-horse.png"
PUBLISHED = {
    "aesthetic_v1[head=aesthetics-predictor-v1-vit-large-patch14]": 5.0491,
    "aesthetic_v1[head=aesthetics-predictor-v1-vit-base-patch32]": 4.4723,
    "aesthetic_v1[head=aesthetics-predictor-v1-vit-base-patch16]": 4.3533,
    "aesthetic[head=aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE]": 5.7546,
    "aesthetic[head=aesthetics-predictor-v2-ava-logos-l14-linearMSE]": 5.6563,
    "aesthetic[head=aesthetics-predictor-v2-ava-logos-l14-reluMSE]": 5.3372,
    "aesthetic": 5.7546,
}


@pytest.mark.skipif(not ASTRONAUT.is_file(), reason="the picture is not here")
@pytest.mark.parametrize("text", PUBLISHED)
def test_the_aesthetic_predictors_give_their_published_scores(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    picture = np.asarray(Image.open(ASTRONAUT).convert("RGB"))
    try:
        reward = rewards.load(text)
    except UserError as error:
        pytest.skip(str(error))
    score = float(reward(tensor([picture]), [""]).scores)
    assert score == pytest.approx(PUBLISHED[text], abs=0.1)


def test_every_scorer_says_which_of_its_options_are_places() -> None:
    def is_a_place(value: object) -> bool:
        return isinstance(value, str) and ("/" in value or Path(value).suffix != "")

    for name in loading.SCORERS:
        kind: Any = loading.scorer_class(name)
        options = inspect.signature(kind).parameters
        assert set(kind.places) <= set(options), name
        for option, parameter in options.items():
            if is_a_place(parameter.default):
                assert option in kind.places, (name, option)
        found = loading.places(name)
        if is_a_place(kind.checkpoint.split()[0]) and kind.places:
            assert found[0] == kind.checkpoint.split()[0], name
    assert loading.places("clip[model=a]=1,hpsv2,my/own.py:fn=0,http://host#x=2,pocket") == [
        *("a", hps.HpsV2.checkpoint, "my/own.py")
    ]
    assert loading.places("vlm[url=http://host,model=docs]") == []  # what the server calls it
    with pytest.raises(UserError, match="no scorer"):
        loading.places("no_such_scorer")
