"""Validation: the prompt library, the pictures, the eval loss, the CLIP score, the trackers."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
import yaml
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image

from dojo import evaluate as validation
from dojo import rng
from dojo.cli import UserError
from dojo.data import Draw
from dojo.evaluate import validator as validator_module
from dojo.evaluate.clip import ClipScore
from dojo.evaluate.prompt_file import Entry, parse_size, read_prompts
from dojo.evaluate.validator import log_pictures
from dojo.files import outputs
from dojo.inputs.pictures import EvalSet
from dojo.models import sd3
from dojo.run import optim
from dojo.run import run as training
from tests.conftest import ROOT
from tests.processes import together

SIZE = (64, 64)  # of training
CLIP = ROOT / "models" / "pocket-clip"


# -- stand-ins --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def micro_sd3(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tiny_sd3` with a transformer and an autoencoder that cost next to nothing."""
    folder = tmp_path_factory.mktemp("models") / "micro-sd3"
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_sd3, folder, ignore=weights)
    torch.manual_seed(0)
    config: Any = SD3Transformer2DModel.load_config(folder, subfolder="transformer")
    network: Any = SD3Transformer2DModel.from_config(
        {
            **config,
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "caption_projection_dim": 32,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
        }
    )
    network.save_pretrained(folder / "transformer")
    config = AutoencoderKL.load_config(folder, subfolder="vae")
    vae: Any = AutoencoderKL.from_config(
        {
            **config,
            "block_out_channels": (4, 4, 4, 4),
            "norm_num_groups": 2,
            "layers_per_block": 1,
        }
    )
    vae.save_pretrained(folder / "vae")
    narrow = {"hidden_size": 8, "projection_dim": 8}  # what the transformer reads
    texts = {"text_encoder": narrow, "text_encoder_2": narrow, "text_encoder_3": {"d_model": 16}}
    for part, sizes in texts.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    return folder


