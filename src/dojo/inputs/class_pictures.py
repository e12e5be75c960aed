"""Prior preservation for DreamBooth (Ruiz et al. 2022, arXiv:2208.12242, Section 3.3).

Pictures of the class, drawn by the base model itself before training, are trained on beside the
instance's, so that "a dog" stays a dog while "sks dog" becomes this one.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dojo import data, files, rng
from dojo.bars import Bar
from dojo.cli import UserError, option, ranges
from dojo.inputs import texts
from dojo.inputs.pictures import refuse_inside
from dojo.lazy import late, no_grad, torch
from dojo.models.family import Model
from dojo.run.run import Run

if TYPE_CHECKING:
    from dojo.run import residence
else:
    residence = late("dojo.run.residence")

_DRAWN = re.compile(r"class-\d{5}\.png")


@dataclass(frozen=True, kw_only=True)
class PriorArgs:
    """Prior preservation."""

    with_prior_preservation: bool = option(False, common=True)
    """train on pictures of the class beside those of the instance, as many in every batch"""
    class_data_dir: Path | None = option(None, incidental=True)
    """folder of the class pictures: your own, or an empty one, into which num_class_images are
    drawn; none is drawn among your own"""
    class_prompt: str | None = None
    """prompt of the class pictures, such as "a photo of a dog"; captions in the folder win"""
    prior_loss_weight: float = 1.0
    """weight of the class pictures' loss beside the instance's"""
    num_class_images: int = 100
    """class pictures that there should be"""
    sample_batch_size: int = option(4, incidental=True)
    """class pictures drawn at a time"""
    prior_generation_precision: Literal["fp32", "fp16", "bf16"] | None = None
    """precision of that drawing; unset is that of the run"""
    prior_guidance_scale: float = 7.0
    """classifier-free guidance of that drawing"""
    prior_inference_steps: int = 28
    """sampling steps of that drawing"""

    def __post_init__(self) -> None:
        if self.with_prior_preservation and self.class_data_dir is None:
            raise ValueError("--with_prior_preservation needs --class_data_dir")
        if self.with_prior_preservation and not self.class_prompt:
            raise ValueError("--with_prior_preservation needs --class_prompt")
        if not self.with_prior_preservation and (self.class_data_dir or self.class_prompt):
            raise ValueError(
                "--class_data_dir and --class_prompt need --with_prior_preservation to be of use"
            )
        ranges.check(self, "num_class_images sample_batch_size prior_inference_steps", least=1)
        ranges.check(self, "prior_loss_weight prior_guidance_scale", least=0)

    @property
    def folder(self) -> Path:
        """The class pictures' folder.

        Raises:
            UserError: there is none because prior preservation is off.
        """
        if self.class_data_dir is None:
            raise UserError("--class_data_dir is missing")
        return self.class_data_dir


def at_a_time(args: PriorArgs, data_args: data.DataArgs) -> int:
    """Class pictures that are drawn at a time before training: none where enough are there."""
    if not args.with_prior_preservation:
        return 0
    folder = args.folder
    there = data.scan(folder, _class_args(args, data_args)).pictures if folder.is_dir() else ()
    return args.sample_batch_size if len(there) < args.num_class_images else 0


def draw(
    run: Run,
    args: PriorArgs,
    model: Model,
    data_args: data.DataArgs,
    size: data.Size,
) -> None:
    """Fills the class folder up to `num_class_images`, the processes sharing the work.

    Picture k depends on the prompt, k and the size of a batch alone, and appears under its name
    when it is whole: a process that is killed leaves its place to be filled the next time.
    """
    folder = args.folder
    if model.words and (own := model.words.find(str(args.class_prompt))):
        raise UserError(
            f"--class_prompt has {own[0].text}, which the base model has not learned when it draws "
            "the class pictures: name the class alone"
        )
    refuse_inside(folder, data_args.location, "class_data_dir")
    folder.mkdir(parents=True, exist_ok=True)
    if run.main:
        files.sweep(folder.rglob(".class-*"))
    run.accelerator.wait_for_everyone()
    found = data.scan(folder, _class_args(args, data_args))
    taken = set(found.pictures)
    missing = max(0, args.num_class_images - len(taken))
    every = range(args.num_class_images + len(taken))
    names = {k: _name(found, k) for k in every}
    open_places = [k for k in every if names[k] not in taken and not (folder / names[k]).exists()]
    places = open_places[:missing]
    free = {names[k] for k in places}
    own = any(not _DRAWN.fullmatch(Path(name).name) for name in taken)
    if free and (found.metadata_files or own):
        raise UserError(
            f"--class_data_dir {folder} holds {len(taken)} pictures of your own, and none is drawn "
            f"among them: --num_class_images {len(taken)} takes them as they are, an empty folder "
            f"gets {args.num_class_images} drawn ones"
        )
    run.accelerator.wait_for_everyone()  # everybody has counted before anybody draws
    run.check_shared(folder, "--class_data_dir", lacking=bool(free))
    # Batches of fixed members, a missing one being drawn with its neighbours: what else is in a
    # batch decides the last bit of a picture.
    batches = sorted({k // args.sample_batch_size for k in places})
    starts = [batch * args.sample_batch_size for batch in batches]
    members = [
        [_name(found, start + k) for k in range(args.sample_batch_size)]
        for start in starts[run.share["process"] :: run.share["num_processes"]]
    ]
    if members:
        _draw(run, args, model, size, members, free, captions=bool(found.sidecars))
    run.accelerator.wait_for_everyone()


def _name(folder: data.Folder, number: int) -> str:
    """The file of a class picture, relative to the folder."""
    return f"{folder.prefix}class-{number:05d}.png"


@no_grad
def _draw(
    run: Run,
    args: PriorArgs,
    model: Model,
    size: tuple[int, int],
    batches: Sequence[Sequence[str]],
    wanted: Set[str],
    *,
    captions: bool,
) -> None:
    """Draws batches of pictures, named by their files, and keeps those that are wanted.

    Each network is on the device only while it computes; the texts, which are the same in every
    batch, are encoded before.
    """
    precisions = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = precisions.get(args.prior_generation_precision or "", run.dtype)
    # In batches as large as those of the pictures: how many there are decides the last bit.
    prompts, none = [str(args.class_prompt)] * args.sample_batch_size, [""] * args.sample_batch_size
    embeds, negative = texts.encoded(run, model, dtype, [prompts, none])
    given = {**embeds, **{f"negative_{name}": value for name, value in negative.items()}}
    given = {name: value.to(run.device, dtype) for name, value in given.items()}
    pipeline = model.load_pipeline(dtype, torch.device("cpu"), texts=False)
    networks = [one for one in pipeline.components.values() if isinstance(one, torch.nn.Module)]
    residence.Turns(networks, run.device)
    pipeline.set_progress_bar_config(disable=True)
    count = sum(name in wanted for some in batches for name in some)
    bar = Bar(total=count, desc="drawing class pictures", disable=not run.main)
    for some in batches:
        pictures = pipeline(
            **given,
            height=size[0],
            width=size[1],
            guidance_scale=args.prior_guidance_scale,
            num_inference_steps=args.prior_inference_steps,
            **model.call_options,
            generator=[rng.generator("class picture", str(args.class_prompt), k) for k in some],
        ).images
        for name, picture in zip(some, pictures, strict=True):
            if name not in wanted:
                continue
            path = args.folder / name
            if captions and not path.with_suffix(".txt").exists():  # the others have theirs
                path.with_suffix(".txt").write_text(str(args.class_prompt), "utf-8")
            with files.whole(path) as file:  # runs may share the folder
                picture.save(file, format="PNG")
            bar.update()
    bar.close()
    del pipeline
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def open_class(args: PriorArgs, data_args: data.DataArgs) -> data.Captioned:
    """The class pictures, with the folder's own captions or else the class prompt."""
    class_args = _class_args(args, data_args)
    found = data.scan(args.folder, class_args)
    if not (found.metadata_files or found.sidecars):
        class_args = replace(class_args, instance_prompt=args.class_prompt)
    source = data.open_source(str(args.folder), class_args)
    return source.with_recipes(weight=args.prior_loss_weight, is_regularisation=True)


def _class_args(args: PriorArgs, data_args: data.DataArgs) -> data.DataArgs:
    """The instance's options without what belongs to the instance alone."""
    own: dict[str, Any] = {
        "dataset_split": "train",
        "caption_strategy": "auto",
        "caption_column": None,
        "image_column": None,
        "instance_prompt": None,
        "mask_dir": None,
        "mask_from_alpha": False,
        "repeats": 1,
        "repeats_from_folder_names": False,
    }
    return data.args_for(data_args, str(args.folder), own)
