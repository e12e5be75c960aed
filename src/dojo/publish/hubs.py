"""The way of a result to the Hugging Face Hub and to ModelScope.

What can be checked is checked before the training, and the upload comes when everything is on the
disk. A token is handed to the hubs' own libraries and to nothing else: what an error says is
cleaned of it, and a file that holds one is not sent.
"""

from __future__ import annotations

import html
import json
import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dojo.cli import UserError, incidental
from dojo.files.records import read_table
from dojo.publish.card import WEIGHTS, last_pictures
from dojo.publish.learned import EMBEDDINGS
from dojo.run import best

RECORDERS = ("wandb", "swanlab", "all")  # trackers that store the command line
# What is sent, by name. Anything else in the folder stays: checkpoints, logs, caches, notes.
_FILES = (
    "README.md",
    "LICENSE*",
    "args.json",
    "metrics.jsonl",
    "report.html",
    "contact_sheet*.png",
    "before_after.png",
    "scores.json",
    "model_index.json",
    "model.safetensors",
    "pytorch_lora_weights*.safetensors",
    "comfyui/adapter_model.safetensors",
    "comfyui/adapter_config.json",
)
_PARTS = ("transformer", "unet")  # what may have been trained whole
_LEARNED = (*_PARTS, EMBEDDINGS)
_TEXTS = (".md", ".json", ".jsonl", ".html")
# diffusers writes into a part's config.json where it was loaded from.
_RECORDS = ("args.json", "config.json", "model_index.json")
_CLEANED = (*_RECORDS, "README.md", "report.html")
_HINTS = {
    401: "the token is not accepted: it is wrong or has expired",
    403: "the token may not write there",
}
_NOT_PRIVATE = "--hub_private_repo: the repository exists already and is not private"


@incidental
@dataclass(frozen=True, kw_only=True)
class PublishArgs:
    """Where the result goes in the end; nothing leaves the machine unless it is asked for."""

    push_to_hub: bool = False
    """upload the result to the Hugging Face Hub"""
    hub_model_id: str | None = None
    """repository on the Hub, name or owner/name; unset: the output folder's name under the
    token's user"""
    hub_token: str | None = field(default=None, repr=False)
    """rather set HF_TOKEN or run `hf auth login`: a token on the command line is seen by every
    user of the machine"""
    hub_private_repo: bool = False
    """make the new repositories private, on ModelScope too"""
    modelscope_model_id: str | None = None
    """upload the result to ModelScope, to this owner/name"""
    modelscope_token: str | None = field(default=None, repr=False)
    """rather set MODELSCOPE_API_TOKEN, for the same reason"""

    def check(self, folder: Path, report_to: Sequence[str] = ("none",)) -> None:
        """Refuses before the training what would fail after it.

        Every process may call it; the first one alone asks the hubs whose the tokens are. A hub
        that does not answer is a warning.

        Args:
            folder: the output folder, which names an unnamed repository.
            report_to: the chosen trackers.
        Raises:
            UserError: a token that a tracker would record, that is missing, wrong or may only
                read; a malformed repository; a missing package.
        """
        if told := [name for name in report_to if name in RECORDERS]:
            for flag, variable in (
                ("hub_token", "HF_TOKEN"),
                ("modelscope_token", "MODELSCOPE_API_TOKEN"),
            ):
                if getattr(self, flag):
                    raise UserError(
                        f"--{flag}: --report_to {told[0]} stores the command line, and the "
                        f"token with it; set {variable} instead"
                    )
        main = os.environ.get("RANK", "0") == "0"
        if self.hub_model_id and not self.push_to_hub and main:
            _warn("--hub_model_id does nothing without --push_to_hub")
        if self.push_to_hub and constants.is_offline_mode():
            raise UserError("--push_to_hub: HF_HUB_OFFLINE is set; unset it to upload")
        for flag, name in self.goals(folder).items():
            _check_name(flag, name)
        for flag, token in self.tokens().items():
            if main:
                _ask_whose(flag, token, self.goals(folder)[flag])

    def goals(self, folder: Path) -> dict[str, str]:
        """The repositories to fill, by the flag that names them."""
        goals = {}
        if self.push_to_hub:
            goals["hub_model_id"] = self.hub_model_id or name_of(folder)
        if self.modelscope_model_id is not None:
            goals["modelscope_model_id"] = self.modelscope_model_id
        return goals

    def tokens(self) -> dict[str, str]:
        """The tokens for them, wherever they come from.

        Raises:
            UserError: there is none, or the package is missing.
        """
        tokens = {}
        if self.push_to_hub:
            tokens["hub_model_id"] = self.hub_token or get_token() or ""
            if not tokens["hub_model_id"]:
                raise UserError("--push_to_hub: no token; set HF_TOKEN or run `hf auth login`")
        if self.modelscope_model_id is not None:
            if not find_spec("modelscope_hub"):
                raise UserError(
                    "--modelscope_model_id: the package modelscope is not installed; "
                    "pip install 'modelscope>=1.40'"
                )
            from modelscope_hub import HubConfig  # pyright: ignore[reportMissingImports]

            # The library's own order: the argument, MODELSCOPE_API_TOKEN, `modelscope login`.
            tokens["modelscope_model_id"] = HubConfig(token=self.modelscope_token).token or ""
            if not tokens["modelscope_model_id"]:
                raise UserError(
                    "--modelscope_model_id: no token; set MODELSCOPE_API_TOKEN or run "
                    "`modelscope login`"
                )
        return tokens


