"""Claims about the CLIPs of SD1, SD2 and SDXL: what is skipped, and what their adapters learn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dojo.cli import UserError
from dojo.data import Geometry
from dojo.finetune import lora
from dojo.models import sd15
from dojo.models.family import ModelArgs
from dojo.models.opening import open_model

CPU = torch.device("cpu")
CAPTIONS = ["a red star", "two blue circles", ""]


def skipping(folder: Path, layers: int) -> Any:
    args = sd15.ModelArgs(pretrained_model_name_or_path=str(folder))
    return sd15.open_model(args, sd15.TextArgs(clip_skip=layers))


# Layers that are left out


def test_skipped_layers_are_those_of_diffusers_with_the_final_norm(tiny_sd15: Path) -> None:
    found = skipping(tiny_sd15, 1).load_text(torch.float32, CPU)(CAPTIONS)["prompt_embeds"]
    encoder: Any = CLIPTextModel.from_pretrained(tiny_sd15 / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd15 / "tokenizer")
    tokens: Any = tokenizer(CAPTIONS, padding="max_length", max_length=20, return_tensors="pt")
    with torch.no_grad():
        states = encoder(tokens.input_ids, output_hidden_states=True).hidden_states
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        expected = norm(states[-2])  # diffusers' clip_skip 1: hidden_states[-(1 + 1)]
    assert torch.equal(found, expected)
    whole = skipping(tiny_sd15, 0).load_text(torch.float32, CPU)(CAPTIONS)["prompt_embeds"]
    assert torch.equal(whole, norm(states[-1]))
    assert not torch.equal(found, whole)


def test_pictures_of_prompts_and_caches_follow_the_skipped_layers(tiny_sd15: Path) -> None:
    plain, skipped = skipping(tiny_sd15, 0), skipping(tiny_sd15, 1)
    assert plain.text_settings == {}  # caches from before the option hold
    assert skipped.text_settings == {"clip_skip": 1}
    pipeline = skipped.load_pipeline(torch.float32, CPU)
    embeds = pipeline.encode_prompt(CAPTIONS, CPU, 1, False)[0]
    expected = skipped.load_text(torch.float32, CPU)(CAPTIONS)["prompt_embeds"]
    torch.testing.assert_close(embeds, expected, rtol=0, atol=0)


def test_more_layers_than_there_are_cannot_be_skipped(tiny_sd15: Path) -> None:
    with pytest.raises(UserError, match=r"--clip_skip 2: .* has 2 layers"):
        skipping(tiny_sd15, 2)
    with pytest.raises(ValueError, match="--clip_skip -1 must be at least 0"):
        sd15.TextArgs(clip_skip=-1)


# Adapters


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_every_adapter_of_every_clip_learns_and_arrives_in_diffusers(
    tmp_path: Path, family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    model = open_model(ModelArgs(pretrained_model_name_or_path=str(folder)))
    texts = model.load_text(torch.float32, CPU, whole=False)
    texts.free_others()
    cached = texts(CAPTIONS)
    assert len(texts.trainable) == len(model.text_encoders)
    unet = model.load_network(torch.float32, CPU)
    args = lora.LoraArgs(rank=2)
    lora.add(unet, args)
    params = [param for clip in texts.trainable for param in lora.add_text(clip, args)]
    # A fresh adapter changes nothing.
    before = texts.refresh(cached, CAPTIONS)
    assert all(torch.equal(before[name], cached[name]) for name in model.embed_names)
    generator = torch.Generator().manual_seed(1)
    for param in params:
        param.data = 0.1 * torch.randn(param.shape, generator=generator)
    embeds = texts.refresh(cached, CAPTIONS)
    told = model.conditions(embeds, Geometry.whole((64, 64), 3) if model.sized else None)
    noisy, timestep = torch.ones(3, 4, 8, 8), torch.tensor([3, 500, 900])
    model.predict(unet, noisy, timestep, told, torch.float32).square().mean().backward()
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in params)
    assert {one.training for one in texts.trainable} == {True}
    # Written and read by one plain call, whatever layers the training left out.
    lora.save(tmp_path, unet, *texts.trainable)
    names = load_file(tmp_path / lora.WEIGHTS)
    beginnings = {name.split(".encoder.")[0] for name in names if name.startswith("text_encoder")}
    assert beginnings == {f"{part}.text_model" for part in model.text_encoders}
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path)
    options = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        found = pipeline.encode_prompt(CAPTIONS, **options)
    now = texts(CAPTIONS)
    assert {one.training for one in texts.trainable} == {False}
    expected: dict[str, Tensor] = {name: now[name] for name in model.embed_names}
    for place, name in zip((0, 2), expected, strict=False):
        torch.testing.assert_close(found[place], expected[name], rtol=0, atol=1e-5)
        assert not torch.allclose(expected[name], cached[name], atol=1e-3), name


def test_only_the_layers_that_sdxl_reads_are_loaded(tiny_sdxl: Path) -> None:
    model = open_model(ModelArgs(pretrained_model_name_or_path=str(tiny_sdxl)))
    texts: Any = model.load_text(torch.float32, CPU)
    layers = {
        part: json.loads((tiny_sdxl / part / "config.json").read_text())["num_hidden_layers"]
        for part in model.text_encoders
    }
    found = [
        len(getattr(one, "text_model", one).encoder.layers) for one in texts.trainable
    ]  # CLIP-L's last is read by nothing; CLIP-G's pooled text reads all of its own
    assert found == [layers["text_encoder"] - 1, layers["text_encoder_2"]]
    pipeline = model.load_pipeline(torch.float32, CPU)
    whole = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder).encoder.layers
    assert len(whole) == layers["text_encoder"]
