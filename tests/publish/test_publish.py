"""What is published, what stays, and that no token is written down: against hubs on loopback."""

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from huggingface_hub import close_session, constants
from PIL import Image
from safetensors.torch import save_file

from dojo import cli, publish
from dojo.cli import UserError
from dojo.finetune import lora
from dojo.publish import PublishArgs, learned
from dojo.publish.__main__ import main
from dojo.publish.hubs import find_result
from tests.fake_hub import USER, FakeHub, serve
from tests.models.test_hunyuandit import tencents_layout
from tests.models.test_kolors import INDICES, authors_layout

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_notARealTokenButAsLongAsOne"
MS_TOKEN = "ms-0000notARealToken0000"
PROMPTS = ["一颗红心", "two [blue] hearts: 'quoted'\nand broken"]
needs_modelscope = pytest.mark.skipif(
    not find_spec("modelscope_hub"), reason="the package modelscope is not installed"
)

OPTIONS = {
    "model": {
        "pretrained_model_name_or_path": "/home/someone/secret/base",
        "max_sequence_length": 77,
    },
    "run": {"output_dir": "/home/someone/secret/hearts", "seed": 0, "mixed_precision": None},
    "data": {"dataset_name": "/home/someone/secret/pictures", "resolution": [512]},
    "validation": {
        "validation_prompt": PROMPTS,
        "validation_inference_steps": 1,
        "validation_guidance_scale": 4.0,
    },
}
SENT = [
    "README.md",
    "args.json",
    "contact_sheet.png",
    "metrics.jsonl",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights_kohya.safetensors",
    "report.html",
    "scheduler/scheduler_config.json",
    "validation/step-10/00-一颗红心-seed0.png",
    "validation/step-10/01-two_blue-seed0.png",
]
KEPT = [
    ".netrc",
    ".checkpoint-11.partial/pytorch_lora_weights.safetensors",
    "cache/latents.safetensors",
    "checkpoint-10/optimizer.pt",
    "checkpoint-10/pytorch_lora_weights.safetensors",
    "data_report.json",
    "finished.json",
    "logs/events.out",
    "notes.txt",
    "optimizer.pt",
    "optimizer.safetensors",
    "scheduler/.hidden",
    "validation/step-9/00-old-seed0.png",
    "validation/step-10/.partial.png",
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """Both hubs in one, a token for each, and no waiting between attempts."""
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is not faked
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        for library in ("modelscope_hub", "huggingface_hub"):  # their handlers outlive a test
            for handler in logging.getLogger(library).handlers:
                if type(handler) is logging.StreamHandler:
                    monkeypatch.setattr(handler, "stream", sys.__stderr__)
        for name, value in environment(server, tmp_path).items():
            monkeypatch.setenv(name, value)
        close_session()
        yield server
        close_session()


def environment(server: FakeHub, root: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(root / "home"),
        "HF_TOKEN": TOKEN,
        "MODELSCOPE_ENDPOINT": server.url,
        "MODELSCOPE_HOME": str(root / "modelscope"),
        "MODELSCOPE_API_TOKEN": MS_TOKEN,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A finished LoRA folder with everything that a run, and its owner, may leave in it."""
    folder = tmp_path / "hearts"
    for name in [*SENT, *KEPT]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(999))
    Image.new("RGB", (8, 8)).save(folder / "validation/step-10/00-一颗红心-seed0.png")
    for name in ("report.html", "metrics.jsonl"):
        (folder / name).write_text("{}\n")
    (folder / "finished.json").write_text('{"step": 10}')
    (folder / "args.json").write_text(json.dumps({"args": OPTIONS, "device": "cpu"}))
    FlowMatchEulerDiscreteScheduler(shift=1.75).save_pretrained(folder / "scheduler")
    write_card(folder)
    return folder


def write_card(folder: Path, **changes: Any) -> dict[str, Any]:
    """Writes a LoRA's card and reads its header back, as the hub does."""
    arguments: dict[str, Any] = {
        "title": "A LoRA",
        "base_model": "stabilityai/stable-diffusion-3.5-medium",
        "dataset": "/home/someone/secret/pictures",
        "options": OPTIONS,
        "steps": 10,
        "tags": ("lora", "text-to-image"),
    }
    folder.mkdir(exist_ok=True)
    publish.write_card(folder, **arguments | changes)
    return header_of(folder)


def header_of(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def snippet(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_arrived(arrived: dict[str, bytes], folder: Path) -> None:
    """Everything that should, byte for byte, and nothing else; args.json is looked at alone."""
    assert sorted(arrived) == SENT
    for name in set(SENT) - {"args.json"}:
        assert arrived[name] == (folder / name).read_bytes(), name


# -- the Hugging Face Hub ---------------------------------------------------------------------


@pytest.mark.parametrize("pipelined", [False, True])
def test_the_result_arrives_byte_for_byte_and_the_rest_stays(
    hub: FakeHub,
    result: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    pipelined: bool,
) -> None:
    if pipelined:  # the library's other way, which it takes where hf_xet is installed
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        hub.large = ".nothing"
    before = contents(result)
    args = PublishArgs(push_to_hub=True)
    args.check(result)
    assert publish.upload(result, args) == [f"{hub.url}/{USER}/hearts"]
    assert_arrived(hub.repos[f"{USER}/hearts"], result)
    assert contents(result) == before
    assert hub.messages == ["Upload LoRA"]
    assert (hub.blobs == {}) == pipelined
    assert f"{USER}/hearts" in capfd.readouterr().out


def test_what_is_sent_names_no_private_folder(hub: FakeHub, result: Path) -> None:
    (result / "report.html").write_text("<dd>/home/someone/secret/base</dd><p>1/2/3</p>")
    publish.upload(result, PublishArgs(push_to_hub=True))
    arrived = hub.repos[f"{USER}/hearts"]
    assert b"/home/someone" in (result / "args.json").read_bytes()
    assert all(b"/home/someone" not in data for data in arrived.values())
    assert arrived["report.html"] == b"<dd>base</dd><p>1/2/3</p>"
    options = json.loads(arrived["args.json"])["args"]
    assert options["run"] == {"output_dir": "hearts", "seed": 0, "mixed_precision": None}
    assert options["validation"] == OPTIONS["validation"]


def test_a_second_upload_to_the_same_repository_replaces_the_files(
    hub: FakeHub, result: Path
) -> None:
    args = PublishArgs(push_to_hub=True, hub_model_id="group/other")
    publish.upload(result, args)
    (result / "metrics.jsonl").write_text('{"step": 11}\n')
    publish.upload(result, args, what="hearts")
    assert hub.repos["group/other"]["metrics.jsonl"] == b'{"step": 11}\n'
    assert hub.messages == ["Upload LoRA", "Upload hearts"]


def test_private_is_asked_for_and_a_public_repository_is_not_filled(
    hub: FakeHub, result: Path
) -> None:
    args = PublishArgs(push_to_hub=True, hub_private_repo=True)
    publish.upload(result, args)
    assert hub.made[f"{USER}/hearts"]["visibility"] == "private"
    hub.made[f"{USER}/hearts"]["visibility"] = "public"
    hub.repos[f"{USER}/hearts"].clear()
    with pytest.raises(UserError, match=r"not private.*--private"):
        publish.upload(result, args)
    assert not hub.repos[f"{USER}/hearts"]


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub: FakeHub, result: Path) -> None:
    publish.upload(result, PublishArgs(push_to_hub=True, hub_token="hf_another_one_given"))
    seen = {path.split("/")[1]: authorization for _, path, authorization in hub.requests}
    assert seen.pop("storage") == ""
    assert set(seen.values()) == {"Bearer hf_another_one_given"}


@pytest.mark.parametrize(
    ("route", "status", "words"),
    [
        ("/api/repos/create", 401, "token is not accepted"),
        ("/api/repos/create", 500, "HTTP 500"),
        ("/preupload/", 403, "may not write"),
        ("/storage/", 500, "HTTP 500"),
        ("/commit/", 503, "HTTP 503"),
    ],
)
def test_a_failing_upload_keeps_the_result_and_says_how_to_go_on(
    hub: FakeHub,
    result: Path,
    capfd: pytest.CaptureFixture[str],
    route: str,
    status: int,
    words: str,
) -> None:
    hub.refuse[route] = status
    before = contents(result)
    args = PublishArgs(push_to_hub=True, hub_model_id=f"{USER}/a", hub_private_repo=True)
    with pytest.raises(UserError) as caught:
        publish.upload(result, args)
    message = str(caught.value)
    assert words in message
    assert f"safe in {result}" in message
    assert message.endswith(f"python -m dojo.publish {result} --hub_model_id {USER}/a --private")
    assert contents(result) == before
    assert caught.value.__context__ is None  # nothing of the request hangs on the error
    printed = capfd.readouterr()
    for text in (message, printed.out, printed.err):
        assert TOKEN not in text
        assert "s3cr3tsignature" not in text

    hub.refuse.clear()
    main([*message.split("dojo.publish ")[1].split()])
    assert_arrived(hub.repos[f"{USER}/a"], result)


def test_no_connection_is_one_sentence(
    hub: FakeHub, result: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    args = PublishArgs(push_to_hub=True)
    args.check(result)
    assert "could not be checked" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"the upload failed.*safe in"):
        publish.upload(result, args)


def test_a_file_that_holds_the_token_is_not_sent(hub: FakeHub, result: Path) -> None:
    (result / "report.html").write_text(f"<pre>train.py --hub_token {TOKEN}</pre>")
    with pytest.raises(UserError, match=r"report\.html holds the token") as caught:
        publish.upload(result, PublishArgs(push_to_hub=True))
    assert TOKEN not in str(caught.value)
    assert not hub.requests


def test_nothing_leaves_the_machine_unless_it_is_asked_for(hub: FakeHub, result: Path) -> None:
    args = PublishArgs()
    args.check(result, ("wandb",))
    assert publish.upload(result, args) == []
    assert not hub.requests


# -- ModelScope -------------------------------------------------------------------------------


@needs_modelscope
def test_modelscope_gets_the_same_files(
    hub: FakeHub, result: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(result)
    args = PublishArgs(modelscope_model_id="me/hearts", hub_private_repo=True)
    args.check(result)
    assert publish.upload(result, args) == [f"{hub.url}/models/me/hearts"]
    assert_arrived(hub.repos["me/hearts"], result)
    assert contents(result) == before
    wish = hub.made["me/hearts"]
    assert (wish["Visibility"], wish["License"]) == (1, "Other")
    publish.upload(result, args)  # it exists now
    wish["Visibility"] = 5
    with pytest.raises(UserError, match="not private"):
        publish.upload(result, args)
    printed = capfd.readouterr()
    assert MS_TOKEN not in printed.out + printed.err


@needs_modelscope
@pytest.mark.parametrize(
    ("route", "status", "words"),
    [
        ("/api/v1/models", 401, "token is not accepted"),
        ("/api/v1/models", 500, "HTTP 500"),
        ("/storage/", 403, "failed to upload"),
        ("/commit/master", 403, "failed to upload"),
    ],
)
def test_one_hub_that_fails_does_not_stop_the_other(
    hub: FakeHub,
    result: Path,
    capfd: pytest.CaptureFixture[str],
    route: str,
    status: int,
    words: str,
) -> None:
    hub.large = ".nothing"  # the Hub's own files do not pass the refused routes
    publish.upload(result, PublishArgs(push_to_hub=True))
    hub.refuse[route] = status
    with pytest.raises(UserError) as caught:
        publish.upload(result, PublishArgs(push_to_hub=True, modelscope_model_id="me/hearts"))
    message = str(caught.value)
    assert words in message
    assert message.endswith(f"python -m dojo.publish {result} --modelscope_model_id me/hearts")
    assert hub.messages[:2] == ["Upload LoRA"] * 2
    printed = capfd.readouterr()
    for text in (message, printed.out, printed.err):
        assert MS_TOKEN not in text
        assert TOKEN not in text
        assert "s3cr3tsignature" not in text


# -- before the training ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "report_to", "words"),
    [
        ({"push_to_hub": True, "hub_token": TOKEN}, "wandb", "stores the command line"),
        ({"push_to_hub": True, "hub_token": TOKEN}, "all", "stores the command line"),
        ({"modelscope_token": TOKEN}, "swanlab", "MODELSCOPE_API_TOKEN"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "none", "cannot be a repository"),
        ({"push_to_hub": True, "hub_model_id": "me/红心"}, "none", "cannot be a repository"),
        ({"modelscope_model_id": "hearts"}, "none", "owner/name"),
    ],
)
def test_what_would_fail_later_is_refused_before_the_training(
    hub: FakeHub, tmp_path: Path, flags: dict[str, Any], report_to: str, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        PublishArgs(**flags).check(tmp_path / "hearts", (report_to,))
    assert TOKEN not in str(caught.value)
    assert not hub.requests


def test_a_folder_whose_name_is_no_repository_is_refused_before_the_training(
    hub: FakeHub, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--hub_model_id: '红心'"):
        PublishArgs(push_to_hub=True).check(tmp_path / "红心")


def test_a_token_must_be_there_be_accepted_and_may_write(
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = PublishArgs(push_to_hub=True, hub_model_id="someone/else")
    args.check(tmp_path)
    assert "can it write there" in capsys.readouterr().err
    hub.role = "read"
    with pytest.raises(UserError, match="may only read"):
        args.check(tmp_path)
    hub.refuse["whoami"] = 401
    with pytest.raises(UserError, match="not accepted") as caught:
        args.check(tmp_path)
    assert TOKEN not in str(caught.value)
    hub.refuse["whoami"] = 500
    args.check(tmp_path)
    assert "could not be checked" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # one process asks
    hub.requests.clear()
    args.check(tmp_path)
    assert not hub.requests
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"no token.*hf auth login"):
        args.check(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        args.check(tmp_path)


@needs_modelscope
def test_a_refused_modelscope_token_is_found_before_the_training(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = PublishArgs(modelscope_model_id="me/hearts")
    hub.refuse["/users/me"] = 401
    with pytest.raises(UserError, match="--modelscope_model_id: the token is not accepted"):
        args.check(tmp_path)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    with pytest.raises(UserError, match="no token"):
        args.check(tmp_path)


def test_a_missing_package_is_named(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dojo.publish.hubs.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'modelscope"):
        PublishArgs(modelscope_model_id="me/hearts").check(tmp_path)


def test_an_id_without_push_to_hub_is_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PublishArgs(hub_model_id="me/hearts").check(tmp_path)
    assert "nothing without --push_to_hub" in capsys.readouterr().err


def test_the_options_are_flags_and_do_not_show_a_token() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Args:
        publish: PublishArgs

    args = cli.parse(Args, None, ["--push_to_hub", "--hub_token", TOKEN, "--hub_private_repo"])
    assert args.publish.hub_token == TOKEN
    assert args.publish.hub_private_repo
    assert TOKEN not in repr(args)


# -- folders and the command line -------------------------------------------------------------


def test_a_checkpoint_is_published_with_what_its_run_tells(hub: FakeHub, result: Path) -> None:
    checkpoint = result / "checkpoint-10"
    (checkpoint / "state.json").write_text('{"step": 10}')
    assert main([str(checkpoint), "--private"]) == 0
    arrived = hub.repos[f"{USER}/hearts-checkpoint-10"]
    assert hub.made[f"{USER}/hearts-checkpoint-10"]["visibility"] == "private"
    assert sorted(arrived) == ["README.md", "pytorch_lora_weights.safetensors"]
    card = arrived["README.md"].decode()
    assert "10 steps" in card
    assert "max_sequence_length=77" in card
    assert "/home/someone" not in card


def test_the_best_weights_are_published_with_what_their_run_tells(
    hub: FakeHub, result: Path
) -> None:
    best = result / "best"
    best.mkdir()
    save_file({"unet.x.lora_A.weight": torch.ones(1)}, best / lora.WEIGHTS)
    (best / "best.json").write_text('{"metric": "eval_loss", "step": 7, "value": 0.5}')
    (result / "args.json").write_text(
        json.dumps({"args": {"model": {"pretrained_model_name_or_path": "some/base"}}})
    )
    assert main([str(best)]) == 0
    card = hub.repos[f"{USER}/hearts-best"]["README.md"].decode()
    assert "base_model: some/base" in card
    assert "LoRA: hearts-best\n" in card.replace("\\", "")
    assert "7 steps" in card


def test_a_process_that_cannot_publish_ends_with_one_message_and_leaves_no_token(
    hub: FakeHub, result: Path, tmp_path: Path
) -> None:
    hub.refuse["/commit/"] = 403
    (result / "README.md").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "dojo.publish", str(result), "--hub_model_id", f"{USER}/a"],
        env={**os.environ, **environment(hub, tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the upload failed")
    assert "Traceback" not in done.stderr
    assert (result / "README.md").is_file()
    assert TOKEN not in done.stdout + done.stderr
    assert all(TOKEN.encode() not in data for data in contents(tmp_path).values())


def test_a_folder_without_a_result_is_refused_and_gets_no_card(
    hub: FakeHub, result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (result / "pytorch_lora_weights.safetensors").unlink()
    (result / "README.md").unlink()
    assert main([str(result)]) == 2
    assert "holds no result" in capsys.readouterr().err
    assert not (result / "README.md").exists()
    assert main([str(result / "nowhere")]) == 2
    assert not hub.requests


def test_a_foreign_lora_without_a_record_gets_a_minimal_card(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "found"
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"x" * 99)
    assert main([str(folder), "--hub_model_id", "me/found"]) == 0
    header = header_of(folder)
    assert "base_model" not in header
    assert "license" not in header
    text = (folder / "README.md").read_text()
    assert "Trained with" not in text
    assert 'result = "me/found"' in text
    (folder / "README.md").write_text("---\ntags: [mine]\n---\n")
    assert main([str(folder), "--hub_model_id", "me/found"]) == 0
    assert hub.repos["me/found"]["README.md"] == (folder / "README.md").read_bytes()
    assert header_of(folder) == {"tags": ["mine"]}


def test_a_pipeline_is_sent_with_its_parts_and_without_where_they_came_from(
    hub: FakeHub, tiny_sd3: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    StableDiffusion3Pipeline.from_pretrained(tiny_sd3).save_pretrained(folder)
    whole = contents(folder)
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"x")
    assert str(tiny_sd3).encode() in whole["transformer/config.json"]  # diffusers' own doing
    assert main([str(folder)]) == 0
    arrived = hub.repos[f"{USER}/whole"]
    assert set(arrived) == {*whole, "README.md"}
    assert hub.messages == ["Upload model"]
    for name, data in arrived.items():
        if b"_name_or_path" in whole.get(name, b""):
            assert json.loads(data).keys() == json.loads(whole[name]).keys()
            assert str(tiny_sd3).encode() not in data
        elif name != "README.md":
            assert data == whole[name], name


# -- the card ---------------------------------------------------------------------------------


def test_the_header_is_what_the_hub_reads(result: Path) -> None:
    header = write_card(result)
    assert header["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert header["base_model_relation"] == "adapter"
    assert header["tags"] == ["lora", "text-to-image", "diffusers"]
    assert header["license"] == "other"
    assert header["license_name"] == "stabilityai-ai-community"
    assert header["license_link"] == (
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md"
    )
    assert [entry["text"] for entry in header["widget"]] == PROMPTS
    for entry in header["widget"]:
        assert (result / entry["output"]["url"]).is_file()
    card = (result / "README.md").read_text(encoding="utf-8")
    assert f"![{PROMPTS[0]}](validation/step-10/00-{PROMPTS[0]}-seed0.png)" in card
    assert "/home/someone" not in card
    assert "`pictures`" in card
    assert "datasets" not in header


@pytest.mark.parametrize(
    ("base", "named", "licence"),
    [
        ("stabilityai/stable-diffusion-3.5-large", None, "stabilityai-ai-community"),
        (
            "/data/models/stable-diffusion-3.5-medium/",
            "stabilityai/stable-diffusion-3.5-medium",
            "stabilityai-ai-community",
        ),
        (
            "AI-ModelScope/stable-diffusion-3.5-large",
            "stabilityai/stable-diffusion-3.5-large",
            "stabilityai-ai-community",
        ),
        (
            "models/stable-diffusion-v1-5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "creativeml-openrail-m",
        ),
        ("someone/stable-diffusion-3.5-medium", None, None),
        ("models/pocket-sd3", "", None),
        ("/home/someone/own", "", None),
    ],
)
def test_the_licence_is_that_of_a_known_base_and_no_other(
    tmp_path: Path, base: str, named: str | None, licence: str | None
) -> None:
    header = write_card(tmp_path / "card", base_model=base)
    assert header.get("base_model", "") == (base if named is None else named)
    assert header.get("license_name", header.get("license")) == licence
    card = (tmp_path / "card" / "README.md").read_text()
    assert "/home" not in card
    assert "/data" not in card
    if licence is None:
        assert "follows from that of the base model" in card


def test_the_name_of_the_run_is_the_title_of_the_card(tmp_path: Path) -> None:
    for name, title in ((None, "A LoRA"), ("hearts, 16", "hearts, 16")):
        write_card(tmp_path / "card", options={"run": {"run_name": name}})
        assert f"\n# {title}\n" in (tmp_path / "card" / "README.md").read_text()


def test_over_a_base_that_diffusers_does_not_open_the_demo_draws(tmp_path: Path) -> None:
    write_card(tmp_path / "card", opens=False, base_model="models/HunyuanDiT")
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "from_pretrained" not in card
    assert "python demo.py --pretrained_model_name_or_path" in card


@pytest.mark.parametrize("layout", ["Tencent's", "Kolors'", "diffusers'"])
def test_a_result_is_published_with_the_card_of_its_bases_layout(
    layout: str, tiny_hunyuandit: Path, tiny_kolors: Path, tmp_path: Path, hub: FakeHub
) -> None:
    base = tiny_kolors
    if layout == "Tencent's":
        base = tencents_layout(tiny_hunyuandit, tmp_path / "HunyuanDiT")
    elif layout == "Kolors'":
        base = authors_layout(tiny_kolors, tmp_path / "Kolors", INDICES["SDXL"])
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 2}')
    save_file({"unet.x.lora_A.weight": torch.ones(1)}, checkpoint / lora.WEIGHTS)
    own = {"pretrained_model_name_or_path": str(base)}
    own |= {"tencent_weights": "distill"} if layout == "Tencent's" else {}
    (tmp_path / "run" / "args.json").write_text(json.dumps({"args": {"model": own}}))
    assert main([str(checkpoint)]) == 0
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    opens = layout == "diffusers'"
    assert ("DiffusionPipeline.from_pretrained(" in card) == opens
    command = f"python demo.py --pretrained_model_name_or_path {base.name}"
    assert (command in card) == (not opens)
    assert ("--tencent_weights distill --lora_weights_path" in card) == (layout == "Tencent's")


@pytest.mark.parametrize(
    ("pipeline", "loads"),
    [("StableDiffusionXLPipeline", True), ("StableDiffusion3Pipeline", False), (None, False)],
)
def test_words_for_two_encoders_are_loaded_where_a_pipeline_does_it(
    tmp_path: Path, pipeline: str | None, loads: bool
) -> None:
    (tmp_path / learned.EMBEDDINGS).mkdir()
    rows = {"clip_l": torch.ones(1, 4), "clip_g": torch.ones(1, 6)}
    save_file(rows, tmp_path / learned.EMBEDDINGS / "dog.safetensors", {"token": "<dog>"})
    assert any("load_textual" in line for line in learned.loading(tmp_path, pipeline)) == loads


def test_trigger_words_stand_in_header_text_and_example(tmp_path: Path) -> None:
    options = {"data": {"instance_prompt": "一只 sks 狗"}}
    header = write_card(tmp_path / "card", options=options, dataset="me/dogs")
    assert header["instance_prompt"] == "一只 sks 狗"
    assert header["datasets"] == ["me/dogs"]
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "Use `一只 sks 狗` in the prompt." in card
    assert 'pipe("一只 sks 狗")' in snippet(tmp_path / "card")
    assert write_card(tmp_path / "card", instance_prompt="sks")["instance_prompt"] == "sks"


@pytest.mark.parametrize("kind", ["lora", "pipeline", "transformer"])
def test_the_code_on_the_card_draws_a_picture_with_the_result(
    kind: str, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-sd3").symlink_to(tiny_sd3)
    folder = tmp_path / "result"
    weights = {"lora": "pytorch_lora_weights.safetensors", "pipeline": ""}.get(kind, kind)
    if kind == "pipeline":
        shutil.copytree(tiny_sd3, folder)
    else:
        model = SD3Transformer2DModel.from_pretrained(tiny_sd3, subfolder="transformer")
        if kind == "lora":
            for param in lora.add(model, lora.LoraArgs(rank=2)):
                torch.nn.init.normal_(param)
            folder.mkdir()
            lora.save(folder, model)
        else:
            model.save_pretrained(folder / "transformer")
        FlowMatchEulerDiscreteScheduler(shift=1.75).save_pretrained(folder / "scheduler")
    options = {
        "model": {"max_sequence_length": 24},
        "validation": {"validation_prompt": PROMPTS[1:], "validation_inference_steps": 1},
    }
    header = write_card(folder, base_model=str(tiny_sd3), options=options, weights=weights)
    assert "base_model" not in header
    assert find_result(folder) == weights
    seen: dict[str, Any] = {}
    call = StableDiffusion3Pipeline.__call__

    def watch(pipe: StableDiffusion3Pipeline, *args: Any, **named: Any) -> Any:
        seen.update(pipe=pipe, args=args, **named)
        return call(pipe, *args, **named, height=64, width=64)

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", watch)
    exec(snippet(folder).replace('"cuda"', '"cpu"'), {})
    with Image.open(tmp_path / "image.png") as picture:
        assert picture.size == (64, 64)
    assert seen["args"] == (PROMPTS[1],)
    assert seen["max_sequence_length"] == 24
    assert seen["num_inference_steps"] == 1
    if kind != "pipeline":
        assert seen["pipe"].scheduler.config.shift == 1.75
    adapters = getattr(seen["pipe"].transformer, "peft_config", {})
    assert bool(adapters) == (kind == "lora")


# -- cards of results that plain diffusers loads in another way, or not -------------------------


def lycoris_file(folder: Path, algorithm: str) -> None:
    folder.mkdir(exist_ok=True)
    header = {"ss_network_module": "lycoris.kohya"}
    header["ss_network_args"] = json.dumps({"algo": algorithm})
    state = {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.ones(())}
    save_file(state, folder / "pytorch_lora_weights.safetensors", header)


@pytest.mark.parametrize(("algorithm", "name"), [("loha", "LoHa"), ("lokr", "LoKr")])
def test_the_card_of_a_loha_says_what_reads_it_and_how_diffusers_can(
    tmp_path: Path, algorithm: str, name: str
) -> None:
    folder = tmp_path / "hearts"
    lycoris_file(folder, algorithm)
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    header = write_card(folder, title="LoRA for Stable Diffusion 1.5", base_model=base)
    text = (folder / "README.md").read_text()
    assert rf"# {name} for Stable Diffusion 1\.5" in text
    assert f"It is a {name} in LyCORIS' format" in text
    assert f"dojo.lora merge --input hearts --base {base} --output merged" in text
    code = snippet(folder)
    assert 'DiffusionPipeline.from_pretrained("merged"' in code
    assert "load_lora_weights" not in code  # plain diffusers refuses it
    compile(code, "card", "exec")
    assert {"lycoris", algorithm} <= set(header["tags"])
    assert "| `rank` |" not in text  # the file's own ranks were trained


def test_the_card_of_a_lora_for_one_file_opens_that_file(tmp_path: Path) -> None:
    folder = tmp_path / "hearts"
    more = {"base_model": "/somewhere/base.safetensors", "pipeline": "StableDiffusionXLPipeline"}
    write_card(folder, **more)
    code = snippet(folder)
    assert 'pipe = StableDiffusionXLPipeline.from_single_file("base.safetensors"' in code
    assert "pipe.load_lora_weights(result" in code
    assert "somewhere" not in (folder / "README.md").read_text()
    compile(code, "card", "exec")

    lycoris_file(folder, "loha")
    write_card(folder, **more)
    assert (
        "--base base.safetensors --output merged.safetensors" in (folder / "README.md").read_text()
    )
    assert '.from_single_file("merged.safetensors"' in snippet(folder)
