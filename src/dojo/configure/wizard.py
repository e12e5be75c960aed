"""The questions of the wizard, what they are checked against, and the options they come to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from dojo import doctor
from dojo.cli import UserError, scripts
from dojo.configure import recipe
from dojo.configure.questions import Answers, Question
from dojo.data.options import DataArgs
from dojo.data.pairs.opening import open_pairs
from dojo.data.pairs.options import PairArgs
from dojo.data.sources.captioned import Captioned
from dojo.data.sources.opening import open_source
from dojo.inputs.prompts import read_file
from dojo.models import folders, opening, published
from dojo.models.catalogue import ENTRIES
from dojo.models.family import ModelArgs

GOALS = ("style", "subject", "reward", "preference")
REWARDED = ("grpo", "ddpo", "nft", "refl")
_NONE = "none"
_SEEN = 300  # pictures whose size is looked at
# What encoders that read Chinese call themselves in their configurations.
_CHINESE = {"chatglm", "bert", "mt5"}
_LANGUAGES = ("english", "chinese", "other")


# -- the model ------------------------------------------------------------------------------------


def model_name(text: str) -> str:
    """What `--pretrained_model_name_or_path` takes, of a short name too.

    A model that `scripts/download.sh` has fetched is taken from its folder.
    """
    known = published.find(text)
    entry = next((one for one in ENTRIES if one.kind == "model" and one.name == text), None)
    if entry is not None and (scripts.ROOT / entry.folder).is_dir():
        return entry.folder
    return known.hub_ids[0] if known is not None else text


@cache
def family(text: str) -> tuple[str, Any]:
    """How the names of a model's scripts end, and the package of its family.

    Raises:
        UserError: there is no such model.
    """
    with published.planning():
        package = opening.family_of(ModelArgs(pretrained_model_name_or_path=model_name(text)))
    (ending,) = (
        folders.SCRIPTS[start] for start, one in opening.FAMILIES.items() if one is package
    )
    return ending, package


def script_name(answers: Answers) -> str:
    """The script for a goal, a model and a way."""
    ending, _ = family(answers["model"])
    kind = {
        "style": answers.get("finetune", "lora"),
        "subject": "dreambooth_lora",
        "reward": answers.get("method", ""),
        "preference": "dpo",
    }[answers["goal"]]
    return f"train_{kind}_{ending}.py"


def _there(kind: str, answers: Answers) -> bool:
    return scripts.find(f"train_{kind}_{family(answers['model'])[0]}.py") is not None


def _ways(answers: Answers) -> list[str]:
    """How the network may be trained."""
    if answers["goal"] == "style":
        return [one for one in ("lora", "full") if _there(one, answers)]
    return ["lora", "full"]


def _methods(answers: Answers) -> list[str]:
    return [one for one in REWARDED if _there(one, answers)]


def _check_model(text: str, answers: Answers) -> list[str]:
    _, package = family(text)
    with_model = {**answers, "model": text}
    kinds = {"style": ("lora",), "subject": ("dreambooth_lora",), "preference": ("dpo",)}
    wanted = kinds.get(answers["goal"], REWARDED)
    if not any(_there(one, with_model) for one in wanted):
        raise UserError(f"there is no script for {package.Model.name} and {answers['goal']}")
    here = Path(model_name(text)).exists()
    return [f"{package.Model.name}, {'a folder here' if here else 'to be fetched from the hub'}"]


def _languages(text: str) -> set[str]:
    """What kinds of text encoders a model has."""
    name = model_name(text)
    folder = Path(name)
    if not folder.is_dir() and (known := published.find(name)) is not None:
        folder = published.open_folder(known.name)
    if folders.tencents(folder) is not None:  # whose encoders have other names
        return {"bert", "t5"}
    found: set[str] = set()
    for path in folder.glob("text_encoder*/config.json"):
        found.add(str(json.loads(path.read_text(encoding="utf-8")).get("model_type")))
    return found


def _check_language(text: str, answers: Answers) -> list[str]:
    if text == "english" or (text == "chinese" and _languages(answers["model"]) & _CHINESE):
        return []
    return [
        f"the text encoders of {answers['model']} learned English: captions in another "
        "language are read badly"
    ]


# -- the data -------------------------------------------------------------------------------------


def places(text: str) -> list[str]:
    """The folders of an answer: several stand behind each other with commas."""
    return [one.strip() for one in text.split(",") if one.strip()]


def _opened(text: str, **options: Any) -> list[Captioned]:
    found = places(text)
    args = DataArgs(train_data_dir=found[0], **options)
    return [open_source(one, args) for one in found]


def _plain(text: str) -> list[Captioned]:
    """The pictures, whatever their captions are."""
    return _opened(text, caption_strategy="instance", instance_prompt="x")


def _own_captions(text: str) -> list[Captioned] | None:
    """The pictures with captions of their own; None where a folder has none.

    Raises:
        UserError: there are no pictures.
    """
    try:
        return _opened(text)
    except UserError:
        _plain(text)  # which has the same to say if it is not about captions
        return None


def _pictures(source: Captioned) -> str:
    return f"{len(source)} pictures in {source.description.partition(':')[0]}"


def _check_data(text: str, answers: Answers) -> list[str]:
    if answers["goal"] == "preference":
        pairs = open_pairs(PairArgs(dataset_name=text), progress=False)
        return [pairs.description, f"{len(pairs)} pairs, {pairs.num_ties} ties left out"]
    if "://" in text or "*" in text:
        return ["shards are read in training: nothing of them is looked at now"]
    own = None if answers["goal"] == "subject" else _own_captions(text)
    sources = _plain(text) if own is None else own
    remarks: list[str] = []
    for source in sources:
        remarks.append(source.description if own is not None else _pictures(source))
        bad = [name for name, why in zip(source.names, source.problems, strict=True) if why]
        if bad:
            remarks.append(f"{len(bad)} of {len(source)} have no caption, {bad[0]} for one")
        if sizes := _sizes(source):
            remarks.append(_told_sizes(sizes, len(source)))
    return remarks


def _sizes(source: Captioned) -> list[int]:
    """The shorter sides of the first pictures in pixels; what cannot be opened is left out."""
    found: list[int] = []
    for row in source.rows[:_SEEN]:
        picture = source.store(row)
        if not isinstance(picture, Path):
            return []
        try:
            with Image.open(picture) as image:
                found.append(min(image.size))
        except (OSError, ValueError):
            continue
    return found


def _told_sizes(sizes: Sequence[int], count: int) -> str:
    ordered = sorted(sizes)
    looked = "" if len(sizes) >= count else f" of the first {len(sizes)}"
    return f"shorter sides{looked}: {ordered[0]} to {ordered[-1]} px, half below {_middle(sizes)}"


def _middle(sizes: Sequence[int]) -> int:
    return sorted(sizes)[len(sizes) // 2]


def _captioned(answers: Answers) -> bool:
    """Whether the pictures have captions of their own."""
    text = answers.get("data", "")
    if answers["goal"] != "style" or "://" in text or "*" in text:
        return True
    return _own_captions(text) is not None


def _first_caption(answers: Answers) -> str:
    """A caption of the data, the launcher's own prompt where none is known."""
    text = answers.get("data", "")
    if not text or "://" in text or "*" in text:
        return ""
    sources = _own_captions(text) or ()
    return next((one[0] for source in sources for one in source.captions if one), "")


