"""Small runs of every training script: their commands, what they read, how two are compared.

A new script is one row of `SCRIPTS`. `tests/scripts/test_every_script.py` holds the claims about
every row, `tests/kills.py` kills such runs, `tests/compare.py` compares two commits by them.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib
import json
import random
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dojo.finetune import lora
from dojo.pocket import scenes
from tests.conftest import make_scenes, make_tiny, reset_accelerate, rl_flags, run_flags

# -- what they read -----------------------------------------------------------------------------

PROMPTS = [f"a {color} {shape}" for color in ("red", "blue") for shape in ("star", "ring", "cross")]

# Rewards of a user's own. What they are asked is written down beside the file.
MINE = """
import os
import torch

def told(images):
    with open(__file__ + ".log", "a") as file:
        print(len(images), file=file)

def brightness(images, prompts, metadata):
    told(images)
    return images.mean(dim=(1, 2, 3))

def darkness(images, prompts, metadata):
    told(images)
    return -images.mean(dim=(1, 2, 3))

def never(images, prompts, metadata):
    return brightness(images, prompts, metadata) * torch.nan

def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 2].mean(dim=(1, 2))

def every_other(images, prompts, metadata):
    there = torch.arange(len(images)) % 2 == 1
    return torch.where(there, brightness(images, prompts, metadata), torch.nan)

def first_only(images, prompts, metadata):
    there = torch.arange(len(images)) == 0
    return torch.where(there, brightness(images, prompts, metadata), torch.nan)

def only_process_0(images, prompts, metadata):
    scores = brightness(images, prompts, metadata)
    return scores if os.environ.get("RANK", "0") == "0" else scores * torch.nan

for function in (brightness, darkness, never, redness, every_other, first_only, only_process_0):
    function.differentiable = True
"""


def mine(folder: Path, function: str) -> str:
    """The text of a reward that is a function in a file of this folder."""
    file = folder / "mine.py"
    folder.mkdir(exist_ok=True, parents=True)
    if not file.exists():
        file.write_text(MINE)
    return f"{file}:{function}"


def asked(folder: Path) -> int:
    """Pictures that rewards in this folder have been asked about."""
    log = folder / "mine.py.log"
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def breaking(folder: Path, at_call: int, how: str) -> str:
    """The text of a reward that goes wrong at the so-many-th call."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "breaks.py").write_text(
        f"import itertools, sys\ncalls = itertools.count(1)\n"
        f"def score(images, prompts, metadata):\n"
        f"    if next(calls) == {at_call}:\n        {how}\n"
        f"    return images.mean(dim=(1, 2, 3))\nscore.differentiable = True\n"
    )
    return f"{folder}/breaks.py:score"


def write_pairs(folder: Path, count: int, *, swapped: bool = False, alike: bool = False) -> Path:
    """Scenes on white that are preferred to the same ones on black, with captions that differ.

    Args:
        swapped: the black ones are preferred.
        alike: both pictures of a pair have the same pixels, in two files.
    """
    folder.mkdir(parents=True)
    rng = random.Random(0)
    drawn: dict[str, scenes.Scene] = {}
    while len(drawn) < count:
        drawn.setdefault(*scenes.sample(rng, "position"))
    rows = []
    for i, (caption, scene) in enumerate(drawn.items()):
        files = [f"{i}-{name}.png" for name in ("white", "black")]
        for file, background in zip(files, ("white", "white" if alike else "black"), strict=True):
            picture = scenes.draw(dataclasses.replace(scene, background=background))
            Image.fromarray(picture).save(folder / file)
        first, second = files if i % 2 else files[::-1]
        label = i % 2 if not swapped else 1 - i % 2
        row = {"image_0": first, "image_1": second, "label_0": label, "caption": caption}
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def make_inputs(folder: Path) -> None:
    """Writes what the commands read."""
    folder.mkdir(parents=True)
    for name in sorted({script.family for script in SCRIPTS.values()}):
        make_tiny(folder / f"tiny-{name}", name)
    make_scenes(folder / "scenes")
    (folder / "plain").mkdir()
    for path in sorted((folder / "scenes").glob("*.png"))[:4]:
        shutil.copy(path, folder / "plain")
    write_pairs(folder / "pairs", 6)
    rows = [{"id": str(i), "text": text} for i, text in enumerate(PROMPTS)]
    (folder / "prompts.json").write_text(json.dumps(rows))
    mine(folder, "brightness")


