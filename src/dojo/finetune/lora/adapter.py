"""Which layers get an adapter, and the adapter itself: float32 and trainable, computed by peft."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dojo.cli import UserError, option, ranges
from dojo.finetune.lora.formats import Format
from dojo.finetune.lora.injected import inject
from dojo.lazy import nn, peft
from dojo.models.opening import facts_of
from dojo.models.precisions import Precision

if TYPE_CHECKING:
    from dojo.models.facts import NetworkFacts

_CLIP_ATTENTION = re.compile(
    r"(text_model\.)?encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
)


@dataclass(frozen=True, kw_only=True)
class LoraArgs:
    """The adapter."""

    rank: int = option(16, common=True)
    """rank of the two factors"""
    lora_alpha: float | None = None
    """the update is scaled by alpha / rank; unset is the rank, a scale of 1"""
    lora_dropout: float = 0.0
    """dropout on the adapter's input"""
    lora_layers: tuple[str, ...] = ("attn",)
    """attn (every attention projection, attn2 and the text stream's included), attn+ff, all-linear
    (of the transformer blocks), names of layers (also as one comma list, such as
    attn.to_k,attn.to_q), or one regular expression over full module names, marked by a leading
    re:"""
    conv_rank: int = 0
    """rank of adapters on a UNet's convolutions too (of its ResNets, down- and upsamplers, and the
    1x1 ones around SD1's attentions), which kohya's scripts call conv_dim; 0: none"""
    conv_alpha: float | None = None
    """their updates are scaled by conv_alpha / conv_rank; unset is the other layers' scale"""
    use_dora: bool = False
    """decompose weights into magnitude and direction (DoRA, arXiv:2402.09353)"""
    init_lora_weights_path: str | None = None
    """start from this LoRA (file, folder or hub id of any public trainer): its layers must be
    adapted here too, its rank may be smaller"""
    lora_format: Format = option("diffusers", incidental=True)
    """write the result in this format too, beside diffusers' file, which resuming needs; for SD1
    ComfyUI reads kohya's"""

    base_precision: Precision = "bf16"
    """how the frozen weights of the network's blocks are stored: bf16 (as --mixed_precision says,
    nothing quantised), int8 or fp8 (a byte each), nf4 (4.5 bits; needs bitsandbytes); the model as
    it was, wherever it is asked for, is the quantised one"""
    blocks_on_cpu: int = option(0, incidental=True)
    """so many of the network's blocks, evenly spread, keep their frozen weights in CPU memory, from
    where they come for each product; 0: none"""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("--rank must be at least 1")
        ranges.check(self, "blocks_on_cpu", least=0)
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError("--lora_alpha must be positive")
        if self.conv_rank < 0:
            raise ValueError("--conv_rank must be at least 0 (0: no convolution is adapted)")
        if self.conv_alpha is not None and not self.conv_rank:
            raise ValueError("--conv_alpha needs --conv_rank")
        if self.conv_alpha is not None and self.conv_alpha <= 0:
            raise ValueError("--conv_alpha must be positive")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError("--lora_dropout must lie in [0, 1)")
        if not self.lora_layers:
            raise ValueError("--lora_layers needs at least one name")
        if self.use_dora and self.lora_format != "diffusers":
            raise ValueError(f"--lora_format {self.lora_format} has no form for --use_dora")
        if self.use_dora and self.init_lora_weights_path:
            raise ValueError("--init_lora_weights_path cannot be combined with --use_dora")

    def check_package(self) -> None:
        """
        Raises:
            UserError: the package that unpacks 4-bit weights is missing.
        """
        if self.base_precision == "nf4" and find_spec("bitsandbytes") is None:
            raise UserError(
                "--base_precision nf4 needs the package bitsandbytes: pip install bitsandbytes "
                "(int8 needs none)"
            )