def _check_prompts(text: str, answers: Answers) -> list[str]:
    if text in _sets():
        return []
    if not Path(text).is_file():
        raise UserError(f"{text} is neither a file nor one of {', '.join(_sets())}")
    return [f"{len(read_file(Path(text), '--prompt_file'))} prompts"]


def _sets() -> tuple[str, ...]:
    return ("animals", "pocket")


def _check_size(text: str, answers: Answers) -> list[str]:
    size = _whole(text, least=16)
    step = 64 if size >= 256 else 8
    if size % step:
        raise UserError(f"{size} is no multiple of {step}")
    texts = answers.get("data", "")
    if answers["goal"] == "preference" or not texts or "://" in texts or "*" in texts:
        return []
    found = [side for source in _plain(texts) for side in _sizes(source)]
    smaller = sum(side < size for side in found)
    return (
        [
            f"{smaller} of {len(found)} pictures are smaller and will be enlarged "
            "(--max_upscale leaves them out)"
        ]
        if smaller
        else []
    )


def _native(answers: Answers) -> str:
    """The size that a model draws at."""
    with published.planning():
        name = model_name(answers["model"])
        model = opening.open_model(ModelArgs(pretrained_model_name_or_path=name))
    return str(model.native_size)


def _whole(text: str, *, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{text!r} is no whole number of at least {least}")
    return int(text)


# -- the machine ----------------------------------------------------------------------------------


@cache
def _machine() -> dict[str, Any]:
    return doctor.examine()


def _card(answers: Answers) -> str:
    """GB of this machine's first GPU."""
    gpus = _machine()["torch"].get("GPUs") or ()
    return str(round(gpus[0]["GiB"])) if gpus else _NONE


def _check_card(text: str, answers: Answers) -> list[str]:
    if text != _NONE and not text.replace(".", "", 1).isdecimal():
        raise UserError(f"{text!r} is no number of GB (or {_NONE})")
    known = [one for one in _machine()["remarks"] if "GPU" in one or "RAM" in one or "free" in one]
    return [f"python -m dojo.doctor: {one}" for one in known]


def _check_output(text: str, answers: Answers) -> list[str]:
    folder = Path(text)
    if folder.is_file():
        raise UserError(f"{text} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        return [f"{text} is not empty: a run in it goes on, anything else is refused"]
    return []


# -- the questions --------------------------------------------------------------------------------


def _is(*goals: str) -> Any:
    return lambda answers: answers["goal"] in goals


QUESTIONS = (
    Question(
        name="goal",
        text="What is to be learned",
        choices=lambda answers: GOALS,
        default=lambda answers: "style",
    ),
    Question(
        name="model",
        text=f"The model: folder, file, hub id or short name ({', '.join(published.MODELS)})",
        check=_check_model,
    ),
    Question(
        name="finetune",
        text="An adapter or every weight",
        choices=_ways,
        default=lambda answers: "lora",
        when=_is("style", "reward", "preference"),
    ),
    Question(
        name="method",
        text="The method",
        choices=_methods,
        default=lambda answers: _methods(answers)[0],
        when=_is("reward"),
    ),
    Question(
        name="data",
        text="The data: folder or hub id, several with commas",
        check=_check_data,
        when=_is("style", "subject", "preference"),
    ),
    Question(
        name="prompts",
        text="The prompts: a file, or a set (animals, pocket)",
        default=lambda answers: "animals",
        check=_check_prompts,
        when=_is("reward"),
    ),
    Question(
        name="reward",
        text="The reward (python -m dojo.rewards list)",
        default=lambda answers: "aesthetic",
        when=_is("reward"),
    ),
    Question(
        name="caption",
        text="One caption for all pictures",
        when=lambda answers: answers["goal"] == "subject" or not _captioned(answers),
    ),
    Question(
        name="class_caption",
        text="A caption of its class, whose pictures keep the rest as it was; empty: none",
        default=lambda answers: "",
        when=_is("subject"),
    ),
    Question(name="resolution", text="Pixels of a side", default=_native, check=_check_size),
    Question(
        name="language",
        text="Captions and prompts are in",
        choices=lambda answers: _LANGUAGES,
        default=lambda answers: "english",
        check=_check_language,
    ),
    Question(
        name="card", text=f"The card's memory in GB, or {_NONE}", default=_card, check=_check_card
    ),
    Question(
        name="steps",
        text="Optimizer steps; empty: the launcher's",
        default=lambda answers: "",
        check=lambda text, answers: [str(_whole(text))][1:] if text else [],
    ),
    Question(
        name="validation",
        text="A prompt that is drawn meanwhile",
        default=lambda answers: answers.get("caption") or _first_caption(answers),
        when=_is("style", "subject"),
    ),
    Question(
        name="output_dir",
        text="The folder of the run",
        default=lambda answers: f"outputs/{script_name(answers)[6:-3]}",
        check=_check_output,
    ),
)


# -- what it comes to -----------------------------------------------------------------------------


def options_of(answers: Answers, data_config: Path) -> tuple[recipe.Options, list[dict[str, Any]]]:
    """The options, and the entries of a `--data_config` where there are several folders.

    Args:
        data_config: where these would be written.
    Raises:
        UserError: the launcher refuses the answers.
    """
    script = scripts.ROOT / script_name(answers)
    options = recipe.of_launcher(script, dict(_variables(answers)))
    changed, entries = dict(_changes(answers)), []
    if len(places(answers.get("data", ""))) > 1:
        entries = [
            {"path": str(Path(one).resolve()) if Path(one).is_dir() else one}
            for one in places(answers["data"])
        ]
        gone = ("dataset_name", "train_data_dir", "instance_data_dir")
        changed |= {**dict.fromkeys(gone), "data_config": str(data_config)}
    return {**options, **changed}, entries


def _variables(answers: Answers) -> Iterator[tuple[str, str]]:
    """Of the launcher's environment."""
    yield "MODEL_NAME", model_name(answers["model"])
    data = places(answers.get("data", ""))
    for name, value in (
        ("DATASET_NAME", data[0] if data else ""),
        ("INSTANCE_DIR", data[0] if data else ""),
        ("INSTANCE_PROMPT", answers.get("caption", "")),
        ("CLASS_PROMPT", answers.get("class_caption", "")),
        ("REWARD", answers.get("reward", "")),
        ("USE_LORA", "1" if answers.get("finetune") == "lora" else ""),
        ("OUTPUT_DIR", answers["output_dir"]),
        ("RESOLUTION", answers["resolution"]),
    ):
        if value:
            yield name, value


def _changes(answers: Answers) -> Iterator[tuple[str, Any]]:
    """The options that the launcher has no variable for; None takes one away."""
    if answers.get("caption") and answers["goal"] == "style":
        yield "instance_prompt", answers["caption"]
        yield "caption_column", None
    if answers["goal"] == "subject" and not answers["class_caption"]:
        kept = ("with_prior_preservation", "class_data_dir", "class_prompt", "num_class_images")
        yield from ((name, None) for name in (*kept, "prior_loss_weight"))
        yield "validation_prompt", answers["caption"]
    if prompts := answers.get("prompts"):
        is_set = prompts in _sets()
        yield "prompt_set", prompts if is_set else None
        yield "prompt_file", None if is_set else prompts
    if answers["goal"] in ("reward", "preference"):
        yield "finetune", answers["finetune"]
    if answers["steps"]:
        yield "max_train_steps", answers["steps"]
    if answers.get("validation"):
        yield "validation_prompt", answers["validation"]
    if answers["card"] == _NONE:
        yield "mixed_precision", "no"
        yield "dataloader_num_workers", None