class Fixed:
    """What the validator asks of `pictures.Inputs`; a text that was not announced is an error."""

    def __init__(self, config: sd3.Model, texts: Sequence[str], evaluation: Sequence[EvalSet] = ()):
        self.model = config
        self.vae = AutoencoderKL.from_pretrained(config.folder, subfolder="vae").eval()
        self.evaluation = list(evaluation)
        self.texts = set(texts)
        self.tokens = (config.clip_tokens + 24, config.transformer["joint_attention_dim"])
        self.pooled = config.transformer["pooled_projection_dim"]

    def text(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        assert set(captions) <= self.texts, "a text that was not in args.texts"
        return {
            "prompt_embeds": rng.normal(self.tokens, [("rows", text) for text in captions]),
            "pooled_prompt_embeds": rng.normal(
                (self.pooled,), [("pool", text) for text in captions]
            ),
        }

    def posterior(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return batch["mean"].float(), batch["std"].float()

    def geometry(self, batch: dict[str, Any]) -> None:
        return None


def model_of(folder: Path) -> tuple[sd3.Model, torch.nn.Module]:
    config = sd3.open_model(sd3.ModelArgs(pretrained_model_name_or_path=str(folder)))
    network: Any = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    return config, network


def start(folder: Path, report_to: training.Tracker = "none") -> training.Run:
    args = training.RunArgs(output_dir=folder, mixed_precision="no", report_to=(report_to,))
    run = training.start(args, optim.OptimArgs(max_train_steps=1))
    folder.mkdir(parents=True, exist_ok=True)
    run.accelerator.init_trackers("sd-dojo", config={"rank": 4, "name": "x"})
    return run


def validator(
    run: training.Run,
    config: sd3.Model,
    network: Any,
    args: validation.ValidationArgs,
    evaluation: Sequence[EvalSet] = (),
    noise: sd3.NoiseArgs | None = None,
) -> validation.Validator:
    fixed: Any = Fixed(config, [*args.texts, "a caption"], evaluation)
    return validation.Validator(run, fixed, network, noise or sd3.NoiseArgs(), args, SIZE)


def eval_set(
    name: str, sizes: Sequence[tuple[int, int]], value: Callable[[int], float], **more: Any
) -> EvalSet:
    """Pictures of 16 channels whose scaled latents are `value(i)` everywhere."""
    draws = [Draw(i, i, size) for i, size in enumerate(sizes)]
    rows = {}
    for i, draw in enumerate(draws):
        shape = (16, draw.size[0] // 8, draw.size[1] // 8)
        mean = torch.full(shape, value(i) / 1.5305 + 0.0609)  # micro_sd3's factors
        rows[draw] = {"mean": mean, "std": torch.zeros(shape), "caption": "a caption", **more}
    return EvalSet(name, cast(Any, rows), draws)


def args_of(*prompts: str, **more: Any) -> validation.ValidationArgs:
    options = {"validation_prompt": prompts, "validation_inference_steps": 2, **more}
    return validation.ValidationArgs(**options)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def drawn(folder: Path, step: int = 0) -> dict[str, Image.Image]:
    paths = sorted((folder / "validation" / f"step-{step}").iterdir())
    return {path.name: Image.open(path).convert("RGB") for path in paths}


# -- the prompt library -----------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"prompt": "a red star", "name": "star", "width": 48, "height": 32, "seed": 7},
    {"prompt": '一只猫, "two"', "negative": "blurry", "guidance_scale": 4.5},
    {"prompt": "a ring", "size": "32x64", "num_inference_steps": 3},
]
ENTRIES = [
    Entry(prompt="a red star", name="star", size=(32, 48), seed=7),
    Entry(prompt='一只猫, "two"', negative="blurry", guidance_scale=4.5),
    Entry(prompt="a ring", size=(64, 32), num_inference_steps=3),
]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".json", json.dumps(ROWS)),
        (".jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        (".yaml", yaml.safe_dump(ROWS, allow_unicode=True)),
        (".csv", "\ufeff" + as_csv(ROWS)),
    ],
)
def test_every_format_says_the_same(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_text(text, encoding="utf-8")
    assert read_prompts(path) == ENTRIES


def test_a_text_file_is_a_prompt_per_line_and_a_table_names_its_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a star\n\n  一只猫  \n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == [Entry(prompt="a star"), Entry(prompt="一只猫")]
    (tmp_path / "a.txt").write_bytes(
        "a --w 64 --h 32 --d 3 --n b c\nd\u2028e\x85f\x0cg\r\n".encode()
    )
    assert read_prompts(tmp_path / "a.txt") == [
        Entry(prompt="a", negative="b c", size=(32, 64), seed=3),
        Entry(prompt="d\u2028e\x85f\x0cg"),
    ]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl") == [Entry(prompt="a\u2028b")]
    (tmp_path / "a.txt").write_text("a --w 64 --s many\n")
    with pytest.raises(UserError, match="--s many is no int"):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "b.yaml").write_text("night: a star at night\ncat: {prompt: a cat, seed: 3}\n")
    assert read_prompts(tmp_path / "b.yaml") == [
        Entry(prompt="a star at night", name="night"),
        Entry(prompt="a cat", name="cat", seed=3),
    ]
    (tmp_path / "c.json").write_text('["a star", {"prompt": "a cat"}]')
    assert read_prompts(tmp_path / "c.json") == [Entry(prompt="a star"), Entry(prompt="a cat")]


