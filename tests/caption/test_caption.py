"""python -m dojo.caption: captions from a server or BLIP, written where training reads them."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dojo import data, files
from dojo.caption import shelf, writers
from dojo.caption.__main__ import Args, begun_with, main
from dojo.cli import TrainingStopped, UserError
from dojo.rewards import wire
from tests.rewards.test_served import Answer, fake, running

COLOURS = {"blue": (0, 0, 255), "green": (0, 128, 0), "red": (255, 0, 0)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.delenv("DOJO_VLM_API_KEY", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of one colour each, one of them in a sub-folder."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for name, colour in COLOURS.items():
        place = root / "more" if name == "green" else root
        Image.new("RGB", (40, 20), colour).save(place / f"{name}.png")
    return root


def told(text: str | None, **more: Any) -> Answer:
    answer = {"choices": [{"message": {"content": text}, "finish_reason": "stop", **more}]}
    return 200, {}, json.dumps(answer).encode()


def seeing(seen: list[Any]) -> Callable[[str, Any], Answer]:
    """A model that says which colour a picture has."""

    def look(path: str, request: Any) -> Answer:
        seen.append((path, request))
        uri = request["body"]["messages"][-1]["content"][0]["image_url"]["url"]
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        shown = picture.convert("RGB").getpixel((5, 5))
        assert isinstance(shown, tuple)
        near = {
            name: sum(abs(a - b) for a, b in zip(shown, c, strict=True))
            for name, c in COLOURS.items()
        }
        return told(f'"A {min(near, key=lambda name: near[name])}\n picture."')

    return look


def args_of(folder: Path, url: str, **more: Any) -> Args:
    return Args(folder=folder, server=f"{url}/v1", model="m", retries=1, timeout=5.0, **more)


def captions(folder: Path) -> dict[str, tuple[str, ...]]:
    """What training reads."""
    source = data.open_training(data.DataArgs(dataset_name=str(folder)))
    assert not any(source.problems), source.problems
    return {Path(n).stem: c for n, c in zip(source.names, source.captions, strict=True)}


RIGHT = {name: (f"A {name} picture.",) for name in COLOURS}


@pytest.mark.parametrize("to", ["txt", "metadata"])
def test_every_picture_gets_its_caption_where_training_reads_it(
    folder: Path, to: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    with running(fake(seeing(seen))) as url:
        main(args_of(folder, url, to=to))
        assert captions(folder) == RIGHT
        main(args_of(folder, url, to=to))
    assert len(seen) == 3
    assert {path for path, _ in seen} == {"/v1/chat/completions"}
    assert all(request["body"]["model"] == "m" for _, request in seen)
    assert "captions: 0 written, 3 kept, 0 pictures" in capsys.readouterr().out
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert hidden == []


def test_the_question_the_language_and_the_trigger_words_are_those_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOJO_VLM_API_KEY", "hidden")
    seen: list[Any] = []
    with running(fake(seeing(seen))) as url:
        more: dict[str, Any] = {"prompt": "Which colour?", "language": "German"}
        main(args_of(folder, url, **more, prefix="sks colour,", max_tokens=7, max_side=32))
    request = seen[0][1]
    assert request["headers"]["Authorization"] == "Bearer hidden"
    assert request["body"]["max_tokens"] == 7
    picture, words = request["body"]["messages"][0]["content"]
    assert words["text"] == "Which colour? Answer in this language: German."
    shown = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(shown)).size == (32, 16)
    assert captions(folder)["red"] == ("sks colour, A red picture.",)


def test_a_trigger_word_is_not_said_twice() -> None:
    assert begun_with("sks dog,", "Sks dog, on a sofa") == "Sks dog, on a sofa"
    assert begun_with("", "a dog") == "a dog"
    assert begun_with("狗", "狗在沙发上") == "狗在沙发上"
    assert begun_with("cat", "Cats on a sofa") == "cat Cats on a sofa"


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("<think>It is\nred.</think>\n A red wall. ", "A red wall."),
        ('"red"', "red"),
        ("“A red wall.”", "A red wall."),
        ('"red" and "blue"', '"red" and "blue"'),
        ("'tis red", "'tis red"),
        ("<think>It is red, so", ""),
        ("red \ud83d", "red ?"),
    ],
)
def test_an_answer_becomes_one_line_without_thoughts_and_quotes(answer: str, caption: str) -> None:
    assert writers.tidy(answer) == caption


@pytest.mark.parametrize("to", ["txt", "metadata"])
def test_captions_that_are_there_are_kept_unless_others_are_asked_for(
    folder: Path, to: Any
) -> None:
    if to == "txt":
        (folder / "red.txt").write_text("mine\n")
        (folder / "blue.txt").write_text(" \n")  # none
    else:
        rows = [
            {"file_name": "red.png", "text": "mine", "size": 3},
            {"file_name": "red.png", "text": "mine too"},
            {"file_name": "blue.png", "size": 4},
        ]
        table = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / "metadata.jsonl").write_text(table)
    mine = ("mine",) if to == "txt" else ("mine", "mine too")
    with running(fake(seeing([]))) as url:
        main(args_of(folder, url, to=to))
        assert captions(folder) == {**RIGHT, "red": mine}
        main(args_of(folder, url, to=to, replace_captions=True))
    assert captions(folder) == RIGHT
    if to == "metadata":
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").open()]
        assert {row["file_name"]: row.get("size") for row in rows} == {
            "red.png": 3,
            "blue.png": 4,
            "more/green.png": None,
        }


@pytest.mark.parametrize("to", ["txt", "metadata"])
def test_a_lost_server_stops_it_and_the_same_command_goes_on(folder: Path, to: Any) -> None:
    seen: list[Any] = []
    look = seeing(seen)

    def dying(path: str, request: Any) -> Answer:
        return look(path, request) if len(seen) < 1 else (503, {}, b"gone")

    with running(fake(dying)) as url:
        with pytest.raises(TrainingStopped, match=r"no answer in 2 tries.*1 captions are written"):
            main(args_of(folder, url, to=to, workers=1))
        assert len(seen) == 1
    with pytest.raises(TrainingStopped, match="no answer in 2 tries"):  # nobody listens any more
        main(args_of(folder, url, to=to))
    with running(fake(look)) as url:
        main(args_of(folder, url, to=to))
    assert len(seen) == 3  # the first one was not asked for again
    assert captions(folder) == RIGHT


def test_what_a_kill_left_in_the_hidden_file_is_taken_in(folder: Path) -> None:
    lines = [json.dumps({"picture": "red.png", "caption": "from before"}), '{"picture": "bl']
    (folder / shelf.JOURNAL).write_text("\n".join(lines))
    seen: list[Any] = []
    with running(fake(seeing(seen))) as url:
        main(args_of(folder, url, to="metadata"))
    assert len(seen) == 2
    assert captions(folder) == {**RIGHT, "red": ("from before",)}


def test_what_cannot_be_read_or_is_refused_is_named_and_the_rest_is_captioned(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    look = seeing([])

    def picky(path: str, request: Any) -> Answer:
        answer = look(path, request)
        return (400, {}, b'{"error": "too green"}') if b"green" in answer[2] else answer

    with running(fake(picky)) as url:
        with pytest.raises(UserError, match="2 pictures could not be captioned"):
            main(args_of(folder, url))
        main(args_of(folder, url, on_bad_sample="skip"))
    said = capsys.readouterr().out
    assert "no caption: broken.jpg: " in said
    assert "too green" in said
    assert (folder / "red.txt").read_text() == "A red picture.\n"
    assert not (folder / "more" / "green.txt").exists()


@pytest.mark.parametrize("status", [401, 404, 400])
def test_a_server_that_refuses_everything_is_believed(folder: Path, status: int) -> None:
    with (
        running(fake(lambda path, request: (status, {}, b'{"error": "no"}'))) as url,
        pytest.raises(UserError, match=f"--server: .*{status}"),
    ):
        main(args_of(folder, url, workers=1))


@pytest.mark.parametrize("body", [b"[]", b'{"choices": []}', told(None)[2]])
def test_an_answer_without_text_is_said(folder: Path, body: bytes) -> None:
    with (
        running(fake(lambda path, request: (200, {}, body))) as url,
        pytest.raises(UserError, match="has no text"),
    ):
        main(args_of(folder, url))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (told(None), "the model answered nothing"),
        (told(None, finish_reason="length"), "--max_tokens 200 cut it"),
        (told("<think>Hm", finish_reason="length"), "--max_tokens 200 cut it"),
        ((200, {}, b'{"error": "overloaded"}'), "the answer is an error: overloaded"),
    ],
)
def test_an_answer_without_text_keeps_no_other_picture_from_its_caption(
    folder: Path, capsys: pytest.CaptureFixture[str], answer: Answer, why: str
) -> None:
    look = seeing([])

    def silent(path: str, request: Any) -> Answer:
        found = look(path, request)
        return answer if b"green" in found[2] else found

    with running(fake(silent)) as url:
        main(args_of(folder, url, on_bad_sample="skip"))
    said = capsys.readouterr().out
    assert "no caption: more/green.png: " in said
    assert why in said
    assert "captions: 2 written, 0 kept, 1 pictures" in said
    assert not (folder / "more" / "green.txt").exists()


def test_two_pictures_do_not_share_a_caption(folder: Path) -> None:
    Image.new("RGB", (40, 20), COLOURS["blue"]).save(folder / "red.jpg")
    with (
        running(fake(seeing([]))) as url,
        pytest.raises(UserError, match=r"red\.jpg and red\.png would go into one file, red\.txt"),
    ):
        main(args_of(folder, url))
    assert not (folder / "red.txt").exists()


def test_captions_that_were_cut_are_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(fake(lambda path, request: told("A red", finish_reason="length"))) as url:
        main(args_of(folder, url, max_pictures=2))
    said = capsys.readouterr().out
    assert "2 captions end where --max_tokens 200 cut them" in said
    assert "captions: 2 written" in said


def test_captions_are_not_written_where_nobody_reads_them(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\nred.png,mine\n")
    for to, words in (("txt", "move metadata.csv away"), ("metadata", "rewrite it")):
        with pytest.raises(UserError, match=words):
            main(args_of(folder, "http://127.0.0.1:9", to=to))
    (folder / "metadata.csv").unlink()
    (folder / "red.txt").write_text("mine")
    with pytest.raises(UserError, match="--to txt adds to them"):
        main(args_of(folder, "http://127.0.0.1:9", to="metadata"))


def test_two_commands_do_not_write_into_one_folder(folder: Path) -> None:
    with (
        files.turn(folder / ".captions.lock"),
        pytest.raises(UserError, match="another process"),
    ):
        main(args_of(folder, "http://127.0.0.1:9"))


def test_a_folder_without_pictures_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no picture"):
        main(args_of(tmp_path, "http://127.0.0.1:9"))
    with pytest.raises(UserError, match="no such folder"):
        main(args_of(tmp_path / "none", "http://127.0.0.1:9"))


@pytest.mark.parametrize(
    "options",
    [
        {"model": ""},
        {"max_pictures": 0},
        {"max_tokens": 0},
        {"max_side": 8},
        {"batch_size": 0},
        {"workers": 0},
        {"timeout": 0.0},
        {"retries": -1},
        {"language": "German"},
    ],
)
def test_an_option_out_of_its_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(options))}"):
        Args(**{"folder": Path(), "model": "m", **options})


# -- BLIP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP of random numbers that knows a few words."""
    import torch
    import transformers
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
        BlipTextConfig,
        BlipVisionConfig,
    )

    root = tmp_path_factory.mktemp("blip")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[DEC]",
        "a",
        "red",
        "dog",
        "picture",
        "of",
    ]
    (root / "vocab.txt").write_text("\n".join(words))
    library: Any = transformers
    tokenizer = library.BertTokenizerFast(
        vocab_file=str(root / "vocab.txt"), vocab=str(root / "vocab.txt")
    )
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = BlipTextConfig(
        vocab_size=len(words) + 2,
        encoder_hidden_size=16,
        max_position_embeddings=32,
        bos_token_id=len(words),  # which, as in the published models, the tokenizer lacks
        eos_token_id=3,
        sep_token_id=3,
        pad_token_id=0,
        **sizes,
    )
    vision = BlipVisionConfig(image_size=32, patch_size=16, **sizes)
    torch.manual_seed(0)
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    BlipForConditionalGeneration(config).save_pretrained(root)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(root)
    return root


