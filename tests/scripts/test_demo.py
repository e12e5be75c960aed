"""demo.py: what it draws, what it writes beside the pictures, and how it says no."""

import io
import json
import shlex
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import demo
from dojo import cli, web
from dojo.cli import UserError
from dojo.evaluate import pipelines as inference
from dojo.finetune import lora
from dojo.models import sd3


def parse(*flags: str) -> demo.Args:
    return cli.parse(demo.Args, None, flags)


@pytest.fixture(scope="module")
def adapter(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA folder that changes pictures, with the scheduler of its training (shift 7)."""
    folder = tmp_path_factory.mktemp("adapter")
    config = sd3.open_model(sd3.ModelArgs(pretrained_model_name_or_path=str(tiny_sd3)))
    model = config.load_network(torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    for param in lora.add(model, lora.LoraArgs(rank=2, lora_layers=("all-linear",))):
        param.data = torch.randn_like(param)
    lora.save(folder, model)
    config.with_shift(7.0).save_pretrained(folder / "scheduler")
    return folder


def flags_for(model: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(model), "--output_dir", str(out)),
        *("--num_inference_steps", "2", "--max_sequence_length", "24", *more),
    ]


def picture(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")


def test_prompts_from_flags_and_files_get_safe_names_and_a_record(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "two rings"}\n\n{"text": "一颗红心"}\n', encoding="utf-8")
    more = ("--prompt", "a/b: *?", "--prompt_file", str(file), "--num_images_per_prompt", "2")
    demo.main(parse(*flags_for(tiny_sd3, tmp_path / "out", *more, "--seed", "4")))
    record = json.loads((tmp_path / "out" / "prompts.json").read_text(encoding="utf-8"))
    assert [row["prompt"] for row in record["pictures"]] == [
        *["a/b: *?"] * 2,
        *["two rings"] * 2,
        *["一颗红心"] * 2,
    ]
    assert [row["seed"] for row in record["pictures"]] == [4, 5] * 3
    assert record["pictures"][0]["file"] == "0000-a_b-seed4.png"
    for row in record["pictures"]:
        assert Image.open(tmp_path / "out" / row["file"]).size == (64, 64)


def test_options_behind_a_prompt_change_its_picture_alone(tiny_sd3: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a star --n dark --w 32 --h 64 --d 9 --s 3 --l 2.5\na ring\n")
    both = ("--prompt_file", str(file), "--seed", "4")
    demo.main(parse(*flags_for(tiny_sd3, tmp_path / "file", *both)))
    record = json.loads((tmp_path / "file" / "prompts.json").read_text())["pictures"]
    assert [(row["prompt"], row["seed"]) for row in record] == [("a star", 9), ("a ring", 4)]
    assert record[0]["guidance_scale"] == 2.5
    wishes = ("--negative_prompt", "dark", "--width", "32", "--height", "64", "--seed", "9")
    wishes += ("--num_inference_steps", "3", "--guidance_scale", "2.5", "--prompt", "a star")
    demo.main(parse(*flags_for(tiny_sd3, tmp_path / "flags", *wishes)))
    demo.main(parse(*flags_for(tiny_sd3, tmp_path / "plain", "--prompt", "a ring", "--seed", "4")))
    drawn = [picture(tmp_path / "file" / row["file"]) for row in record]
    assert drawn[0].size == (32, 64)
    assert drawn[0].tobytes() == picture(tmp_path / "flags" / "0000-a_star-seed9.png").tobytes()
    assert drawn[1].tobytes() == picture(tmp_path / "plain" / "0000-a_ring-seed4.png").tobytes()


def test_a_picture_depends_on_its_own_seed_alone(tiny_sd3: Path, tmp_path: Path) -> None:
    for out, more in (
        ("many", ("--num_images_per_prompt", "2", "--seed", "4")),
        ("one", ("--seed", "5")),
    ):
        demo.main(parse(*flags_for(tiny_sd3, tmp_path / out, "--prompt", "a star", *more)))
    many = Image.open(tmp_path / "many" / "0000-a_star-seed5.png")
    one = Image.open(tmp_path / "one" / "0000-a_star-seed5.png")
    difference = torch.tensor(list(many.tobytes())) - torch.tensor(list(one.tobytes()))
    assert difference.abs().max() <= 1  # a batch of two rounds differently


def test_several_pictures_without_a_prompt_at_all(tiny_sd3: Path, tmp_path: Path) -> None:
    options = ("--prompt", "a star", "--uncond", "zeros", "--seed", "4")
    for out, more in (("two", ("--num_images_per_prompt", "2")), ("one", ())):
        demo.main(parse(*flags_for(tiny_sd3, tmp_path / out, *options, *more)))
    two, one = (Image.open(tmp_path / out / "0000-a_star-seed4.png") for out in ("two", "one"))
    difference = torch.tensor(list(two.tobytes())) - torch.tensor(list(one.tobytes()))
    assert difference.abs().max() <= 2
    assert len(list((tmp_path / "two").glob("*.png"))) == 2


def test_compare_lays_base_and_lora_side_by_side(
    tiny_sd3: Path, adapter: Path, tmp_path: Path
) -> None:
    prompt = ("--prompt", "a star", "--seed", "1")
    demo.main(parse(*flags_for(tiny_sd3, tmp_path / "base", *prompt)))
    tuned = ("--lora_weights_path", str(adapter), "--compare")
    demo.main(parse(*flags_for(tiny_sd3, tmp_path / "both", *prompt, *tuned)))
    grid = Image.open(tmp_path / "both" / "compare.png")
    base = Image.open(tmp_path / "base" / "0000-a_star-seed1.png")
    after = Image.open(tmp_path / "both" / "0000-a_star-seed1.png")
    # The cells of the grid, scaled by whole numbers, hold exactly these pictures.
    for left, picture in ((170, base), (170 + 198, after)):
        cell = grid.crop((left, 26, left + 192, 26 + 192))
        assert cell.tobytes() == picture.resize((192, 192), Image.Resampling.NEAREST).tobytes()
    assert base.tobytes() != after.tobytes()


def test_scale_zero_is_the_base_with_the_loras_scheduler(
    tiny_sd3: Path, adapter: Path, tmp_path: Path
) -> None:
    prompt = ("--prompt", "a star", "--seed", "1")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / lora.WEIGHTS).write_bytes((adapter / lora.WEIGHTS).read_bytes())
    demo.main(parse(*flags_for(tiny_sd3, tmp_path / "base", *prompt)))
    pictures = {}
    for name, folder in (("plain", bare), ("shifted", adapter)):
        off = ("--lora_weights_path", str(folder), "--lora_scale", "0")
        demo.main(parse(*flags_for(tiny_sd3, tmp_path / name, *prompt, *off)))
        pictures[name] = Image.open(tmp_path / name / "0000-a_star-seed1.png").tobytes()
    base = Image.open(tmp_path / "base" / "0000-a_star-seed1.png").tobytes()
    assert pictures["plain"] == base
    assert pictures["shifted"] != base


def test_a_lora_that_does_not_fit_is_an_error(
    tiny_sd3: Path, adapter: Path, tmp_path: Path
) -> None:
    alien = {
        f"lora_unet_{name.replace('.', '_')}": value
        for name, value in load_file(adapter / lora.WEIGHTS).items()
    }
    save_file(alien, tmp_path / "alien.safetensors")
    more = ("--prompt", "a star", "--lora_weights_path", str(tmp_path / "alien.safetensors"))
    with pytest.raises(UserError, match=r"alien\.safetensors"):
        demo.main(parse(*flags_for(tiny_sd3, tmp_path, *more)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pretrained_model_name_or_path", "models/none"), "there is no folder models/none"),
        (("--lora_weights_path", "none.safetensors"), "there is no file or folder"),
        (("--prompt_file", "none.txt"), "none.txt cannot be read"),
        (("--offload", "model"), "needs a CUDA device"),
        (("--device", "cuda"), "this machine has none"),
    ],
)
def test_mistakes_are_one_clear_sentence(
    tiny_sd3: Path, tmp_path: Path, flags: tuple[str, str], message: str
) -> None:
    if torch.cuda.is_available() and flags[0] in ("--offload", "--device"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=message):
        demo.main(parse(*flags_for(tiny_sd3, tmp_path, "--prompt", "x", *flags)))


def test_mistakes_end_with_exit_code_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["demo.py", "--prompt", "x", "--pretrained_model_name_or_path", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.run(demo.main, demo.Args, demo.__doc__)
    assert ended.value.code == 2
    assert "has no model_index.json" in capsys.readouterr().err
    for wrong in ((), ("--compare", "--prompt", "x"), ("--promt", "x")):
        with pytest.raises(SystemExit) as ended:
            parse("--pretrained_model_name_or_path", "x", *wrong)
        assert ended.value.code == 2


def test_skip_layer_guidance_reaches_the_pipeline(tiny_sd3: Path, tmp_path: Path) -> None:
    slg = ("--skip_guidance_layers", "1", "--skip_layer_guidance_stop", "1")
    pictures = []
    for name, more in (("plain", ()), ("guided", slg)):
        prompt = ("--prompt", "a star", "--seed", "1", "--num_inference_steps", "4")
        demo.main(parse(*flags_for(tiny_sd3, tmp_path / name, *prompt, *more)))
        pictures.append(Image.open(tmp_path / name / "0000-a_star-seed1.png").tobytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_inference_steps", "5"), "no effect: with 5 steps none lies between"),
        (("--num_inference_steps", "9", "--guidance_scale", "1"), "no effect without guidance"),
        (("--num_inference_steps", "9", "--skip_layer_guidance_scale", "0"), "no effect"),
        (("--num_inference_steps", "9", "--skip_guidance_layers", "4"), "4: the model's layers"),
    ],
)
def test_skip_layer_guidance_that_would_change_nothing_is_refused(
    tiny_sd3: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    layers = () if "--skip_guidance_layers" in flags else ("--skip_guidance_layers", "1")
    args = parse(*flags_for(tiny_sd3, tmp_path), "--prompt", "x", *layers, *flags)
    pipeline = demo.load(args, str(tiny_sd3), (), torch.device("cpu"))[0]
    with pytest.raises(UserError, match="--skip_guidance_layers") as refused:
        demo.draw(pipeline, args.drawing, "x", [0])
    assert message in str(refused.value)


def drawn(pipeline: Any, flags: list[str], seeds: list[int]) -> list[bytes]:
    args = parse(*flags, "--prompt", "x")
    return [picture.tobytes() for picture in demo.draw(pipeline, args.drawing, "x", seeds)]


def test_the_seed_fixes_a_picture_whose_steps_add_noise(tiny_sd3: Path, tmp_path: Path) -> None:
    flags = flags_for(tiny_sd3, tmp_path)
    args = parse(*flags, "--prompt", "x")
    pipeline, _, _ = demo.load(args, str(tiny_sd3), (), torch.device("cpu"))
    plain = drawn(pipeline, flags, [4])
    pipeline.scheduler.register_to_config(stochastic_sampling=True)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = drawn(pipeline, flags, [4, 5])
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's noise has changed
    torch.manual_seed(2)
    assert drawn(pipeline, flags, [5]) + drawn(pipeline, flags, [4]) == first[::-1]
    assert first[0] != plain[0]


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_lora_brings_its_shift_to_any_scheduler_of_a_flow(
    tiny_sd3: Path, adapter: Path, name: str
) -> None:
    kind = getattr(diffusers, name)
    own = kind(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
        tiny_sd3,
        scheduler=own,
        **dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3")),
    )
    scheduler = inference.load_loras(pipeline, [str(adapter)], [1.0])
    assert type(scheduler) is kind
    assert scheduler.config.flow_shift == 7
    assert pipeline.scheduler.config.flow_shift == 3
    scheduler.set_timesteps(2)
    expected = kind.from_config({**own.config, "flow_shift": 7.0})
    expected.set_timesteps(2)
    assert torch.equal(scheduler.sigmas, expected.sigmas)


def test_pictures_are_drawn_again_into_a_folder_of_ours_and_not_into_a_users(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    prompt = ("--prompt", "a star", "--seed", "1")
    for _ in range(2):
        demo.main(parse(*flags_for(tiny_sd3, tmp_path / "out", *prompt)))
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {"0000-a_star-seed1.png", "prompts.json", "manifest.jsonl"}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "prompts.json").write_text('{"a": "list of mine"}')
    with pytest.raises(UserError, match=r"is not empty.*prompts\.json"):
        demo.main(parse(*flags_for(tiny_sd3, mine, *prompt)))
    assert [path.name for path in mine.iterdir()] == ["prompts.json"]


# -- the page ---------------------------------------------------------------------------------


def opened(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    """The page that demo.py would serve."""
    pytest.importorskip("starlette")
    found: list[Any] = []
    monkeypatch.setattr(web, "open_page", lambda what, make, **place: found.append(make()))
    demo.main(parse(*flags))
    return found[0]


def test_the_command_beside_a_picture_draws_it_again(
    tiny_sd3: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--pretrained_model_name_or_path", str(tiny_sd3), "--max_sequence_length", "24")
    page = opened(
        *(monkeypatch, *flags, "--lora_weights_path", str(adapter)),
        *("--web", "--num_inference_steps", "2", "--prompt", "a star"),
    )
    assert page.about["prompts"] == ["a star"]
    odd = "--web \"it's\" 'a' $HOME\n一颗红心"
    body = {"prompt": odd, "seed": 9, "scales": [0.4], "negative_prompt": "-x"}
    page.easel.ask(page.wish(body))
    page.easel._thread.shutdown(wait=True)
    (job,) = page.easel.jobs()
    assert job.state == "done", job.error
    drawn: dict[str, bytes] = {}
    for side, line in job.commands.items():
        words = shlex.split(line)
        assert words[:2] == ["python", "demo.py"]
        out = tmp_path / side
        demo.main(parse(*words[2:], "--output_dir", str(out)))
        (record,) = json.loads((out / "prompts.json").read_text())["pictures"]
        with Image.open(io.BytesIO(job.pictures[side])) as first:
            drawn[side] = first.tobytes()
        assert picture(out / record["file"]).tobytes() == drawn[side]
    assert drawn["base"] != drawn["lora"]


@pytest.mark.parametrize("more", [("--compare",), ("--versus", "y"), ("--port", "70000")])
def test_flags_that_do_not_go_with_the_page_are_refused(more: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        parse("--pretrained_model_name_or_path", "x", "--web", *more)


def test_a_taken_port_is_known_before_the_model_is_loaded() -> None:
    site = pytest.importorskip("dojo.web.site")
    with site.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        flags = ["--pretrained_model_name_or_path", "nothing", "--web", "--port", port]
        with pytest.raises(UserError, match=f"--port {port}"):
            demo.main(parse(*flags))