def test_numbers_of_a_table_have_all_their_spellings(tmp_path: Path) -> None:
    header = "prompt,seed,num_inference_steps,guidance_scale\n"
    # As pandas writes whole numbers beside empty cells.
    (tmp_path / "a.csv").write_text(f"{header}a,28.0,2e1,.5\nb,,,\nc,9007199254740993,1,5\n")
    assert read_prompts(tmp_path / "a.csv") == [
        Entry(prompt="a", seed=28, num_inference_steps=20, guidance_scale=0.5),
        Entry(prompt="b"),
        Entry(prompt="c", seed=9007199254740993, num_inference_steps=1, guidance_scale=5.0),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", '{"prompt": "one\u2028two"}\n'), ("a.csv", "prompt\none\u2028two\n")],
)
def test_only_line_feeds_part_rows(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == [Entry(prompt="one\u2028two")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "guidance_scale": "1,5"}, "guidance_scale '1,5' is no number"),
        ({"prompt": "x", "negative_prompt": "y"}, "did you mean 'negative'"),
        ({"prompt": "x", "guidence_scale": 3}, "did you mean 'guidance_scale'"),
        ({"name": "x"}, "it has no prompt"),
        ({"prompt": 1984}, "prompt 1984 is not text"),
        ({"prompt": "x", "seed": 1.5}, "seed 1.5 is no integer"),
        ({"prompt": "x", "seed": True}, "seed True is no integer"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale must be at least 0"),
        ({"prompt": "x", "width": 64}, "give width and height"),
        ({"prompt": "x", "width": 64, "height": 64, "size": "64"}, "give width and height"),
        ({"prompt": "x", "size": "64 by 64"}, "is no size"),
        (17, "neither a prompt nor a table"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_number_and_reason(
    tmp_path: Path, row: object, reason: str
) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(["a star", row]))
    with pytest.raises(UserError, match=r"--validation_prompts_file: .*entry 2: ") as error:
        read_prompts(path)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", "[,"), ("a.yaml", "a: [b"), ("a.csv", "prompt\n"), ("a.txt", "\n"), ("a.tsv", "x")],
)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="--validation_prompts_file"):
        read_prompts(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "missing.json")


def test_a_size_is_width_by_height() -> None:
    assert parse_size("512") == (512, 512)
    assert parse_size("768x512") == parse_size(" 768 × 512 ") == (512, 768)
    for wrong in ("0", "0x64", "64x", "-64", "64x64x64", ""):
        with pytest.raises(ValueError, match="no size"):
            parse_size(wrong)
    with pytest.raises(ValueError, match="--validation_resolution: '64x'"):
        args_of(validation_resolution=("64x",))


def test_the_texts_are_every_prompt_and_negative_once(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps([*ROWS, {"prompt": "a star", "negative": "dark"}]))
    args = args_of("a star", validation_prompts_file=tmp_path / "p.json")
    wanted = ["a star", "a red star", '一只猫, "two"', "a ring", "", "blurry", "dark"]
    assert args.texts == wanted
    assert args_of().texts == []


def test_pictures_are_every_prompt_at_every_size_with_every_seed(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    args = args_of(
        "a/b",
        validation_prompts_file=tmp_path / "p.json",
        validation_resolution=("64", "64x32", "64x64"),
        num_validation_images=2,
        validation_seed=5,
    )
    pictures = args.pictures(SIZE)
    assert [picture.file for picture in pictures] == [
        "00-a_b-seed5.png",
        "00-a_b-seed6.png",
        "00-a_b-64x32-seed5.png",
        "00-a_b-64x32-seed6.png",
        "01-star-48x32-seed7.png",
        "01-star-48x32-seed8.png",
        "02-一只猫_two-seed5.png",
        "02-一只猫_two-seed6.png",
        "02-一只猫_two-64x32-seed5.png",
        "02-一只猫_two-64x32-seed6.png",
        "03-a_ring-32x64-seed5.png",
        "03-a_ring-32x64-seed6.png",
    ]
    assert (pictures[2].height, pictures[2].width) == (32, 64)
    assert [picture.negative for picture in pictures[6:8]] == ["blurry", "blurry"]
    assert [picture.guidance_scale for picture in pictures[5:7]] == [5.0, 4.5]
    assert [picture.num_inference_steps for picture in pictures[-3:]] == [2, 3, 3]


def test_file_names_are_safe_and_differ_whatever_the_prompts(tmp_path: Path) -> None:
    prompts = ["../../etc/passwd", "", "猫" * 500, "\U00020000" * 500, 'a\\b:c*?"<>|\n', "x", "x"]
    names = [picture.file for picture in args_of(*prompts, validation_seed=2**62).pictures((1, 1))]
    assert len(set(names)) == len(prompts)
    for name in names:
        (tmp_path / name).write_text("")  # at most 255 bytes, no folder
        assert not set(name) & set('/\\:*?"<>|\n')
    assert len(list(tmp_path.iterdir())) == len(prompts)


# -- what the model cannot do -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"validation_resolution": ("60",)},
            "--validation_resolution 60x60: height 60 is not a multiple of",
        ),
        ({"validation_resolution": ("64x100000",)}, "larger than this model's positions"),
        ({"validation_skip_guidance_layers": (0, 99)}, "--validation_skip_guidance_layers 99"),
        ({"validation_skip_guidance_layers": (-1,)}, "--validation_skip_guidance_layers -1"),
        (
            {"validation_skip_guidance_layers": (1,), "validation_inference_steps": 5},
            "--validation_skip_guidance_layers has no effect: with 5 steps none lies between",
        ),
        ({"validation_clip_model": "models/none"}, "--validation_clip_model: models/none"),
    ],
)
def test_what_the_model_cannot_do_is_refused_at_the_start(
    micro_sd3: Path, options: dict[str, Any], reason: str
) -> None:
    config, _ = model_of(micro_sd3)
    with pytest.raises(UserError) as error:
        args_of("a star", **options).check(config)
    assert reason in str(error.value)
    assert "--height" not in str(error.value)


