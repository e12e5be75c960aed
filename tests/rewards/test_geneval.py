"""GenEval: mmdetection's weights in transformers' network, and the verdicts by hand-made finds."""

import csv
import itertools
import json
import random
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.models.swin.modeling_swin import SwinPatchMerging

from dojo import rewards
from dojo.cli import UserError
from dojo.rewards import __main__ as command
from dojo.rewards import geneval, loading, mask2former, weights
from dojo.rewards.mask2former import Found
from dojo.rewards.scorer import Place

ROOT = Path(__file__).resolve().parents[2]
POCKET_CLIP = ROOT / "models" / "pocket-clip"
DEPTHS, LAYERS = (2, 1, 1, 1), 2


@pytest.fixture(scope="module")
def official() -> Any:
    """transformers' own network on random weights."""
    torch.manual_seed(0)
    swin: Any = SwinConfig
    config: Any = Mask2FormerConfig
    network = Mask2FormerForUniversalSegmentation(
        config(
            backbone_config=swin(
                embed_dim=8,
                depths=list(DEPTHS),
                num_heads=[1, 2, 2, 4],
                window_size=3,
                mlp_ratio=2.0,
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            num_labels=80,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            num_queries=6,
            num_attention_heads=4,
            encoder_layers=LAYERS,
            encoder_feedforward_dim=24,
            decoder_layers=LAYERS + 1,
            dim_feedforward=20,
        )
    ).eval()
    for name, parameter in network.named_parameters():
        if ".swin.layernorm." not in name:  # which mmdetection does not have
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return network


def as_mmdet(state: dict[str, Tensor], version: int) -> dict[str, Tensor]:
    """A network's weights under the names, and in the order, of mmdetection 2 or 3."""
    told: dict[str, Tensor] = {}

    def move(theirs: str, ours: str, ends: Sequence[str] = ("weight", "bias")) -> None:
        for end in ends:
            told[f"{theirs}.{end}"] = state[f"{ours}.{end}"]

    swin, pixel = "model.pixel_level_module.encoder.swin", "model.pixel_level_module.decoder"
    move("backbone.patch_embed.projection", f"{swin}.embeddings.patch_embeddings.projection")
    move("backbone.patch_embed.norm", f"{swin}.embeddings.norm")
    for i, depth in enumerate(DEPTHS):
        move(
            f"backbone.norm{i}",
            f"model.pixel_level_module.encoder.hidden_states_norms.stage{i + 1}",
        )
        stage, layer = f"backbone.stages.{i}", f"{swin}.encoder.layers.{i}"
        for j in range(depth):
            theirs, ours = f"{stage}.blocks.{j}", f"{layer}.blocks.{j}"
            for end in ("weight", "bias"):
                parts = [state[f"{ours}.attention.{x}_proj.{end}"] for x in "qkv"]
                told[f"{theirs}.attn.w_msa.qkv.{end}"] = torch.cat(parts)
            move(f"{theirs}.attn.w_msa.proj", f"{ours}.attention.o_proj")
            name = "relative_position_bias_table"
            told[f"{theirs}.attn.w_msa.{name}"] = state[
                f"{ours}.attention.relative_position_bias.{name}"
            ]
            told[f"{theirs}.attn.w_msa.relative_position_index"] = torch.zeros(9, 9).long()
            move(f"{theirs}.norm1", f"{ours}.layernorm_before")
            move(f"{theirs}.norm2", f"{ours}.layernorm_after")
            move(f"{theirs}.ffn.layers.0.0", f"{ours}.mlp.fc1")
            move(f"{theirs}.ffn.layers.1", f"{ours}.mlp.fc2")
        if i < len(DEPTHS) - 1:
            for name in ("reduction.weight", "norm.weight", "norm.bias"):
                # column, row, channel -> channel, row, column
                blocks = state[f"{layer}.downsample.{name}"].unflatten(-1, (2, 2, -1))
                told[f"{stage}.downsample.{name}"] = torch.stack(
                    [blocks[..., c, r, :] for r in (0, 1) for c in (0, 1)], dim=-1
                ).flatten(-2)
    for i in range(3):
        move(
            f"panoptic_head.pixel_decoder.input_convs.{i}.conv", f"{pixel}.input_projections.{i}.0"
        )
        move(f"panoptic_head.pixel_decoder.input_convs.{i}.gn", f"{pixel}.input_projections.{i}.1")
    told["panoptic_head.pixel_decoder.level_encoding.weight"] = state[f"{pixel}.level_embed"]
    for theirs, ours in (("lateral_convs", "adapter_1"), ("output_convs", "layer_1")):
        move(f"panoptic_head.pixel_decoder.{theirs}.0.conv", f"{pixel}.{ours}.0", ["weight"])
        move(f"panoptic_head.pixel_decoder.{theirs}.0.gn", f"{pixel}.{ours}.1")
    move("panoptic_head.pixel_decoder.mask_feature", f"{pixel}.mask_projection")
    own, cross, inner, ffn = (
        ("attentions.0", "attentions.0", "attentions.1", "ffns.0")
        if version == 2
        else ("self_attn", "cross_attn", "self_attn", "ffn")
    )
    for i in range(LAYERS):
        theirs = f"panoptic_head.pixel_decoder.encoder.layers.{i}"
        ours = f"{pixel}.encoder.layers.{i}"
        for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            move(f"{theirs}.{own}.{name}", f"{ours}.self_attn.{name}")
        move(f"{theirs}.norms.0", f"{ours}.self_attn_layer_norm")
        move(f"{theirs}.norms.1", f"{ours}.final_layer_norm")
        move(f"{theirs}.{ffn}.layers.0.0", f"{ours}.fc1")
        move(f"{theirs}.{ffn}.layers.1", f"{ours}.fc2")
        theirs = f"panoptic_head.transformer_decoder.layers.{i}"
        ours = f"model.transformer_module.decoder.layers.{i}"
        for end in ("weight", "bias"):
            told[f"{theirs}.{cross}.attn.in_proj_{end}"] = state[f"{ours}.cross_attn.in_proj_{end}"]
            told[f"{theirs}.{inner}.attn.in_proj_{end}"] = torch.cat(
                [state[f"{ours}.self_attn.{x}_proj.{end}"] for x in "qkv"]
            )
        move(f"{theirs}.{cross}.attn.out_proj", f"{ours}.cross_attn.out_proj")
        move(f"{theirs}.{inner}.attn.out_proj", f"{ours}.self_attn.out_proj")
        for number, name in enumerate(("cross_attn", "self_attn", "final")):
            move(f"{theirs}.norms.{number}", f"{ours}.{name}_layer_norm")
        move(f"{theirs}.{ffn}.layers.0.0", f"{ours}.fc1")
        move(f"{theirs}.{ffn}.layers.1", f"{ours}.fc2")
    head, module = "panoptic_head", "model.transformer_module"
    move(f"{head}.transformer_decoder.post_norm", f"{module}.decoder.layernorm")
    for i in range(3):
        embedder = f"{module}.decoder.mask_predictor.mask_embedder.{i}.0"
        move(f"{head}.mask_embed.{2 * i}", embedder)
    move(f"{head}.query_embed", f"{module}.queries_embedder", ["weight"])
    move(f"{head}.query_feat", f"{module}.queries_features", ["weight"])
    move(f"{head}.level_embed", f"{module}.level_embed", ["weight"])
    move(f"{head}.cls_embed", "class_predictor")
    return told


SERIALISATIONS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "legacy"])
def detector(official: Any, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    """The same weights as a file of mmdetection 2, in the old form that its authors published."""
    file = tmp_path_factory.mktemp("detector") / "mask2former.pth"
    content = {"meta": {"epoch": 1}, "state_dict": as_mmdet(official.state_dict(), 2)}
    torch.save(content, file, _use_new_zipfile_serialization=request.param)
    return file


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask2former, "SHORT", 64)
    monkeypatch.setattr(mask2former, "LONG", 107)


