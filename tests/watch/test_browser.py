"""Both pages in a real browser: Chromium, driven by Playwright.

pip install playwright && apt-get install chromium
pytest -m slow tests/watch/test_browser.py
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.watch import fake_run

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
driver = pytest.importorskip("playwright.sync_api", reason="no browser's driver: playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: none of " + ", ".join(NAMES)),
]
SIZES = [(width, scheme) for width in (1200, 400) for scheme in ("light", "dark")]
PATIENCE = 180_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with driver.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@contextmanager
def served(*words: str) -> Iterator[str]:
    """The address that a command prints, until it is ended."""
    process = subprocess.Popen(
        [sys.executable, *words, "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+/#token=\S+", line):
                yield found[0]
                return
        raise AssertionError(said)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()


@contextmanager
def page_at(browser: Any, address: str, width: int = 1200, scheme: str = "light") -> Iterator[Any]:
    """A page, of which nothing may fail, and which may ask no other server."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda said: trouble.append(said.text) if said.type == "error" else None)
    page.on("request", lambda asked: abroad(asked.url, address, trouble))
    page.goto(address)
    try:
        yield page
    finally:
        context.close()
    assert trouble == []


def abroad(url: str, address: str, trouble: list[str]) -> None:
    own = address.partition("#")[0]
    if not url.startswith((own, f"blob:{own}", "data:")):
        trouble.append(f"asked for {url}")


def text_of(page: Any, selector: str) -> str:
    return page.locator(selector).inner_text()


