"""The options of validation, and the pictures that follow from them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dojo.cli import UserError, incidental, option, ranges
from dojo.evaluate import clip
from dojo.evaluate.preview import DrawnArgs
from dojo.evaluate.prompt_file import Entry, parse_size, read_prompts
from dojo.files.pictures import slug
from dojo.models.family import Model


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One validation picture: everything that it depends on but the weights."""

    file: str
    """name in `validation/step-N/`; pictures of the training size leave the size out"""
    label: str
    """how grids and the report call it"""
    prompt: str
    negative: str
    height: int
    width: int
    seed: int
    guidance_scale: float
    num_inference_steps: int


@incidental
@dataclass(frozen=True, kw_only=True)
class ValidationArgs(DrawnArgs):
    """Pictures and the eval loss during training: at step 0, every so often, and at the end."""

    validation_prompt: tuple[str, ...] = option((), common=True)
    """prompts of the validation pictures"""
    validation_prompts_file: Path | None = None
    """more prompts, with a name, negative prompt, size, seed, guidance and steps of their own where
    wanted: .json, .jsonl, .yaml, .csv, or .txt with a prompt per line"""
    validation_negative_prompt: str = ""
    """negative prompt of the validation pictures"""
    validation_resolution: tuple[str, ...] = ()
    """sizes of the validation pictures, 512 or 768x512 (width x height), each prompt at each;
    unset is the training size"""
    num_validation_images: int = 1
    """pictures per prompt and size, with seeds validation_seed, validation_seed + 1, ..."""
    validation_steps: int = 200
    """optimizer steps between two validations"""
    validation_seed: int = 0
    """seed of the pictures and of the eval loss's noise"""
    validation_guidance_scale: float = 5.0
    """classifier-free guidance of the pictures; 1 switches it off"""
    validation_guidance_rescale: float = 0.0
    """how far guided predictions are brought back to the size of the unguided: 0 is not at all, 0.7
    is usual for models with zero terminal SNR (SD1, SD2, SDXL)"""
    validation_inference_steps: int = 28
    """sampling steps of the pictures"""
    validation_skip_guidance_layers: tuple[int, ...] = ()
    """layers for skip-layer guidance of the pictures (SD3.5-Medium: 7 8 9)"""
    validation_skip_layer_guidance_scale: float = 2.8
    """strength of skip-layer guidance"""
    validation_skip_layer_guidance_start: float = 0.01
    """fraction of the steps at which skip-layer guidance begins"""
    validation_skip_layer_guidance_stop: float = 0.2
    """fraction of the steps at which skip-layer guidance ends"""
    validation_clip_model: str | None = None
    """folder or hub id of a CLIP that scores the pictures against their prompts (clip_score), such
    as openai/clip-vit-base-patch16"""
    eval_sigmas: int = 4
    """noise levels per picture of the eval loss"""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "num_validation_images validation_steps validation_inference_steps eval_sigmas"
        ranges.check(self, counts, least=1)
        ranges.check_seed(self, "validation_seed")
        skip = "validation_skip_layer_guidance"
        ranges.check(self, f"validation_guidance_scale {skip}_scale", least=0)
        rescale = "validation_guidance_rescale"
        ranges.check(self, f"{skip}_start {skip}_stop {rescale}", least=0, most=1)
        for text in self.validation_resolution:
            try:
                parse_size(text)
            except ValueError as error:
                raise ValueError(f"--validation_resolution: {error}") from None
        if self.validation_skip_guidance_layers and self.validation_guidance_scale <= 1:
            raise ValueError(
                "--validation_skip_guidance_layers needs --validation_guidance_scale above 1: it "
                "is a part of classifier-free guidance"
            )

    @cached_property
    def entries(self) -> list[Entry]:
        """The prompts of the command line, then those of the file.

        Raises:
            UserError: the file cannot be read or an entry is wrong.
        """
        path = self.validation_prompts_file
        given = [Entry(prompt=prompt) for prompt in self.validation_prompt]
        return given + (read_prompts(path) if path else [])

    @property
    def texts(self) -> list[str]:
        """Every text that the pictures need embedded, once each."""
        negatives = [
            self.validation_negative_prompt if entry.negative is None else entry.negative
            for entry in self.entries
        ]
        return list(dict.fromkeys([*(entry.prompt for entry in self.entries), *negatives]))

    def pictures(self, size: tuple[int, int]) -> list[Picture]:
        """All pictures of one validation, in the order of the prompts, sizes and seeds.

        Args:
            size: height and width of training.
        """
        sizes = [parse_size(text) for text in self.validation_resolution] or [size]
        digits = max(2, len(str(len(self.entries) - 1)))
        return [
            self._picture(f"{i:0{digits}d}", entry, one, k, size)
            for i, entry in enumerate(self.entries)
            for one in ([entry.size] if entry.size else dict.fromkeys(sizes))
            for k in range(self.num_validation_images)
        ]

    def _picture(
        self, number: str, entry: Entry, size: tuple[int, int], k: int, usual: tuple[int, int]
    ) -> Picture:
        """Picture k of an entry at a size; `usual` is the training size."""
        seed = (self.validation_seed if entry.seed is None else entry.seed) + k
        title = entry.name or entry.prompt
        pixels = f"{size[1]}x{size[0]}"
        middle = "" if size == usual else f"-{pixels}"
        steps, scale = entry.num_inference_steps, entry.guidance_scale
        return Picture(
            file=f"{number}-{slug(title)}{middle}-seed{seed}.png",
            label=f"{number} {'' if size == usual else pixels + ' '}seed {seed}: {title}",
            prompt=entry.prompt,
            negative=self.validation_negative_prompt if entry.negative is None else entry.negative,
            height=size[0],
            width=size[1],
            seed=seed,
            guidance_scale=self.validation_guidance_scale if scale is None else scale,
            num_inference_steps=self.validation_inference_steps if steps is None else steps,
        )

    def check(self, model: Model) -> None:
        """Refuses what the model cannot do, before anything is loaded; reads the prompts' file.

        Raises:
            UserError: a size does not fit the model, it has no such layer, its pipeline does not
                rescale guidance, the prompts' file is wrong, or `--validation_clip_model` is no
                CLIP.
        """
        sizes = [("--validation_resolution", parse_size(x)) for x in self.validation_resolution]
        for entry in self.entries:
            if entry.size:
                name = entry.name or entry.prompt
                sizes.append((f"--validation_prompts_file: {name!r}", entry.size))
        for source, (height, width) in sizes:
            try:
                model.latent_shape(height, width)
            except UserError as error:
                # The options of training that it names are not to blame here.
                reason = re.sub(r"--(height|width) \(or --resolution\)", r"\1", str(error))
                raise UserError(f"{source} {width}x{height}: {reason}") from error
        self._check_skipping(model)
        if self.validation_guidance_rescale and not model.rescales_guidance:
            raise UserError(
                f"--validation_guidance_rescale: the pipeline of {model.name} has no such option"
            )
        if self.validation_clip_model and self.entries:
            clip.check(self.validation_clip_model)

    def _check_skipping(self, model: Model) -> None:
        """Refuses skip-layer guidance that would change no picture."""
        if not self.validation_skip_guidance_layers:
            return
        own = {(entry.guidance_scale, entry.num_inference_steps) for entry in self.entries}
        reasons = [
            model.why_no_skipping(
                self.validation_skip_guidance_layers,
                guidance_scale=self.validation_guidance_scale if scale is None else scale,
                scale=self.validation_skip_layer_guidance_scale,
                num_steps=self.validation_inference_steps if steps is None else steps,
                start=self.validation_skip_layer_guidance_start,
                stop=self.validation_skip_layer_guidance_stop,
            )
            for scale, steps in own
        ]
        if own and all(reasons):
            raise UserError(f"--validation_skip_guidance_layers {reasons[0]}")

    def due(self, step: int, num_steps: int) -> bool:
        """Whether a validation belongs after this step."""
        return step % self.validation_steps == 0 or step == num_steps