def test_blip_captions_a_folder(folder: Path, blip: Path) -> None:
    main(Args(folder=folder, model=str(blip), max_tokens=5, batch_size=2, prompt="a picture of"))
    found = captions(folder)
    assert set(found) == set(COLOURS)
    assert all(caption.startswith("a picture of") for (caption,) in found.values())


def test_a_model_of_another_kind_is_to_be_served(folder: Path, blip: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(blip, other)
    (other / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match=r"of kind clip.*--server"):
        main(Args(folder=folder, model=str(other)))
    with pytest.raises(UserError, match=r"--model: .*cannot be read"):
        main(Args(folder=folder, model=str(tmp_path / "nowhere")))


def test_a_blip_without_its_weights_writes_nothing(
    folder: Path, blip: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(blip, damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="--model"):
        main(Args(folder=folder, model=str(damaged)))
    assert list(folder.glob("*.txt")) == []


def test_a_silent_server_holds_no_command_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, over = threading.Barrier(2), threading.Event()
    workers: list[threading.Thread] = []

    def silent(path: str, request: Any) -> Answer:
        asked.wait(60)
        over.wait(60)
        return told("late")

    def interrupted(running: Any, return_when: str) -> Any:
        asked.wait(60)
        workers.extend(one for one in threading.enumerate() if "_work" in one.name)
        raise KeyboardInterrupt

    monkeypatch.setattr("dojo.caption.__main__.wait", interrupted)
    with running(fake(silent)) as url:
        with pytest.raises(KeyboardInterrupt):
            main(args_of(folder, url, workers=1))
        assert workers
        assert all(one.daemon for one in workers)  # Python does not wait for these
        over.set()
        for one in workers:
            one.join(60)
    assert not (folder / "red.txt").exists()


@pytest.mark.slow
def test_the_command_shows_no_key(folder: Path) -> None:
    command = [sys.executable, "-m", "dojo.caption", str(folder), "--model", "m"]
    command += ["--server", "http://me:s3cret@127.0.0.1:9/v1", "--retries", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "stopped: http://***@127.0.0.1:9" in result.stderr
    assert "s3cret" not in result.stdout + result.stderr