# -- the network ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_weights_of_mmdetection_give_the_outputs_of_transformers(
    version: int, official: Any, tmp_path: Path
) -> None:
    told = as_mmdet(official.state_dict(), version)
    torch.save({"state_dict": told}, tmp_path / "file.pth")
    ours = mask2former.Mask2Former(str(tmp_path / "file.pth"), Place()).network
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, (classes, masks) = official(pixels), ours(pixels)
    assert expected.class_queries_logits.std() > 0.1
    assert expected.masks_queries_logits.std() > 0.1
    torch.testing.assert_close(classes, expected.class_queries_logits)
    torch.testing.assert_close(masks, expected.masks_queries_logits, atol=1e-4, rtol=1e-4)


def test_merged_patches_have_the_order_of_transformers() -> None:
    # mmdetection's merging, written with the operation that it is made of.
    channels, height, width = 3, 4, 6
    norm, reduction = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, 2 * channels, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, channels, height, width)
    unfolded = nn.Unfold(kernel_size=2, stride=2)(x).transpose(1, 2)
    expected = reduction(norm(unfolded))
    ours = SwinPatchMerging(channels)
    ours.norm.weight.data = mask2former.merge_order(norm.weight.data)
    ours.norm.bias.data = mask2former.merge_order(norm.bias.data)
    ours.reduction.weight.data = mask2former.merge_order(reduction.weight.data)
    merged = ours(x.flatten(2).transpose(1, 2), (height, width))
    torch.testing.assert_close(merged, expected)
    # Numbers say it too: channel 0 of the patch's four corners, then channel 1.
    numbers = torch.arange(8)  # (channel, row, column)
    assert mask2former.merge_order(numbers).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


