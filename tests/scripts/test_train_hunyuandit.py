"""The script of Hunyuan-DiT from end to end: either layout, what draws its result, its card."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import demo
import train_dreambooth_lora_hunyuandit
import train_lora_hunyuandit
from dojo import cli, pairs
from dojo.cli import UserError
from dojo.evaluate import pipelines
from dojo.evaluate.placing import PlaceArgs
from dojo.files.records import read_pictures
from dojo.finetune import lora
from dojo.models import hunyuandit
from tests.conftest import run_flags
from tests.models.test_hunyuandit import WRAPS, tencents_layout
from tests.scripts.runs import family_flags, in_process, metrics
from tests.scripts.test_train_kolors import check_subject, subject_flags, texts_of_batches
from tests.scripts.test_train_kolors import pictures as pictures

CPU = torch.device("cpu")
PROMPT = "一颗红色的星星"
WATCHED = ("--validation_prompt", PROMPT, "--validation_inference_steps", "2")
WATCHED = (*WATCHED, "--validation_guidance_scale", "3", "--caption_dropout", "0.3")


def train(folder: Path, model: Path, data: Path, *flags: str) -> Path:
    """Trains in this process and returns the output folder."""
    words = [*family_flags(folder, model, data), "--rank", "2", "--seed", "0"]
    in_process(train_lora_hunyuandit, [*words, "--learning_rate", "1e-2", *flags])
    return folder / "run"


@pytest.fixture(scope="module")
def trained(
    tiny_hunyuandit: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of a short run on pictures with Chinese captions."""
    return train(tmp_path_factory.mktemp("trained"), tiny_hunyuandit, pictures, *WATCHED)


def drawn_by_demo(model: Path, trained: Path, seed: int, out: Path) -> Path:
    """The one picture of a prompt, by demo.py."""
    flags = ["--pretrained_model_name_or_path", str(model), "--prompt", PROMPT]
    flags += ["--lora_weights_path", str(trained), "--seed", str(seed), "--height", "64"]
    flags += ["--width", "64", "--num_inference_steps", "2", "--guidance_scale", "3"]
    flags += ["--dtype", "fp32", "--compare", "--output_dir", str(out)]
    demo.main(cli.parse(demo.Args, None, flags))
    (own,) = (path for path in out.glob("*.png") if path.name != "compare.png")
    return own