# -- their commands -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """A training script and its small command."""

    name: str
    """the method and the family, as in train_NAME.py"""
    kind: Kind
    own: str = ""
    """what its command adds; {inputs} and {folder} are what `make_inputs` wrote and the run's"""
    near: float = 2e-3
    """how far two runs may differ that are equal but for rounding"""
    slow: bool = False
    """what is claimed of it by running is left to the slow tests: its sibling runs, and its own
    file has fast ones"""

    @property
    def family(self) -> str:
        return self.name.rpartition("_")[2]

    @property
    def file(self) -> str:
        return f"train_{self.name}.py"

    def load(self) -> ModuleType:
        return importlib.import_module(f"train_{self.name}")

    def flags(self, inputs: Path, folder: Path) -> list[str]:
        """The command line of a run that writes everything below `folder`; what follows wins."""
        base, more = self.kind(folder, inputs / f"tiny-{self.family}", inputs)
        words = shlex.split(f"{more} {self.own} {_LENGTH}")
        return [*base, *(word.format(inputs=inputs, folder=folder) for word in words)]


Kind = Callable[[Path, Path, Path], tuple[list[str], str]]
"""Of the run's folder, the model's and that of the inputs: flags, and more of them as text."""

_LENGTH = "--seed 0 --max_train_steps 8 --checkpointing_steps 3 --checkpoints_total_limit 2"
_LENGTH += " --resume_from_checkpoint latest"
_WATCHED = "--eval_fraction 0.2 --eval_sigmas 2 --validation_inference_steps 2"
_WATCHED += " --validation_steps 4 --validation_prompt 'a star'"


def family_flags(folder: Path, model: Path, data: Path | None) -> list[str]:
    """The command line of a small run, without an option that only SD3 has."""
    flags = run_flags(folder, model, data)
    if "sd3" not in model.name:
        place = flags.index("--max_sequence_length")
        del flags[place : place + 2]
    return flags


def pictures(folder: Path, model: Path, inputs: Path) -> tuple[list[str], str]:
    """Learns captioned pictures."""
    return family_flags(folder, model, inputs / "scenes"), _WATCHED


def word(folder: Path, model: Path, inputs: Path) -> tuple[list[str], str]:
    """Learns a word from pictures that all have it in their caption."""
    own = " --new_tokens '<thing>:2' --instance_prompt 'a <thing>' --learning_rate 1e-2"
    return family_flags(folder, model, inputs / "scenes"), _WATCHED + own


def subject(folder: Path, model: Path, inputs: Path) -> tuple[list[str], str]:
    """Learns a subject, and keeps its class."""
    own = """
        --instance_data_dir {inputs}/plain --instance_prompt 'a sks star' --class_prompt 'a star'
        --with_prior_preservation --class_data_dir {folder}/class --num_class_images 4
        --sample_batch_size 1 --prior_inference_steps 2"""
    return family_flags(folder, model, None), _WATCHED + own


def pairs(folder: Path, model: Path, inputs: Path) -> tuple[list[str], str]:
    """Learns what is preferred."""
    own = "--validation_steps 4 --eval_sample_steps 2 --validation_prompt 'a star'"
    return family_flags(folder, model, inputs / "pairs"), own


def rewards(folder: Path, model: Path, inputs: Path) -> tuple[list[str], str]:
    """Follows the gradient of a reward."""
    own = """
        --validation_steps 4 --eval_sample_steps 2 --prompt_file {inputs}/prompts.json
        --num_eval_prompts 2 --reward {inputs}/mine.py:brightness --sample_steps 4
        --eval_guidance_scale 1"""
    return family_flags(folder, model, None), own


