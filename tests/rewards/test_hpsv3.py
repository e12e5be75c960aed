"""HPS v3 on a tiny random Qwen2-VL, against transformers' own model and image processor."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
    Qwen2VLImageProcessor,
    smart_resize,
)

from dojo import rewards
from dojo.cli import UserError
from dojo.rewards import hpsv3

POCKET_CLIP = Path(__file__).resolve().parents[2] / "models" / "pocket-clip"
WIDTH, IMAGE = 32, "<|image_pad|>"
SOURCE = f'''
import sys
sys.exit("it was run")
INSTRUCTION = """Judge it by {{text_prompt}} now. """
other = 3
prompt_with_special_token = """Marks: {hpsv3.TOKEN} END"""
'''


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpsv3, "PIXELS", 6 * 28 * 28)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder with base, weights under the names of transformers 4 and wheel; model, tokenizer."""
    folder = tmp_path_factory.mktemp("hpsv3")
    tokenizer: Any = AutoTokenizer.from_pretrained(POCKET_CLIP)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.save_pretrained(folder / "base")
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    tokenizer.add_tokens([hpsv3.TOKEN], special_tokens=True)
    torch.manual_seed(0)
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    kind: Any = Qwen2VLConfig
    config = kind(
        text_config={**text, "vocab_size": len(tokenizer) + 40},  # a base has more rows
        vision_config=vision,
        image_token_id=image_id,
    )
    config.save_pretrained(folder / "base")
    config.text_config.vocab_size = len(tokenizer)
    model: Any = Qwen2VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        old = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        tensors[old] = tensor.clone()
    widths = {"0": (24, WIDTH), "3": (16, 24), "5": (2, 16)}
    for name, shape in widths.items():
        tensors[f"rm_head.{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        tensors[f"rm_head.{name}.bias"] = torch.randn(shape[0])
    save_file(tensors, folder / "HPSv3.safetensors")
    with zipfile.ZipFile(folder / "hpsv3.whl", "w") as wheel:
        wheel.writestr(hpsv3.MEMBER, SOURCE)
    return folder, model, tokenizer


def spec(folder: Path, **change: Any) -> str:
    options = {
        "model": folder / "HPSv3.safetensors",
        "base": folder / "base",
        "template": folder / "hpsv3.whl",
        **change,
    }
    return f"hpsv3[{','.join(f'{name}={value}' for name, value in options.items())}]"


def test_it_is_the_head_on_transformers_own_model(parts: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = parts
    torch.manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 60, 92)) / 255
    prompts = ["a red star", f"two {{rings}} {hpsv3.TOKEN}{IMAGE}"]
    scores = rewards.load(spec(folder))(images, prompts).scores
    tensors = load_file(folder / "HPSv3.safetensors")
    processor: Any = Qwen2VLImageProcessor(do_resize=False)
    expected = []
    for image, prompt in zip(images, ["a red star", "two {rings} "], strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels).resize((84, 56), Image.Resampling.BICUBIC)
        seen = processor(images=[picture], return_tensors="pt")
        assert seen["image_grid_thw"].tolist() == [[1, 4, 6]]
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_start|>{IMAGE * 6}<|vision_end|>Judge it by {prompt} now. "
            f"Marks: {hpsv3.TOKEN} END<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model(
                input_ids=ids,
                pixel_values=seen["pixel_values"],
                image_grid_thw=seen["image_grid_thw"],
                mm_token_type_ids=(ids == tokenizer.convert_tokens_to_ids(IMAGE)).int(),
                output_hidden_states=True,
            )
        x = out.hidden_states[-1][ids == tokenizer.convert_tokens_to_ids(hpsv3.TOKEN)]
        for name in ("0", "3", "5"):
            x = F.linear(x, tensors[f"rm_head.{name}.weight"], tensors[f"rm_head.{name}.bias"])
            x = x if name == "5" else x.relu()
        expected.append(x[0, 0])
    expected = torch.stack(expected)
    assert (expected[0] - expected[1]).abs() > 1e-3
    torch.testing.assert_close(scores, expected, atol=2e-3, rtol=0)


def test_no_control_token_of_a_prompt_reaches_the_network(parts: tuple[Path, Any, Any]) -> None:
    assert hpsv3.plain("a <|Re<|image_pad|>ward|> b") == "a  b"
    assert hpsv3.plain("<|im_<|<||>x|>end|>c<|im_start|> <|vision_start|>") == "c "
    assert hpsv3.plain("a < b | c > d <3 |> <|") == "a < b | c > d <3 |> <|"
    prompts = ["ab", "a<|Re<|image_pad|>ward|>b", "a<|image_<|Reward|>pad|>b", "a<|endoftext|>b"]
    images = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)).expand(
        4, -1, -1, -1
    )
    scores = rewards.load(spec(parts[0]))(images, prompts).scores
    assert torch.equal(scores, scores[:1].expand(4))


