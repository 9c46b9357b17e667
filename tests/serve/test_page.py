"""The page in a real browser: Debian's Chromium (or Chrome), headless, driven by playwright. One start serves all."""

import base64
import contextlib
import http.client
import io
import json
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llava_fast
from llava_fast.demo.canvas import compose, split_scans
from tests.serve.conftest import local
from tests.support import made_videos, tiny

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="the page's tests need Chromium or Chrome on PATH")

TIMES = "\N{MULTIPLICATION SIGN}"
DEMO_MODEL = Path(llava_fast.__file__).parent / "demo_model"
GIVE = """([how, name, type, text]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name, { type }));
  const options = { dataTransfer: data, clipboardData: data, bubbles: true, cancelable: true };
  document.body.dispatchEvent(new (how === "drop" ? DragEvent : ClipboardEvent)(how, options));
}"""
COLOURS = """() => {
  const { width, height } = document.getElementById("drawing");
  const pixels = document.getElementById("drawing").getContext("2d").getImageData(0, 0, width, height).data;
  return new Set(new Uint32Array(pixels.buffer)).size;
}"""
BRIGHTNESS = """() => {
  const { width, height } = document.getElementById("drawing");
  return document.getElementById("drawing").getContext("2d").getImageData(width / 2 + 9, height / 2 + 9, 1, 1).data[0];
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def demo_model():
    return llava_fast.load(DEMO_MODEL)


@pytest.fixture(scope="module")
def demo(demo_model):
    with local(demo_model) as server:
        yield server


@contextlib.contextmanager
def opened(browser, url, **options):
    """The page; fails on what the console says, except where a request is meant to fail."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
    context.set_default_timeout(10_000)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    outside = []
    page.on("request", lambda request: outside.append(request.url) if not request.url.startswith((url, "blob:")) else 0)
    page.goto(url)
    yield page
    context.close()
    expected = ("Failed to load resource", "willReadFrequently")  # a refusal that is shown; this test reads the canvas
    assert [each for each in said if not any(part in each for part in expected)] == []
    assert outside == []


def canvas(seed=3, **options):
    made = compose(np.random.default_rng(seed), split_scans()[1], **{"count": 4, "aspect": 2.4, **options})
    return made.digits, encoded(Image.fromarray(made.image))


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def drop(page, name: str, data: bytes, kind: str = "image/png", how: str = "drop") -> None:
    page.evaluate(GIVE, [how, name, kind, base64.b64encode(data).decode()])


def answers(page, number: int) -> list[str]:
    page.locator(".answer .cost").nth(number - 1).wait_for()
    return page.locator(".answer .words").all_inner_texts()


def test_a_question_about_a_dropped_picture_is_answered(browser, demo):
    digits, picture = canvas(long_side=(380, 400))
    with opened(browser, demo.url) as page:
        page.get_by_text("tiny", exact=True).wait_for()
        drop(page, "canvas.png", picture)
        page.get_by_text(f"Resized to 96 {TIMES} 32 pixels, cut into 3 tiles: 160 tokens.").wait_for()
        assert page.evaluate(COLOURS) > 50, "the picture is drawn"
        page.get_by_text("Whole picture").click()
        page.get_by_text(f"Resized to 32 {TIMES} 32 pixels: 64 tokens.").wait_for()
        page.get_by_label("Question", exact=True).fill("What digits are written here?")
        page.keyboard.press("Enter")
        assert answers(page, 1) == [" ".join(map(str, digits))]
        (cost,) = page.locator(".cost").all_text_contents()
        assert "246 tokens read5 written" in cost.replace(" · ", "")
        assert "Picture 1: 232 tokens, encoded now." in cost

        page.get_by_label("Question", exact=True).fill("How many digits are there?")
        page.get_by_role("button", name="Send").click()
        assert answers(page, 2)[1] == "4", "the conversation goes on, with its picture"
        assert "Picture 1: 232 tokens, from the cache" in page.locator(".cost").nth(1).text_content()
        assert page.get_by_text("This conversation: 2 answers").is_visible()


