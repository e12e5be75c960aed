"""One check after every load: is what was loaded whole, and does it fit?

transformers fills the tensors that a file lacks with noise, diffusers leaves them without memory,
and a tokenizer without its files knows two words: all of that is at most a line in a log. Here it
is a sentence that names folder and part, before anything is computed, cached or written. Networks,
tokenizers and whole pipelines are loaded through this module and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dojo.cli import UserError
from dojo.files import tensors
from dojo.lazy import diffusers, nn, no_grad, torch, transformers
from dojo.models import published

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model_index.json"

# Tensors that files have and a network may leave aside, by its class. Position ids are counted
# off, not learned; the others are the half of a larger model that this class does not have.
_LEFT_ASIDE = {
    "": r"(.*\.)?position_ids",
    "CLIPTextModel": r"(vision_model|visual_projection|text_projection|logit_scale)\b.*",
    "CLIPTextModelWithProjection": r"(vision_model|visual_projection|logit_scale)\b.*",
    "CLIPVisionModelWithProjection": r"(text_model|text_projection|logit_scale)\b.*",
    "T5EncoderModel": r"(decoder|lm_head)\..*",
    "BertModel": r"(bert\.)?(pooler|cls)\..*|logit_scale|(visual|text_projection)\b.*",
}
# Any one of these sets of files makes a tokenizer.
_VOCABULARIES = (
    {"tokenizer.json"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
    {"spiece.model"},
    {"tokenizer.model"},
    {"sentencepiece.bpe.model"},
)
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors")
_SPARE_ROWS = 128  # tables are rounded up: 32,128 rows for the 32,100 tokens of T5
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_MANY = {"layers": 1000}  # no network has more; building it would only fill the memory
_MOST = 10**8


# ---- loading ----


def network(kind: Any, name: str | Path, part: str = "", *, flag: str, **options: Any) -> Any:
    """`kind.from_pretrained`, and the check that every tensor arrived and is made of numbers.

    Args:
        kind: a class of diffusers or transformers.
        name: a folder or the id of a hub repository.
        part: sub-folder of it.
        flag: what the user named it with, for the sentence.
        options: for `from_pretrained`.
    Raises:
        UserError: it is damaged, incomplete, or other than its configuration.
    """
    where, folder = subject(name, part, flag), Path(name) / part
    if folder.is_dir():
        _check_settings(folder, where)
    if part:
        options["subfolder"] = part
    if variant := only_variant(folder, options.get("variant")):
        options["variant"] = variant
    try:
        model, report = kind.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # the libraries have many kinds of them
        reason = _reason(folder, kind, options.get("variant"), error)
        raise UserError(f"{where} cannot be read ({reason})") from error
    check_whole(model, report, where)
    state = model.state_dict()
    if folder.is_dir():
        _check_types(weight_files(folder, options.get("variant")), state, where)
    check_finite(state, where)
    return model


Prepare: TypeAlias = "Callable[[nn.Module, torch.device], None]"
"""Puts layers into a network that store their weights in a way of their own: on the meta device
they wait for them (`take`), elsewhere they take them along. The device is the run's."""


def prepared(
    kind: Any,
    folder: Path | None,
    part: str,
    otherwise: Callable[[], Any],
    prepare: Prepare,
    *,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None,
    flag: str,
) -> Any:
    """A frozen network of diffusers on a device; some of its layers store their weights otherwise.

    It is read tensor by tensor, so that no more than one is in memory as the file has it. What that
    cannot read is read by `otherwise`, whole, and its layers are replaced one after another.

    Args:
        folder: the model's; None where `part` does not come from it.
        otherwise: the network in `dtype`, or the sentence about what is wrong with it.
    Raises:
        UserError: it is damaged, incomplete, or other than its configuration.
    """
    model = None
    if folder is not None:
        where = subject(folder, part, flag)
        model = _in_pieces(kind, folder / part, prepare, dtype, device, variant, where)
    if model is None:
        model = otherwise()
        prepare(model, device)
    return model.requires_grad_(False).to(device)