def upload(folder: Path, args: PublishArgs, *, what: str | None = None) -> list[str]:
    """Uploads a result that is complete on the disk; one process calls it.

    Sent are the card, the weights, the scheduler, args.json, the metrics, the report and the
    validation pictures of the last step. What is sent names private folders by their last part.

    Args:
        folder: a finished output folder, a pipeline folder, a `checkpoint-N` or `best`.
        what: what it is, for the commit's message; unset: LoRA or model, as it is.
    Returns:
        The addresses of the repositories; empty when no upload was asked for.
    Raises:
        UserError: there is no result, or an upload failed. Every upload was tried, the folder is
            as it was, and the message says how to publish again.
    """
    tokens = args.tokens()
    if not tokens:
        return []
    addresses, reasons, again = [], [], []
    secrets = list(tokens.values())
    message = f"Upload {what or ('LoRA' if find_result(folder) == WEIGHTS else 'model')}"
    with tempfile.TemporaryDirectory(prefix="dojo-publish-") as temporary, _clean_logs(secrets):
        staged = Path(temporary)
        _stage(folder, staged, secrets)
        for flag, name in args.goals(folder).items():
            send = _to_hub if flag == "hub_model_id" else _to_modelscope
            try:
                address = send(staged, name, tokens[flag], args.hub_private_repo, message)
            except Exception as error:
                reasons.append(f"{name}: {_reason(error, secrets)}")
                again += [f"--{flag}", name]
            else:
                addresses.append(address)
                print(f"published: {address}", flush=True)
    if reasons:
        again = ["python", "-m", "dojo.publish", str(folder), *again]
        again += ["--private"] if args.hub_private_repo else []
        raise UserError(
            f"the upload failed ({'; '.join(reasons)}). The result is safe in {folder}; publish "
            f"it again with: {shlex.join(again)}"
        )
    return addresses


def find_result(folder: Path) -> str:
    """What a folder holds, as `write_card` names it: a LoRA's file, "" for a pipeline, or a part.

    Raises:
        UserError: nothing that could be published.
    """
    if (folder / WEIGHTS).is_file():
        return WEIGHTS
    if (folder / "model_index.json").is_file():
        return ""
    for part in _LEARNED:
        if list((folder / part).glob("*.safetensors")):
            return part
    raise UserError(
        f"{folder} holds no result: neither {WEIGHTS} nor model_index.json nor a folder "
        f"{' or '.join(_LEARNED)} with weights (a run that is not over has them in checkpoint-N)"
    )


def result_files(folder: Path) -> list[str]:
    """The files of a result that are sent, relative to its folder.

    Raises:
        UserError: there is no result.
    """
    find_result(folder)
    found = [path for pattern in _FILES for path in folder.glob(pattern)]
    parts = read_table(folder / "model_index.json").keys()
    for part in {"scheduler", *_LEARNED, *(f"{part}_ema" for part in _PARTS), *parts}:
        found += (folder / part).rglob("*")
    found += last_pictures(folder)
    names = {path.relative_to(folder) for path in found if path.is_file()}
    return sorted(
        name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)
    )


def _stage(folder: Path, staged: Path, secrets: Sequence[str]) -> None:
    """Links what is to be sent into an empty folder, so that both hubs get just that.

    Where a text names private folders, a copy that does not takes its place.

    Raises:
        UserError: a text holds a token.
    """
    names = result_files(folder)
    records = [folder / name for name in names if Path(name).name in _RECORDS]
    private = {path for record in records for path in _paths(read_table(record))}
    for name in names:
        source, target = folder / name, staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text("utf-8", "replace") if source.suffix in _TEXTS else ""
        if any(secret in text for secret in secrets):
            raise UserError(f"{source} holds the token: it was not sent; remove it there")
        shared = _without_folders(text, private) if source.name in _CLEANED else text
        if shared == text:
            target.symlink_to(source.resolve())
        else:
            target.write_text(shared, encoding="utf-8")


