"""One picture of a finished pipeline, drawn as a user asks for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dojo.cli import UserError, option, ranges
from dojo.evaluate import pipelines
from dojo.lazy import torch

if TYPE_CHECKING:
    from PIL import Image

    from dojo.inputs.prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class DrawArgs:
    """How the pictures are drawn."""

    negative_prompt: str | None = option(None, common=True)
    """what the pictures should not show"""
    height: int | None = option(None, common=True)
    """height in pixels; unset is the model's native size"""
    width: int | None = option(None, common=True)
    """width in pixels; unset is the model's native size"""
    guidance_scale: float = option(5.0, common=True)
    """classifier-free guidance; 1 switches it off"""
    guidance_rescale: float = 0.0
    """how far guided predictions are brought back to the size of the unguided: 0 is not at all, 0.7
    is usual for models with zero terminal SNR (SD1, SD2, SDXL)"""
    num_inference_steps: int = option(28, common=True)
    """sampling steps"""
    max_sequence_length: int | None = None
    """tokens of T5 (SD3); unset is the pipeline's 256; use what was trained with"""
    uncond: Literal["empty_string", "zeros"] = "empty_string"
    """what guidance takes for no prompt (SD3): the embeddings of "", or zeros; use what was trained
    with"""
    t5_padding: Literal["unmodified", "zero"] = "unmodified"
    """T5's rows of padding (SD3): as they come, or zeros; use what was trained with"""
    skip_guidance_layers: tuple[int, ...] = ()
    """layers for skip-layer guidance (SD3.5-Medium: 7 8 9)"""
    skip_layer_guidance_scale: float = 2.8
    """strength of skip-layer guidance"""
    skip_layer_guidance_start: float = 0.01
    """fraction of the steps at which skip-layer guidance begins"""
    skip_layer_guidance_stop: float = 0.2
    """fraction of the steps at which skip-layer guidance ends"""

    def __post_init__(self) -> None:
        ranges.check(self, "num_inference_steps height width max_sequence_length", least=1)
        layers = "skip_guidance_layers skip_layer_guidance_scale"
        ranges.check(self, f"guidance_scale {layers}", least=0)
        shares = "guidance_rescale skip_layer_guidance_start skip_layer_guidance_stop"
        ranges.check(self, shares, least=0, most=1)

    def said_with(self, prompt: Prompt) -> DrawArgs:
        """How a prompt is drawn, as its line of a file says; its seed is not among that.

        Raises:
            UserError: the line asks for what there is not.
        """
        names = {"negative": "negative_prompt"}
        said = {names.get(key, key): value for key, value in prompt.options.items()}
        said.pop("seed", None)
        try:
            return replace(self, **said)
        except ValueError as error:
            raise UserError(f"--prompt_file: {prompt.text!r}: {error}") from error

    def tell_cut(self, pipeline: Any, prompts: Sequence[Prompt]) -> None:
        """Says which prompts are longer than the pipeline reads."""
        texts = [*(prompt.text for prompt in prompts), self.negative_prompt]
        pipelines.tell_cut(pipeline, texts, self.max_sequence_length)


def draw(
    pipeline: Any,
    args: DrawArgs,
    prompt: str,
    seeds: list[int],
    on_step: Callable[[], None] | None = None,
) -> list[Image.Image]:
    """One picture per seed.

    Args:
        on_step: called after each sampling step, where the pipeline allows it.
    """
    if len(seeds) > 1 and pipelines.draws_noise(pipeline):  # each under its own seed
        return [draw(pipeline, args, prompt, [seed], on_step)[0] for seed in seeds]
    options: dict[str, Any] = {"height": args.height, "width": args.width}
    optional = {
        "max_sequence_length": args.max_sequence_length,
        "negative_prompt": args.negative_prompt,
        "guidance_rescale": args.guidance_rescale or None,
    }
    if args.max_sequence_length and (length := pipelines.fixed_length(pipeline)):
        raise UserError(
            f"--max_sequence_length: {type(pipeline).__name__} reads {length} tokens, whatever it "
            "is told"
        )
    if args.skip_guidance_layers:
        _check_skipping(pipeline, args)
        optional["skip_guidance_layers"] = list(args.skip_guidance_layers)
        for name in ("scale", "start", "stop"):
            option = f"skip_layer_guidance_{name}"
            optional[option] = getattr(args, option)
    accepted = inspect.signature(pipeline.__call__).parameters
    if on_step is not None and "callback_on_step_end" in accepted:
        options["callback_on_step_end"] = lambda *_: on_step() or {}
    texts: dict[str, Any] = {"prompt": prompt}
    if args.uncond == "zeros" or args.t5_padding == "zero":
        found = pipelines.embeddings(
            *(pipeline, prompt, args.negative_prompt or ""),
            max_sequence_length=args.max_sequence_length or 256,
            uncond=args.uncond,
            t5_padding=args.t5_padding,
        )
        # The pipeline repeats prompts, not embeddings.
        texts = {name: value.repeat_interleave(len(seeds), 0) for name, value in found.items()}
        optional["negative_prompt"] = None
    for name, value in optional.items():
        if value is not None and name not in accepted:
            raise UserError(f"--{name}: {type(pipeline).__name__} has no such option")
        if value is not None:
            options[name] = value
    try:
        with pipelines.step_noise(pipeline, seeds):
            return pipeline(
                **texts,
                guidance_scale=args.guidance_scale,
                num_inference_steps=args.num_inference_steps,
                num_images_per_prompt=len(seeds) if "prompt" in texts else 1,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **options,
            ).images
    except ValueError as error:  # a size or length that the model does not take
        raise UserError(str(error).strip().splitlines()[0]) from error


def _check_skipping(pipeline: Any, args: DrawArgs) -> None:
    """Refuses skip-layer guidance that would change nothing."""
    reason = pipelines.why_no_skipping(
        pipeline,
        args.skip_guidance_layers,
        guidance_scale=args.guidance_scale,
        scale=args.skip_layer_guidance_scale,
        num_steps=args.num_inference_steps,
        start=args.skip_layer_guidance_start,
        stop=args.skip_layer_guidance_stop,
    )
    if reason:
        raise UserError(f"--skip_guidance_layers {reason}")
