"""A pipeline to draw with, whatever it is given as, and what it should draw."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from dojo import bars
from dojo.cli import UserError
from dojo.files.records import read_if_whole
from dojo.finetune import lora
from dojo.finetune.embeddings import read as read_words
from dojo.lazy import diffusers, no_grad, torch
from dojo.models import folders, hunyuandit, kolors, loaded, opening, sd3, truncation
from dojo.models.family import ModelArgs
from dojo.models.unet import schedule, single_file
from dojo.models.words import known, teach_pipeline

if TYPE_CHECKING:
    from torch import Tensor


TencentWeights: TypeAlias = hunyuandit.Weights


def load_pipeline(
    name: str,
    dtype: torch.dtype,
    single_file_config: str | None = None,
    tencent_weights: TencentWeights = "auto",
) -> Any:
    """The pipeline of a folder, a hub id or a single file, quiet, on the CPU.

    Args:
        tencent_weights: which network of Tencent's own folder.
    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    bars.leave_out_others_in_logs()
    flag = "--pretrained_model_name_or_path"
    folder = Path(name)
    theirs = folders.tencents(folder)
    if tencent_weights != "auto" and theirs is None:
        raise UserError(
            f"{hunyuandit.WEIGHTS_FLAG} {tencent_weights} is for Tencent's own folder (t2i), and "
            f"{name} is none"
        )
    if folder.is_file():
        family = opening.family_of(ModelArgs(pretrained_model_name_or_path=name))
        model = family.ModelArgs(
            pretrained_model_name_or_path=name, single_file_config=single_file_config
        )
        pipeline: Any = family.open_model(model).load_pipeline(dtype, torch.device("cpu"))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
    if folder.is_dir() and theirs is None and not (folder / "model_index.json").is_file():
        is_lora = (folder / lora.WEIGHTS).is_file()
        hint = " (a LoRA folder goes to --lora_weights_path)" if is_lora else ""
        raise UserError(f"{flag}: {name} has no model_index.json{hint}")
    if not folder.is_dir() and not _may_be_on_hub(name):
        raise UserError(f"{flag}: there is no folder {name}")
    kind = folders.kind_of(folder, flag) if folder.is_dir() else ""
    if theirs is not None or kind.startswith("Kolors"):
        # Its authors' layout names classes that diffusers does not have, or none.
        args = ModelArgs(pretrained_model_name_or_path=name)
        if theirs is not None:
            args = hunyuandit.ModelArgs(
                pretrained_model_name_or_path=name, tencent_weights=tencent_weights
            )
        pipeline = opening.open_model(args).load_pipeline(dtype, torch.device("cpu"))
    else:
        pipeline = loaded.pipeline(name, flag=flag, dtype=dtype)
        if type(pipeline).__name__.startswith("HunyuanDiT"):
            pipeline = hunyuandit.drawing(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def in_diffusers_layout(folder: Path, tencent_weights: TencentWeights = "auto") -> Path:
    """Where a model's folder has its files by diffusers' names: itself, or links to Tencent's own.

    Raises:
        UserError: Tencent's lacks a part.
    """
    theirs = folders.tencents(folder)
    return folder if theirs is None else hunyuandit.linked(theirs, tencent_weights).folder


def trained_on(name: str, loras: Sequence[str]) -> TencentWeights:
    """Which network of Tencent's own folder some LoRAs were trained on, as their runs' args.json
    says; auto where none does, or the model is no such folder.

    Raises:
        UserError: they were trained on different ones.
    """
    if folders.tencents(Path(name)) is None:
        return "auto"
    found: dict[str, TencentWeights] = {}
    for one in loras:
        if (wish := _network_of_run(Path(one))) != "auto":
            found[one] = wish
    if len(set(found.values())) > 1:
        each = ", ".join(f"{one} on {wish}" for one, wish in found.items())
        raise UserError(
            f"--lora_weights_path: they were trained on different networks of {name} ({each}): "
            f"choose one of these by {hunyuandit.WEIGHTS_FLAG}"
        )
    return next(iter(found.values())) if found else "auto"


def _network_of_run(place: Path) -> TencentWeights:
    """A LoRA's: of a run, of a checkpoint or another folder in it, or of a file in these."""
    folder = place if place.is_dir() else place.parent
    record = next((p for p in (folder, folder.parent) if (p / "args.json").is_file()), None)
    groups: Any = {} if record is None else read_if_whole(record / "args.json").get("args")
    model: Any = groups.get("model") if isinstance(groups, dict) else None
    wish: Any = model.get("tencent_weights") if isinstance(model, dict) else None
    return wish if wish in get_args(TencentWeights) else "auto"


def _may_be_on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("models/", "outputs/"))