def test_pictures_are_chosen_and_pasted_and_removed(browser, demo):
    _, picture = canvas()
    with opened(browser, demo.url) as page:
        page.get_by_label("Add pictures").set_input_files(
            [{"name": name, "mimeType": "image/png", "buffer": picture} for name in ("one.png", "two.png")]
        )
        page.get_by_role("button", name="Remove two.png").wait_for()
        drop(page, "three.png", encoded(Image.new("RGB", (60, 20))), how="paste")
        page.get_by_role("button", name="Remove three.png").wait_for()
        page.get_by_role("button", name="Remove one.png").click()
        page.get_by_label("Question", exact=True).fill("Read the digits.")
        page.keyboard.press("Enter")
        answers(page, 1)
        assert page.locator(".question img").evaluate_all("all => all.map(each => each.alt)") == [
            "two.png",
            "three.png",
        ]
        assert page.locator(".cost").text_content().count("Picture") == 2


def test_a_question_waits_for_the_pictures_that_are_being_read(browser, demo, monkeypatch):
    """However long their plans take; one that cannot be read keeps the question here."""
    digits, picture = canvas(long_side=(380, 400))
    plan, may_go = demo.service._plan, threading.Event()
    monkeypatch.setattr(demo.service, "_plan", lambda *given: (may_go.wait(10), plan(*given))[1])
    with opened(browser, demo.url) as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url) if "chat/completions" in request.url else 0)
        page.get_by_text("tiny", exact=True).wait_for()
        question = page.get_by_label("Question", exact=True)
        question.fill("What digits are written here?")
        drop(page, "canvas.png", picture)
        page.keyboard.press("Enter")
        page.get_by_text("Reading canvas.png").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Send").wait_for()
        assert question.input_value() == "What digits are written here?"
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Stop").wait_for()
        assert not asked
        may_go.set()
        assert answers(page, 1) == [" ".join(map(str, digits))]
        assert len(asked) == page.locator(".question img").count() == 1

        may_go.clear()
        question.fill("And here?")
        drop(page, "bad.png", b"hello")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Stop").wait_for()
        may_go.set()
        page.get_by_role("alert").get_by_text("bad.png: The image or video").wait_for()
        page.get_by_role("button", name="Send").wait_for()
        assert question.input_value() == "And here?"
        assert len(asked) == 1


def test_a_video_is_shown_frame_by_frame(browser, tmp_path):
    frames = [np.full((60, 80, 3), 8 * number, np.uint8) for number in range(30)]
    video = made_videos.write(tmp_path / "clip.webm", frames, "libvpx").read_bytes()
    with local(tiny.pair("video").ours, video_frames=4) as server, opened(browser, server.url) as page:
        drop(page, "clip.webm", video, "video/webm")
        page.get_by_text("1 of 4, at 0.00 s").wait_for()
        first = page.evaluate(BRIGHTNESS)
        page.get_by_role("slider", name="Frame").focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.get_by_text("4 of 4, at 2.90 s").wait_for()
        assert page.evaluate(BRIGHTNESS) > first + 100


def test_stop_ends_the_answer_on_the_server(browser, demo, monkeypatch):
    """Slowed down, and without an end, so that there is something to stop."""
    scheduler = demo.service.engine.scheduler
    step = scheduler.step
    monkeypatch.setattr(scheduler, "step", lambda: (time.sleep(0.05), step())[1])
    monkeypatch.setattr("llava_fast.serve.protocol.ChatRequest.sampling", lambda _: {"ignore_eos": True})
    with opened(browser, demo.url) as page:
        page.get_by_label("Question", exact=True).fill("Read the digits.")
        page.keyboard.press("Enter")
        page.locator(".answer .words:not(:empty)").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.locator(".answer").get_by_text("Stopped.").wait_for()
        ends = time.monotonic() + 5
        while demo.service.open_answers and time.monotonic() < ends:
            time.sleep(0.01)
        assert demo.service.open_answers == 0
        assert page.get_by_role("button", name="Send").is_visible()