@no_grad
def _in_pieces(
    kind: Any,
    folder: Path,
    prepare: Prepare,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None,
    where: str,
) -> Any:
    """A network read tensor by tensor; None where that is not possible.

    Raises:
        UserError: a tensor is not finite.
    """
    _check_settings(folder, where)
    paths = weight_files(folder, variant)
    try:
        with torch.device("meta"):
            model = _empty(kind, folder)
        nn.Module.to(model, dtype)  # diffusers' own warns
        headers = {path: tensors.read_header(path)[0] for path in paths}
    except Exception:  # whatever it is, reading the network whole says it
        return None
    sizes = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {name: entry for header in headers.values() for name, entry in header.items()}
    if {name: entry["shape"] for name, entry in found.items()} != sizes:
        return None
    plain = {entry["dtype"] for entry in found.values()} <= _FLOATS - {"F8_E5M2"}
    if not plain or kind._keep_in_fp32_modules:
        return None
    prepare(model, device)
    for path, header in headers.items():
        with path.open("rb") as file:
            for name, entry in sorted(header.items(), key=lambda one: one[1]["data_offsets"]):
                tensor = tensors.read_tensor(file, entry)
                check_finite({name: tensor}, where)
                _place(model, name, tensor.to(device, dtype))
    left = [*model.parameters(), *model.buffers()]
    return None if any(tensor.is_meta for tensor in left) else model.eval()


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Gives a network on the meta device one of its tensors."""
    parent, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(parent)
    if leaf == "weight" and hasattr(module, "take"):
        module.take(tensor)
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def tokenizer(
    kind: Any, name: str | Path, part: str = "", *, flag: str, encoder: Any = None
) -> Any:
    """`kind.from_pretrained` of a tokenizer, or of a processor that has one, and its check.

    Args:
        kind, name, part, flag: as for `network`.
        encoder: what reads the tokens, if it is there.
    Raises:
        UserError: files are missing or damaged, or the vocabulary is not the encoder's.
    """
    where, folder = subject(name, part, flag), Path(name) / part
    if Path(name).is_dir():
        check_vocabulary_files(folder, where, kind)
    try:
        made = kind.from_pretrained(name, **({"subfolder": part} if part else {}))
    except Exception as error:
        raise UserError(f"{where} cannot be read ({_reason(folder, None, None, error)})") from error
    if encoder is not None:
        words = made if hasattr(made, "get_vocab") else made.tokenizer
        check_vocabulary(words, encoder, where)
    return made


def pipeline(name: str | Path, *, flag: str, kind: Any = None, **options: Any) -> Any:
    """A whole pipeline of a folder or hub id, every network and tokenizer of it checked.

    A T5 that the folder says it does not have stays away without being named.

    Args:
        kind: the pipeline's class; by default the folder says it.
        options: for `from_pretrained`: `dtype`, `variant`, parts that are there already or None.
    Raises:
        UserError: a part is damaged, incomplete, or does not fit another.
    """
    folder = Path(name)
    variant = options.get("variant")
    if not folder.is_dir():
        try:
            folder = Path(diffusers.DiffusionPipeline.download(str(name), variant=variant))
        except Exception as error:
            raise UserError(f"{flag}: {name} could not be loaded ({_line(error)})") from error
    index = read_index(folder, flag)
    parts: dict[str, Any] = {
        part: None for part in ("text_encoder_3", "tokenizer_3") if index.get(part) == [None, None]
    }
    parts |= {part: options.pop(part) for part in index if part in options}
    how = {key: options[key] for key in ("dtype", "variant") if options.get(key) is not None}
    for part in index:  # the networks first: the tokenizers are held against them
        made = None if part in parts else class_of(index, part, folder, flag)
        if isinstance(made, type) and issubclass(made, nn.Module):
            parts[part] = network(made, folder, part, flag=flag, **how)
    for part, entry in index.items():
        if part.startswith("tokenizer") and part not in parts and _is_part(entry):
            made = class_of(index, part, folder, flag)
            encoder = parts.get(part.replace("tokenizer", "text_encoder"))
            parts[part] = tokenizer(made, folder, part, flag=flag, encoder=encoder)
    try:
        kind = kind or diffusers.DiffusionPipeline
        return kind.from_pretrained(folder, **parts, **options)
    except Exception as error:
        raise UserError(f"{flag}: {name} could not be loaded ({_line(error)})") from error


def subject(name: str | Path, part: str, flag: str) -> str:
    """How sentences about a part begin."""
    return f"{flag}: {Path(name) / part if part else name}"


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: it is missing or holds something else; `where` begins the sentence.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "is missing" if not path.is_file() else f"is damaged ({_line(error)})"
        raise UserError(f"{where}/{path.name} {what}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}/{path.name} is damaged (it holds no JSON object)")
    return content


def read_index(folder: Path, flag: str) -> dict[str, Any]:
    """The model_index.json of a pipeline's folder.

    Raises:
        UserError: it is missing or damaged.
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"{flag}: {folder} has no {INDEX}")
    index = read_json(folder / INDEX, f"{flag}: {folder}")
    wrong = [part for part, entry in index.items() if isinstance(entry, list) and len(entry) != 2]
    if not isinstance(index.get("_class_name"), str) or wrong:
        what = f"its entry {wrong[0]}" if wrong else "_class_name"
        raise UserError(f"{flag}: {folder}: {INDEX} is damaged ({what} names no class)")
    return index


