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
# What some options are only read with; without it they are refused for that.
READ_WITH: dict[str, dict[str, Any]] = {
    "port": {"web": True},
    "pretrain_weight": {"pretrain_data_dir": "x"},
    "mode_scale": {"weighting_scheme": "mode"},
    "lora_scale": {"lora_weights_path": ("x",)},
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
    if {*READ_WITH.get(name, ())} <= {field.name for field in fields(kind)}:
        some |= READ_WITH.get(name, {})
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


UNREAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("dojo.pairs", "Args", {"lora_scale": (0.5,)}, "without --lora_weights_path"),
    ("demo", "Args", {"lora_scale": (0.5,), "prompt": ("x",)}, "without --lora_weights_path"),
    ("dojo.inputs.pretraining_pictures", "PretrainArgs", {"pretrain_weight": 2.0}, "pictures"),
    ("dojo.methods.rl", "NftArgs", {"old_decay_flat": 3, "old_decay_max": 0.0}, "_max 0: the"),
    ("dojo.methods.rl", "NftArgs", {"old_decay_flat": 3, "old_decay_ramp": 0.0}, "_ramp 0: the"),
    ("dojo.methods.rl", "NftArgs", {"old_decay_ramp": 0.1, "old_decay_max": 0.0}, "not lag"),
    ("dojo.methods.rl", "NftArgs", {"old_decay_max": 0.5, "old_decay_ramp": 0.0}, "not lag"),
    ("dojo.methods.rl", "RolloutArgs", {"window_every": 5}, "for sliding"),
    ("dojo.methods.rl", "RolloutArgs", {"timestep_fraction": 0.3}, "for fraction"),
    ("dojo.methods.rl", "RolloutArgs", {"window_size": 2, "train_timesteps": "all"}, "for window"),
    ("dojo.methods.rl", "RolloutArgs", {"window_first": 1, "train_timesteps": "all"}, "for window"),
    ("dojo.methods.rl", "DiffusionRolloutArgs", {"window_range": 0.3}, "for window"),
    ("dojo.methods.refl", "FlowReflArgs", {"negative_prompt": "dark"}, "--guidance_scale above 1"),
    ("dojo.methods.refl", "ReflArgs", {"negative_prompt": "dark"}, "--guidance_scale above 1"),
    (
        "dojo.methods.drawing",
        "FlowEvalArgs",
        {"eval_negative_prompt": "dark", "eval_guidance_scale": 1.0},
        "--eval_guidance_scale above 1",
    ),
    ("train_grpo_sd3", "GrpoArgs", {"kl": "transition"}, "without --beta"),
    ("dojo.models.sd3", "NoiseArgs", {"mode_scale": 0.3}, "for mode"),
    (
        "dojo.models.sd3",
        "NoiseArgs",
        {"logit_mean": 0.3, "weighting_scheme": "mode"},
        "for logit_normal",
    ),
    ("dojo.bench.rl", "RlArgs", {"window_size": 2, "train_timesteps": "all"}, "for window"),
]


@pytest.mark.parametrize(
    ("module", "group", "given", "why"),
    [
        pytest.param(*case, id=f"{case[1]}-{next(iter(case[2]))}-{n}")
        for n, case in enumerate(UNREAD)
    ],
)
def test_an_option_that_nothing_reads_is_refused_by_name(
    module: str, group: str, given: dict[str, Any], why: str
) -> None:
    kind = getattr(importlib.import_module(module), group)
    needed = {"pretrained_model_name_or_path": "x", "prompts": None, "prompt": ("x",), "model": "x"}
    there = {field.name for field in fields(kind) if field.default is MISSING}
    needed = {name: value for name, value in (needed | REQUIRED).items() if name in there}
    with pytest.raises(ValueError, match=f"--{next(iter(given))} does nothing .*{why}.*; leave it"):
        kind(**needed, **given)


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