@SERIALISATIONS
def test_a_checkpoint_with_records_of_other_programs_is_read_and_nothing_is_run(
    zipped: bool, tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return subprocess.call, (["mkdir", str(tmp_path / "ran")],)

    content = {
        # range has another name in the protocol, which is as old as Python 2.
        "meta": {"loss": np.float64(1.5), "at": range(3), "history": np.arange(4), "evil": Evil()},
        "state_dict": OrderedDict(weight=torch.ones(2), half=torch.full((3,), 2.0).half()),
    }
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(tmp_path / "file.pth") == zipped
    with pytest.raises(UserError, match="cannot be read"):
        weights.read(tmp_path / "file.pth")
    tensors = weights.read_checkpoint(tmp_path / "file.pth")
    assert tensors["weight"].tolist() == [1, 1]
    assert tensors["half"].tolist() == [2, 2, 2]
    assert not (tmp_path / "ran").exists()
    content = {"state_dict": {"weight": Evil()}}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="no named tensors"):
        weights.read_checkpoint(tmp_path / "file.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "file.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        weights.read_checkpoint(tmp_path / "file.pth")


def test_what_is_no_detector_is_refused(
    official: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no models/
    told = as_mmdet(official.state_dict(), 2)
    file = tmp_path / "file.pth"

    def refused(tensors: dict[str, Tensor], says: str) -> None:
        torch.save({"state_dict": tensors}, file)
        with pytest.raises(UserError, match=says):
            mask2former.Mask2Former(str(file), Place())

    refused({"weight": torch.ones(1)}, "is no Mask2Former of mmdet")
    name = "panoptic_head.query_embed.weight"
    refused({k: v for k, v in told.items() if k != name}, "other weights than expected")
    refused({**told, name: torch.full_like(told[name], torch.nan)}, "not finite")
    refused({**told, "roi_head.weight": torch.ones(1)}, "other weights than expected")
    with pytest.raises(UserError, match=r"no file .*; fetch it with .*geneval-detector"):
        rewards.load("geneval")
    with pytest.raises(UserError, match=r"there is no file other\.pth[^;]*$"):
        rewards.load("geneval[model=other.pth]")


def test_half_precision_finds_about_the_same(detector: Path) -> None:
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    exact = mask2former.Mask2Former(str(detector), Place())(image)
    half = mask2former.Mask2Former(str(detector), Place(dtype=torch.bfloat16))(image)
    assert half[0].score == pytest.approx(exact[0].score, rel=0.2)


# -- before and after it ----------------------------------------------------------------------


def test_pictures_get_the_size_of_mmdetections_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sizes = [(512, 512), (1024, 900), (2000, 500), (300, 420)]
    fitted = [mask2former.fitted(*size) for size in sizes]
    assert fitted == [(800, 800), (910, 800), (1333, 333), (800, 1120)]


def test_a_picture_is_normalised_red_first_and_padded_with_grey() -> None:
    image = torch.zeros(3, 48, 32)
    image[0] = 1.0
    pixels, inner = mask2former.prepared(image)
    assert inner == (96, 64)
    assert pixels.shape == (1, 3, 96, 64)
    expected = torch.tensor([(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375])
    torch.testing.assert_close(pixels[0, :, 5, 5], expected)
    pixels, inner = mask2former.prepared(image[:, :40])
    assert inner == (80, 64)
    assert pixels.shape == (1, 3, 96, 64)
    mean, std = torch.tensor(mask2former.MEAN), torch.tensor(mask2former.STD)
    torch.testing.assert_close(pixels[0, :, 80:].mean((1, 2)), (128 - mean) / std)


def test_objects_are_read_by_mmdetections_rule() -> None:
    classes = torch.full((2, 4), -20.0)  # three classes and nothing
    classes[0, 1], classes[0, 3] = 0.0, 0.0  # half a class, half nothing
    classes[1, 2] = 0.0
    masks = torch.full((2, 4, 4), -3.0)
    masks[0, 1:3, 0:2] = 2.0
    masks[1, 3, 3] = 1.0
    found = mask2former.read(classes, masks, torch.Size((4, 4)), (4, 4), (4, 4), 0.3)
    assert [one.label for one in found] == [2, 1]
    sure, half = torch.tensor(1.0).sigmoid().item(), 0.5 * torch.tensor(2.0).sigmoid().item()
    assert [one.score for one in found] == pytest.approx([sure, half], rel=1e-4)
    assert [one.box for one in found] == [(3, 3, 4, 4), (0, 1, 2, 3)]
    assert found[1].mask.nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    # A score must be above the threshold, not at it; without one, nothing is left out but what
    # covers no pixel.
    at = found[1].score
    assert len(mask2former.read(classes, masks, masks.shape[1:], (4, 4), (4, 4), at)) == 1
    assert len(mask2former.read(classes, masks, masks.shape[1:], (4, 4), (4, 4), 0.0)) == 6
    masks[1] = -1.0
    assert len(mask2former.read(classes, masks, masks.shape[1:], (4, 4), (4, 4), 0.0)) == 3
    # The padding is cut off before the mask gets the picture's size.
    masks[0] = -3.0
    masks[0, :2] = 2.0
    (one,) = mask2former.read(classes, masks, torch.Size((4, 4)), (2, 4), (10, 20), 0.3)
    assert one.box == (0, 0, 20, 10)
    assert one.mask.shape == (10, 20)


# -- verdicts ---------------------------------------------------------------------------------


def thing(name: str, box: tuple[int, int, int, int] = (0, 0, 10, 10), score: float = 0.95) -> Found:
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return Found(label=geneval.CLASSES.index(name), score=score, box=box, mask=mask)


def verdict(
    include: list[dict[str, Any]],
    found: Sequence[Found],
    colours: Sequence[str] = (),
    exclude: Sequence[dict[str, Any]] = (),
) -> tuple[bool, float]:
    wanted = geneval.wanted({"include": include, "exclude": list(exclude)})
    return geneval.judge(wanted, found, lambda some, _name: list(colours)[: len(some)])


def test_one_object() -> None:
    include = [{"class": "cat", "count": 1}]
    assert verdict(include, [thing("cat")]) == (True, 1)
    assert verdict(include, [thing("cat")] * 3) == (True, 1)  # more may be there
    assert verdict(include, [thing("dog")]) == (False, 0)
    assert verdict(include, []) == (False, 0)


def test_two_objects() -> None:
    include = [{"class": "cat", "count": 1}, {"class": "tv remote", "count": 1}]
    assert verdict(include, [thing("cat"), thing("tv remote")]) == (True, 1)
    assert verdict(include, [thing("tv remote")]) == (False, 0.5)


@pytest.mark.parametrize(
    ("there", "share"), [(0, 0), (2, 2 / 3), (3, 1), (4, 2 / 3), (6, 0), (9, 0)]
)
def test_counting(there: int, share: float) -> None:
    include, exclude = [{"class": "cup", "count": 3}], [{"class": "cup", "count": 4}]
    holds, part = verdict(include, [thing("cup")] * there, exclude=exclude)
    assert holds == (there == 3)
    assert part == pytest.approx(share)


def test_what_is_excluded_alone() -> None:
    include, exclude = [{"class": "cup", "count": 1}], [{"class": "cat", "count": 2}]
    assert verdict(include, [thing("cup"), thing("cat")], exclude=exclude) == (True, 1)
    assert verdict(include, [thing("cup"), thing("cat"), thing("cat")], exclude=exclude) == (
        False,
        0.5,
    )
    assert verdict([], [thing("cup")], exclude=exclude) == (True, 1)


def test_no_more_than_sixteen_of_a_class_are_seen() -> None:
    cups = [thing("cup")] * 20
    assert verdict([{"class": "cup", "count": 16}], cups)[0]
    assert not verdict([{"class": "cup", "count": 17}], cups)[0]
    assert verdict([], cups, exclude=[{"class": "cup", "count": 17}]) == (True, 1)


def test_colours() -> None:
    include = [{"class": "bus", "count": 1, "color": "red"}]
    assert verdict(include, [thing("bus")], ["red"]) == (True, 1)
    assert verdict(include, [thing("bus")], ["orange"]) == (False, 0.5)
    assert verdict(include, [], []) == (False, 0)
    # Only the most certain bus is looked at.
    assert verdict(include, [thing("bus"), thing("bus")], ["orange", "red"]) == (False, 0.5)
    two = [{"class": "bus", "count": 2, "color": "red"}]
    assert verdict(two, [thing("bus"), thing("bus")], ["red", "blue"]) == (False, 0.75)
    assert verdict(two, [thing("bus")], ["red"]) == (False, 0.5)


def test_colours_of_two_classes() -> None:
    include = [
        {"class": "bus", "count": 1, "color": "red"},
        {"class": "cow", "count": 1, "color": "blue"},
    ]
    names = {"bus": ["blue"], "cow": ["blue"]}
    wanted = geneval.wanted({"include": include})
    found = [thing("bus"), thing("cow")]
    assert geneval.judge(wanted, found, lambda _, name: names[name]) == (False, 0.75)
    names["bus"] = ["red"]
    assert geneval.judge(wanted, found, lambda _, name: names[name]) == (True, 1)


LEFT, RIGHT = (0, 40, 20, 60), (80, 40, 100, 60)


def test_positions() -> None:
    include = [
        {"class": "bus", "count": 1},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
    ]
    assert verdict(include, [thing("bus", RIGHT), thing("cat", LEFT)]) == (True, 1)
    # The wrong side is no half success: the position earns nothing, the presence does.
    assert verdict(include, [thing("bus", LEFT), thing("cat", RIGHT)]) == (False, 0.75)
    assert verdict(include, [thing("bus", LEFT), thing("cat", LEFT)]) == (False, 0.75)
    assert verdict(include, [thing("cat", LEFT)]) == (False, 0.25)
    assert verdict(include, [thing("bus", LEFT)]) == (False, 0.5)
    # Only the most certain cat counts.
    both = [thing("bus", (45, 40, 55, 60)), thing("cat", RIGHT), thing("cat", LEFT)]
    assert verdict(include, both) == (False, 0.75)


def test_every_pair_must_be_in_position() -> None:
    include = [
        {"class": "bus", "count": 1},
        {"class": "cat", "count": 2, "position": ["left of", 0]},
    ]
    bus = thing("bus", (45, 40, 55, 60))
    assert verdict(include, [bus, thing("cat", LEFT), thing("cat", LEFT)]) == (True, 1)
    assert verdict(include, [bus, thing("cat", LEFT), thing("cat", RIGHT)]) == (False, 0.875)


def test_relations_have_slack_and_a_main_direction() -> None:
    here = (0, 0, 10, 10)

    def moved(x: float, y: float) -> tuple[float, float, float, float]:
        return x, y, 10 + x, 10 + y

    assert geneval.relations(here, moved(30, 0)) == {"left of"}
    assert geneval.relations(moved(30, 0), here) == {"right of"}
    assert geneval.relations(here, moved(0, 30)) == {"above"}
    assert geneval.relations(moved(0, 30), here) == {"below"}
    assert geneval.relations(moved(30, 30), here) == {"right of", "below"}
    assert geneval.relations(here, here) == set()
    # A tenth of both sizes, 2 pixels here, counts as the same place; and what is beyond must be
    # more than half of the distance: (x - 2) / x > 1 / 2 from 4 pixels on.
    assert geneval.relations(moved(2, 0), here) == set()
    assert geneval.relations(moved(4, 0), here) == set()
    assert geneval.relations(moved(4.01, 0), here) == {"right of"}
    # In a direction that is a side issue: (x - 2) / sqrt(x² + 30²) > 1 / 2 from 20.04 on.
    assert geneval.relations(moved(20, 30), here) == {"below"}
    assert geneval.relations(moved(20.1, 30), here) == {"right of", "below"}


def test_all_of_it_is_there_exactly_where_everything_holds() -> None:
    rng = random.Random(0)
    names = ["cat", "bus"]
    seen: set[bool] = set()
    for _ in range(400):
        include = []
        for number in range(rng.randint(1, 3)):
            clause: dict[str, Any] = {"class": rng.choice(names), "count": rng.randint(1, 2)}
            if rng.random() < 0.3:
                clause["color"] = rng.choice(["red", "blue"])
            if number and rng.random() < 0.3:
                clause["position"] = [rng.choice(geneval.RELATIONS), rng.randrange(number)]
            include.append(clause)
        exclude = [{"class": name, "count": 3} for name in names if rng.random() < 0.3]
        found = [
            thing(rng.choice(names), rng.choice([LEFT, RIGHT, (45, 0, 55, 10)]))
            for _ in range(rng.randint(0, 6))
        ]
        colours = [rng.choice(["red", "blue"]) for _ in range(2)]
        holds, share = verdict(include, found, colours, exclude)
        assert 0 <= share <= 1
        assert holds == (share == 1)
        seen.add(holds)
    assert seen == {True, False}


def test_the_threshold_of_counting_is_higher() -> None:
    assert geneval.wanted({"include": [{"class": "cup", "count": 1}]}).threshold == 0.3
    row = {"tag": "counting", "include": [{"class": "cup", "count": 1}]}
    assert geneval.wanted(row).threshold == 0.9


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "neither include nor exclude"),
        ({"include": []}, "neither include nor exclude"),
        ({"include": "no JSON"}, "include is no JSON"),
        ({"include": {"class": "cat"}}, "include is no list"),
        ({"include": ["cat"]}, "no clause"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "'unicorn' is none of the 80 classes"),
        ({"include": [{"class": "cat"}]}, "count of cat is None"),
        ({"include": [{"class": "cat", "count": 0}]}, "count of cat is 0"),
        ({"include": [{"class": "cat", "count": True}]}, "count of cat is True"),
        ({"include": [{"class": "cat", "count": 1, "color": "grey"}]}, "'grey' is none of the col"),
        (
            {"include": [{"class": "cat", "count": 1, "position": ["above", 0]}]},
            "number of an earlier clause",
        ),
        (
            {
                "include": [
                    {"class": "cat", "count": 1},
                    {"class": "cat", "count": 1, "position": ["behind", 0]},
                ]
            },
            "not one of left of, right of, above, below",
        ),
    ],
)
def test_a_row_that_asks_for_nothing_known_has_no_score(row: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        geneval.wanted(row)


def test_a_row_of_a_flat_table_may_hold_json() -> None:
    include = [{"class": "cat", "count": 1}]
    row = {"include": json.dumps(include), "exclude": "[]"}
    assert geneval.wanted(row) == geneval.wanted({"include": include})


# -- colours by CLIP --------------------------------------------------------------------------

PALETTE = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}