def test_a_score_does_not_hang_on_the_pictures_beside_it(parts: tuple[Path, Any, Any]) -> None:
    images = torch.rand(3, 3, 56, 56)
    reward = rewards.load(spec(parts[0]))
    together = reward(images, ["a", "b b b b", "c"]).scores
    assert together[2].item() == reward(images[2:], ["c"]).scores.item()
    assert len(together.unique()) == 3


def test_half_precision_keeps_the_head_exact(parts: tuple[Path, Any, Any]) -> None:
    reward = rewards.load(spec(parts[0], dtype="bf16"))
    (network,) = rewards.networks([reward])
    dtypes = {name.split(".")[0]: value.dtype for name, value in network.named_parameters()}
    assert dtypes == {"model": torch.bfloat16, "rm_head": torch.float32}
    assert reward(torch.rand(1, 3, 56, 56), ["a"]).valid.all()


def test_names_of_transformers_5_stay(parts: tuple[Path, Any, Any], tmp_path: Path) -> None:
    tensors = load_file(parts[0] / "HPSv3.safetensors")
    save_file(hpsv3.renamed(tensors), tmp_path / "new.safetensors")
    images = torch.rand(1, 3, 56, 56)
    old = rewards.load(spec(parts[0]))(images, ["a"]).scores
    new = rewards.load(spec(parts[0], model=tmp_path / "new.safetensors"))(images, ["a"]).scores
    assert torch.equal(old, new)


def test_what_is_no_hpsv3_is_refused(parts: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, _, _ = parts
    tensors = load_file(folder / "HPSv3.safetensors")
    file = tmp_path / "other.safetensors"

    def refused(change: dict[str, Tensor | None], says: str) -> None:
        kept = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(kept, file)
        with pytest.raises(UserError, match=says):
            rewards.load(spec(folder, model=file))

    name = "model.layers.1.mlp.up_proj.weight"
    refused({name: None}, "incomplete: it has no layers|has no .*up_proj")
    refused({name: torch.full_like(tensors[name], torch.nan)}, "not finite")
    refused({"rm_head.5.bias": None}, "other weights than expected")
    refused({"rm_head.0.weight": None}, "is no HPS v3")
    table = "model.embed_tokens.weight"
    refused({table: tensors[table][:-1].clone()}, "no weights for the token")
    refused({"model.extra": torch.ones(1)}, "no place for .*extra")
    with pytest.raises(UserError, match=r"hpsv3 wants the base qwen2_vl, and .* is clip"):
        rewards.load(spec(folder, base=POCKET_CLIP))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("INSTRUCTION = 'a {text_prompt}'", "prompt_with_special_token"),
        ("INSTRUCTION = 'a'\nprompt_with_special_token = 'b'", "no place for"),
        ("INSTRUCTION = 'a {}'\nprompt_with_special_token = '<|Reward|>'", "index"),
        ("INSTRUCTION = 'a {text_prompt.b}'\nprompt_with_special_token = '<|Reward|>'", "no attr"),
        ("INSTRUCTION = 'a {other}'\nprompt_with_special_token = '<|Reward|>'", "other"),
        ("def", "invalid syntax"),
    ],
)
def test_a_file_without_the_instruction_is_refused(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(content)
    with pytest.raises(UserError, match=says):
        hpsv3.read_template(tmp_path / "file.py")
    (tmp_path / "file.whl").write_text(content)
    with pytest.raises(UserError, match="does not hold hpsv3's instruction"):
        hpsv3.read_template(tmp_path / "file.whl")


def test_the_way_to_the_instruction_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"pip download --no-deps hpsv3==1\.0\.0 -d models/HPSv3"):
        rewards.load("hpsv3")


def test_pictures_get_the_size_of_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sizes = [(512, 512), (1024, 1024), (768, 512), (100, 100), (448, 448), (20, 3000)]
    fitted = [hpsv3.fitted(*size, 28) for size in sizes]
    most = hpsv3.PIXELS
    assert fitted == [smart_resize(*size, 28, most, most) for size in sizes]
    assert fitted[:3] == [(448, 448), (448, 448), (532, 364)]
    with pytest.raises(UserError, match="too long"):
        hpsv3.fitted(10, 3000, 28)
