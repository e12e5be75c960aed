"""python -m dojo.watch: what the page gets, who may ask, and that nothing else is touched."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from starlette.testclient import TestClient

from dojo.launch.interrupt import Requests
from dojo.watch import __main__ as command
from dojo.watch.app import Watcher
from dojo.watch.runs import ABROAD, plain_lines
from dojo.web import site
from tests.watch import fake_run

HOST = "http://127.0.0.1:7007"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fake_run.make(tmp_path / "outputs" / "one")
    fake_run.make(tmp_path / "outputs" / "deeper" / "two", options={"learning_rate": 2e-4})
    return tmp_path / "outputs"


def client_of(root: Path, door: site.Door | None = None) -> TestClient:
    door = door or site.Door()
    headers = {"Authorization": f"Bearer {door.token}"}
    return TestClient(Watcher(root).app(door), base_url=HOST, headers=headers)


def get(root: Path, path: str) -> Any:
    answer = client_of(root).get(f"/api/{path}")
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- what the page gets -----------------------------------------------------------------------


def test_all_runs_below_the_folder_are_listed_the_newest_first(root: Path) -> None:
    os.utime(root / "one" / "metrics.jsonl", (1e9, 1e9))
    found = get(root, "runs")["runs"]
    assert [run["name"] for run in found] == ["deeper/two", "one"]
    assert found[0]["state"] == "stopped"
    assert (found[0]["step"], found[0]["num_steps"]) == (20, 100)
    assert found[0]["loss"] == pytest.approx(1 / 21)
    assert found[0]["seconds_left"] is None


def test_a_folder_that_is_a_run_is_shown_alone(root: Path) -> None:
    assert [run["name"] for run in get(root / "one", "runs")["runs"]] == ["."]
    assert get(root / "one", "run?run=.")["facts"]["folder"] == "one"


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 alone")
def test_a_folder_whose_name_is_not_utf_8_is_shown_too(root: Path) -> None:
    fake_run.make(root / os.fsdecode(b"l\xe4ufe"))
    names = [run["name"] for run in get(root, "runs")["runs"]]
    assert "l?ufe" in names
    assert get(root, "run?run=l%3Fufe")["facts"]["folder"] == "l?ufe"


def test_a_run_at_work_says_how_long_it_still_takes(root: Path) -> None:
    fake_run.start(root / "one")
    found = {run["name"]: run for run in get(root, "runs")["runs"]}
    assert found["one"]["state"] == "running"
    assert found["one"]["seconds_left"] == pytest.approx(80 * 2.5)


def test_a_lock_that_a_kill_left_does_not_pass_for_work(root: Path) -> None:
    lock = root / "one" / ".lock"
    fake_run.start(root / "one")
    os.utime(lock, (1e9, 1e9))  # this process began after that: another one had its number
    assert Watcher(root).run("one").state == "stopped"
    lock.write_text(json.dumps({"pid": 2**22 + 1, "host": "elsewhere"}))
    assert Watcher(root).run("one").state == "running"  # another machine's, a moment ago
    for path in (lock, root / "one" / "metrics.jsonl"):
        os.utime(path, (time.time() - ABROAD - 9, time.time() - ABROAD - 9))
    assert Watcher(root).run("one").state == "stopped"
    (root / "one" / "finished.json").write_text('{"step": 100}')
    assert Watcher(root).run("one").state == "finished"


def test_curves_come_with_their_charts_and_only_when_they_have_changed(root: Path) -> None:
    watcher = Watcher(root)
    names = ["one", "deeper/two"]
    first = watcher.curves(names, 300)
    assert not first["reading"]
    assert {chart["title"] for chart in first["charts"]} == {
        *("Training loss", "Learning rate", "Gradient norm"),
    }
    loss = first["runs"]["one"]["curves"]["loss"]
    assert len(loss["points"]) == 20
    assert (loss["first"], loss["high"]) == (0.5, 0.5)
    have = {name: run["version"] for name, run in first["runs"].items()}
    assert watcher.curves(names, 300, have)["runs"] == {}
    fake_run.append(root / "one", fake_run.rows(21, 22))
    assert [*watcher.curves(names, 300, have)["runs"]] == ["one"]


def test_the_details_have_phases_options_and_no_secret(root: Path) -> None:
    client = client_of(root)
    client.get("/api/curves?run=one")
    found = client.get("/api/run?run=one").json()
    assert found["phases"] == {"train": 40, "data": 10}
    assert found["options"]["optim.learning_rate"] == "0.0001"
    assert found["facts"]["seed"] == "3"
    assert "hf_secret" not in json.dumps(found)


def test_pictures_come_by_step_with_the_prompts_as_plain_texts(root: Path) -> None:
    for step in (5, 10):
        file = fake_run.draw(root / "one", step, fake_run.MARKUP)
    assert get(root, "run?run=one")["pictures"] == {"validation": [5, 10]}
    (picture,) = get(root, "pictures?run=one&set=validation&step=10")["pictures"]
    assert picture["label"] == fake_run.MARKUP
    answer = client_of(root).get("/api/picture", params={"run": "one", "file": picture["file"]})
    assert answer.content == file.read_bytes()
    assert answer.headers["content-type"] == "image/png"


def test_the_newest_log_is_told_as_a_terminal_would_show_it(root: Path) -> None:
    (root / "one.log").write_text("old")
    os.utime(root / "one.log", (1e9, 1e9))
    bars = "\rsteps:  1%\rsteps: 50%\x1b[0m\r\n"
    (root / "one" / "train.log").write_text(f"start\n{bars}\nat http://u:pw@h/x\n")
    log = get(root, "run?run=one")["log"]
    assert log == {"file": "train.log", "lines": ["start", "steps: 50%", "at http://***@h/x"]}
    assert len(plain_lines(b"x\n" * 10_000)) < 100


def test_a_folder_with_anything_in_it_is_shown_as_far_as_it_goes(root: Path) -> None:
    odd = root / "odd"
    odd.mkdir()
    for name in ("args.json", ".lock", "finished.json"):
        (odd / name).write_text("[1, 2")
    (odd / "metrics.jsonl").write_bytes(b"\xff\xfe\n{}\n[]\n")
    worse = root / "worse"
    worse.mkdir()
    (worse / "args.json").write_text('{"args": [1], "num_steps": "x", "versions": 3}')
    (worse / "validation").write_text("no folder")
    for name in ("odd", "worse"):
        assert get(root, f"run?run={name}")["step"] == 0
        assert get(root, f"curves?run={name}")["runs"][name]["curves"] == {}
    assert len(get(root, "runs")["runs"]) == 4


# -- control ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["stop", "save", "sample"])
def test_a_button_asks_the_run_as_touch_does(root: Path, what: str) -> None:
    folder = root / "one"
    requests = Requests(folder, main=True, minutes=None)
    requests.begin()
    fake_run.start(folder)
    answer = client_of(root).post("/api/control", json={"run": "one", "what": what})
    assert answer.json() == {"asked": what}
    requests.agree(requests.local())
    asked = {"stop": bool(requests.stop), "save": requests.save, "sample": requests.sample}
    assert [name for name, value in asked.items() if value] == [what]
    assert not (folder / what).exists()  # it is obeyed


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"run": "one", "what": "stop"}, 409),  # is not at work
        ({"run": "deeper/two", "what": "args.json"}, 400),
        ({"run": "deeper/two", "what": "../x"}, 400),
        ({"run": "../outputs/one", "what": "stop"}, 404),
        ([], 400),
    ],
)
def test_nothing_else_can_be_asked(root: Path, body: Any, status: int) -> None:
    fake_run.start(root / "deeper" / "two")
    before = sorted(root.rglob("*"))
    assert client_of(root).post("/api/control", json=body).status_code == status
    assert sorted(root.rglob("*")) == before


def test_a_control_file_that_is_a_link_is_not_followed(root: Path, tmp_path: Path) -> None:
    fake_run.start(root / "one")
    (root / "one" / "stop").symlink_to(tmp_path / "elsewhere")
    answer = client_of(root).post("/api/control", json={"run": "one", "what": "stop"})
    assert answer.status_code == 409
    assert not (tmp_path / "elsewhere").exists()


# -- who may ask ------------------------------------------------------------------------------

ASKED = [
    *("/api/runs", "/api/curves?run=one", "/api/run?run=one"),
    *("/api/pictures?run=one&set=validation&step=5", "/api/picture?run=one&file=x.png"),
]


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer x"}, {"Authorization": "é"}])
def test_nothing_is_said_or_done_without_the_token(root: Path, header: dict[str, str]) -> None:
    fake_run.start(root / "one")
    client = TestClient(Watcher(root).app(site.Door()), base_url=HOST)
    sent = {name.encode(): value.encode() for name, value in header.items()}
    for path in ASKED:
        assert client.get(path, headers=sent).status_code == 401
    answer = client.post("/api/control", json={"run": "one", "what": "stop"}, headers=sent)
    assert answer.status_code == 401
    assert not (root / "one" / "stop").exists()


def test_another_pages_form_cannot_press_a_button(root: Path) -> None:
    fake_run.start(root / "one")
    client = client_of(root)
    text = json.dumps({"run": "one", "what": "stop"})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        sent = client.post("/api/control", content=text, headers={"Content-Type": kind})
        assert sent.status_code == 415
    large = {"run": "one", "what": "stop", "more": "x" * site.MAX_BODY}
    assert client.post("/api/control", json=large).status_code == 413
    assert client.get("/api/control").status_code == 405
    assert not (root / "one" / "stop").exists()


@pytest.mark.parametrize(
    ("listens", "asked", "admitted"),
    [
        ("127.0.0.1", "127.0.0.1:7007", True),
        ("127.0.0.1", "localhost:9000", True),  # through a tunnel
        ("127.0.0.1", "[::1]:7007", True),
        ("127.0.0.1", "evil.example:7007", False),  # a name that is made to point here
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "192.168.1.5:7007", False),
        ("127.0.0.1", "", False),
        ("0.0.0.0", "192.168.1.5:7007", True),
        ("0.0.0.0", "evil.example:7007", False),
        ("box.lan", "box.lan:7007", True),
    ],
)
def test_the_host_must_name_this_machine(
    root: Path, listens: str, asked: str, admitted: bool
) -> None:
    client = client_of(root, site.Door(host=listens))
    for path in ("/", "/page.js", "/api/runs"):
        status = client.get(path, headers={"Host": asked}).status_code
        assert status == (200 if admitted else 421)


def test_every_answer_forbids_a_browser_what_the_page_does_not_need(root: Path) -> None:
    client = client_of(root)
    for path in ("/", "/page.css", "/watch.js", "/api/runs", "/api/nothing", "/nothing"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", sorted(site.STATIC.iterdir()), ids=lambda path: path.name)
def test_a_page_names_no_other_server_and_makes_no_markup(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.search(r"<[^>]+\s(style|on\w+)=", text)  # the policy would block them


# -- the folder's edges -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        *("../secret.png", "validation/../../secret.png", "/etc/passwd", "args.json", "x\0.png"),
        *("link.png", "validation/step-5/link.png", "away/secret.png", "validation", "", "a" * 999),
    ],
)
def test_no_picture_outside_of_the_run_is_given(root: Path, tmp_path: Path, file: str) -> None:
    picture = fake_run.draw(root / "one", 5)
    away = tmp_path / "away"
    away.mkdir()
    for place in (away / "secret.png", root / "secret.png"):
        place.write_bytes(picture.read_bytes())
    (root / "one" / "link.png").symlink_to(away / "secret.png")
    (picture.parent / "link.png").symlink_to(away / "secret.png")
    (root / "one" / "away").symlink_to(away)
    answer = client_of(root).get("/api/picture", params={"run": "one", "file": file})
    assert answer.status_code == 404
    shown = get(root, "pictures?run=one&set=validation&step=5")["pictures"]
    assert [one["file"] for one in shown] == ["validation/step-5/0.png"]


def test_links_out_of_the_folder_are_not_read(root: Path, tmp_path: Path) -> None:
    outside = fake_run.make(tmp_path / "outside")
    (outside / "a.log").write_text("secret")
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to(root)
    bent = root / "bent"
    bent.mkdir()
    for name in ("args.json", "metrics.jsonl", "a.log"):
        (bent / name).symlink_to(outside / name)
    assert {run["name"] for run in get(root, "runs")["runs"]} == {"one", "deeper/two", "bent"}
    found = get(root, "run?run=bent")
    assert (found["step"], found["options"], found["log"]["lines"]) == (0, {}, [])
    assert get(root, "curves?run=bent")["runs"]["bent"]["curves"] == {}


# -- the command ------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_and_a_taken_port_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(root / "nothing")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    with site.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert command.main([str(root), "--port", port]) == 2
    assert f"--port {port}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_what_its_address_says_until_it_is_ended(root: Path) -> None:
    import urllib.request

    words = [sys.executable, "-m", "dojo.watch", str(root), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"on (http://127\.0\.0\.1:\d+)/#token=([\w-]{20,}) ", line)
        assert found, line
        headers = {"Authorization": f"Bearer {found[2]}"}
        request = urllib.request.Request(f"{found[1]}/api/runs", headers=headers)
        with urllib.request.urlopen(request) as answer:
            assert len(json.load(answer)["runs"]) == 2
        process.terminate()
        assert process.wait(30) in (0, -15)