class OneHot:
    """A CLIP that knows three colours by their names and pixels."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.seen: list[Tensor] = []

    def texts(self, prompts: Sequence[str]) -> Tensor:
        self.asked += prompts
        rows = [[float(name in text.split("-")[0].split()) for name in PALETTE] for text in prompts]
        return torch.tensor(rows)

    def pictures(self, images: Tensor, crop: str) -> Tensor:
        self.seen.append(images)
        return images.mean((2, 3))


def test_an_object_is_cut_out_on_grey_and_named_by_three_phrases() -> None:
    image = torch.zeros(3, 100, 100)
    image[1] = 1.0  # a green picture with a blue L in it
    one = thing("cow", (10, 20, 30, 50))
    one.mask[20:40, 20:30] = False
    image[:, one.mask] = torch.tensor(PALETTE["blue"])[:, None]
    clip: Any = OneHot()
    assert geneval.name_colours(clip, image, [one], "cow") == ["blue"]
    (crop,) = clip.seen
    assert crop.shape == (1, 3, 30, 20)
    assert crop[0, :, 0, 0].tolist() == [0, 0, 1]
    assert crop[0, :, 0, 19].tolist() == pytest.approx([0x99 / 255] * 3)
    assert len(clip.asked) == 30
    phrases = "a photo of a red cow, a photo of a red-colored cow, a photo of a red object"
    assert ", ".join(clip.asked[:3]) == phrases


# -- the scorers ------------------------------------------------------------------------------

CAT = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}


def spec(detector: Path, *names: str) -> str:
    return ",".join(f"{name}[model={detector},clip={POCKET_CLIP}]" for name in names)


def test_both_scorers_ask_one_detector_once(
    detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    finds = [[thing("cat")], [thing("dog")], []]

    def find(self: Any, image: Tensor, least: float = 0.0) -> list[Found]:
        asked.append(least)
        return finds[int(image[0, 0, 0])]

    monkeypatch.setattr(mask2former.Mask2Former, "__call__", find)
    reward = rewards.load(spec(detector, "geneval", "geneval_dense"))
    images = torch.zeros(3, 3, 8, 8) + torch.arange(3)[:, None, None, None]
    two = {"include": [*CAT["include"], {"class": "dog", "count": 1}]}
    output = reward(images, ["a"] * 3, [CAT, two, {}])
    assert asked == [0.3, 0.3]
    assert output.components["geneval"].tolist()[:2] == [1, 0]
    assert output.components["geneval_dense"].tolist()[:2] == [1, 0.5]
    assert output.valid.tolist() == [True, True, False]
    other = reward(images, ["a"] * 3, [two, two, two])  # the same pictures, asked for other things
    assert other.components["geneval_dense"].tolist() == [0.5, 0.5, 0]
    assert len(rewards.networks([reward])) == 2


def test_a_picture_is_scored_from_its_file_to_the_table(
    detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    rows = []
    for i in range(2):
        pixels = (torch.rand(50, 40, 3) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "a cat", **(CAT if i else {})})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = spec(detector, "geneval", "geneval_dense")
    assert command.main(["score", text, "--images", str(tmp_path), "--device", "cpu"]) == 0
    assert "geneval cannot score 1 of 2 prompts" in capsys.readouterr().out
    with (tmp_path / "scores.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["valid"], second["valid"]) == ("False", "True")
    assert float(second["geneval"]) in (0, 1)


def test_prompts_that_ask_for_nothing_known_are_refused_beforehand(detector: Path) -> None:
    class Asked:
        text = "a cat"
        metadata: dict[str, Any] = {}  # noqa: RUF012

    with pytest.raises(UserError, match=r"geneval cannot score 1 of 1 .* neither include nor"):
        rewards.check_prompts(print, rewards.load(spec(detector, "geneval")), [Asked()])


def test_the_list_says_that_it_was_never_compared() -> None:
    rows = [line for line in loading.table().splitlines() if line.startswith("geneval")]
    assert len(rows) == 2
    assert all("never compared with mmdetection's own results" in row for row in rows)


def test_its_classes_are_eighty() -> None:
    assert len(set(geneval.CLASSES)) == 80
    assert all(name == name.strip() for name in geneval.CLASSES)
    assert list(itertools.islice(geneval.CLASSES, 78, None)) == ["hair drier", "toothbrush"]