def is_lora(name: str, flag: str) -> bool:
    """Whether a file, folder or hub id is a LoRA for a pipeline, and not a pipeline itself.

    Raises:
        UserError: it is neither; it names `flag`.
    """
    path, parts = Path(name), ("model_index.json", lora.WEIGHTS, lora.PEFT_WEIGHTS)
    if path.is_dir():
        there = [part for part in parts if (path / part).is_file()]
        files = list(path.glob("*.safetensors"))  # one under another name is taken for a LoRA
        if there or len(files) == 1:
            return there[:1] != ["model_index.json"]
        raise UserError(f"{flag}: {name} has neither {' nor '.join(parts)}")
    if path.is_file():
        if path.suffix in single_file.PICKLES:
            # Of a LoRA its reader says that it takes no pickles; a whole model may be one.
            return lora.is_lora(single_file.read(path, flag).entries)
        if path.suffix in lora.PICKLES:
            return True  # the reader of LoRA says what is wrong with it
        try:
            with safe_open(path, framework="pt") as file:
                return lora.is_lora(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{flag}: {name} cannot be read ({error})") from error
    if not _may_be_on_hub(name):
        raise UserError(f"{flag}: there is no file or folder {name}")
    for part in parts:
        try:
            hf_hub_download(name, part)
        except (OSError, ValueError):
            continue
        return part != "model_index.json"
    raise UserError(
        f"{flag}: {name} is neither a file, a folder nor a reachable hub repository with "
        f"{' or '.join(parts)}"
    )


def load_loras(pipeline: Any, paths: Sequence[str], scales: Sequence[float]) -> Any:
    """Makes LoRAs active, all at once, and returns the scheduler to draw with.

    Args:
        scales: strength of each, or one for all.

    Returns:
        The scheduler that is saved beside the last of them that has one, or the pipeline's own as
        that one was trained: shift, prediction type, zero terminal SNR. Else the pipeline's own,
        which is left in place.

    Raises:
        UserError: one is missing or does not fit.
    """
    scheduler = pipeline.scheduler
    for name, path in zip(_adapters(len(paths)), paths, strict=True):
        arrived = lora.load(pipeline, path, name)
        print(f"{path}: {arrived} tensors")
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        scheduler = _trained_with(scheduler, folder)
    if paths:
        set_scales(pipeline, list(scales) * (len(paths) if len(scales) == 1 else 1))
    return scheduler


def set_scales(pipeline: Any, scales: Sequence[float]) -> None:
    """Gives the LoRAs that `load_loras` has loaded these strengths, one each."""
    pipeline.set_adapters(_adapters(len(scales)), list(scales))


def _adapters(count: int) -> list[str]:
    """The names of so many LoRAs in a pipeline."""
    return [f"lora{i}" for i in range(count)]


def load_embeddings(pipeline: Any, names: Sequence[str]) -> None:
    """Teaches a pipeline learned words, and says what they are called.

    Args:
        names: files, or folders of them.
    Raises:
        UserError: one is missing, is no embedding, or is another model's.
    """
    flag = "--embeddings"
    words = [word for name in names for word in read_words(name, flag)]
    if not words:
        return
    if "CLIP" not in type(getattr(pipeline, "text_encoder", None)).__name__:
        raise UserError(f"{flag}: {type(pipeline).__name__} has no CLIP that could learn words")
    teach_pipeline(pipeline, known(words))
    for word in words:
        several = f", {word.vectors} vectors" if word.vectors > 1 else ""
        print(f"{flag}: write {word.text} into the prompts{several}")


def _trained_with(scheduler: Any, folder: Path) -> Any:
    """A scheduler as the one that is saved in `folder` was trained, if there is one of its kind.

    Of one class with it, it becomes that one; else it keeps its class: each class of flows has a
    name of its own for the shift, and reads over the others'. Of diffusions, what is predicted and
    how the schedule ends are taken over; where its class has no zero terminal SNR, it becomes DDIM.

    Raises:
        UserError: the saved scheduler is broken.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return scheduler
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        own = sd3.scheduler_config(scheduler)
        if saved.get("_class_name") == own["_class_name"]:
            return type(scheduler).from_config(saved)
        if sd3.shift_name(saved) and sd3.shift_name(own):
            return sd3.with_shift(own, sd3.own_shift(saved))
        if not sd3.shift_name(saved) and not sd3.shift_name(own):
            return schedule.own(schedule.taken_over(own, saved))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--lora_weights_path: {path} is broken ({error})") from error
    return scheduler


def tell_cut(
    pipeline: Any, texts: Sequence[str | None], max_sequence_length: int | None = None
) -> None:
    """Says which prompts are longer than the pipeline's text encoders read.

    Args:
        texts: the prompts and negative prompts; None is passed over.
        max_sequence_length: tokens of T5; None is the pipeline's own default.
    """
    default = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    readers: list[truncation.Reader] = []
    if type(pipeline).__name__.startswith("HunyuanDiT"):
        readers = hunyuandit.readers([pipeline.tokenizer, pipeline.tokenizer_2])
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipeline, part, None)
        if (
            tokenizer is None
            or getattr(pipeline, part.replace("tokenizer", "text_encoder"), None) is None
        ):
            continue
        kind = type(getattr(tokenizer, "inner", tokenizer)).__name__
        if "T5" in kind and default is not None:
            limit = max_sequence_length or default.default
            readers.append(truncation.Reader("T5", tokenizer, limit, "--max_sequence_length"))
        elif "CLIP" in kind:
            readers.append(truncation.Reader("CLIP", tokenizer, tokenizer.model_max_length))
        elif "ChatGLM" in kind:
            readers.append(truncation.Reader("ChatGLM", tokenizer, kolors.TOKENS, marks_end=False))
    for line in truncation.find_cut(filter(None, texts), readers).told:
        print(line)


def draws_noise(pipeline: Any) -> bool:
    """Whether the steps add noise that the pipeline's generators do not give: so do SD3's."""
    is_sd3 = isinstance(pipeline, diffusers.StableDiffusion3Pipeline)
    return is_sd3 and sd3.draws_noise(sd3.scheduler_config(pipeline.scheduler))


def fixed_length(pipeline: Any) -> int | None:
    """Tokens that a pipeline reads whatever its `max_sequence_length` says; None if it obeys."""
    return kolors.TOKENS if type(pipeline).__name__.startswith("Kolors") else None


def why_no_skipping(pipeline: Any, layers: Sequence[int], **options: Any) -> str | None:
    """Why skip-layer guidance would change nothing, for a pipeline with a transformer.

    Args:
        options: see `sd3.why_no_skipping`.
    """
    if not hasattr(pipeline, "transformer"):
        return None
    blocks = getattr(pipeline.transformer, "transformer_blocks", ())
    return sd3.why_no_skipping(layers, len(blocks), **options)


def step_noise(pipeline: Any, seeds: Sequence[int]) -> AbstractContextManager[None]:
    """For a while such noise hangs on the first seed; draw one picture at a time."""
    return sd3.step_noise(seeds[0]) if draws_noise(pipeline) else nullcontext()


@no_grad
def embeddings(
    pipeline: Any,
    prompt: str,
    negative_prompt: str,
    *,
    max_sequence_length: int,
    uncond: Literal["empty_string", "zeros"],
    t5_padding: Literal["unmodified", "zero"],
) -> dict[str, Tensor]:
    """What an SD3 pipeline takes in place of the prompts, as `--uncond` and `--t5_padding` say.

    Raises:
        UserError: another pipeline than SD3's.
    """
    if not isinstance(pipeline, diffusers.StableDiffusion3Pipeline):
        raise UserError("--uncond zeros and --t5_padding zero are for Stable Diffusion 3")
    encoders = sd3.TextEncoders(
        pipeline,
        clip_tokens=pipeline.tokenizer.model_max_length,
        max_sequence_length=max_sequence_length,
        t5_padding=t5_padding,
        width=pipeline.transformer.config["joint_attention_dim"],
        device=pipeline._execution_device,
    )
    found = dict(encoders([prompt]))
    for name, value in encoders([negative_prompt]).items():
        dropped = uncond == "zeros" and not negative_prompt
        found[f"negative_{name}"] = torch.zeros_like(value) if dropped else value
    return {name: value.to(encoders.device) for name, value in found.items()}
