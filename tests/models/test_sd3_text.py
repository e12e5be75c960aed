"""Claims about text: equal to the pipeline's, padding, dropped encoders, CLIP in training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dojo.models import sd3

CAPTIONS = ["a red star", "two blue circles above a very small green square on the left"]


def encoders(folder: Path, length: int = 24, **text: Any) -> tuple[sd3.Model, sd3.TextEncoders]:
    args = sd3.ModelArgs(pretrained_model_name_or_path=str(folder), max_sequence_length=length)
    config = sd3.open_model(args, sd3.TextArgs(**text))
    return config, config.load_text(torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("length", [8, 24, 77])
def test_embeddings_are_those_of_the_pipeline(tiny_sd3: Path, length: int) -> None:
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            CAPTIONS, None, None, max_sequence_length=length, do_classifier_free_guidance=False
        )
    own = encoders(tiny_sd3, length)[1](CAPTIONS)
    assert torch.equal(own["prompt_embeds"], embeds)
    assert torch.equal(own["pooled_prompt_embeds"], pooled)


def test_zero_padding_changes_the_rows_of_padding_alone(tiny_sd3: Path) -> None:
    config, plain = encoders(tiny_sd3)
    _, zeroed = encoders(tiny_sd3, t5_padding="zero")
    tokens = len(plain.tokenizer_3(CAPTIONS[0]).input_ids)
    assert tokens < 24
    first, second = (some([CAPTIONS[0]])["prompt_embeds"][0] for some in (plain, zeroed))
    end = config.clip_tokens + tokens
    assert torch.equal(first[:end], second[:end])
    assert not second[end:].any()
    assert first[end:].any()


def test_a_model_without_t5_gets_zeros_for_it(tiny_sd3: Path) -> None:
    config, there = encoders(tiny_sd3)
    full = there(CAPTIONS)["prompt_embeds"]
    there.free_others()
    without = there(CAPTIONS)["prompt_embeds"]
    assert without.shape == full.shape
    assert not without[:, config.clip_tokens :].any()
    assert torch.equal(without[:, : config.clip_tokens], full[:, : config.clip_tokens])


@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5"])
def test_a_dropped_encoder_leaves_zeros_and_the_others_alone(tiny_sd3: Path, name: str) -> None:
    config, there = encoders(tiny_sd3)
    embeds = there(CAPTIONS)
    layout = sd3.Layout.of(config)
    none = torch.tensor([False, False])
    dropped = dict.fromkeys(("clip_l", "clip_g", "t5"), none) | {name: torch.tensor([True, False])}
    after = layout.drop(embeds, dropped)
    # What each encoder alone gives, by silencing it in the model.
    silent: Any = {"clip_l": there.clips[0], "clip_g": there.clips[1], "t5": there.t5}[name]
    for param in silent.parameters():
        param.data.zero_()
    if name == "clip_l":
        silent.text_projection.weight.data.zero_()
    expected = there(CAPTIONS)
    for key in sd3.EMBEDS:
        assert torch.equal(after[key][0], expected[key][0]), key
        assert torch.equal(after[key][1], embeds[key][1]), key
    assert embeds["prompt_embeds"][0].any(), "the cached embeddings themselves are not touched"


def test_live_clip_replaces_clips_part_and_carries_gradients(tiny_sd3: Path) -> None:
    _, there = encoders(tiny_sd3)
    cached = there(CAPTIONS)
    same = sd3.with_live_clip(cached, *there.clip(CAPTIONS))
    assert torch.equal(same["prompt_embeds"], cached["prompt_embeds"])
    assert torch.equal(same["pooled_prompt_embeds"], cached["pooled_prompt_embeds"])
    weights: list[Tensor] = []
    for clip in there.clips:
        weight = clip.get_input_embeddings().weight
        weights.append(weight.requires_grad_(True))
    live = sd3.with_live_clip(cached, *there.clip(CAPTIONS))
    live["prompt_embeds"].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in weights)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_outside_zero_and_one_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="--t5_dropout"):
        sd3.TextDropoutArgs(t5_dropout=share)
