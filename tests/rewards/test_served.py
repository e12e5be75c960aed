"""Rewards over HTTP: server and client, their limits and refusals, the judge, the command line."""

import base64
import csv
import io
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dojo import rewards
from dojo.cli import TrainingStopped, UserError
from dojo.rewards import __main__ as command
from dojo.rewards import server, vlm, wire
from dojo.rewards.reward import Component, Reward
from dojo.rewards.scorer import Metadata, Place, Scorer
from dojo.rewards.server import Limits, Server
from tests.processes import served


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
    monkeypatch.setattr(wire, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.delenv("DOJO_REWARD_TOKEN", raising=False)
    return waits


@contextmanager
def running(server: HTTPServer | Server) -> Iterator[str]:
    own = {} if isinstance(server, Server) else {"poll_interval": 0.01}
    thread = threading.Thread(target=server.serve_forever, kwargs=own)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_server(**limits: float) -> Server:
    parts = [
        Component(name="told", scorer=Told(Place()), weight=2.0),
        Component(name="bright", scorer=Brightness(Place()), weight=0.5),
    ]
    return Server(Reward(parts, batch_size=2), ("127.0.0.1", 0), Limits(**limits))  # pyright: ignore[reportArgumentType]


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
        ({"images": [png(200, 200)]}, 413, "more than 10000 pixels"),
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
    with running(make_server(body=50_000, picture_pixels=10_000)) as url:
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


# -- what a request may cost ------------------------------------------------------------------


def ask(url: str, **change: Any) -> tuple[int, Any]:
    body = {"images": [png(4, 4)], "prompts": ["a"], "metadata": [{"score": 1}], **change}
    return post(f"{url}/v1/score", json.dumps(body).encode())


def test_pixels_are_counted_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire.Image, "open", lambda *_, **__: pytest.fail("decoded"))
    wide = base64.b64decode(png(4, 4))
    wide = wide[:16] + (4096).to_bytes(4, "big") * 2 + wide[24:]  # a header that says more
    many = {"images": [base64.b64encode(wide).decode()] * 40, "prompts": ["a"] * 40}
    with running(make_server()) as url:
        status, answer = ask(url, **many, metadata=None)
        assert (status, "send 8 at a time (--reward_batch_size)" in answer["error"]) == (413, True)
    with running(make_server(pictures=39)) as url:
        assert ask(url, **many, metadata=None)[0] == 413


def test_a_body_of_endless_small_things_is_refused() -> None:
    with running(make_server(values=1000)) as url:
        status, answer = ask(url, metadata=[{"score": 1, "list": [[]] * 1000}])
    assert (status, "more than 1000 values" in answer["error"]) == (413, True)


def test_large_pictures_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    decode = wire.decode

    def counted(texts: Sequence[Any], *args: Any, **options: Any) -> Tensor:
        seen.append(len(texts))
        return decode(texts, *args, **options)

    monkeypatch.setattr(wire, "decode", counted)
    monkeypatch.setattr(server, "AT_ONCE", 2 * 12 * 20 + 1)
    reward = Reward([Component(name="bright", scorer=Brightness(Place()))], batch_size=16)
    with running(Server(reward, ("127.0.0.1", 0))) as url:
        output = rewards.load(f"{url}#bright")(pictures(5), ["a"] * 5)
    assert seen == [2, 2, 1]
    torch.testing.assert_close(output.scores, pictures(5).mean((1, 2, 3)))


def test_a_refusal_reaches_a_client_that_is_still_sending() -> None:
    with running(make_server(body=1000)) as url:
        status, answer = post(f"{url}/v1/score", b" " * 5_000_000)
    assert (status, answer["error"]) == (413, "the body is larger than 1000 bytes")


