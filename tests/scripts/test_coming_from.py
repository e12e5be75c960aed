"""Every training command of ours on the page for those who come from other trainers does run."""

import importlib
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT, make_tiny
from tests.scripts import runs
from tests.scripts.test_readme import commands, options, text_of, words_of

PAGE = "docs/coming_from.md"
TRAINERS = ("DiffSynth", "Diffusion-DPO", "SimpleTuner", "diffusers", "kohya", "flow_grpo", "TRL")
# What a command is shortened by; the last of a flag counts.
SHORT = "--max_train_steps 1 --gradient_accumulation_steps 1 --prior_inference_steps 2"
SHORT += " --validation_inference_steps 2 --num_eval_prompts 1 --eval_sample_steps 2"

pytestmark = pytest.mark.usefixtures("one_thread")
one_thread = runs.one_thread


def ours() -> list[str]:
    """The commands of the page that train or draw, but for those that read a file of options."""
    lines = dict.fromkeys(line.strip() for line in commands(text_of(PAGE)))
    return [one for one in lines if re.search(r"\w+\.py ", one) and "--config" not in one]


def test_every_trainer_has_a_row_and_every_row_a_command_of_ours() -> None:
    rows = [line.split(" | ") for line in text_of(PAGE).splitlines() if line.startswith("| ")][2:]
    for name in TRAINERS:
        assert any(name in row[0] for row in rows), name
    without = [row[0] for row in rows if not re.search(r"`(python|bash) |dojo\.", row[-1])]
    assert not without


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ours(), ids=lambda line: line.split("--output_dir ")[-1].split()[0]
)
def test_our_command_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, words = words_of(line)
    for name, family in (("models/Kolors", "kolors"), ("models/HunyuanDiT", "hunyuandit")):
        if name in words:
            words[words.index(name)] = str(make_tiny(tmp_path / "tiny", family))
    if "outputs/pocket-pairs" in words:
        pairs = runs.write_pairs(tmp_path / "pairs", 6)
        words[words.index("outputs/pocket-pairs")] = str(pairs)
    words = [re.sub("^outputs/", f"{tmp_path}/", word) for word in words]
    script = importlib.import_module(Path(words[1]).stem)
    if "train_ddpo_sd15.py" in words and "outputs/trl" in line:  # an epoch is not broken off
        words += ["--num_prompts_per_epoch", "6"]
    known = {flag.removeprefix("--") for flag in options(script.Args)}
    short = [*SHORT.split(), "--latent_cache_dir", str(tmp_path / "cache")]
    for flag, value in zip(short[::2], short[1::2], strict=True):
        words += [flag, value] if flag[2:] in known else []
    words += ["--max_train_steps", "2"] if "6" in words else []
    runs.in_process(script, words[2:])
    folder = Path(words[words.index("--output_dir") + 1])
    assert any((folder / name).exists() for name in ("finished.json", "versus.json")), folder