def target_layers(model: nn.Module, choice: Sequence[str]) -> list[str]:
    """Full names of the linear layers that `--lora_layers` means.

    Layers whose result nothing reads are left out: they would get a zero gradient for ever.

    Raises:
        UserError: a name or expression matches no layer; the message names it.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    facts = facts_of(model)
    presets = _presets(facts)
    found: list[str] = []
    for word in [part.strip() for item in choice for part in _parts(item)]:
        if word in presets:
            pattern = presets[word]
        elif word.startswith("re:"):
            pattern = word.removeprefix("re:")
        else:
            pattern = rf"(.*\.)?{re.escape(word)}"
        try:
            matches = [name for name in linear if re.fullmatch(pattern, name)]
        except re.error as error:
            raise UserError(
                f"--lora_layers: {word!r} is no regular expression ({error})"
            ) from error
        if not matches:
            raise UserError(
                f"--lora_layers: {word!r} matches no linear layer; there are, for example, "
                f"{', '.join(linear[:6])}"
            )
        found += matches
    wanted = set(found) - facts.unread(linear)
    if not wanted:
        raise UserError(
            f"--lora_layers: {', '.join(found)} alone would never learn: nothing reads its result"
        )
    return [name for name in linear if name in wanted]


def _parts(item: str) -> list[str]:
    return [item] if item.startswith("re:") else item.split(",")


def _presets(facts: NetworkFacts) -> dict[str, str]:
    """The words that stand for many layers, as expressions for full names."""
    return {
        "attn": rf"{facts.block}\.{facts.attention}",
        "attn+ff": rf"{facts.block}\.({facts.attention}|{facts.feed_forward})",
        "all-linear": rf"{facts.block}\..*",
    }


def add(model: nn.Module, args: LoraArgs) -> list[nn.Parameter]:
    """Adds an adapter to the frozen model and returns its parameters, float32 and trainable.

    B starts at zero, so the model is unchanged; A is drawn from torch's global generator.
    """
    layers = target_layers(model, args.lora_layers)
    return _add(model, args, args.rank, layers, _convolutions(model) if args.conv_rank else [])


def _convolutions(model: nn.Module) -> list[str]:
    """Full names of the convolutions that `--conv_rank` means.

    Raises:
        UserError: there is none.
    """
    pattern = re.compile(facts_of(model).convolutions)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and pattern.fullmatch(name)
    ]
    if not found:
        raise UserError(
            f"--conv_rank: a {type(model).__name__} has no convolutions that are adapted, only a "
            "UNet has"
        )
    return found


def add_text(
    text_encoder: nn.Module, args: LoraArgs, rank: int | None = None
) -> list[nn.Parameter]:
    """Adds an adapter to the attention projections of a frozen CLIP text encoder.

    Args:
        rank: unset is `--rank`; the scale alpha / rank is the transformer's in any case.
    """
    layers = [name for name, _ in text_encoder.named_modules() if _CLIP_ATTENTION.fullmatch(name)]
    return _add(text_encoder, args, rank or args.rank, layers)


def _add(
    model: nn.Module,
    args: LoraArgs,
    rank: int,
    layers: list[str],
    convolutions: Sequence[str] = (),
) -> list[nn.Parameter]:
    scale = 1 if args.lora_alpha is None else args.lora_alpha / args.rank
    conv_alpha = scale * args.conv_rank if args.conv_alpha is None else args.conv_alpha
    exactly = [f"^{re.escape(name)}" for name in convolutions]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # pyright: ignore
        lora_dropout=args.lora_dropout,
        target_modules=[*layers, *convolutions],
        rank_pattern=dict.fromkeys(exactly, args.conv_rank),
        alpha_pattern=dict.fromkeys(exactly, conv_alpha),  # pyright: ignore
        use_dora=args.use_dora,
        init_lora_weights="gaussian",
    )
    inject(model, config)
    params = [param for param in model.parameters() if param.requires_grad]
    for param in params:
        # peft creates them in the base's dtype; a bfloat16 weight of 0.02 cannot take a step of
        # 1e-5, which is below half a unit in its last place.
        param.data = param.data.float()
    return params
