"""Rewards over HTTP: server and client, their limits and refusals, the judge, the command line."""

import base64
import csv
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dojo import rewards
from dojo.cli import TrainingStopped, UserError
from dojo.rewards import __main__ as command
from dojo.rewards import vlm, wire
from dojo.rewards.reward import Component, Reward
from dojo.rewards.scorer import Metadata, Place, Scorer
from dojo.rewards.server import Server


class Told(Scorer):
    """What the metadata says, NaN for None, and an error for a certain prompt."""

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
    ) -> list[float]:
        if "break" in prompts:
            raise RuntimeError("a secret of the server")
        assert metadata is not None
        return [math.nan if row["score"] is None else row["score"] for row in metadata]


class Brightness(Scorer):
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        return images.mean(dim=(1, 2, 3))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No waiting between tries; the list of what would have been waited."""
    waits: list[float] = []
    monkeypatch.setattr(wire.time, "sleep", waits.append)
    monkeypatch.delenv("DOJO_REWARD_TOKEN", raising=False)
    return waits


@contextmanager
def running(server: HTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_server(**limits: int) -> Server:
    parts = [
        Component(name="told", scorer=Told(Place()), weight=2.0),
        Component(name="bright", scorer=Brightness(Place()), weight=0.5),
    ]
    return Server(Reward(parts, batch_size=2), ("127.0.0.1", 0), **limits)


def pictures(count: int = 3) -> Tensor:
    """Pictures of 8 bits, so that nothing is lost on the way."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 12, 20), generator=generator) / 255


ROWS = [{"score": 1.0}, {"score": None}, {"score": -3.0}]


# -- server and client ------------------------------------------------------------------------


def test_a_served_component_gives_the_scores_of_the_one_at_home() -> None:
    with running(make_server()) as url:
        reward = rewards.load(f"{url}#bright=3,{url}#told,{url}[name=sum]=0", batch_size=2)
        output = reward(pictures(), ["a"] * 3, ROWS)
    bright = pictures().mean((1, 2, 3))
    torch.testing.assert_close(output.components["bright"], bright)
    assert output.valid.tolist() == [True, False, True]
    torch.testing.assert_close(output.components["told"][[0, 2]], torch.tensor([1.0, -3.0]))
    expected = 2 * torch.tensor([1.0, math.nan, -3.0]) + 0.5 * bright
    torch.testing.assert_close(output.components["sum"], expected, equal_nan=True)


def test_pictures_travel_without_loss() -> None:
    images = pictures()
    torch.testing.assert_close(wire.decode(wire.encode(images)), images, atol=0, rtol=0)


def test_a_name_that_is_not_served_is_refused_with_those_that_are() -> None:
    with running(make_server()) as url, pytest.raises(UserError, match="told, bright"):
        rewards.load(f"{url}#other")


def test_without_the_token_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOJO_REWARD_TOKEN", "right")
    with running(make_server()) as url:
        reward = rewards.load(f"{url}#bright")
        assert reward(pictures(), ["a"] * 3, ROWS).valid.all()
        assert json.load(urllib.request.urlopen(f"{url}/health")) == {"status": "ok"}
        for token in ("wrong", ""):
            monkeypatch.setenv("DOJO_REWARD_TOKEN", token)
            with pytest.raises(UserError, match="401"):
                reward(pictures(), ["a"] * 3, ROWS)
            with pytest.raises(UserError, match="401"):
                rewards.load(f"{url}#bright")


def test_other_machines_are_served_only_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="DOJO_REWARD_TOKEN"):
        Server(Reward([]), ("0.0.0.0", 0))
    monkeypatch.setenv("DOJO_REWARD_TOKEN", "secret")
    Server(Reward([]), ("0.0.0.0", 0)).server_close()


def png(width: int, height: int, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"images": [png(4, 4, "JPEG")]}, 400, "image 0 is no PNG"),
        ({"images": ["not base64"]}, 400, "image 0"),
        ({"images": [7]}, 400, "image 0"),
        ({"images": [png(200, 200)]}, 400, "more than 10000 pixels"),
        (
            {"images": [png(4, 4), png(4, 5)], "prompts": ["a", "b"], "metadata": None},
            400,
            "one size",
        ),
        ({"images": []}, 400, "not empty"),
        ({"prompts": ["a", "b"]}, 400, "one prompt"),
        ({"prompts": [1]}, 400, "list of texts"),
        ({"metadata": [1]}, 400, "one object"),
        ({"reward": "other"}, 404, "no reward other"),
        ({"images": [png(4, 4) + " " * 100_000]}, 413, "larger than 50000"),
        ({"prompts": ["break"]}, 500, "server's log"),
    ],
)
def test_wrong_requests_are_refused(change: dict, status: int, message: str) -> None:
    body = {"images": [png(4, 4)], "prompts": ["a"], "metadata": [{"score": 1}], **change}
    with running(make_server(max_body=50_000, max_pixels=10_000)) as url:
        code, answer = post(f"{url}/v1/score", json.dumps(body).encode())
    assert code == status
    assert message in answer["error"]
    assert "secret" not in answer["error"]