def test_what_goes_wrong_is_said_in_words(browser, demo):
    with opened(browser, demo.url) as page:
        problem = page.get_by_role("alert")
        for name, data, kind, says in (
            ("notes.txt", b"hello", "text/plain", "notes.txt: this is neither a picture nor a video."),
            (
                "bad.png",
                b"hello",
                "image/png",
                "bad.png: The image or video given as 5 bytes is not an image",
            ),
            ("clip.mp4", b"hello", "video/mp4", "clip.mp4: The image or video given as 5 bytes cannot be read"),
            (
                "wide.png",
                encoded(Image.new("1", (30_000, 2900))),
                "image/png",
                "wide.png: An image of 30000x2900",
            ),
        ):
            drop(page, name, data, kind)
            problem.get_by_text(says).wait_for()
        page.get_by_role("button", name="Send").click()
        problem.get_by_text("Write a question first.").wait_for()
        question = page.get_by_label("Question", exact=True)
        question.fill("again and again " * 200)
        page.keyboard.press("Enter")
        problem.get_by_text("The prompt takes").wait_for()
        assert question.input_value().startswith("again and again"), "the question is still there"
        assert not page.locator(".question").count()


@pytest.mark.parametrize("kind", ["CMYK", "one pixel", "long", "animated", "turned"])
def test_odd_pictures_are_shown_as_the_model_gets_them(browser, demo, kind):
    black = Image.new("RGB", (60, 20))
    turned = Image.Exif()
    turned[0x0112] = 6
    data, mime, says = {
        "CMYK": (encoded(black.convert("CMYK"), "JPEG"), "image/jpeg", f"60 {TIMES} 20 pixels"),
        "one pixel": (encoded(Image.new("RGB", (1, 1))), "image/png", f"1 {TIMES} 1 pixels"),
        "long": (encoded(Image.new("RGB", (20_000, 10))), "image/png", f"20,000 {TIMES} 10 pixels"),
        "animated": (
            encoded(black, "GIF", save_all=True, append_images=[Image.new("RGB", black.size, "red")]),
            *("image/gif", f"60 {TIMES} 20 pixels"),
        ),
        "turned": (encoded(black, "JPEG", exif=turned), "image/jpeg", f"20 {TIMES} 60 pixels"),
    }[kind]
    with opened(browser, demo.url) as page:
        drop(page, "odd", data, mime)
        page.locator("#seen-name").get_by_text(f"odd, {says}").wait_for()
        page.locator("#size:not(:empty)").wait_for()
        assert "cannot show" not in page.locator("#seen-view").text_content()
        assert page.evaluate(COLOURS) > 3
        page.get_by_label("Question", exact=True).fill("Read the digits.")
        page.keyboard.press("Enter")
        answers(page, 1)


def test_a_key_is_asked_for_and_kept(browser, demo_model):
    with local(demo_model, api_keys=("one",)) as server, opened(browser, server.url) as page:
        for key, says in (("two", "This server asks for a key"), ("one", "The server did not accept this key.")):
            page.get_by_role("dialog").get_by_text(says).wait_for()
            page.get_by_label("Key", exact=True).fill(key)
            page.keyboard.press("Enter")
        page.get_by_text("tiny", exact=True).wait_for()
        page.reload()
        page.get_by_text("tiny", exact=True).wait_for()
        assert not page.get_by_role("dialog").is_visible()


def test_it_fits_a_narrow_screen_and_the_keyboard_reaches_all(browser, demo):
    narrow = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "reduced_motion": "reduce"}
    with opened(browser, demo.url, **narrow) as page:
        drop(page, "canvas.png", canvas()[1])
        page.get_by_role("button", name="Remove canvas.png").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        reached = []
        page.keyboard.press("Shift+Tab")
        for _ in range(9):
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
            page.keyboard.press("Shift+Tab")
        assert reached[:5] == ["remove", "thumbnail", "new", "settings-button", "skip"]
        page.locator(".thumbnail").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "seen-title"
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.className") == "thumbnail"


def test_nothing_inline_and_nothing_from_elsewhere(demo):
    """What the policy forbids is not in the files, and the files carry the policy."""
    connection = http.client.HTTPConnection(demo.url.removeprefix("http://"), timeout=10)
    files = sorted((Path(llava_fast.__file__).parent / "serve" / "page").iterdir())
    for path in ("/", *(f"/static/{file.name}" for file in files)):
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
        policy = response.getheader("content-security-policy")
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.getheader("x-content-type-options") == "nosniff"
        assert re.findall(r"""["'(=]\s*(?:[a-z]+:)?//[^"')\s]+""", text) in ([], ['"http://www.w3.org/2000/svg']), path
        assert " style=" not in text
    connection.request("GET", "/v1/models")
    assert "limits" in json.loads(connection.getresponse().read())["data"][0]