def test_another_model_is_no_clip_and_skipping_layers_needs_guidance(micro_sd3: Path) -> None:
    config, _ = model_of(micro_sd3)
    other = str(micro_sd3 / "text_encoder_3")
    with pytest.raises(UserError, match="is a t5, no CLIP"):
        args_of("a star", validation_clip_model=other).check(config)
    with pytest.raises(ValueError, match="needs --validation_guidance_scale above 1"):
        args_of(validation_skip_guidance_layers=(1,), validation_guidance_scale=1)
    args_of("a star", validation_clip_model=str(CLIP)).check(config)


# -- pictures ---------------------------------------------------------------------------------


def test_pictures_are_those_of_the_plain_pipeline(tmp_path: Path, micro_sd3: Path) -> None:
    rows = [{"prompt": "a ring", "negative": "blurry", "size": "48x32", "seed": 9}]
    rows[0] |= {"guidance_scale": 2.0, "num_inference_steps": 12}
    (tmp_path / "p.json").write_text(json.dumps(rows))
    args = args_of(
        "a star",
        validation_prompts_file=tmp_path / "p.json",
        validation_skip_guidance_layers=(1, 2),
        validation_skip_layer_guidance_scale=3.5,
        validation_skip_layer_guidance_stop=0.5,
    )
    config, network = model_of(micro_sd3)
    run = start(tmp_path / "run")
    watch = validator(run, config, network, args)
    watch()
    found = drawn(run.output_dir)
    absent: Any = None
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
        micro_sd3,
        transformer=network.eval(),
        **{
            f"{part}{i}": absent for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")
        },
    )
    pipeline.set_progress_bar_config(disable=True)
    for name, prompt, negative, size, seed, scale, steps in (
        ("00-a_star-seed0.png", "a star", "", (64, 64), 0, 5.0, 2),
        ("01-a_ring-48x32-seed9.png", "a ring", "blurry", (32, 48), 9, 2.0, 12),
    ):
        embeds = {
            **watch.inputs.text([prompt]),
            **{f"negative_{k}": v for k, v in watch.inputs.text([negative]).items()},
        }
        common = {
            **embeds,
            "height": size[0],
            "width": size[1],
            "num_inference_steps": steps,
            "guidance_scale": scale,
        }
        skip = {"skip_guidance_layers": [1, 2], "skip_layer_guidance_scale": 3.5}
        skip |= {"skip_layer_guidance_stop": 0.5}
        expected = pipeline(**common, **skip, generator=torch.Generator().manual_seed(seed)).images[
            0
        ]
        assert found[name].size == (size[1], size[0])
        assert found[name].tobytes() == expected.tobytes()
        plain = pipeline(**common, generator=torch.Generator().manual_seed(seed)).images[0]
        # Of two steps none lies strictly between 0.01 and 0.5 of the way, of twelve steps five do.
        assert (plain.tobytes() == expected.tobytes()) == (steps == 2)


