"""HPS v3 (Ma et al. 2025, arXiv:2508.03789): Qwen2-VL reads an instruction about picture and
prompt, and a small head on the hidden state of one special token gives the preference.

Its own package needs transformers 4. Its network is Qwen2-VL of transformers 5 under other names.
The instruction is not repeated here: it is read, without running it, from the package's wheel,
which the user fetches.
"""

from __future__ import annotations

import ast
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from dojo.cli import UserError
from dojo.models import loaded
from dojo.rewards import preprocess, weights
from dojo.rewards.scorer import Metadata, Place, Scorer

TOKEN = "<|Reward|>"  # its hidden state is what the head reads
PIXELS = 256 * 28 * 28  # of a picture for the network, about
ELONGATED = 200  # no picture has sides of such a ratio
WHEEL, MEMBER = "hpsv3-1.0.0-py3-none-any.whl", "hpsv3/dataset/data_collator_qwen.py"
HOME = weights.MODELS / "HPSv3"
# Qwen2-VL's form of a conversation; the picture's tokens stand for <|image_pad|>.
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{picture}<|vision_end|>{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_PICTURE = "<|image_pad|>"
_CONTROL = re.compile(r"<\|[^<>|]*\|>")  # the form of Qwen2-VL's special tokens
# What reading the instruction may raise; the last three are of a place for something else in it.
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    zipfile.BadZipFile,
    LookupError,
    AttributeError,
)


class _Network(nn.Module):
    """Qwen2-VL and the head, of the sizes that `config` and the weights have."""

    def __init__(self, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.model = model

        def linear(name: str) -> nn.Linear:
            out, width = shapes[f"rm_head.{name}.weight"]
            return nn.Linear(width, out)

        # Dropout is number 2.
        self.rm_head = nn.Sequential(
            linear("0"), nn.ReLU(), nn.Identity(), linear("3"), nn.ReLU(), linear("5")
        )

    def forward(self, ids: Tensor, patches: Tensor, grid: Tensor, at: int) -> Tensor:
        """Token ids [1, T], the picture's patches [N, D] and their grid [1, 3] to mean and log
        spread of the preference, read at the token with number `at`."""
        states = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=patches,
            image_grid_thw=grid,
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            use_cache=False,
        ).last_hidden_state
        return self.rm_head(states[0, at].float())