def _paths(value: Any) -> set[str]:
    """The paths in a record that tell where its owner keeps things."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return set().union(*map(_paths, items))
    is_path = isinstance(value, str) and value[:1] in ("/", "~") and value.count("/") > 1
    return {value} if is_path else set()


def _without_folders(text: str, paths: set[str]) -> str:
    """A text, JSON or HTML, with only the last parts of these paths."""
    for path in sorted(paths, key=len, reverse=True):
        for form in (path, json.dumps(path)[1:-1], html.escape(path)):
            text = text.replace(form, Path(path).name)
    return text


# -- the two hubs -----------------------------------------------------------------------------


def run_of(folder: Path) -> Path:
    """The folder of the run that a result is of: the one above for a checkpoint or the best."""
    is_part = any((folder / record).is_file() for record in ("state.json", best.RECORD))
    return folder.resolve().parent if is_part else folder


def name_of(folder: Path) -> str:
    """A folder's name; that of a checkpoint or of the best weights alone would say nothing."""
    whole = folder.resolve()
    is_part = re.fullmatch(r"checkpoint-\d+", whole.name) or run_of(folder) != folder
    return f"{whole.parent.name}-{whole.name}" if is_part else whole.name


def _check_name(flag: str, name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"--{flag}: {name!r} cannot be a repository; it takes letters, digits, '-', '_' "
            "and '.', as name or owner/name"
        ) from None
    if flag == "modelscope_model_id" and "/" not in name:
        raise UserError("--modelscope_model_id must be owner/name")


def _ask_whose(flag: str, token: str, name: str) -> None:
    """Refuses a token that the hub refuses; a hub out of reach is a warning."""
    try:
        if flag == "modelscope_model_id":
            _modelscope(token).whoami()
            return
        user = HfApi(token=token).whoami()
    except Exception as error:
        if _status(error) == 401:
            raise UserError(f"--{flag}: {_HINTS[401]}") from None
        _warn(f"--{flag}: the token could not be checked ({type(error).__name__}); going on")
        return
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("--push_to_hub: the token may only read; make one that may write")
    owners = [user.get("name"), *(group.get("name") for group in user.get("orgs", []))]
    if "/" in name and name.split("/")[0] not in owners:
        _warn(f"--hub_model_id {name}: the token is {owners[0]}'s; can it write there?")


def _to_hub(staged: Path, name: str, token: str, private: bool, message: str) -> str:
    api = HfApi(token=token)
    # Not private means as the owner's settings say.
    repo_id = api.create_repo(name, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise UserError(_NOT_PRIVATE)
    api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message=message)
    return f"{api.endpoint}/{repo_id}"


def _to_modelscope(staged: Path, name: str, token: str, private: bool, message: str) -> str:
    from modelscope_hub import License, Visibility  # pyright: ignore[reportMissingImports]
    from modelscope_hub.errors import AlreadyExistsError  # pyright: ignore[reportMissingImports]

    api = _modelscope(token)
    visibility = Visibility.PRIVATE if private else Visibility.PUBLIC
    try:
        # Left to itself the client makes the repository public and calls it Apache-2.0.
        api.create_repo(name, "model", visibility=visibility, license=License.OTHER)
    except AlreadyExistsError:
        if private and api.get_repo(name, "model").visibility != visibility:
            raise UserError(_NOT_PRIVATE) from None
    # Without its cache, a file in the folder: the hub knows itself what has arrived already.
    api.upload_folder(name, "model", staged, commit_message=message, use_cache=False)
    return f"{api.legacy.endpoint}/models/{name}"


def _modelscope(token: str) -> Any:
    """ModelScope's client; the package is an extra."""
    from modelscope_hub import HubApi, HubConfig  # pyright: ignore[reportMissingImports]

    return HubApi(HubConfig(token=token))


# -- words ------------------------------------------------------------------------------------


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of either hub's library."""
    response = getattr(error, "response", None)
    return getattr(error, "status_code", None) or getattr(response, "status_code", None)


def _reason(error: BaseException, secrets: Sequence[str]) -> str:
    """What went wrong, in one line."""
    status = _status(error)
    cause = error.__cause__
    text = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    text = text.splitlines()[0]
    if status in _HINTS:
        text = f"{_HINTS[status]} (HTTP {status})"
    elif status:
        text = f"HTTP {status}: {text}"
    elif cause is not None and str(cause) not in text:
        text = f"{text}: {_reason(cause, secrets)}"
    return _clean(text, secrets)[:400]


def _clean(text: str, secrets: Sequence[str]) -> str:
    """A text without tokens and without what signed addresses carry."""
    for secret in secrets:
        text = text.replace(secret, "***")
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
    return re.sub(r"\b(hf_|ms-)[\w-]{8,}", "***", text)


@contextmanager
def _clean_logs(secrets: Sequence[str]) -> Iterator[None]:
    """Cleans what the hubs' libraries log meanwhile: they quote answers and signed addresses."""
    make = logging.getLogRecordFactory()

    def make_clean(*args: Any, **named: Any) -> logging.LogRecord:
        record = make(*args, **named)
        record.msg, record.args, record.exc_info = _clean(record.getMessage(), secrets), (), None
        return record

    logging.setLogRecordFactory(make_clean)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