def _is_part(entry: Any) -> bool:
    return isinstance(entry, list) and entry[0] is not None


def class_of(index: Mapping[str, Any], part: str, folder: Path, flag: str) -> Any:
    """The class that a pipeline's index names for a part; None of foreign code, or of no part.

    Raises:
        UserError: its library does not have it.
    """
    entry: Any = index.get(part)
    if not _is_part(entry):
        return None
    library, name = entry
    homes = {"diffusers": diffusers, "transformers": transformers}
    home = homes.get(library) or getattr(diffusers.pipelines, str(library), None)
    if home is None:
        return None  # diffusers says what it thinks of it
    found = getattr(home, str(name), None)
    if found is None:
        version = f" {home.__version__}" if library in homes else ""
        raise UserError(
            f"{flag}: {folder}: {INDEX} names {name} for {part}, which is no class of "
            f"{library}{version}"
        )
    return found


# ---- the checks ----


def check_whole(model: nn.Module, report: Mapping[str, Any], where: str) -> None:
    """Looks at what `from_pretrained(output_loading_info=True)` reports, and for lost parameters.

    Raises:
        UserError: tensors are missing, over, or of another size.
    """
    lost = {name for name, value in model.state_dict().items() if value.is_meta}
    absent = sorted(set(report["missing_keys"]) | lost)
    if absent:
        raise UserError(f"{where} is incomplete: it has no {_some(absent)}")
    known = [_LEFT_ASIDE[""], _LEFT_ASIDE.get(type(model).__name__, r"(?!)")]
    over = sorted(
        name
        for name in report["unexpected_keys"]
        if not any(re.fullmatch(pattern, name) for pattern in known)
    )
    if over:
        raise UserError(
            f"{where} is another network than its configuration: a {type(model).__name__} has no "
            f"place for {_some(over)}"
        )
    other = sorted(str(one[0] if isinstance(one, tuple) else one) for one in _other_sizes(report))
    if other:
        raise UserError(f"{where} has other sizes than its configuration: {_some(other)}")


def _other_sizes(report: Mapping[str, Any]) -> Collection[Any]:
    return report.get("mismatched_keys") or ()


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Refuses weights that are not numbers.

    Raises:
        UserError: naming them.
    """
    wrong = not_finite(state)
    if wrong:
        raise UserError(f"{where} is damaged: {_some(wrong)} is not finite (NaN or infinity)")


@no_grad
def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity.

    One pass that writes nothing (about 20 GB/s on one CPU core), and one answer for all of them.
    """
    floats = {
        name: value
        for name, value in state.items()
        if value.is_floating_point() and value.numel() and not value.is_meta
    }
    ends: list[Tensor] = []
    for value in floats.values():
        low, high = (value.float() if value.itemsize < 2 else value).aminmax()
        ends.append(torch.stack([low, high]).double())  # NaN comes through
    finite = torch.stack(ends).isfinite().all(1).tolist() if ends else []
    return [name for name, good in zip(floats, finite, strict=True) if not good]