class HpsV3(Scorer):
    """The mean of the preference that HPS v3 predicts.

    Options: `model` is the file with the weights, `base` the folder or hub id with Qwen2-VL's
    config.json and tokenizer, `template` the wheel of hpsv3 1.0.0, or the file in it, with the
    instruction. One picture is scored at a time, without a gradient.
    """

    range = "-1 to 11"
    checkpoint = "MizzenAI/HPSv3/HPSv3.safetensors"
    places = ("model", "base", "template")
    size = "16 GB, with dtype=bf16"
    licence = "MIT; Apache-2.0 (Qwen2-VL)"

    def __init__(
        self,
        place: Place,
        *,
        model: str = checkpoint,
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        template: str | None = None,
    ) -> None:
        super().__init__(place)
        self.template = read_template(Path(template) if template else HOME / WHEEL)
        path = weights.folder(base, "config.json", "tokenizer*", "vocab.json", "merges.txt")
        tensors = renamed(weights.read(weights.file(model)))
        loaded.check_finite(tensors, f"--reward: {model}")
        self.tokenizer: Any = loaded.tokenizer(AutoTokenizer, str(path), flag="--reward")
        self.tokenizer.add_tokens([TOKEN], special_tokens=True)
        self.token = self.tokenizer.convert_tokens_to_ids(TOKEN)
        rows = tensors.get("model.language_model.embed_tokens.weight")
        if rows is None or self.token >= len(rows):
            raise UserError(f"--reward: {model} has no weights for the token {TOKEN} of HPS v3")
        config = _config(path)
        config.text_config.vocab_size = len(rows)
        self.network = _load(config, tensors, model, place)
        self.vision = config.vision_config

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        return torch.stack(
            [self._one(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        )

    def _one(self, image: Tensor, prompt: str) -> Tensor:
        merge, side = self.vision.spatial_merge_size, self.vision.patch_size
        height, width = fitted(image.shape[-2], image.shape[-1], side * merge)
        pixels = preprocess.normalize(preprocess.resize(image[None], height, width))
        patches = patchify(pixels[0], side, merge, self.vision.temporal_patch_size)
        grid = torch.tensor([[1, height // side, width // side]], device=self.place.device)
        picture = _PICTURE * (len(patches) // merge**2)
        # A prompt must not bring the token along that the score is read at, nor a second picture.
        told = self.template.format(text_prompt=plain(prompt))
        text = _CHAT.format(picture=picture, text=told)
        ids = self.tokenizer(text, return_tensors="pt").input_ids.to(self.place.device)
        (at,) = (ids[0] == self.token).nonzero()[:, 0].tolist()
        return self.network(ids, patches.to(self.place.dtype), grid, at)[0]


def plain(prompt: str) -> str:
    """A prompt without anything of the form <|...|>, nor what becomes so where one is cut out."""
    while (told := _CONTROL.sub("", prompt)) != prompt:
        prompt = told
    return prompt


def _config(path: Path) -> Any:
    """Qwen2-VL's configuration.

    Raises:
        UserError: it is another's, or cannot be read.
    """
    kind = loaded.read_json(path / "config.json", f"--reward: {path}").get("model_type")
    if kind != "qwen2_vl":
        raise UserError(f"--reward: hpsv3 wants the base qwen2_vl, and {path} is {kind}")
    try:
        return Qwen2VLConfig.from_pretrained(path)
    except Exception as error:  # the library has many kinds of them
        raise weights.missing(str(path), error) from error


def _load(config: Any, tensors: dict[str, Tensor], name: str, place: Place) -> _Network:
    """The network with its weights; the head is float32.

    Raises:
        UserError: it is of another form than the configuration.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    head = {key: tensors.pop(key) for key in list(tensors) if key.startswith("rm_head.")}
    inner = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    where = f"--reward: {name}"
    try:
        # Without a name it takes the weights as they are given: no second copy is made.
        kind: Any = Qwen2VLModel
        model, report = kind.from_pretrained(
            None, config=config, state_dict=inner, dtype=place.dtype, output_loading_info=True
        )
        network = _Network(model, shapes)
    except Exception as error:  # whatever the classes say to sizes that they cannot have
        raise UserError(f"{where} is no HPS v3 ({error})") from error
    loaded.check_whole(model, report, where)
    weights.fill(network.rm_head, {k.removeprefix("rm_head."): v for k, v in head.items()}, name)
    return network.requires_grad_(False).eval().to(place.device)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of transformers 4 (and of 5, which stay) as those of 5; the head of the language
    model, which scoring does not use, is left out."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model.") and not name.startswith(("model.visual", "model.language")):
            name = f"model.language_model.{name.removeprefix('model.')}"
        if not name.startswith("lm_head."):
            found[name] = tensor
    return found


def read_template(path: Path) -> str:
    """The instruction, with a place for the prompt, out of the authors' file.

    Args:
        path: the wheel of hpsv3, or its data_collator_qwen.py. Nothing in it is run.
    Raises:
        UserError: it is not there, with the way to get it, or holds something else.
    """
    if not path.is_file():
        raise UserError(
            f"--reward: hpsv3 wants its authors' instruction, and there is no {path}: fetch it "
            f"with `pip download --no-deps hpsv3==1.0.0 -d {HOME}`"
        )
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                source = wheel.read(MEMBER).decode()
        else:
            source = path.read_text(encoding="utf-8")
        told = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(source).body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        template = told["INSTRUCTION"] + told["prompt_with_special_token"]
        if TOKEN in template.format(text_prompt="") and "{text_prompt}" in template:
            return template
        raise ValueError(f"it has no place for {TOKEN} and the prompt")
    except _UNREADABLE as error:
        raise UserError(f"--reward: {path} does not hold hpsv3's instruction ({error})") from error


# -- pictures ---------------------------------------------------------------------------------


def fitted(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The size for the network: about PIXELS, sides that are a multiple, about the same shape.

    It is qwen_vl_utils' rule where least and most pixels are the same number: sides are rounded,
    and if that gives more or fewer pixels, scaled, then cut or filled to a multiple.
    """
    if max(height, width) > ELONGATED * min(height, width):
        raise UserError(f"--reward: hpsv3: a picture of {width} x {height} is too long")
    rows = max(multiple, round(height / multiple) * multiple)
    columns = max(multiple, round(width / multiple) * multiple)
    if rows * columns == PIXELS:
        return rows, columns
    scale = multiple * math.sqrt(height * width / PIXELS)
    cut = math.floor if rows * columns > PIXELS else math.ceil
    return max(1, cut(height / scale)) * multiple, max(1, cut(width / scale)) * multiple


def patchify(pixels: Tensor, side: int, merge: int, frames: int) -> Tensor:
    """[3, H, W] to the patches [N, 3 * frames * side * side] of Qwen2-VL.

    A still picture is `frames` equal frames. Patches that are merged to one token, `merge` in each
    direction, follow one another.
    """
    _, height, width = pixels.shape
    x = pixels.expand(frames, -1, -1, -1).unflatten(3, (-1, merge, side))
    x = x.unflatten(2, (-1, merge, side))  # frame, color, (row, row, y), (column, column, x)
    x = x.permute(2, 5, 3, 6, 1, 0, 4, 7)
    return x.reshape(height // side * (width // side), -1)