def test_validation_draws_what_the_demo_and_the_card_draw(
    trained: Path, tiny_hunyuandit: Path, tmp_path: Path
) -> None:
    assert [row["step"] for row in metrics(trained) if "loss" in row] == [1, 2, 3]
    (path,) = (trained / "validation" / "step-3").glob("*.png")
    (row,) = read_pictures(trained / "validation")
    seed = row["seed"]
    own = drawn_by_demo(tiny_hunyuandit, trained, seed, tmp_path / "drawn")
    assert Image.open(own).tobytes() == Image.open(path).tobytes()
    with Image.open(tmp_path / "drawn" / "compare.png") as grid:
        assert grid.width > 2 * 64

    # The card's Python is run as it stands, with names of this machine.
    card = (trained / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    names = {
        f'"{tiny_hunyuandit.name}"': repr(str(tiny_hunyuandit)),
        f'"{trained.name}"': repr(str(trained)),
        "torch.bfloat16": "torch.float32",
        'pipe.to("cuda")': f"generator = torch.Generator().manual_seed({seed})",
        "use_resolution_binning=False": "use_resolution_binning=False, generator=generator",
        '"image.png"': repr(str(tmp_path / "image.png")),
    }
    for name, here in names.items():
        assert name in text, name
        text = text.replace(name, here)
    exec(compile(text, "the card", "exec"), {"__name__": "card"})
    assert Image.open(tmp_path / "image.png").tobytes() == Image.open(path).tobytes()

    # No caption was cut to nothing or taken for another one.
    report = json.loads((trained / "data_report.json").read_text(encoding="utf-8"))
    assert report["texts"]["tokens_of_BERT"] == 77
    assert report["texts"]["tokens_of_mT5"] == 256
    assert report["texts"]["cut_for_mT5"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("version", ["hunyuandit", "hunyuandit11"])
def test_tencents_folder_trains_the_same_bytes(
    pictures: Path, tmp_path: Path, version: str, request: pytest.FixtureRequest
) -> None:
    own = request.getfixturevalue(f"tiny_{version}")
    theirs = tencents_layout(own, tmp_path / "HunyuanDiT", wrap=WRAPS["DeepSpeed"])
    one, other = (
        train(tmp_path / name, folder, pictures, *WATCHED)
        for name, folder in (("own", own), ("theirs", theirs))
    )
    assert (one / lora.WEIGHTS).read_bytes() == (other / lora.WEIGHTS).read_bytes()
    title = "v1.0 or v1.1" if version.endswith("11") else "v1.2"
    card = (other / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert f"# LoRA for Hunyuan-DiT {title}\n" in card
    seed = read_pictures(one / "validation")[0]["seed"]
    drawn = [
        drawn_by_demo(folder, one, seed, tmp_path / folder.name).read_bytes()
        for folder in (own, theirs)
    ]
    assert drawn[0] == drawn[1]


def test_the_demo_draws_over_the_network_that_is_chosen(
    tiny_hunyuandit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tencents_layout(tiny_hunyuandit, tmp_path / "HunyuanDiT")
    model = theirs / "t2i" / "model"
    state = torch.load(model / "pytorch_model_ema.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    name = "final_layer.linear.weight"
    state[name] = torch.randn(state[name].shape, generator=generator)
    torch.save(state, model / "pytorch_model_distill.pt")

    def network(wish: Any) -> dict[str, torch.Tensor]:
        place = PlaceArgs(tencent_weights=wish)
        return place.load(str(theirs), torch.device("cpu")).transformer.state_dict()

    ema, distill = network("auto"), network("distill")
    other = {name for name, value in ema.items() if not torch.equal(value, distill[name])}
    assert other == {"proj_out.weight"}
    assert torch.equal(distill["proj_out.weight"], state[name])
    with pytest.raises(UserError, match=r"--tencent_weights module: .*_distill\.pt"):
        network("module")
    with pytest.raises(UserError, match=r"--tencent_weights ema is for Tencent's own folder"):
        PlaceArgs(tencent_weights="ema").load(str(tiny_hunyuandit), torch.device("cpu"))
    flags = ["--pretrained_model_name_or_path", "x", "--prompt", "x", "--tencent_weights", "ema"]
    assert cli.parse(demo.Args, None, flags).place.tencent_weights == "ema"

    loras = [run_of(tmp_path / wish, wish) for wish in ("distill", "ema", "auto")]
    drawn, *_ = demo.load(cli.parse(demo.Args, None, flags[:4]), *(str(theirs), (), CPU))
    assert torch.equal(drawn.transformer.proj_out.weight, ema["proj_out.weight"])
    left = PlaceArgs()
    for some in (
        [loras[0]],
        [loras[2], f"{loras[0]}/checkpoint-2"],
        [f"{loras[0]}/mine.safetensors"],
    ):
        assert left.for_loras(str(theirs), some).tencent_weights == "distill"
    assert left.for_loras(str(theirs), loras[2:]) == left
    assert left.for_loras(str(tiny_hunyuandit), loras[:1]) == left  # the only one that it has
    assert (
        PlaceArgs(tencent_weights="ema").for_loras(str(theirs), loras[:1]).tencent_weights == "ema"
    )
    with pytest.raises(UserError, match=r"different networks .*distill on distill, .*ema on ema"):
        left.for_loras(str(theirs), loras)
    loaded: list[PlaceArgs] = []

    def load(place: PlaceArgs, *_: Any) -> None:
        loaded.append(place)
        raise KeyboardInterrupt

    monkeypatch.setattr(PlaceArgs, "load", load)
    with pytest.raises(KeyboardInterrupt):
        demo.load(cli.parse(demo.Args, None, flags[:4]), *(str(theirs), loras[:1], CPU))
    assert loaded[0].tencent_weights == "distill"


def run_of(folder: Path, wish: str) -> str:
    """A run that trained on a network of Tencent's, as far as its args.json says."""
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": {"model": {"tencent_weights": wish}}}))
    return str(folder)


def test_pairs_know_the_files_of_a_model_in_tencents_layout(
    tiny_hunyuandit: Path, tmp_path: Path
) -> None:
    theirs = tencents_layout(tiny_hunyuandit, tmp_path / "HunyuanDiT")
    model = theirs / "t2i" / "model"
    before = pairs._model_files(theirs)
    assert (
        before == pairs._model_files(theirs / "t2i", "ema") != pairs._model_files(tiny_hunyuandit)
    )
    shutil.copy(model / "pytorch_model_ema.pt", model / "pytorch_model_distill.pt")
    assert pairs._model_files(theirs) == before
    for part in ("model/pytorch_model_ema.pt", "mt5/pytorch_model.bin"):
        with (theirs / "t2i" / part).open("ab") as file:
            file.write(b"more")
        after = pairs._model_files(theirs)
        assert after != before
        before = after


@pytest.mark.slow
def test_without_a_cache_the_same_is_learned(
    trained: Path, tiny_hunyuandit: Path, pictures: Path, tmp_path: Path
) -> None:
    flags = (*WATCHED, "--no_cache_text_embeddings", "--no_cache_latents")
    again = train(tmp_path / "live", tiny_hunyuandit, pictures, *flags)
    one, other = (load_file(folder / lora.WEIGHTS) for folder in (trained, again))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_the_file_for_other_programs_is_drawn_with_as_the_own_one(
    tiny_hunyuandit: Path, pictures: Path, tmp_path: Path, form: str
) -> None:
    flags = ("--lora_format", form, "--lora_alpha", "1", "--gradient_checkpointing")
    run = train(tmp_path / form, tiny_hunyuandit, pictures, *WATCHED, *flags)
    (theirs,) = [path for path in run.rglob("*.safetensors") if "checkpoint" not in str(path)][1:]
    latents: list[Any] = []
    for path in (run, theirs):
        pipeline = pipelines.load_pipeline(str(tiny_hunyuandit), torch.float32)
        pipelines.load_loras(pipeline, [str(path)], [1.0])
        wish: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline(PROMPT, **wish, output_type="latent", generator=generator)
        latents.append(drawn.images)
    assert torch.equal(*latents)


def test_a_subject_is_learned_beside_its_class_in_chinese(
    tiny_hunyuandit11: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = texts_of_batches(monkeypatch, hunyuandit.Model)
    flags = subject_flags(tmp_path, tiny_hunyuandit11, pictures)
    in_process(train_dreambooth_lora_hunyuandit, flags)
    check_subject(tmp_path / "run", texts)


def test_the_text_encoders_are_not_trained_and_other_families_refused(
    tiny_hunyuandit: Path,
    tiny_sdxl: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = run_flags(tmp_path, tiny_hunyuandit, pictures)
    for script in (train_lora_hunyuandit, train_dreambooth_lora_hunyuandit):
        with pytest.raises(SystemExit):
            cli.parse(script.Args, None, [*words, "--train_text_encoder"])
        assert "stay as they are" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=r"its scripts are train_\*_sdxl\.py"):
        train(tmp_path, tiny_sdxl, pictures)
