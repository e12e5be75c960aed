"""Webhooks: what a server is told, that it can neither stop nor delay a run, and what stays secret.

The servers are real ones on this machine.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dojo.cli import TrainingStopped, UserError, masking
from dojo.doctor import examine
from dojo.launch.interrupt import Interrupted
from dojo.run import run as training
from dojo.run import webhook
from dojo.run.optim import OptimArgs
from dojo.run.webhook import Message, Webhook, shaped, thumbnail
from tests.conftest import make_scenes, run_flags
from tests.scripts.runs import SCRIPTS, in_process

ABOUT = {"run": "hearts", "script": "train_lora_sd3.py", "num_steps": 9}


class Server:
    """Keeps what it is sent; answers as it is told to, after as many seconds."""

    def __init__(self, code: int = 200, delay: float = 0.0) -> None:
        self.heard: list[tuple[dict[str, str], bytes]] = []
        self.go = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.heard.append((dict(self.headers), body))
                outer.go.wait(delay)
                self.send_response(code)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hooks/a-long-secret-word"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.heard]


@contextmanager
def serving(code: int = 200, delay: float = 0.0) -> Iterator[Server]:
    server = Server(code, delay)
    try:
        yield server
    finally:
        server.go.set()
        server.server.shutdown()
        server.server.server_close()


def hook_to(url: str, said: list[str], **more: Any) -> Webhook:
    masking.keep(url)
    return Webhook(url, ABOUT, lambda: 3, said.append, **more)


def pictures(folder: Path, count: int, side: int = 900) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.effect_noise((side, side), 80).convert("RGB").save(folder / f"{i:02d}-a-star.png")
    return folder


# -- what is sent -------------------------------------------------------------------------------


def test_a_server_is_told_with_numbers_and_one_small_picture(tmp_path: Path) -> None:
    said: list[str] = []
    with serving() as server:
        hook = hook_to(server.url, said)
        numbers = {"eval_loss": 0.5, "clip_score": float("nan")}
        hook.tell("validation", "it drew", metrics=numbers, folder=pictures(tmp_path / "step-3", 2))
        hook.tell("end", "done", folder=tmp_path / "nothing")
        hook.close()
    first, last = server.messages
    assert first["event"] == "validation"
    assert first["text"] == first["content"] == "it drew"
    assert {**ABOUT, "step": 3}.items() <= first.items()
    assert first["metrics"] == {"eval_loss": 0.5, "clip_score": None}, "strict JSON has no NaN"
    assert first["picture"]["name"] == "step-3.jpg"
    data = base64.b64decode(first["picture"]["base64"])
    assert len(data) <= webhook.MOST_BYTES
    with Image.open(io.BytesIO(data)) as shown:
        assert shown.size == (512, 256)
    assert last["event"] == "end"
    assert "picture" not in last
    assert server.heard[0][0]["Content-Type"] == "application/json"
    assert not said


@pytest.mark.parametrize(("count", "size"), [(1, (512, 512)), (3, (512, 512)), (9, (512, 512))])
def test_a_picture_is_bounded_however_many_there_are(
    tmp_path: Path, count: int, size: tuple[int, int]
) -> None:
    found = thumbnail(pictures(tmp_path / "step-3", count, side=300))
    assert found is not None
    with Image.open(io.BytesIO(found[1])) as shown:
        assert shown.size == size


def test_discord_gets_a_form_with_the_picture_and_calls_nobody() -> None:
    picture = ("step-3.jpg", b"\xff\xd8 jpeg \r\n--")
    message = Message(event="validation", text="@everyone", about=ABOUT, picture=picture)
    kind, body = shaped("discord.com", message)
    mark = kind.partition("boundary=")[2]
    parts = body.split(f"--{mark}".encode())
    assert [len(parts), parts[0], parts[3]] == [4, b"", b"--\r\n"]
    head, table = parts[1].split(b"\r\n\r\n")
    assert b'name="payload_json"' in head
    assert json.loads(table) == {"content": "@everyone", "allowed_mentions": {"parse": []}}
    head, _, data = parts[2].partition(b"\r\n\r\n")
    assert b'name="files[0]"; filename="step-3.jpg"' in head
    assert data == picture[1] + b"\r\n"


def test_slack_gets_a_text_alone() -> None:
    message = Message(event="end", text="loss < 1 & done", about=ABOUT, picture=("a.jpg", b"x"))
    kind, body = shaped("hooks.slack.com", message)
    assert kind == "application/json"
    assert json.loads(body) == {"text": "loss &lt; 1 &amp; done"}
    assert "about" not in json.loads(shaped("notslack.com", message)[1])
    assert json.loads(shaped("notslack.com", message)[1])["event"] == "end"


# -- a server that is no help -------------------------------------------------------------------


def test_a_dead_server_is_said_once_and_without_its_secret() -> None:
    with serving() as server:
        url = server.url
    said: list[str] = []  # nobody listens there any more
    hook = hook_to(url, said)
    for _ in range(3):
        hook.tell("validation", "it drew")
    hook.close()
    assert len(said) == 1
    assert "--webhook 127.0.0.1" in said[0]
    assert "a-long-secret-word" not in said[0]


@pytest.mark.parametrize("code", [404, 429, 500])
def test_a_server_that_refuses_is_said_once(code: int) -> None:
    said: list[str] = []
    with serving(code) as server:
        hook = hook_to(server.url, said)
        hook.tell("start", "begins")
        hook.tell("end", "done")
        hook.close()
    assert len(server.heard) == 2
    assert [str(code) in line for line in said] == [True]


def test_a_slow_server_holds_up_neither_the_messages_nor_the_end() -> None:
    said: list[str] = []
    with serving(delay=60) as server:
        hook = hook_to(server.url, said, room=2)
        while not server.heard:  # the first one is with the server
            hook.tell("start", "begins")
            time.sleep(0.01)
        began = time.monotonic()
        for _ in range(50):
            hook.tell("validation", "it drew")
        hook.close(patience=0.2)
        assert time.monotonic() - began < 30, "it waited for the server"
        assert len(server.heard) == 1
    assert len(said) == 1
    assert "2 messages wait" in said[0]


def test_a_slow_server_is_given_up_after_its_time() -> None:
    said: list[str] = []
    with serving(delay=60) as server:
        hook = hook_to(server.url, said, timeout=0.2)
        hook.tell("start", "begins")
        hook.tell("end", "done")
        hook.close()
        assert len(server.heard) == 2
    assert len(said) == 1
    assert "timed out" in said[0]


# -- how a run ends -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "event", "text"),
    [
        (TrainingStopped("the loss is NaN"), "failure", "hearts failed at step 3"),
        (RuntimeError("CUDA out of memory\nlong"), "failure", "CUDA out of memory"),
        (UserError("--x https://me:hidden-word@host/ fails"), "failure", "https://***@host"),
        (Interrupted(143, lambda: "kept"), "stop", "hearts was stopped at step 3"),
        (KeyboardInterrupt(), "stop", "hearts was stopped at step 3"),
    ],
)
def test_what_ends_a_run_is_told_and_goes_on(error: BaseException, event: str, text: str) -> None:
    with serving() as server:
        hook_to(server.url, [])
        with pytest.raises(type(error)), webhook.failure_told():
            raise error
        with pytest.raises(type(error)), webhook.failure_told():
            raise error  # of another run: nobody is told twice
    (message,) = server.messages
    assert message["event"] == event
    assert text in message["text"]
    assert not {"long", "hidden-word"} & set(message["text"].replace("/", " ").split())


# -- secrets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["hooks.slack.com/services/T/B/x", "ftp://host/x", "***", "http:/y"]
)
def test_what_is_no_address_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--webhook"):
        training.RunArgs(output_dir=tmp_path, webhook=text)
    monkeypatch.setenv(webhook.VARIABLE, text)
    with pytest.raises(UserError, match=webhook.VARIABLE) as caught:
        training.start(training.RunArgs(output_dir=tmp_path), OptimArgs(max_train_steps=1))
    assert text not in str(caught.value)


def test_the_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(webhook.VARIABLE, "https://host/one")
    assert webhook.address(None) == "https://host/one"
    assert webhook.address("https://host/two") == "https://host/two"
    monkeypatch.delenv(webhook.VARIABLE)
    assert webhook.address(None) is None


@pytest.mark.parametrize("words", [["--webhook", "{}"], ["--webhook={}"]])
def test_the_address_is_masked_wherever_it_is_said(words: list[str]) -> None:
    url = "https://discord.com/api/webhooks/123/never-to-be-seen" + str(len(words))
    masking.keep_flagged([word.format(url) for word in words])
    assert masking.hide(f"python train.py --webhook {url} --rank 4") == (
        "python train.py --webhook *** --rank 4"
    )
    assert "never-to-be-seen" not in masking.hide(f"POST {url.partition('.com')[2]} failed")


def test_the_doctor_shows_that_it_is_set_and_no_more() -> None:
    found = examine({"DOJO_WEBHOOK": "https://host/never-to-be-seen"})
    assert found["variables"]["DOJO_WEBHOOK"] == "set, not shown"
    assert "never-to-be-seen" not in json.dumps(found)


def test_a_run_tells_from_beginning_to_end_and_keeps_the_address_to_itself(
    tmp_path: Path, tiny_sd3: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_scenes(tmp_path / "scenes")
    flags = run_flags(tmp_path, tiny_sd3, tmp_path / "scenes")
    flags += ["--max_train_steps", "2", "--validation_prompt", "a star"]
    flags += ["--validation_inference_steps", "2"]
    with serving() as server:
        in_process(SCRIPTS["lora_sd3"].load(), [*flags, "--webhook", server.url])
    events = [message["event"] for message in server.messages]
    assert events == ["start", "validation", "validation", "end"]
    assert [message["step"] for message in server.messages] == [0, 0, 2, 2]
    assert all("picture" in message for message in server.messages[1:3])
    said = capfd.readouterr()
    secret = "a-long-secret-word"
    assert secret not in said.out + said.err
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