@pytest.mark.parametrize("owned", [False, True])
def test_weights_whose_memory_something_counts_on_stay_where_they_are(
    tmp_path: Path, micro_sd3: Path, monkeypatch: pytest.MonkeyPatch, owned: bool
) -> None:
    left: list[object] = []

    @contextmanager
    def away(network: object, device: torch.device) -> Iterator[None]:
        left.append(network)
        yield

    monkeypatch.setattr(validator_module.residence, "away", away)
    config, network = model_of(micro_sd3)
    run = start(tmp_path)
    run.replicas.owns_storage = owned
    validator(run, config, network, args_of("a star"))()
    assert left == ([] if owned else [network])
    assert len(drawn(tmp_path)) == 1


def test_watching_changes_nothing_and_loads_no_text_encoder(
    tmp_path: Path, micro_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, network = model_of(micro_sd3)
    network.train()
    run = start(tmp_path / "run")
    sets = [eval_set("eval", [SIZE], lambda i: 0.5)]
    watch = validator(run, config, network, args_of("a star", "一只猫"), sets)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded during validation")

    monkeypatch.setattr(sd3.Model, "load_text", refuse)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "from_pretrained", refuse)
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", refuse)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    watch()
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training
    assert all(param.grad is None for param in network.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())

    first = {name: picture.tobytes() for name, picture in drawn(run.output_dir).items()}
    folder = run.output_dir / "validation" / "step-0"
    mine = folder / "mine.png"
    for stale in (outputs.own(folder / "99-of_a_branch_that_was_left.png"), mine):
        Image.new("RGB", (8, 8)).save(stale)
    watch()
    mine.unlink()  # a user's own stayed
    again = {name: picture.tobytes() for name, picture in drawn(run.output_dir).items()}
    assert first == again
    assert set(first) == {"00-a_star-seed0.png", "01-一只猫-seed0.png"}
    with torch.no_grad():
        for param in network.parameters():
            param.mul_(1.1)
    run.step = 1
    watch()
    other = drawn(run.output_dir, 1)
    assert all(other[name].tobytes() != first[name] for name in first)


def test_the_contact_sheet_has_a_row_per_picture_and_a_column_per_step(
    tmp_path: Path, micro_sd3: Path
) -> None:
    config, network = model_of(micro_sd3)
    run = start(tmp_path / "run")
    watch = validator(
        run, config, network, args_of("a star", "一只猫", validation_inference_steps=1)
    )
    for step in (0, 1):
        run.step = step
        watch()
    watch.finish()
    sheet = Image.open(run.output_dir / "contact_sheet.png").convert("RGB")
    assert sheet.size == (170 + 2 * 198, 26 + 2 * 198)
    picture = drawn(run.output_dir, 1)["01-一只猫-seed0.png"]
    box = sheet.crop((170 + 198, 26 + 198, 170 + 198 + 192, 26 + 198 + 192))
    assert box.tobytes() == picture.resize((192, 192), Image.Resampling.NEAREST).tobytes()
    record = json.loads((run.output_dir / "validation" / "prompts.json").read_text("utf-8"))
    assert [row["prompt"] for row in record["pictures"]] == ["a star", "一只猫"]


def test_without_prompts_and_pictures_nothing_is_written(tmp_path: Path, micro_sd3: Path) -> None:
    config, network = model_of(micro_sd3)
    run = start(tmp_path / "run")
    watch = validator(run, config, network, args_of(validation_clip_model="models/never-read"))
    watch()
    watch.finish()
    assert {path.name for path in run.output_dir.iterdir()} == {"manifest.jsonl", ".lock"}