def check_vocabulary(words: Any, encoder: Any, where: str) -> None:
    """Holds a tokenizer's vocabulary against the table of embeddings that it points into.

    Tables are often rounded up, and may have rows for tokens that were learned beside.

    Raises:
        UserError: the tokenizer has tokens without a row, or far too few for the table.
    """
    rows = _table(encoder)
    if rows is None:
        return
    size = max(words.get_vocab().values(), default=-1) + 1
    if size > rows:
        raise UserError(
            f"{where} is another model's: it knows {size} tokens, the text encoder {rows}"
        )
    if rows - size > max(_SPARE_ROWS, rows // 16):
        raise UserError(
            f"{where} is incomplete or another model's: it knows only {size} of the {rows} tokens "
            "of the text encoder"
        )


def _table(encoder: Any) -> int | None:
    """Rows of an encoder's table of embeddings; None of one that does not say it."""
    tower = getattr(encoder, "text_model", encoder)
    try:
        return int(tower.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def check_vocabulary_files(folder: Path, where: str, kind: Any = None) -> None:
    """Refuses a folder in which no tokenizer finds its words.

    Args:
        kind: a tokenizer's class, whose own names of files count too.
    Raises:
        UserError: naming what is missing.
    """
    if published.has_no_weights(folder.parent):
        return
    own: Mapping[str, str] = getattr(kind, "vocab_files_names", {})
    sets = [*_VOCABULARIES, {name for key, name in own.items() if key != "tokenizer_file"}]
    there = {path.name for path in folder.glob("*")}
    if not any(names and names <= there for names in sets):
        wanted = "tokenizer.json"
        if sets[-1]:
            wanted += f", or {' and '.join(sorted(sets[-1]))}"
        raise UserError(f"{where} is incomplete: a tokenizer needs {wanted}")


def _check_settings(folder: Path, where: str) -> None:
    """Refuses numbers in config.json that would fill the memory before anything could be said."""
    for name, value in read_json(folder / "config.json", where).items():
        most = next((most for word, most in _MANY.items() if name.endswith(word)), _MOST)
        if isinstance(value, int) and value > most:
            raise UserError(f"{where}/config.json says {name} {value}, which no network has")


def _check_types(files: Iterable[Path], state: Mapping[str, Tensor], where: str) -> None:
    """Refuses whole numbers, which the libraries would take for weights without their scales."""
    floats = {name for name, value in state.items() if value.is_floating_point()}
    for path in files:
        for name, entry in tensors.read_header(path)[0].items():
            if entry["dtype"] not in _FLOATS and floats.intersection(_spellings(name)):
                raise UserError(
                    f"{where}: {path.name} holds {name} as {entry['dtype']}; weights are read as "
                    "floating-point numbers only, not quantised"
                )


# ---- files ----


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors that a model's folder is loaded from, whole or in shards."""
    infix = f".{variant}" if variant else ""
    chosen = []
    for path in sorted(folder.glob("*.safetensors")):
        plain = path.name.replace(infix, "", 1) if infix and infix in path.name else None
        name = plain if variant else path.name
        if name and _WEIGHTS.fullmatch(name):
            chosen.append(path)
    whole = [path for path in chosen if "-of-" not in path.name]
    if not chosen and variant is None and (only := only_variant(folder, None)):
        return weight_files(folder, only)
    return whole or chosen


def only_variant(folder: Path, variant: str | None) -> str | None:
    """The variant to load: what was asked for, or fp16 where nothing else is in a folder.

    So Kwai-Kolors/Kolors-diffusers is published.
    """
    names = [path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin")]
    only = bool(names) and all(".fp16" in name for name in names)
    return "fp16" if variant is None and only else variant


def _reason(folder: Path, kind: Any, variant: str | None, error: Exception) -> str:
    """Why a folder could not be loaded, naming the file; of a hub's, what the library says."""
    if not folder.is_dir():
        return _line(error)
    for path in sorted(folder.glob("*.json")):
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as broken:
            return f"{path.name} is damaged ({_line(broken)})"
        listed = content.get("weight_map", {}) if isinstance(content, dict) else {}
        absent = sorted({name for name in listed.values() if not (folder / name).is_file()})
        if absent and path.name.endswith(".json") and ".index." in path.name:
            return f"{_some(absent)} is missing, which {path.name} lists"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors.read_header(path)
        except (OSError, ValueError) as broken:
            return f"{path.name} is damaged ({_line(broken)})"
    files = weight_files(folder, variant)
    if kind is not None and not files and not list(folder.glob("*.bin")):
        return f"it has no weights of the variant {variant}" if variant else "it has no weights"
    if kind is not None and variant and not any(f".{variant}" in p.name for p in folder.glob("*")):
        return f"it has no weights of the variant {variant}"
    return _other_shape(folder, kind, files) or _line(error)


def _other_shape(folder: Path, kind: Any, files: Iterable[Path]) -> str | None:
    """The first tensor whose size is not that of the configuration, in words."""
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        return None
    try:
        with torch.device("meta"):
            model = _empty(kind, folder)
    except Exception as error:  # whatever a class says to sizes that it cannot have
        return f"config.json makes no network: {_line(error)}"
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    for path in files:
        for name, entry in sorted(tensors.read_header(path)[0].items()):
            for spelled in _spellings(name):
                if wanted.get(spelled, entry["shape"]) != entry["shape"]:
                    return (
                        f"{name} of {path.name} has the size {entry['shape']}, config.json asks "
                        f"for {wanted[spelled]}"
                    )
    return None


def _spellings(name: str) -> tuple[str, ...]:
    """The names that a CLIP's tensor has in one version of transformers or another."""
    return name, name.removeprefix("text_model."), f"text_model.{name}"


def _empty(kind: Any, folder: Path) -> nn.Module:
    """A network of a folder's configuration, made where the caller says."""
    if issubclass(kind, transformers.PreTrainedModel):
        config: Any = kind.config_class
        return kind(config.from_pretrained(folder))
    return kind.from_config(read_json(folder / "config.json", str(folder)))


def _line(error: Exception) -> str:
    """What an error says first."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).strip()


def _some(names: Collection[str]) -> str:
    """The first names of a list, and how many more there are."""
    shown = list(names)[:3]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
