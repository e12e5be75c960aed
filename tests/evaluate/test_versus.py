"""demo.py --versus: the same pictures on both sides, fair counts, and early refusals."""

import csv
import json
import math
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import demo
from dojo import cli
from dojo.cli import UserError
from dojo.evaluate import picture, versus
from dojo.evaluate import pipelines as inference
from dojo.finetune import lora
from dojo.inputs.prompts import Prompt
from dojo.pocket import models
from dojo.rewards import load

REWARDS = """
import torch


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


def darkness(images, prompts, metadata):
    return 1 - images.mean(dim=(1, 2, 3))


def brightness_if_wanted(images, prompts, metadata):
    wanted = torch.tensor([row.get("wanted") == "yes" for row in metadata])
    return torch.where(wanted, images.mean(dim=(1, 2, 3)), torch.nan)
"""
PROMPTS = '{"prompt": "a star", "wanted": "yes"}\n{"prompt": "two rings", "wanted": "no"}\n'


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    """File of reward functions."""
    path = tmp_path / "mine.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two prompts with metadata."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained pocket SD1.5."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd15"
    torch.manual_seed(0)
    models.sd15_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd3_lora(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA folder that brightens pictures, with the scheduler of its training (shift 7)."""
    folder = tmp_path_factory.mktemp("adapters")
    pipeline: Any = inference.load_pipeline(str(tiny_sd3), torch.float32)
    brighten(pipeline, pipeline.transformer.proj_out, "transformer.proj_out", folder)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift=7.0)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def sd15_lora(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA folder that brightens pictures."""
    folder = tmp_path_factory.mktemp("adapters")
    pipeline: Any = inference.load_pipeline(str(tiny_sd15), torch.float32)
    brighten(pipeline, pipeline.unet.conv_out, "unet.conv_out", folder)
    return folder


def brighten(pipeline: Any, layer: torch.nn.Module, name: str, folder: Path) -> None:
    """Saves a LoRA of rank 1 on the last layer that lets every picture become brighter.

    Up leads against the gradient of brightness by latents: velocities and noises are taken away
    from a picture. Down is the mean of what the layer is given, so that its product with them is 1
    in the mean over places.
    """
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    final = pipeline(
        "a star",
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images.requires_grad_()
    hook.remove()
    pipeline.vae.decode(final).sample.mean().backward()
    gradient = final.grad.mean(dim=(0, 2, 3))  # by channels
    given = torch.cat(seen)
    convolution = isinstance(layer, torch.nn.Conv2d)
    mean = given.mean(dim=(0, 2, 3) if convolution else (0, 1))
    down = (mean / mean.square().sum())[None]
    up = -10 * gradient / gradient.norm()
    if convolution:
        down = torch.nn.functional.pad(down[..., None, None], (1, 1, 1, 1))
        up = up[:, None, None, None]
    else:
        up = up.repeat(4)[:, None]  # the places of a patch before its channels
    weights = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / lora.WEIGHTS)


def flags_for(model: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(model), "--output_dir", str(out)),
        *("--num_inference_steps", "2", "--seed", "4"),
        *(("--max_sequence_length", "24") if "sd3" in model.name else ()),
        *more,
    ]


def run(model: Path, out: Path, *more: str) -> None:
    demo.main(cli.parse(demo.Args, None, flags_for(model, out, *more)))