# -- CLIP score -------------------------------------------------------------------------------


def scenes_of(count: int) -> dict[str, Image.Image]:
    """Captions with the pictures that they describe."""
    from dojo.pocket import scenes

    found, generator = {}, random.Random(3)
    while len(found) < count:
        caption, scene = scenes.sample(generator)
        found[caption] = Image.fromarray(scenes.draw(scene))
    return found


def test_the_clip_score_is_the_mean_cosine_of_pictures_and_prompts(
    tmp_path: Path, micro_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, network = model_of(micro_sd3)
    run = start(tmp_path / "run")
    pictures = scenes_of(3)
    first = next(iter(pictures))
    pictures["and " * 100 + first] = pictures[first]  # more than CLIP reads
    args = args_of(*pictures, validation_clip_model=str(CLIP))
    watch = validator(run, config, network, args)
    monkeypatch.setattr(watch, "_draw", lambda _, picture: pictures[picture.prompt])
    monkeypatch.setattr(watch, "_decoded", lambda picture: picture)
    watch()
    model: Any = transformers.CLIPModel.from_pretrained(CLIP)
    processor: Any = transformers.CLIPProcessor.from_pretrained(CLIP)
    scores = []
    for picture in args.pictures(SIZE):
        image = drawn(run.output_dir)[picture.file]
        inputs = processor(
            images=image, text=picture.prompt, return_tensors="pt", truncation=True, max_length=20
        )
        with torch.no_grad():
            logits = model(**inputs).logits_per_image  # the cosine times a learned scale
            scores.append(max(0.0, 100 * float(logits / model.logit_scale.exp())))
    assert min(scores[:3]) > 20
    assert metrics(run.output_dir)[0]["clip_score"] == pytest.approx(sum(scores) / 4, rel=1e-5)


def test_the_clip_score_prefers_the_right_prompt_and_is_never_negative() -> None:
    pictures = scenes_of(8)
    score = ClipScore(str(CLIP), torch.device("cpu"))
    right = score(list(pictures.values()), list(pictures))
    wrong = score(list(pictures.values()), [*list(pictures)[1:], *list(pictures)[:1]])
    assert sum(right) > 1.5 * sum(wrong)
    assert all(0 <= value <= 100 for value in right + wrong)
    with torch.no_grad():
        score.model.text_projection.weight.neg_()
    assert score(list(pictures.values()), list(pictures)) == [0.0] * 8


# -- eval loss --------------------------------------------------------------------------------


class Away(torch.nn.Module):
    """Predicts noise + sigma where the latents are zero, so that the error is sigma squared."""

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor]:
        sigma = (timestep / 1000).view(-1, 1, 1, 1)
        return (hidden_states / sigma + sigma,)


@pytest.mark.parametrize("scheme", ["none", "mode", "logit_normal"])
def test_the_strata_go_from_the_least_noise_to_the_most(
    tmp_path: Path, micro_sd3: Path, scheme: Any
) -> None:
    config, _ = model_of(micro_sd3)
    run = start(tmp_path / "run")
    noise = sd3.NoiseArgs(weighting_scheme=scheme, flow_shift=1.0)
    sets = [eval_set("eval", [SIZE] * 40, lambda i: 0.0)]
    validator(run, config, Away(), args_of(eval_sigmas=5), sets, noise)()
    (row,) = metrics(run.output_dir)
    strata = [row[f"eval_loss_sigma_{k}"] for k in range(1, 6)]
    assert strata == sorted(strata)
    assert row["eval_loss"] == pytest.approx(sum(strata) / 5, rel=1e-9)
    assert "eval_loss_sigma_6" not in row
    assert "train_eval_loss" not in row
    if scheme == "none":  # sigma squared of a uniform sigma, per fifth and in all
        for k, value in enumerate(strata):
            assert (k / 5) ** 2 < value < ((k + 1) / 5) ** 2
        assert row["eval_loss"] == pytest.approx(1 / 3, abs=0.01)


