"""The page of demo.py --web: what it takes, what it draws, and for whom."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from starlette.testclient import TestClient

from dojo.evaluate import easel
from dojo.evaluate.easel_page import Page
from dojo.evaluate.picture import DrawArgs
from dojo.web import site
from tests.watch import fake_run

HOST = "http://127.0.0.1:7008"


class Drawer:
    """A pipeline without weights: a picture of one colour, told by what it was asked."""

    scheduler = "base"

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.go = threading.Event()
        self.go.set()
        self.scales: list[float] = []
        self.lora = True

    def __call__(
        self,
        prompt: str = "",
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 0,
        num_inference_steps: int = 0,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        callback_on_step_end: Any = None,
    ) -> Any:
        self.asked.append({"prompt": prompt, "lora": self.lora and self.scales})
        for step in range(num_inference_steps):
            assert self.go.wait(20)
            assert callback_on_step_end(self, step, 0, {}) == {}
        if prompt == "fail":
            raise RuntimeError("out of memory")

        class Output:
            images = (Image.new("RGB", (8, 8), (len(self.asked), 0, 0)),)

        return Output

    def set_adapters(self, names: list[str], scales: list[float]) -> None:
        assert len(names) == len(scales)
        self.scales = scales

    def enable_lora(self) -> None:
        self.lora = True

    def disable_lora(self) -> None:
        self.lora = False


def page_of(drawer: Drawer, loras: tuple[str, ...] = ("outputs/x",)) -> tuple[Page, TestClient]:
    def command(wish: easel.Wish, tuned: bool) -> str:
        return f"{wish.prompt} {wish.seed} {tuned and wish.scales}"

    drawing = DrawArgs(num_inference_steps=2)
    board = easel.Easel(drawer, "tuned", loras, command)
    page = Page(board, "models/base", drawing, ["a star"], 5, (1.0,) * len(loras))
    door = site.Door()
    headers = {"Authorization": f"Bearer {door.token}"}
    return page, TestClient(page.app(door), base_url=HOST, headers=headers)


def finished(client: TestClient, number: int = 1) -> dict[str, Any]:
    for _ in range(1000):
        jobs = {job["number"]: job for job in client.get("/api/jobs").json()["jobs"]}
        if jobs[number]["state"] not in ("waiting", "drawing"):
            return jobs[number]
        time.sleep(0.01)
    raise AssertionError("nothing was drawn")


def test_base_and_lora_are_drawn_and_a_new_scale_draws_the_lora_alone() -> None:
    drawer = Drawer()
    _, client = page_of(drawer)
    wish = {"prompt": "a star", "seed": 7, "scales": [0.5]}
    assert client.post("/api/draw", json=wish).json() == {"job": 1}
    job = finished(client)
    assert (job["state"], job["done"], job["steps"]) == ("done", 4, 4)
    assert [one["lora"] for one in drawer.asked] == [False, [0.5]]
    client.post("/api/draw", json={**wish, "scales": [1.5]})
    assert finished(client, 2)["state"] == "done"
    assert [one["lora"] for one in drawer.asked] == [False, [0.5], [1.5]]
    pictures = [
        client.get("/api/picture", params={"job": number, "side": side}).content
        for number, side in ((1, "base"), (2, "base"), (2, "lora"))
    ]
    assert pictures[0] == pictures[1] != pictures[2]
    assert client.get("/api/picture?job=9&side=base").status_code == 404
    assert client.get("/api/picture?job=1&side=x").status_code == 404


def test_without_a_lora_the_base_alone_is_drawn_under_a_new_seed() -> None:
    drawer = Drawer()
    _, client = page_of(drawer, ())
    client.post("/api/draw", json={"prompt": "a star", "scales": []})
    job = finished(client)
    assert [*job["sides"]] == ["base"]
    assert job["seed"] >= 0
    assert drawer.scales == []


def test_what_fails_is_told_and_the_next_picture_is_drawn(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, client = page_of(Drawer())
    client.post("/api/draw", json={"prompt": "fail"})
    job = finished(client)
    assert (job["state"], job["error"]) == ("failed", "RuntimeError: out of memory")
    client.post("/api/draw", json={"prompt": "a star"})
    assert finished(client, 2)["state"] == "done"


def test_a_picture_can_be_given_up_and_no_more_wait_than_may() -> None:
    drawer = Drawer()
    drawer.go.clear()
    page, client = page_of(drawer)
    for _ in range(1000):  # the first is being drawn, the others wait
        jobs = page.easel.jobs()
        if not jobs:
            client.post("/api/draw", json={"prompt": "a"})
        elif jobs[0].state == "drawing":
            break
        time.sleep(0.01)
    for _ in range(easel.WAITING):
        assert client.post("/api/draw", json={"prompt": "b"}).status_code == 200
    assert client.post("/api/draw", json={"prompt": "b"}).status_code == 429
    for number in range(1, easel.WAITING + 2):
        client.post("/api/cancel", json={"job": number})
    drawer.go.set()
    page.easel.close()
    assert {job.state for job in page.easel.jobs()} == {"cancelled"}
    assert [one["prompt"] for one in drawer.asked] == ["a"]


def test_only_so_many_pictures_are_kept() -> None:
    page, client = page_of(Drawer(), ())
    for number in range(1, easel.KEPT + 4):
        client.post("/api/draw", json={"prompt": str(number), "num_inference_steps": 1})
        finished(client, number)
    numbers = [job.number for job in page.easel.jobs()]
    assert numbers == [*range(easel.KEPT + 3, 3, -1)]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x" * 20_000}, "prompt"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"scales": []}, "scales"),
        ({"scales": ["1"]}, "scales"),
        ({"scales": [11]}, "scales"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 501}, "num_inference_steps"),
        ({"width": 64.5}, "width"),
        ({"height": 99999}, "height"),
        ({"guidance_scale": -1}, "guidance_scale"),
    ],
)
def test_a_wish_that_cannot_be_drawn_is_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    page, client = page_of(Drawer())
    answer = client.post("/api/draw", json={"prompt": "a", "scales": [1], **wrong})
    assert answer.status_code == 400
    assert named in answer.json()["error"]
    assert page.easel.jobs() == []


def test_nothing_is_drawn_or_told_without_the_token() -> None:
    page, _ = page_of(Drawer())
    client = TestClient(page.app(site.Door()), base_url=HOST)
    for path in ("/api/model", "/api/jobs", "/api/picture?job=1&side=base"):
        assert client.get(path).status_code == 401
    assert client.post("/api/draw", json={"prompt": "a"}).status_code == 401
    assert page.easel.jobs() == []


def test_the_prompts_are_those_of_the_run_that_the_lora_comes_from(tmp_path: Path) -> None:
    folder = fake_run.make(tmp_path / "run")
    assert easel.prompts_of(str(folder)) == []
    fake_run.draw(folder, 5, "a red star")
    (folder / "checkpoint-5").mkdir()
    for name in ("", "checkpoint-5", "pytorch_lora_weights.safetensors"):
        assert easel.prompts_of(str(folder / name)) == ["a red star"]