def read(out: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """versus.json and the rows of versus.csv."""
    with (out / "versus.csv").open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    return json.loads((out / "versus.json").read_text(encoding="utf-8")), rows


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*-seed*.png"))}


# -- both sides -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_sd15"])
def test_a_model_against_itself_only_ties(
    family: str, file: Path, rewards: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(family)
    given = ("--prompt_file", str(file), "--prompt", "a heart", "--num_images_per_prompt", "2")
    spec = f"{rewards}:brightness=2,{rewards}:darkness"
    run(model, tmp_path / "plain", *given)
    run(model, tmp_path / "out", *given, "--versus", str(model), "--reward", spec)
    # Both sides are what the plain command draws, bit for bit.
    plain = pictures(tmp_path / "plain")
    assert len(plain) == 6
    assert pictures(tmp_path / "out" / "base") == plain
    assert pictures(tmp_path / "out" / "tuned") == plain
    found, rows = read(tmp_path / "out")
    assert list(found["rewards"]) == ["weighted sum", "brightness", "darkness"]
    assert found["weights"] == {"brightness": 2.0, "darkness": 1.0}
    assert found["seeds"] == [4, 5]
    assert found["options"]["reward"] == spec
    assert found["options"]["versus"] == str(model)
    for one in found["rewards"].values():
        assert (one["pairs"], one["clusters"], one["ties"], one["left_out"]) == (6, 3, 6, 0)
        assert one["win_rate"]["value"] == 0.5
        assert one["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert one["verdict"] == "no difference shown"
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        *[("a heart", "4"), ("a heart", "5"), ("a star", "4"), ("a star", "5")],
        *[("two rings", "4"), ("two rings", "5")],
    ]
    assert [row["file"] for row in rows] == list(plain)
    for row in rows:
        pixels = torch.tensor(list(Image.open(tmp_path / "plain" / row["file"]).tobytes()))
        bright = float(row["base/brightness"])
        assert bright == pytest.approx(pixels.double().mean().item() / 255, abs=1e-5)
        assert float(row["tuned/weighted sum"]) == pytest.approx(1 + bright, abs=1e-5)
    assert not (tmp_path / "out" / "prompts.json").exists()


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_a_lora_that_brightens_wins_by_brightness_and_loses_by_darkness(
    family: str,
    rewards: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model: Path = request.getfixturevalue(f"tiny_{family}")
    adapter: Path = request.getfixturevalue(f"{family}_lora")
    prompts = ("--prompt", *"abcd")
    run(model, tmp_path / "alone", *prompts, "--lora_weights_path", str(adapter))
    alone = pictures(tmp_path / "alone")
    for name, path in (("folder", adapter), ("file", adapter / lora.WEIGHTS)):
        out = tmp_path / name
        spec = f"{rewards}:brightness,{rewards}:darkness=0"
        run(model, out, *prompts, "--versus", str(path), "--reward", spec)
        assert pictures(out / "tuned") == alone  # with the scheduler that lies beside the LoRA
        found, rows = read(out)
        for reward, sign in (("weighted sum", 1), ("brightness", 1), ("darkness", -1)):
            one = found["rewards"][reward]
            assert one["verdict"] == ("better" if sign > 0 else "worse")
            assert one["win_rate"]["value"] == (1 + sign) / 2
            assert (one["wins"], one["losses"]) == ((4, 0) if sign > 0 else (0, 4))
            gains = [float(row[f"tuned/{reward}"]) - float(row[f"base/{reward}"]) for row in rows]
            mean = sum(gains) / 4
            assert sign * mean > 0
            assert one["difference"]["value"] == pytest.approx(mean, abs=1e-6)
            assert one["difference"]["low"] <= mean <= one["difference"]["high"]
        lines = capsys.readouterr().out.splitlines()
        assert any("brightness" in line and line.endswith("better") for line in lines)
        assert any("darkness" in line and line.endswith("worse") for line in lines)


def test_the_strength_of_the_lora_can_be_chosen(
    tiny_sd15: Path, sd15_lora: Path, rewards: Path, tmp_path: Path
) -> None:
    more = ("--prompt", "a star", "--versus", str(sd15_lora), "--lora_scale", "0")
    out = tmp_path / "out"
    run(tiny_sd15, out, *more, "--reward", f"{rewards}:brightness")
    assert pictures(out / "base") == pictures(out / "tuned")
    found, _ = read(out)
    assert list(found["rewards"]) == ["brightness"]  # it is the sum itself
    one = found["rewards"]["brightness"]
    assert one["ties"] == 1
    assert one["difference"] == {"value": 0.0, "low": None, "high": None}  # valid JSON, no NaN


def test_a_tuned_pipeline_keeps_its_own_scheduler_and_one_model_is_loaded_at_a_time(
    tiny_sd3: Path, rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tmp_path / "tuned-sd3"
    shutil.copytree(tiny_sd3, tuned)
    path = tuned / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift": 7.0}))
    for model, name in ((tiny_sd3, "base"), (tuned, "tuned")):
        run(model, tmp_path / name, "--prompt", "a star")
    loaded: list[weakref.ref[Any]] = []
    real = inference.load_pipeline

    def watched(*args: Any) -> Any:
        assert not [one for one in loaded if one() is not None]
        loaded.append(weakref.ref(pipeline := real(*args)))
        return pipeline

    monkeypatch.setattr(inference, "load_pipeline", watched)
    out = tmp_path / "out"
    more = ("--prompt", "a star", "--versus", str(tuned), "--reward", f"{rewards}:brightness")
    run(tiny_sd3, out, *more)
    assert len(loaded) == 2
    for side in versus.SIDES:
        assert pictures(out / side) == pictures(tmp_path / side)
    assert pictures(out / "base") != pictures(out / "tuned")


def test_columns_of_the_prompt_file_reach_the_rewards_and_missing_scores_are_counted(
    tiny_sd15: Path, file: Path, rewards: Path, tmp_path: Path
) -> None:
    spec = f"{rewards}:brightness,{rewards}:brightness_if_wanted"
    out = tmp_path / "out"
    more = ("--prompt_file", str(file), "--versus", str(tiny_sd15), "--reward", spec)
    run(tiny_sd15, out, *more, "--reward_batch_size", "1")
    found, rows = read(out)
    counts = {
        name: (one["pairs"], one["left_out"], one["clusters"])
        for name, one in found["rewards"].items()
    }
    assert counts == {
        "weighted sum": (1, 1, 1),
        "brightness": (2, 0, 2),
        "brightness_if_wanted": (1, 1, 1),
    }
    assert [math.isnan(float(row["base/brightness_if_wanted"])) for row in rows] == [False, True]
    assert [math.isnan(float(row["tuned/weighted sum"])) for row in rows] == [False, True]


# -- judging pictures that are there -----------------------------------------------------------


def shades(folder: Path, base: Sequence[int], tuned: Sequence[int]) -> list[Prompt]:
    """Grey pictures in the two folders, a prompt each."""
    prompts = [Prompt(text=f"shade {i}") for i in range(len(base))]
    for side, levels in zip(versus.SIDES, (base, tuned), strict=True):
        (folder / side).mkdir()
        for i, level in enumerate(levels):
            path = folder / side / versus.file_name(i, prompts[i].text, 0)
            Image.new("RGB", (64, 64), (level,) * 3).save(path)
    return prompts


def test_the_grid_shows_the_greatest_gains_first_and_the_greatest_losses_last(
    rewards: Path, tmp_path: Path
) -> None:
    # Gains of -9 to 10, mixed; the four in the middle, -1 to 2, are left out of 16 rows.
    gains = [(7 * i) % 20 - 9 for i in range(20)]
    prompts = shades(tmp_path, [100] * 20, [100 + gain for gain in gains])
    found = versus.judge(tmp_path, prompts, [0], load(f"{rewards}:brightness"), {"by": "hand"})
    assert (found["brightness"].wins, found["brightness"].losses) == (10, 9)
    assert json.loads((tmp_path / "versus.json").read_text())["options"] == {"by": "hand"}
    grid = Image.open(tmp_path / "versus.png")
    shown = []
    for row in range(16):
        place = (170 + 198 + 96, 26 + row * 215 + 96)  # the middle of a cell
        level = grid.getpixel(place)
        assert isinstance(level, tuple)
        shown.append(int(level[0]) - 100)
    assert shown == [*range(10, 2, -1), *range(-2, -10, -1)]
    assert grid.height < 26 + 17 * 215


def test_lines_of_equal_text_are_one_prompt(rewards: Path, tmp_path: Path) -> None:
    prompts = shades(tmp_path, [100] * 4, [101, 101, 101, 99])
    for i in range(3):
        for side in versus.SIDES:
            old = tmp_path / side / versus.file_name(i, prompts[i].text, 0)
            old.rename(tmp_path / side / versus.file_name(i, "same", 0))
    prompts = [*(Prompt(text="same") for _ in range(3)), prompts[3]]
    one = versus.judge(tmp_path, prompts, [0], load(f"{rewards}:brightness"), {})["brightness"]
    assert (one.pairs, one.clusters, one.wins, one.losses) == (4, 2, 3, 1)
    assert one.win_rate.value == 0.5


def test_without_any_score_there_is_a_table_and_no_grid(rewards: Path, tmp_path: Path) -> None:
    prompts = shades(tmp_path, [100], [101])
    found = versus.judge(tmp_path, prompts, [0], load(f"{rewards}:brightness_if_wanted"), {})
    assert versus.table(found).splitlines()[1].endswith("no pair has scores")
    assert not (tmp_path / "versus.png").exists()
    text = (tmp_path / "versus.json").read_text()
    assert json.loads(text)["rewards"]["brightness_if_wanted"]["base"] is None
    assert "NaN" not in text


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--versus", "x", "--lora_weights_path", "y"), "in place of --lora_weights_path"),
        (("--versus", "x", "--compare", "--lora_weights_path", "y"), "in place of"),
        (("--versus", "x", "--compare"), "--compare needs"),
        (("--reward", "clip"), "need --versus"),
        (("--reward_batch_size", "2"), "need --versus"),
        (("--versus", "x", "--reward", "clip[model"), "is not of the form"),
    ],
)
def test_options_that_contradict_each_other(
    more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse(demo.Args, None, flags_for(Path("x"), Path("y"), "--prompt", "z", *more))
    assert ended.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown


def test_a_password_in_a_rewards_address_is_not_written_down(tmp_path: Path) -> None:
    spec = "vlm[url=http://me:hidden@host/v1?key=hidden,model=m]"
    words = ("--prompt", "a star", "--versus", "x", "--reward", spec)
    args = cli.parse(demo.Args, None, flags_for(tmp_path, tmp_path / "out", *words))
    options = demo.options_of(args)
    assert options["reward"] == "vlm[url=http://***@host/v1?key=***,model=m]"
    assert "hidden" not in json.dumps(options)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--versus", "none/at/all"), "--versus: there is no file or folder none/at/all"),
        (("--versus", "none/there"), "--versus: none/there is neither a file, a folder nor"),
        (("--versus", "{out}"), "--versus: .* has neither model_index.json nor"),
        (("--versus", "{alien}"), "--versus: .*alien.safetensors"),
        (("--versus", "{broken}"), "--versus: .*broken.safetensors cannot be read"),
        (("--pretrained_model_name_or_path", "{lora}"), "is a LoRA; --versus takes it"),
        (("--pretrained_model_name_or_path", "no/folder/x"), "--pretrained_model_name_or_path: th"),
        (("--reward", "clap"), "there is no scorer clap"),
        (("--reward", "jpeg_compressibility[quality=3]"), "jpeg_compressibility has no option"),
        (("--reward", "clip[model=nowhere/clip]"), "nowhere/clip"),
        (("--reward", "none.py:f"), "there is no file none.py"),
        (("--prompt", "a sentence of my own", "--reward", "pocket"), "'a sentence of my own'"),
    ],
)
def test_mistakes_are_told_before_anything_is_drawn(
    more: tuple[str, ...],
    message: str,
    tiny_sd15: Path,
    sd15_lora: Path,
    sd3_lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(picture, "draw", lambda *_: pytest.fail("drawn"))
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    shutil.copy(sd3_lora / lora.WEIGHTS, tmp_path / "alien.safetensors")
    (tmp_path / "empty").mkdir()
    places = {
        "{out}": tmp_path / "empty",
        "{alien}": tmp_path / "alien.safetensors",
        "{broken}": tmp_path / "broken.safetensors",
        "{lora}": sd15_lora,
    }
    value = str(places.get(more[1], more[1]))
    usual = ("--versus", str(sd15_lora), "--reward", "jpeg_compressibility")
    usual += () if "--prompt" in more else ("--prompt", "a star")
    with pytest.raises(UserError, match=message):
        run(tiny_sd15, tmp_path / "out", *usual, more[0], value, *more[2:])


def test_a_hub_id_is_a_pipeline_or_a_lora_by_the_files_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {"some/pipeline": "model_index.json", "some/lora": lora.WEIGHTS}

    def fetch(name: str, file: str) -> str:
        if files[name] != file:
            raise OSError
        return file

    monkeypatch.setattr(inference, "hf_hub_download", fetch)
    assert not inference.is_lora("some/pipeline", "--versus")
    assert inference.is_lora("some/lora", "--versus")


def test_a_single_file_is_told_from_a_lora_by_its_tensors(sd3_lora: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.x_embedder.proj.bias": torch.zeros(1)}, path)
    assert not inference.is_lora(str(path), "--versus")
    assert inference.is_lora(str(sd3_lora / lora.WEIGHTS), "--versus")


def test_a_pickle_is_told_from_a_lora_by_its_tensors_too(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"model.diffusion_model.out.2.bias": torch.zeros(1)}}, path)
    assert not inference.is_lora(str(path), "--versus")
    torch.save({"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.ones(())}, path)
    assert inference.is_lora(str(path), "--versus")
    path.write_bytes(b"neither")
    with pytest.raises(UserError, match=r"--versus: .*model.ckpt holds more than tensors"):
        inference.is_lora(str(path), "--versus")