def wait_for(page: Any, selector: str, words: str) -> None:
    driver.expect(page.locator(selector)).to_contain_text(words, timeout=PATIENCE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "outputs"
    fake_run.make(folder / "one")
    fake_run.make(folder / "two", options={"learning_rate": 2e-4})
    odd = fake_run.make(folder / "<b>odd</b>", options={"caption": fake_run.MARKUP})
    fake_run.draw(odd, 5, fake_run.MARKUP)
    (odd / "run.log").write_text(f"{fake_run.MARKUP}\n")
    return folder


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with served("-m", "dojo.watch", str(root)) as found:
        yield found


def choose(page: Any, *names: str) -> None:
    """Ticks these runs and no other."""
    page.wait_for_selector("#runs tr")
    for line in page.locator("#runs tr").all():
        box = line.locator("input")
        box.set_checked(line.locator("label").inner_text().strip() in names)


def test_curves_and_numbers_go_on_while_rows_come(browser: Any, root: Path, address: str) -> None:
    with page_at(browser, address) as page:
        choose(page, "one")
        wait_for(page, "#charts", "lowest 0.04762")
        assert "token" not in page.url
        drawn = page.locator("#charts polyline").first.get_attribute("points")
        fake_run.start(root / "one")
        fake_run.append(root / "one", fake_run.rows(21, 40))
        wait_for(page, "#runs", "40 of 100")
        wait_for(page, "#runs", "2 min 30 s")
        wait_for(page, "#charts", "lowest 0.02439")
        assert page.locator("#charts polyline").first.get_attribute("points") != drawn
        wait_for(page, "#details", "running, step 40 of 100")
        page.reload()  # the token is kept for this tab
        wait_for(page, "#details", "running, step 40 of 100")


def test_new_pictures_come_by_themselves(browser: Any, root: Path, address: str) -> None:
    with page_at(browser, address) as page:
        choose(page, "two")
        wait_for(page, "#details", "step 20 of 100")
        assert page.locator("#pictures img").count() == 0
        fake_run.draw(root / "two", 10, "a red star")
        wait_for(page, "#pictures", "a red star")
        page.locator("#pictures img[src^=blob]").wait_for()
        fake_run.draw(root / "two", 20, "a red star")
        wait_for(page, "#pictures", "step 20")
        page.locator("#pictures .picture").click()
        page.locator("dialog img").wait_for()
        page.keyboard.press("Escape")
        driver.expect(page.locator("dialog")).to_have_count(0)


def test_two_runs_lie_over_each_other_with_their_options_side_by_side(
    browser: Any, address: str
) -> None:
    with page_at(browser, address) as page:
        choose(page, "one", "two")
        loss = page.locator("#charts figure").filter(has_text="Training loss")
        driver.expect(loss.locator(".key")).to_have_count(2, timeout=PATIENCE)
        assert loss.locator("polyline").count() == 4  # each with its smoothed line
        names = page.locator("#options thead th").all_inner_texts()[1:]  # the latest comes first
        row = page.locator("#options tr").filter(has_text="optim.learning_rate")
        rates = dict(zip(names, row.locator("td.differs").all_inner_texts(), strict=True))
        assert rates == {"one": "0.0001", "two": "0.0002"}
        assert "max_train_steps" not in text_of(page, "#options")
        page.locator("#different").uncheck()
        wait_for(page, "#options", "optim.max_train_steps")


def test_markup_in_names_captions_options_and_logs_is_text(browser: Any, address: str) -> None:
    with page_at(browser, address) as page:
        choose(page, "<b>odd</b>")
        wait_for(page, "#pictures", fake_run.MARKUP)
        wait_for(page, "#options", fake_run.MARKUP)
        wait_for(page, "#details pre", fake_run.MARKUP)
        wait_for(page, "#details h3", "<b>odd</b>")
        assert page.locator("main b, main script, img[src=x]").count() == 0
        assert page.title() == "Runs · SD Dojo"


def test_without_the_token_the_page_says_so(browser: Any, address: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(address.partition("#")[0])
    wait_for(page, "#status", "the token is missing or wrong")
    assert page.locator("#runs tr").count() == 0
    context.close()


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_page_fits_its_window_and_follows_the_system(
    browser: Any, root: Path, address: str, width: int, scheme: str
) -> None:
    with page_at(browser, address, width, scheme) as page:
        choose(page, "one", "two")
        wait_for(page, "#options", "optim.learning_rate")
        fits(page, width, scheme)
        keep(page, f"watch-{width}-{scheme}")


def fits(page: Any, width: int, scheme: str) -> None:
    """Nothing is wider than the window, but what scrolls; the ground is light or dark."""
    box = page.locator("main").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    for part in page.locator("main > *, article, figure").all():
        box = part.bounding_box()
        assert box is None or box["x"] + box["width"] <= width + 1
    assert page.locator("html").evaluate("html => html.scrollWidth") <= width
    ground = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert (min(map(int, re.findall(r"\d+", ground))) > 128) == (scheme == "light")


def keep(page: Any, name: str) -> None:
    """Leaves a picture of the page in the folder DOJO_SCREENSHOTS, if there is one."""
    if folder := os.environ.get("DOJO_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_a_real_run_is_stopped_and_its_lora_drawn(
    browser: Any, tiny_sd3: Path, tmp_path: Path
) -> None:
    run = tmp_path / "outputs" / "run"
    words = [
        *("train_lora_sd3.py", "--pretrained_model_name_or_path", str(tiny_sd3)),
        *("--dataset_name", "datas/pocket-hearts", "--resolution", "64", "--rank", "2"),
        *("--max_train_steps", "100000", "--train_batch_size", "1", "--logging_steps", "1"),
        *("--max_sequence_length", "24", "--validation_steps", "100000"),
        *("--validation_prompt", "a red heart", "--validation_inference_steps", "2"),
        *("--latent_cache_dir", str(tmp_path / "cache"), "--output_dir", str(run)),
        *("--report_to", "none"),
    ]
    log = tmp_path / "outputs" / "run.log"
    log.parent.mkdir()
    with log.open("w") as said:
        # One thread: two that wait for each other stand still for minutes beside a busy browser.
        training = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        stop_in_browser(browser, tmp_path / "outputs")
        assert training.wait(180) == 130, log.read_text()
    finally:
        training.kill()
    (kept,) = run.glob("checkpoint-*")
    more = ("--lora_weights_path", str(kept), "--web", "--max_sequence_length", "24")
    model = ("--pretrained_model_name_or_path", str(tiny_sd3))
    with served("demo.py", *model, *more) as address:
        for width, scheme in SIZES:
            with page_at(browser, address, width, scheme) as page:
                draw_in_browser(page)
                fits(page, width, scheme)
                keep(page, f"draw-{width}-{scheme}")


def stop_in_browser(browser: Any, root: Path) -> None:
    with served("-m", "dojo.watch", str(root)) as address, page_at(browser, address) as page:
        wait_for(page, "#details", "running, step")
        page.get_by_role("button", name="Draw now").click()
        wait_for(page, "#pictures", "a red heart")
        wait_for(page, "#details .soft", "run.log")
        page.get_by_role("button", name="Stop", exact=True).click()
        page.get_by_role("button", name="Cancel").click()
        assert not (root / "run" / "stop").exists()
        page.get_by_role("button", name="Stop", exact=True).click()
        page.get_by_role("button", name="Stop the run").click()
        wait_for(page, "#status", "run was asked to stop")
        wait_for(page, "#details", "stopped, step")


def draw_in_browser(page: Any) -> None:
    wait_for(page, "#status", "ready")
    assert page.locator("#prompt").input_value() == "a red heart"
    page.locator("#num_inference_steps").fill("2")
    page.locator("#seed").fill("3")
    page.locator("input[type=range]").fill("0.5")
    before = page.locator("article").count()
    page.get_by_role("button", name="Draw", exact=True).click()
    driver.expect(page.locator("article")).to_have_count(before + 1, timeout=PATIENCE)
    card = page.locator("article").first
    driver.expect(card.locator("img[src^=blob]")).to_have_count(2, timeout=PATIENCE)
    card.get_by_text("command, with LoRA").click()
    line = card.locator("pre").last.inner_text()
    assert line.startswith("python demo.py --pretrained_model_name_or_path")
    assert "--lora_scale 0.5" in line
    assert "--seed 3" in line