def policy(folder: Path, model: Path, inputs: Path) -> tuple[list[str], str]:
    """Draws, is scored, and learns from both."""
    return policy_flags(folder, model), "--eval_every 2 --reward {inputs}/mine.py:brightness"


def policy_flags(folder: Path, model: Path) -> list[str]:
    """The command line of a small reinforcement learning, without what only SD3's scripts read."""
    flags = rl_flags(folder, model)
    return (
        flags if "sd3" in model.name else without(flags, "--max_sequence_length", "--window_size")
    )


def finished(folder: Path, model: Path, inputs: Path) -> tuple[list[str], str]:
    """Draws, is scored, and learns from what came out; no step of the way is trained."""
    flags, more = policy(folder, model, inputs)
    return without(flags, "--window_size", "--clip_range"), f"{more} --num_train_timesteps 2"


def without(flags: list[str], *names: str) -> list[str]:
    """The same words without some flags and their one value each."""
    places = [flags.index(name) for name in names]
    return [word for i, word in enumerate(flags) if i not in places and i - 1 not in places]


SCRIPTS: dict[str, Script] = {
    script.name: script
    for script in (
        Script("full_sd3", pictures, "--use_ema", near=1e-4),
        Script("lora_sd3", pictures, "--rank 2 --dataloader_num_workers 1", near=1e-4),
        Script("dreambooth_lora_sd3", subject, "--rank 2", near=1e-3),
        Script("ddpo_sd3", policy, "--buffer_size 4 --buffer_min_count 2"),
        Script("grpo_sd3", policy, "--use_ema --beta 0.01"),
        Script("nft_sd3", finished, "--use_ema --old_decay_ramp 0.2"),
        Script("refl_sd3", rewards, "--rank 2 --use_ema --pretrain_data_dir {inputs}/scenes"),
        Script("dpo_sd15", pairs, "--use_ema --beta_dpo 500 --proportion_empty_prompts 0.3"),
        Script("refl_sd15", rewards, "--use_ema --pretrain_data_dir {inputs}/scenes"),
        Script("full_sd15", pictures, "--use_ema --snr_gamma 5 --noise_offset 0.1", near=1e-4),
        Script("lora_sd15", pictures, "--rank 2 --debiased_estimation --clip_skip 1", near=1e-4),
        Script("dreambooth_lora_sd15", subject, "--rank 2 --train_text_encoder", near=1e-3),
        Script("full_sdxl", pictures, "--input_perturbation 0.1 --loss_type huber", near=1e-4),
        Script("lora_sdxl", pictures, "--rank 2 --use_ema --caption_dropout 0.3", near=1e-4),
        Script("dreambooth_lora_sdxl", subject, "--rank 2 --train_text_encoder", near=1e-3),
        Script("lora_kolors", pictures, "--rank 2 --caption_dropout 0.3", near=1e-4),
        Script("lora_hunyuandit", pictures, "--rank 2 --caption_dropout 0.3", near=1e-4),
        Script("dreambooth_lora_kolors", subject, "--rank 2", near=1e-3, slow=True),
        Script("dreambooth_lora_hunyuandit", subject, "--rank 2", near=1e-3, slow=True),
        Script("textual_inversion_sd15", word, "--use_ema", near=1e-3, slow=True),
        Script("textual_inversion_sdxl", word, "--keep_token_norm", near=1e-3, slow=True),
        Script("textual_inversion_sd3", word, "--initializer_token star", near=1e-3, slow=True),
        Script("dpo_sdxl", pairs, "--use_ema --beta_dpo 500"),
        Script("dpo_sd3", pairs, "--use_ema --beta_dpo 500 --learning_rate 1e-2", near=1e-2),
        Script("refl_sdxl", rewards, "--finetune lora --rank 2 --guidance_scale 2"),
        Script("ddpo_sd15", policy, "--buffer_size 4 --buffer_min_count 2 --use_ema"),
        Script("ddpo_sdxl", policy, "--baseline group --train_timesteps window --window_size 2"),
    )
}


# -- running and comparing ----------------------------------------------------------------------


