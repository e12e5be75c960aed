"""Claims about numbers of options: out of range they are refused by name, before any work."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import dojo
from dojo.cli import ranges
from tests.conftest import ROOT

# What the dataclasses cannot do without.
REQUIRED: dict[str, Any] = {
    **{"output_dir": Path("x"), "dataset_name": "x", "prompt": ("x",), "clone": Path("x")},
    **{"output": Path("x.safetensors"), "input": ("x", "y"), "model": "sd35-medium"},
    "rank": 1,
}
# Options that may be zero; all others are refused there.
_ZERO = """
    Args.guidance_scale Args.min_margin DrawArgs.guidance_scale MeasureArgs.trained_step
    adam_beta1 adam_beta2 adam_weight_decay beta
    caption_dropout clip_g_dropout clip_l_dropout clip_skip conv_rank dataloader_num_workers
    ema_decay eval_fraction eval_seed
    blocks_on_cpu kl_beta norm_guard old_decay_flat old_decay_max old_decay_ramp
    first_step guidance_rescale input_perturbation keep_tokens logit_mean lora_dropout lora_scale
    lr_warmup_steps margin
    port scheduled_sampling scheduled_sampling_ramp
    masked_loss_weight max_invalid min_timestep mode_scale noise_offset
    num_eval_prompts num_saved_images scales
    pretrain_weight prior_guidance_scale prior_loss_weight proportion_empty_prompts seed
    skip_guidance_layers skip_layer_guidance_scale skip_layer_guidance_start
    skip_layer_guidance_stop t5_dropout validation_guidance_rescale validation_guidance_scale
    validation_seed
    validation_skip_guidance_layers validation_skip_layer_guidance_scale
    validation_skip_layer_guidance_start validation_skip_layer_guidance_stop window_first
    winner_preserving_mu
"""
ZERO = _ZERO.split()
# Options that may be negative: means of normal distributions, scores, LoRAs turned round; and one
# that is refused a little later, by the number of the model's layers.
NEGATIVE = ["logit_mean", "margin", "mode_scale", "lora_scale", "scales"]
NEGATIVE += ["validation_skip_guidance_layers"]


def groups() -> Iterator[type]:
    """Every dataclass of options, of the library, the scripts and the demo."""
    names = [m.name for m in pkgutil.walk_packages(dojo.__path__, "dojo.")]
    names = [name for name in names if not name.endswith("__main__")]
    names += ["demo", *(path.stem for path in sorted(ROOT.glob("train_*.py")))]
    for name in names:
        for title, kind in vars(importlib.import_module(name)).items():
            own = inspect.isclass(kind) and kind.__module__ == name and is_dataclass(kind)
            if own and title.endswith("Args"):
                yield kind


def numbers(kind: type) -> Iterator[tuple[str, bool, bool]]:
    """Its numeric options with the numbers they take: name, whether real, whether a tuple."""
    for name, hint in get_type_hints(kind).items():
        parts = {hint, *get_args(hint)}
        if parts & {int, float}:
            yield name, float in parts, tuple in parts or "tuple" in str(hint)


CASES = [(kind, *number) for kind in groups() for number in numbers(kind)]


def make(kind: Any, name: str, value: object) -> object:
    """The options with one of them set."""
    needed = {
        field.name: REQUIRED.get(field.name, "x")
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    }
    some = {field.name: REQUIRED[field.name] for field in fields(kind) if field.name in REQUIRED}
    if kind.__name__ == "PromptArgs":
        some["prompt_set"] = "pocket"
    if name == "port" and "web" in {field.name for field in fields(kind)}:
        some["web"] = True  # without a page no port is taken
    return kind(**{**needed, **some, name: value})


def refused(kind: type, name: str, value: object) -> bool:
    try:
        make(kind, name, value)
    except ValueError as error:
        if f"--{name}" not in str(error):
            raise
        return True
    return False


def test_the_options_are_all_there() -> None:
    assert len(CASES) > 200
    found = {(kind.__name__, name) for kind, name, _, _ in CASES}
    assert {("OptimArgs", "adam_beta1"), ("RunArgs", "seed"), ("DataArgs", "repeats")} <= found
    names = {name for _, name in found} | {f"{kind}.{name}" for kind, name in found}
    assert {*ZERO, *NEGATIVE} <= names


@pytest.mark.parametrize(
    ("kind", "name", "real", "many"),
    [pytest.param(*case, id=f"{case[0].__module__}-{case[1]}") for case in CASES],
)
def test_numbers_out_of_range_are_refused_by_name(
    kind: type, name: str, real: bool, many: bool
) -> None:
    def outside(number: float) -> bool:
        return refused(kind, name, (number,) if many else number)

    assert outside(-1.0 if real else -1) == (name not in NEGATIVE)
    whole_name = f"{kind.__name__}.{name}"
    assert outside(0.0 if real else 0) == (name not in ZERO and whole_name not in ZERO)
    outside(1e30 if real else 10**15)  # refused by name or taken, and nothing else


def test_a_refusal_says_the_range() -> None:
    class Args:
        share, count, seed, unset, many = 1.5, 0, -1, None, (1, 2, -3)

    with pytest.raises(ValueError, match=r"^--share 1.5 must be at least 0 and below 1$"):
        ranges.check(Args, "share", least=0, below=1)
    with pytest.raises(ValueError, match=r"^--count 0 must be above 0 and at most 3$"):
        ranges.check(Args, "count", above=0, most=3)
    with pytest.raises(ValueError, match=r"^--seed -1 must be at least 0"):
        ranges.check_seed(Args, "seed")
    with pytest.raises(ValueError, match="--many -3"):
        ranges.check(Args, "share unset many", least=0)
    ranges.check(Args, "share unset many", least=-3, most=2)