class Zero(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (torch.zeros_like(hidden_states),)


def test_the_eval_loss_is_the_velocitys_mean_square_for_a_network_that_says_zero(
    tmp_path: Path, micro_sd3: Path
) -> None:
    config, _ = model_of(micro_sd3)
    run = start(tmp_path / "run")
    sizes = [(64, 64), (32, 64), (64, 32), (96, 64)]  # as aspect buckets give them
    sets = [
        eval_set("eval", sizes, lambda i: 2.0),
        eval_set("train", sizes, lambda i: 1.0, mask=torch.zeros(1, 8, 8), weight=torch.zeros(())),
    ]
    validator(run, config, Zero(), args_of(), sets)()
    (row,) = metrics(run.output_dir)
    # E (eps - x)^2 = 1 + x^2; 16 channels of 32 to 96 places, four draws each.
    assert row["eval_loss"] == pytest.approx(1 + 4, rel=0.02)
    assert row["train_eval_loss"] == pytest.approx(1 + 1, rel=0.02)
    assert row["eval_gap"] == row["eval_loss"] - row["train_eval_loss"]


def test_equal_pictures_have_no_gap_and_masks_do_not_count(tmp_path: Path, micro_sd3: Path) -> None:
    config, network = model_of(micro_sd3)
    run = start(tmp_path / "run")
    sizes = [(64, 64), (32, 64)]
    sets = [
        eval_set("eval", sizes, lambda i: float(i)),
        eval_set("train", sizes, lambda i: float(i), mask=torch.zeros(1, 8, 8)),
    ]
    watch = validator(run, config, network, args_of(), sets)
    watch()
    watch()
    first, second = metrics(run.output_dir)
    assert first["eval_gap"] == 0
    assert first == second


def test_with_auto_shift_each_size_is_measured_at_its_own_density(
    tmp_path: Path, micro_sd3: Path
) -> None:
    config, _ = model_of(micro_sd3)
    run = start(tmp_path / "run")
    rows = []
    for size in ((32, 32), (128, 128)):
        sets = [eval_set("eval", [size] * 20, lambda i: 0.0)]
        noise = sd3.NoiseArgs(flow_shift="auto")
        validator(run, config, Away(), args_of(), sets, noise)()
        rows.append(metrics(run.output_dir)[-1]["eval_loss"])
    assert rows[1] > 1.2 * rows[0]  # more pixels, more noise


# -- processes --------------------------------------------------------------------------------


def watch_all(folder: Path, model: Path) -> None:
    """One validation with everything, on a single thread: as many bits on any number of cores."""
    torch.set_num_threads(1)
    config, network = model_of(model)
    run = start(folder)
    network = run.accelerator.prepare(network)
    sizes = [(64, 64), (32, 64), (64, 64)]
    sets = [eval_set(name, sizes, lambda i: i / 2) for name in ("eval", "train")]
    args = args_of("a star", "a ring", "x", validation_clip_model=str(CLIP))
    watch = validator(run, config, network, args, sets)
    watch()
    watch.finish()
    print("processes", run.accelerator.num_processes)


def test_two_processes_give_the_same_pictures_and_numbers_as_one(
    tmp_path: Path, micro_sd3: Path
) -> None:
    work = (tmp_path / "2", micro_sd3)
    code, said = together(watch_all, work, tmp_path / "log", processes=2)
    assert code == 0, said
    assert said.count("processes 2") == 2
    threads = torch.get_num_threads()
    watch_all(tmp_path / "1", micro_sd3)
    torch.set_num_threads(threads)
    one, two = tmp_path / "1", tmp_path / "2"
    assert metrics(one) == metrics(two)  # bit for bit
    assert {"eval_loss", "train_eval_loss", "eval_gap", "clip_score"} <= metrics(one)[0].keys()
    assert len(drawn(one)) == 3
    for name, picture in drawn(one).items():
        assert picture.tobytes() == drawn(two)[name].tobytes()
    assert (one / "contact_sheet.png").read_bytes() == (two / "contact_sheet.png").read_bytes()


# -- trackers ---------------------------------------------------------------------------------


def watch_with(tracker: training.Tracker, folder: Path, model: Path) -> None:
    """Two validations between logged steps, two sizes, a prompt in Chinese, for real."""
    config, network = model_of(model)
    run = start(folder, cast(Any, tracker))
    args = args_of("a star", "一只/猫", validation_resolution=("64", "48x32"))
    sets = [eval_set("eval", [SIZE], lambda i: 0.5)]
    watch = validator(run, config, network, args, sets)
    for step in (0, 1, 2):
        run.step = step
        if step:
            run.write_metrics({"loss": 1 / step, "lr": 1e-4})
        if step != 1:
            watch()
    run.accelerator.end_training()


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets of this process connect to no address of a network."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"a connection to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_tensorboard_gets_every_picture_in_its_own_size(tmp_path: Path, micro_sd3: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch_with("tensorboard", tmp_path / "run", micro_sd3)
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "sd-dojo"))
    events.Reload()
    assert set(events.Tags()["images"]) == {
        "validation/00-a_star-seed0",
        "validation/00-a_star-48x32-seed0",
        "validation/01-一只_猫-seed0",
        "validation/01-一只_猫-48x32-seed0",
    }
    seen = events.Images("validation/01-一只_猫-48x32-seed0")
    assert [(image.step, image.width, image.height) for image in seen] == [(0, 48, 32), (2, 48, 32)]
    assert [event.step for event in events.Scalars("eval_loss")] == [0, 2]
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_two_evaluations_of_one_step_do_not_overwrite_each_others_pictures(tmp_path: Path) -> None:
    sent: dict[str, Any] = {}

    class Tracker:
        name = "mine"

        def log_images(self, values: dict[str, Any], *, step: int) -> None:
            assert not sent.keys() & values.keys()
            sent.update(values)

    run: Any = SimpleNamespace(accelerator=SimpleNamespace(trackers=[Tracker()]), step=3)
    for name in ("validation", "validation-guided"):
        folder = tmp_path / name / "step-3"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "00-cat.png")
        log_pictures(run, folder)
    assert set(sent) == {"validation/00-cat", "validation-guided/00-cat"}


