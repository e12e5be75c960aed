"""The seven training scripts' small commands, and the models, pictures and prompts that they read.

`tests/kills.py` kills such runs, `tests/compare.py` compares two commits by them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.conftest import make_scenes, make_tiny, rl_flags, run_flags
from tests.scripts.test_train_dpo_sd15 import mine, write_pairs
from tests.scripts.test_train_refl_sd15 import PROMPTS

SCRIPTS = (
    *("full_sd3", "lora_sd3", "dreambooth_lora_sd3", "ddpo_sd3", "grpo_sd3"),
    *("dpo_sd15", "refl_sd15"),
)


def command(script: str, inputs: Path, folder: Path) -> list[str]:
    """The command line of a run that writes everything below `folder`; what follows it wins.

    Scripts for SD1.5 train all weights by it, the others adapters where they can.
    """
    sd3, sd15, scenes = inputs / "tiny-sd3", inputs / "tiny-sd15", inputs / "scenes"
    watched = "--eval_fraction 0.2 --eval_sigmas 2 --validation_inference_steps 2"
    watched = [*watched.split(), "--validation_steps", "4", "--validation_prompt", "a star"]
    adapters = ["--rank", "2"]
    if script in ("ddpo_sd3", "grpo_sd3"):
        flags = rl_flags(folder, sd3)
    elif script.endswith("sd15"):
        flags = run_flags(folder, sd15, inputs / "pairs" if script == "dpo_sd15" else None)
        place = flags.index("--max_sequence_length")
        del flags[place : place + 2]
        flags += ["--validation_steps", "4", "--eval_sample_steps", "2"]
    else:
        data = None if script == "dreambooth_lora_sd3" else scenes
        flags = [*run_flags(folder, sd3, data), *watched]
    flags += {
        "full_sd3": ["--use_ema"],
        "lora_sd3": [*adapters, "--dataloader_num_workers", "1"],
        "dreambooth_lora_sd3": [
            *(*adapters, "--instance_data_dir", str(inputs / "plain")),
            *("--instance_prompt", "a sks star", "--class_prompt", "a star"),
            *("--with_prior_preservation", "--class_data_dir", str(folder / "class")),
            *("--num_class_images", "4", "--sample_batch_size", "1"),
            *("--prior_inference_steps", "2"),
        ],
        "ddpo_sd3": ["--buffer_size", "4", "--buffer_min_count", "2", "--eval_every", "2"],
        "grpo_sd3": ["--eval_every", "2"],
        "dpo_sd15": ["--validation_prompt", "a star"],
        "refl_sd15": [
            *("--prompt_file", str(inputs / "prompts.json"), "--num_eval_prompts", "2"),
            *("--reward", f"{inputs / 'mine.py'}:brightness"),
            *("--sample_steps", "4", "--eval_guidance_scale", "1"),
        ],
    }[script]
    flags += ["--seed", "0", "--max_train_steps", "8", "--checkpointing_steps", "3"]
    return [*flags, "--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest"]


def make_inputs(folder: Path) -> None:
    """Writes what the commands read."""
    folder.mkdir(parents=True)
    for name in ("sd3", "sd15"):
        make_tiny(folder / f"tiny-{name}", name)
    make_scenes(folder / "scenes")
    (folder / "plain").mkdir()
    for path in sorted((folder / "scenes").glob("*.png"))[:4]:
        shutil.copy(path, folder / "plain")
    write_pairs(folder / "pairs", 6)
    rows = [{"id": str(i), "text": text} for i, text in enumerate(PROMPTS)]
    (folder / "prompts.json").write_text(json.dumps(rows))
    mine(folder, "brightness")