def in_process(script: ModuleType, flags: list[str]) -> None:
    """Runs a script in this process, as one that was started anew."""
    reset_accelerate()
    script.main(script.cli.parse(script.Args, None, flags))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are tiny, and threads that wait for busy cores would take seconds.

    And a run in this process ends with the bits of one in a process of its own.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def counted_rows(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Forward passes of the SD3 that is trained, as they are made; one that is trained is three."""
    counted: list[float] = []
    forward = SD3Transformer2DModel.forward

    def seen(self: Any, hidden_states: Tensor, *given: Any, **more: Any) -> Any:
        if hidden_states.device.type != "meta":  # where the cost is counted
            counted.append(len(hidden_states) * (3 if torch.is_grad_enabled() else 1))
        return forward(self, hidden_states, *given, **more)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", seen)
    return counted


def timeless(folder: Path) -> list[dict[str, float]]:
    """The rows without what a clock or the memory says."""
    apart = ("images_per_s", "seconds_", "eta_s", "memory_gib", "mfu")
    return [
        {name: value for name, value in row.items() if not name.startswith(apart)}
        for row in metrics(folder)
    ]


def steps(folder: Path) -> list[dict[str, float]]:
    """The rows of training."""
    return [row for row in metrics(folder) if "loss" in row]


def with_loss(folder: Path) -> list[dict[str, float]]:
    """The rows of evaluations by a loss."""
    return [row for row in metrics(folder) if "eval_loss" in row]


def with_reward(folder: Path) -> list[dict[str, float]]:
    """The rows of evaluations by a reward."""
    return [row for row in metrics(folder) if "eval_reward" in row]


def scores(folder: Path, step: int) -> list[dict[str, str]]:
    path = folder / "validation" / f"step-{step}" / "scores.csv"
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / lora.WEIGHTS)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / lora.WEIGHTS).read_bytes()


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def files(folder: Path) -> dict[Path, int]:
    """Every file, and when it was written last."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def ended_with(folder: Path) -> dict[str, object]:
    """What a finished run is compared by: to the bit, but for times."""
    run = folder / "run"
    finished = (run / "finished.json").read_text()
    last = f"checkpoint-{json.loads(finished)['step']}"
    hashes = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("run/**/*.safetensors", "run/validation/**/*.png", "class/*.png")
        for path in sorted(folder.glob(pattern))
        # A signal keeps a step of its own, which puts an older checkpoint out: the last one counts.
        if not path.relative_to(folder).parts[1].startswith("checkpoint-")
        or path.relative_to(folder).parts[1] == last
    }
    return {"finished": finished, "rows": timeless(run), "files": hashes}


def agree(script: Script, one: Path, other: Path) -> None:
    """Two runs of a script tell the same, but for rounding."""
    for row, again in zip(timeless(one), timeless(other), strict=True):
        assert row.keys() == again.keys()
        for name, value in row.items():
            close = pytest.approx(value, rel=script.near, abs=_least(script, name))
            assert again[name] == close, (row["step"], name, value, again[name])
    for step in {int(row["step"]) for row in with_reward(one)}:
        for row, again in zip(scores(one, step), scores(other, step), strict=True):
            assert (row["file"], row["prompt"]) == (again["file"], again["prompt"])
            assert float(row["reward"]) == pytest.approx(float(again["reward"]), rel=1e-3)


def _least(script: Script, name: str) -> float:
    """What counts as nothing: what is near 0 has no relative error."""
    if script.kind is not policy:
        return 1e-5
    return 1e-4 if "ratio" in name or name in ("approx_kl", "loss") else 1e-6


def draw(pipeline: Any, prompt: str = "a star") -> Tensor:
    """One picture, of the same seed each time."""
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    options |= {"height": 64, "width": 64}
    if hasattr(pipeline, "text_encoder_3"):
        options["max_sequence_length"] = 24
    if type(pipeline).__name__.startswith("HunyuanDiT"):
        options["use_resolution_binning"] = False  # or it draws 1024 px
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), **options).images