def test_mlflow_gets_pictures_as_files(tmp_path: Path) -> None:
    sent: list[tuple[str, str]] = []
    tracker = SimpleNamespace(name="mlflow", log_artifact=lambda *words: sent.append(words))
    run: Any = SimpleNamespace(accelerator=SimpleNamespace(trackers=[tracker]), step=3)
    folder = tmp_path / "validation" / "step-3"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "00-cat.png")
    log_pictures(run, folder)
    assert sent == [(str(folder / "00-cat.png"), "validation/step-3")]


def test_wandb_offline_takes_pictures_and_numbers(
    tmp_path: Path, micro_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    no_network(monkeypatch)
    watch_with("wandb", tmp_path / "run", micro_sd3)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    files = sorted((folder / "files" / "media" / "images" / "validation").iterdir())
    sizes = sorted(Image.open(file).size for file in files)
    assert sizes == [(48, 32)] * 4 + [(64, 64)] * 4
    (log,) = folder.glob("*.wandb")
    content = log.read_bytes()
    assert b"eval_loss_sigma_1" in content
    assert "validation/01-一只_猫-seed0".encode() in content


def test_swanlab_offline_takes_pictures_and_numbers(
    tmp_path: Path, micro_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_LOGDIR", str(tmp_path / "swanlog"))
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "swanlab"))
    no_network(monkeypatch)
    watch_with("swanlab", tmp_path / "run", micro_sd3)
    (folder,) = (tmp_path / "swanlog").glob("run-*")
    sizes = sorted(Image.open(file).size for file in (folder / "media" / "image").iterdir())
    assert sizes == [(48, 32)] * 4 + [(64, 64)] * 4
    content = b"".join(path.read_bytes() for path in folder.glob("*.swanlab"))
    assert b"eval_loss_sigma_1" in content