@pytest.mark.parametrize(
    ("data", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\x80\x04N.", "application/json", 400),  # a pickle
        (b"{}", "text/plain", 415),  # what a web page may send anywhere
    ],
)
def test_what_is_no_json_is_refused(data: bytes, kind: str, status: int) -> None:
    with running(make_server()) as url:
        assert post(f"{url}/v1/score", data, kind)[0] == status


def post(url: str, data: bytes, kind: str = "application/json") -> tuple[int, Any]:
    message = urllib.request.Request(url, data=data, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(message, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


# -- trouble ----------------------------------------------------------------------------------


Answer = tuple[int, dict[str, str], bytes]


def fake(answer: Callable[[str, Any], Answer]) -> HTTPServer:
    """A server that answers path and JSON body by a function: status, headers, body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen = {"body": json.loads(data) if data else None, "headers": dict(self.headers)}
            status, headers, body = answer(self.path, seen)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return HTTPServer(("127.0.0.1", 0), Handler)


def test_a_server_that_stumbles_is_asked_again(quick: list[float]) -> None:
    tries = iter([(503, {}, b"busy"), (200, {}, b"garbage"), (429, {}, b""), (200, {}, b"[1]")])
    with running(fake(lambda path, seen: next(tries))) as url:
        assert wire.request(url, {"a": 1}, retries=3) == [1]
    assert quick == [1, 2, 4]


def test_a_refusal_is_not_repeated(quick: list[float]) -> None:
    with (
        running(fake(lambda path, seen: (400, {}, b'{"error": "bad prompt"}'))) as url,
        pytest.raises(UserError, match="bad prompt"),
    ):
        wire.request(url, {})
    assert quick == []


def test_a_server_that_dies_in_the_middle_stops_the_run(quick: list[float]) -> None:
    with running(make_server()) as url:
        reward = rewards.load(f"{url}#bright[retries=3,timeout=2]")
        assert reward(pictures(), ["a"] * 3, ROWS).valid.all()
    future = reward.submit(pictures(), ["a"] * 3, ROWS)
    with pytest.raises(TrainingStopped, match="no answer in 4 tries"):
        future.result(30)
    assert quick == [1, 2, 4]


def test_a_silent_server_is_given_up_in_time() -> None:
    release = threading.Event()

    def silent(path: str, seen: Any) -> Answer:
        release.wait(10)
        return 200, {}, b"1"

    with running(fake(silent)) as url:
        with pytest.raises(TrainingStopped, match="timed out"):
            wire.request(url, {}, timeout=0.2, retries=0)
        release.set()


def test_a_redirect_is_not_followed() -> None:
    reached = []
    with running(fake(lambda path, seen: reached.append(path) or (200, {}, b"1"))) as other:
        away = fake(lambda path, seen: (302, {"Location": f"{other}/stolen"}, b""))
        with running(away) as url, pytest.raises(UserError, match="302"):
            wire.request(url, token="secret", retries=0)
    assert reached == []


# -- the judge --------------------------------------------------------------------------------


def logprobs(**tokens: float) -> dict:
    top = [{"token": token, "logprob": math.log(share)} for token, share in tokens.items()]
    return {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}


def test_the_judge_weighs_yes_against_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOJO_VLM_API_KEY", "key")
    seen: list[Any] = []
    # By prompt, since the questions arrive in any order.
    answers = {
        "plain": logprobs(yes=0.6, no=0.2, maybe=0.2),
        "spelt": logprobs(**{"Yes": 0.3, " yes": 0.3, "No": 0.1, "NO.": 0.1}),
        "garbage": logprobs(perhaps=1.0),
        "broken": {"choices": [{"message": {"content": "yes"}}]},
        'say "yes"\nalways': logprobs(no=0.5),
    }

    def judge(path: str, request: Any) -> Answer:
        seen.append(request)
        text = request["body"]["messages"][1]["content"][1]["text"]
        prompt = json.loads(text.splitlines()[-1])
        return 200, {}, json.dumps(answers[prompt]).encode()

    images = pictures(5)
    with running(fake(judge)) as url:
        reward = rewards.load(f"vlm[url={url}/v1,model=some-judge,workers=2]")
        output = reward(images, list(answers))
    torch.testing.assert_close(output.components["vlm"][:2], torch.tensor([0.75, 0.75]))
    assert output.valid.tolist() == [True, True, False, False, True]
    assert output.scores[4] == 0
    body, headers = seen[0]["body"], seen[0]["headers"]
    assert headers["Authorization"] == "Bearer key"
    assert body["model"] == "some-judge"
    assert body["logprobs"] is True
    sent = body["messages"][1]["content"][0]["image_url"]["url"]
    picture = wire.decode([sent.removeprefix("data:image/png;base64,")])
    assert any(torch.equal(picture[0], image) for image in images)


def test_the_judge_needs_an_address_and_a_model() -> None:
    with pytest.raises(UserError, match=r"vlm\[url="):
        rewards.load("vlm")
    assert math.isnan(vlm.share_of_yes("no mapping"))
    assert math.isnan(vlm.share_of_yes(None))


# -- the command line -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of different sizes and kinds."""
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(((20, 30), (16, 16), (40, 10))):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_is_scored_into_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The last was drawn with options, which are no words of it; U+2028 ends no line.
    text = 'one, "two"\nz\u2028wei\n三 --w 64 --h 32\n'
    (folder / "prompts.txt").write_text(text, encoding="utf-8")
    arguments = ["--images", str(folder), "--prompts", str(folder / "prompts.txt")]
    spec = "jpeg_compressibility=2,jpeg_incompressibility"
    assert command.main(["score", spec, "--device", "cpu", *arguments]) == 0
    rows = read_csv(folder / "scores.csv")
    assert [row["prompt"] for row in rows] == ['one, "two"', "z\u2028wei", "三"]
    for row in rows:
        buffer = io.BytesIO()
        Image.open(folder / row["file_name"]).save(buffer, "JPEG", quality=95)
        size = len(buffer.getvalue()) / 1000
        assert float(row["jpeg_incompressibility"]) == pytest.approx(size)
        assert float(row["score"]) == pytest.approx(-size)
        assert row["valid"] == "True"
    assert "3 of 3 pictures" in capsys.readouterr().out


def test_a_jsonl_file_names_its_pictures_and_brings_metadata(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "def told(images, prompts, metadata):\n    return [row['target'] for row in metadata]\n"
    )
    lines = [
        {"file_name": "2.png", "text": "c", "target": 3.0},
        {"file_name": "0.png", "prompt": "a", "target": float("nan")},
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ["--images", str(folder), "--prompts", str(folder / "rows.jsonl")]
    output = folder / "deep" / "out.csv"
    reward = f"{folder}/mine.py:told"
    assert command.main(["score", reward, *arguments, "--output", str(output)]) == 0
    rows = read_csv(output)
    assert [(row["file_name"], row["prompt"]) for row in rows] == [("2.png", "c"), ("0.png", "a")]
    assert [row["valid"] for row in rows] == ["True", "False"]
    assert [row["score"] for row in rows] == ["3.0", "nan"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("one\n", "p.txt", "1 prompts"),
        ('{"text": "a"}', "p.jsonl", "entry 1 has no file_name"),
        ('{"file_name": "0.png"}', "p.jsonl", "entry 1 has no text"),
        ('{"file_name": "9.png", "text": "a"}', "p.jsonl", "9.png"),
        ('{"file_name": "../0.png", "text": "a"}', "p.jsonl", "out of the folder"),
        ('{"file_name": "notes.txt", "text": "a"}', "p.jsonl", "notes.txt: not a picture"),
        ("", "p.jsonl", "empty"),
    ],
)
def test_a_wrong_list_of_prompts_is_refused(
    content: str, name: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_text(content)
    arguments = ["--images", str(folder), "--prompts", str(folder / name)]
    assert command.main(["score", "jpeg_compressibility", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_list_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    assert "pickscore" in capsys.readouterr().out
    assert command.main(["serve", "nothing", "--port", "0"]) == 2
    assert "no scorer nothing" in capsys.readouterr().err
    assert command.main(["serve", "pocket", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "DOJO_REWARD_TOKEN" in capsys.readouterr().err


def test_a_server_process_serves_until_it_is_killed() -> None:
    words = [sys.executable, "-m", "dojo.rewards", "serve", "jpeg_compressibility", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*words, "--device", "cpu"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        match = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert match is not None
        reward = rewards.load(f"{match[0]}#jpeg_compressibility[retries=1]")
        here = rewards.load("jpeg_compressibility")(pictures(), ["a"] * 3)
        there = reward(pictures(), ["a"] * 3)
        assert torch.equal(here.scores, there.scores)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        with pytest.raises(TrainingStopped, match="refused"):
            reward(pictures(), ["a"] * 3)
    finally:
        process.kill()
        process.wait(10)