def slowly(url: str, data: bytes) -> bytes:
    """What a client hears that sends some data and no more."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as one:
        one.sendall(data)
        heard = b""
        while part := one.recv(4096):
            heard += part
    return heard


BEGUN = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "limits"),
    [
        (b"", {"header_seconds": 0.1}),
        (b"POST /v1/sc", {"header_seconds": 0.1}),
        (BEGUN + b'Content-Length: 9\r\n\r\n{"a"', {"body_seconds": 0.1}),
    ],
    ids=["silence", "half a header", "half a body"],
)
def test_a_client_that_stops_sending_is_cut_off(data: bytes, limits: dict[str, float]) -> None:
    with running(make_server(**limits)) as url:
        heard = slowly(url, data)
        assert heard.startswith(b"HTTP/1.1 408 ")
        assert b'"error"' in heard
        assert ask(url)[0] == 200


class Held(Scorer):
    """Scores when it is let, one request at a time."""

    def __init__(self) -> None:
        super().__init__(Place())
        self.asked, self.let, self.inside = threading.Event(), threading.Event(), 0

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
    ) -> list[float]:
        self.inside += 1
        assert self.inside == 1
        self.asked.set()
        assert self.let.wait(30)
        self.inside -= 1
        return [1.0] * len(images)


def test_who_cannot_be_served_in_time_is_told_to_come_again(quick: list[float]) -> None:
    held = Held()
    reward = Reward([Component(name="held", scorer=held)])
    busy = Server(reward, ("127.0.0.1", 0), Limits(wait_seconds=0.05))
    with running(busy) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, url)
        assert held.asked.wait(30)
        request = urllib.request.Request(
            f"{url}/v1/score",
            json.dumps({"images": [png(4, 4)], "prompts": ["a"]}).encode(),
            {"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        with caught.value as error:
            assert (error.code, error.headers["Retry-After"]) == (503, "5")
        held.let.set()
        assert first.result(30)[0] == 200
        assert ask(url)[0] == 200


def test_those_that_wait_are_scored_one_after_the_other() -> None:
    held = Held()
    with (
        running(Server(Reward([Component(name="held", scorer=held)]), ("127.0.0.1", 0))) as url,
        ThreadPoolExecutor(4) as pool,
    ):
        answers = [pool.submit(ask, url) for _ in range(4)]
        assert held.asked.wait(30)
        held.let.set()
        assert [answer.result(30)[0] for answer in answers] == [200] * 4


def test_a_reward_that_breaks_does_not_end_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\ndef score(images, prompts, metadata):\n    sys.exit(0)\n"
    )
    served = Server(rewards.load(f"{tmp_path}/mine.py:score"), ("127.0.0.1", 0))
    with running(served) as url:
        for _ in range(2):
            status, answer = ask(url)
            assert (status, answer["error"]) == (500, "scoring failed; the server's log says why")
    assert "score (mine.py, line 3) raised SystemExit" in capsys.readouterr().err


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


def test_the_server_says_how_long_to_wait(quick: list[float]) -> None:
    tries = iter([(503, {"Retry-After": "7"}, b""), (408, {}, b""), (200, {}, b"[1]")])
    with running(fake(lambda path, seen: next(tries))) as url:
        assert wire.request(url, {"a": 1}) == [1]
    assert quick == [7, 2]


def test_a_name_and_password_in_an_address_reach_the_server_and_nobody_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[Any] = []

    def refuse(path: str, request: Any) -> Answer:
        seen.append((path, request["headers"].get("Authorization")))
        return 403, {}, b'{"error": "me:s@cret, your key hidden is not known"}'

    with running(fake(refuse)) as url:
        own = url.replace("http://", "http://me:s%40cret@")
        for text in (f"{own}/?key=hidden#x", f"vlm[url={own}/v1?key=hidden,model=m]"):
            with pytest.raises(UserError, match=r"http://\*\*\*@127") as caught:
                rewards.load(text)(pictures(1), ["a"])
            for secret in ("s@cret", "s%40cret", "hidden"):
                assert secret not in str(caught.value)
    basic = "Basic " + base64.b64encode(b"me:s@cret").decode()
    assert seen == [("/info?key=hidden", basic), ("/v1/chat/completions?key=hidden", basic)]


@pytest.mark.parametrize("text", ["http://host:x#a", "http://me:hidden@host:x", "https://#a"])
def test_what_is_no_address_is_refused_at_once(text: str, quick: list[float]) -> None:
    with pytest.raises(UserError, match="no address") as caught:
        rewards.load(text)
    assert "hidden" not in str(caught.value)
    assert quick == []


@pytest.mark.parametrize("answer", [b"[]", b'{"rewards": 3}', b"{}"])
def test_a_server_of_another_kind_is_named(answer: bytes) -> None:
    with (
        running(fake(lambda path, seen: (200, {}, answer))) as url,
        pytest.raises(UserError, match="is it a server of"),
    ):
        rewards.load(url)


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
    assert command.main(["score", spec, "--device", "cpu", *arguments]) == 0  # its own is replaced
    (folder / "scores.csv").write_text("mine")
    assert command.main(["score", spec, "--device", "cpu", *arguments]) == 2
    assert "scores.csv is there already" in capsys.readouterr().err
    assert (folder / "scores.csv").read_text() == "mine"


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


PROMPTS = {
    "prompts.json": '{"options": {}, "pictures": [{"file": "1.png", "prompt": "b", "seed": 7}, '
    '{"file": "0.png", "prompt": "a | `c`", "seed": 8}]}',
    "metadata.jsonl": '{"file_name": "1.png", "text": "b"}\n'
    '{"file_name": "0.png", "text": "a | `c`"}',
    "metadata.csv": 'file_name,text\n1.png,b\n0.png,"a | `c`"\n',
    "../prompts.json": '{"pictures": [{"file": "1.png", "label": "x", "prompt": "b"}, '
    '{"file": "0.png", "label": "y", "prompt": "a | `c`"}]}',
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_folder_that_knows_its_prompts_needs_no_other_file(folder: Path, name: str) -> None:
    inside = folder / "step-3"
    inside.mkdir()
    for i in (0, 1):
        (folder / f"{i}.png").rename(inside / f"{i}.png")
    (inside / name).write_text(PROMPTS[name])
    assert command.main(["score", "jpeg_compressibility", "--images", str(inside)]) == 0
    rows = read_csv(inside / "scores.csv")
    assert [(row["file_name"], row["prompt"]) for row in rows] == [
        ("1.png", "b"),
        ("0.png", "a | `c`"),
    ]


def test_both_sides_of_a_comparison_are_scored(folder: Path) -> None:
    for side, i in (("base", 0), ("tuned", 1)):
        (folder / side).mkdir()
        (folder / f"{i}.png").rename(folder / side / "x.png")
    (folder / "versus.csv").write_text("prompt,seed,file,base/clip\na star,4,x.png,0.5\n")
    assert command.main(["score", "jpeg_compressibility", "--images", str(folder)]) == 0
    rows = read_csv(folder / "scores.csv")
    assert [(row["file_name"], row["prompt"]) for row in rows] == [
        ("base/x.png", "a star"),
        ("tuned/x.png", "a star"),
    ]


def test_a_reward_that_breaks_leaves_the_earlier_scores(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    earlier = "file_name,prompt,score,valid,x\nof before"
    (folder / "scores.csv").write_text(earlier)
    (folder / "mine.py").write_text(
        "def score(images, prompts, metadata):\n    return [{'one': 1.0}[prompts[0]]]\n"
    )
    words = ["--images", str(folder), "--prompts", str(folder / "prompts.txt")]
    assert command.main(["score", f"{folder}/mine.py:score", *words]) == 2
    said = capsys.readouterr().err
    assert "score (mine.py, line 2) raised KeyError: 'two'" in said
    assert "scores.csv.partial" in said
    assert (folder / "scores.csv").read_text() == earlier
    assert [row["prompt"] for row in read_csv(folder / "scores.csv.partial")] == ["one"]


def test_prompts_that_cannot_be_scored_are_said_before_any_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "prompts.txt").write_text("one\na red star\nthree\n")
    words = ["--images", str(folder), "--prompts", str(folder / "prompts.txt")]
    assert command.main(["score", "pocket", *words]) == 0
    assert "pocket cannot score 2 of 3 prompts, such as 'one'" in capsys.readouterr().out
    assert [row["valid"] for row in read_csv(folder / "scores.csv")] == ["False", "True", "False"]
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    assert command.main(["score", "pocket", *words, "--output", str(folder / "new.csv")]) == 2
    assert "3 of 3 prompts" in capsys.readouterr().err
    assert not (folder / "new.csv").exists()


def test_a_folder_that_says_nothing_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["score", "pocket", "--images", str(folder)]) == 2
    assert "has none of prompts.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("one\n", "p.txt", "1 prompts"),
        ('{"options": 1}', "p.json", "no list of pictures"),
        ("[3]", "p.json", "entry 1 has no file_name"),
        ("{", "p.json", "cannot be read"),
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


def test_a_client_survives_the_servers_death_and_return(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def words(name: str) -> str:
        return (tmp_path / name / "server.txt").read_text()

    with ExitStack() as stack:

        def serve(name: str, port: str) -> Any:
            return stack.enter_context(served("jpeg_compressibility", int(port), tmp_path / name))

        first = serve("first", "0")
        match = re.search(r"http://127\.0\.0\.1:(\d+)", words("first"))
        assert match is not None
        reward = rewards.load(f"{match[0]}#jpeg_compressibility[retries=1]")
        here = rewards.load("jpeg_compressibility")(pictures(), ["a"] * 3)
        assert torch.equal(reward.submit(pictures(), ["a"] * 3).result(60).scores, here.scores)
        os.kill(first.pid, signal.SIGKILL)
        first.join(10)
        with pytest.raises(TrainingStopped, match="refused"):
            reward.submit(pictures(), ["a"] * 3).result(60)
        # It is back before the second try.
        back: list[Any] = []
        sleep = SimpleNamespace(sleep=lambda _: back.append(serve("again", match[1])))
        monkeypatch.setattr(wire, "time", sleep)
        assert torch.equal(reward.submit(pictures(), ["a"] * 3).result(60).scores, here.scores)
        (last,) = back
        os.kill(last.pid, signal.SIGTERM)
        last.join(30)
        assert last.exitcode == 0
        assert words("again").endswith("ended\n")


def test_without_its_packages_serving_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "dojo.rewards.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert command.main(["serve", "jpeg_compressibility", "--port", "0"]) == 2
    assert 'pip install "sd-dojo[serve]"' in capsys.readouterr().err
