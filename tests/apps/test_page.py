"""The page in a browser: draw, mask, train, bring, stop, two people at once.

Skipped where playwright (`pip install -e '.[dev]'`) or a Chromium (`apt-get install chromium`) is
missing.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dreambooth.lora_files import read_lora, write_lora

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("gradio", reason="gradio is not installed")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"
)

START = 120_000
WORK = 40_000
ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(scratch):
    port = free_port()
    log = scratch / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "apps.demo", "--port", str(port), "--upload", "2"],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/", server, log)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
    # Whatever the tests did, nothing of it is left, and nothing went wrong unsaid.
    assert not list(scratch.glob("mole-vl-page-*"))
    assert "Traceback" not in log.read_text(), log.read_text()


def wait_for(address, server, log):
    end = time.monotonic() + START / 1000
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.3)
    raise RuntimeError(f"the page did not start: {log.read_text()}")


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(address, chromium):
    """Opens pages of people who do not know each other; each draws with few steps."""
    people, strangers = [], []

    def visited():
        people.append(chromium.new_context(accept_downloads=True))
        page = people[-1].new_page()
        page.set_default_timeout(WORK)
        page.on("request", lambda request: strangers.append(request.url))
        page.goto(address)
        page.wait_for_selector("#draw")
        unfold(page, "#more")
        set_slider(page, "#steps", 2)
        return page

    yield visited
    for one in people:
        one.close()
    local = (address, "data:", "blob:")
    assert not [url for url in strangers if not url.startswith(local)]


def unfold(page, place):
    page.locator(f"{place} button.label-wrap").click()


def set_slider(page, place, value):
    field = page.locator(f"{place} input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def draw(page):
    page.click("#draw")
    page.wait_for_selector("#draw-status >> text=Done.")
    page.wait_for_selector("#weights svg")
    return captions(page)


def captions(page):
    return [text.strip() for text in page.locator("#pictures .caption-label").all_inner_texts()]


def toast(page, words):
    page.locator(".toast-body", has_text=words).first.wait_for()


def test_one_click_draws_every_arm_and_a_mask_takes_one_away(visit):
    page = visit()
    assert page.locator("#prompt textarea").input_value() == "a <v1> mammal in <v17> style"
    everything = ["base", "panda", "retro", "sum", "NLA", "Switch", "gates, untrained"]
    assert draw(page) == everything
    tips = page.locator("#weights svg rect title")
    assert tips.count() == 7 * 2 * 2
    page.get_by_label("retro", exact=True).uncheck()
    page.click("#draw")
    page.wait_for_function("document.querySelectorAll('#pictures .caption-label').length == 3")
    assert captions(page) == ["base", "panda", "gates, untrained"]
    tab(page, "Export")
    page.click("#make")
    page.wait_for_selector("#export-status >> text=misses")
    with page.expect_download() as found:
        page.click("#lora-download")
    assert found.value.suggested_filename == "mixture.safetensors"


def test_gates_are_trained_stopped_downloaded_and_drawn_with(visit, scratch):
    page = visit()
    tab(page, "Train gates")
    assert (
        page.locator("#caption textarea, #caption input").input_value() == "a panda in retro style"
    )
    page.click("#train")
    page.wait_for_selector("#train-status >> text=Step 1 of 60")
    page.wait_for_selector("#curve svg polyline")
    page.click("#stop-train")
    page.wait_for_selector("#train-status >> text=Stopped after step")
    page.locator("#samples img").first.wait_for()
    with page.expect_download() as found:
        page.click("#gate-file")
    file = scratch / "gates.safetensors"
    found.value.save_as(file)
    tab(page, "Side by side")
    assert draw(page)[-1] == "gates, trained"
    # Another person brings the file.
    other = visit()
    tab(other, "Train gates")
    with other.expect_file_chooser() as chooser:
        other.click("#bring-gates")
    chooser.value.set_files(file)
    other.wait_for_selector("#train-status >> text=panda + retro")
    tab(other, "Side by side")
    assert draw(other)[-1] == "gates, trained"


def upload(page, place, file):
    with page.expect_file_chooser() as chooser:
        page.click(place)
    chooser.value.set_files(file)


def test_uploads_are_checked_and_nobody_else_sees_them(visit, scratch):
    page, other = visit(), visit()
    unfold(page, "#bring")
    bad = scratch / "bad.safetensors"
    bad.write_bytes(b"no tensors")
    upload(page, "#lora-file", bad)
    toast(page, "bad.safetensors is damaged or no safetensors file")
    large = scratch / "large.safetensors"
    large.write_bytes(bytes(3 * 2**20))
    upload(page, "#lora-file", large)
    toast(page, "exceed the maximum allowed size")
    good = scratch / "mug.safetensors"
    write_lora(read_lora(ROOT / "worlds/emoji/loras/owl").experts, good)
    upload(page, "#lora-file", good)
    page.locator("#speaking label", has_text="mug").wait_for()
    page.click("#loras input")
    assert page.get_by_role("option", name="mug").count() == 1
    other.click("#loras input")
    assert other.get_by_role("option", name="owl").count() == 1
    assert other.get_by_role("option", name="mug").count() == 0
    page.keyboard.press("Escape")
    page.fill("#place textarea, #place input", "/etc")
    page.click("#find")
    toast(page, "/etc holds no LoRA")


def test_a_drawing_is_stopped_and_the_next_person_goes_on(visit):
    page, other = visit(), visit()
    set_slider(page, "#steps", 100)
    page.click("#draw")
    page.wait_for_selector("#draw-status >> text=Drawing")
    other.click("#draw")
    other.wait_for_selector("#draw-status >> text=Waiting: another drawing goes first.")
    page.click("#stop-draw")
    page.wait_for_selector("#draw-status >> text=Stopped.")
    other.wait_for_selector("#draw-status >> text=Done.")
    assert len(captions(other)) == 7 and len(captions(page)) < 7
    page.fill("#prompt textarea", " ")
    page.click("#draw")
    toast(page, "the prompt is empty")
    page.fill("#seed input", "")
    page.click("#draw")
    toast(page, "seed is empty, expected a number")
    tab(page, "Train gates")
    unfold(page, "#train-more")
    page.get_by_label("Learning rate").fill("")
    page.click("#train")
    toast(page, "seed is empty, expected a number; learning rate is empty, expected a number")


@pytest.mark.parametrize("path", ["/etc/passwd", "worlds/emoji/world.json", "apps/demo.py"])
def test_no_file_outside_is_served(address, path):
    place = path if path.startswith("/") else str(ROOT / path)
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(f"{address}gradio_api/file={place}", timeout=10)
    with found.value as answer:
        assert answer.code == 403
