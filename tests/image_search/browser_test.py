"""The page in Chromium, where Playwright and a Chromium are installed: what a person would do with it."""

import os
from pathlib import Path
import shutil

from image_search import gallery
from image_search.gallery import CAPTION, COUNT, encoded
import pytest

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DROP = """async ([name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
  for (const type of ["dragenter", "dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(type, {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
  with gallery.serving(gallery.make_searcher(tmp_path_factory.mktemp("gallery"))) as server:
    yield server.url


@pytest.fixture(scope="module")
def browser():
  with sync_api.sync_playwright() as playwright:
    if not CHROMIUM and not Path(playwright.chromium.executable_path).exists():
      pytest.skip("there is no Chromium: make chromium installs Playwright's")
    found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
    yield found
    found.close()


@pytest.fixture
def page(browser, address):
  """A page without errors, requests to other servers or scripts of captions; the test waits for each step."""
  found, problems = browser.new_page(viewport={"width": 1280, "height": 860}), []
  found.set_default_timeout(20_000)
  found.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
  found.on("pageerror", lambda error: problems.append(str(error)))
  found.on(
    "request",
    lambda request: None if request.url.startswith((address, "blob:", "data:")) else problems.append(request.url),
  )
  found.goto(address)
  yield found
  assert problems == []
  assert found.title() == "Image search"
  found.close()


def settle(page):
  page.locator("main[aria-busy=false]").wait_for()
  page.wait_for_load_state("networkidle")


def terms(page):
  return page.locator(".term").evaluate_all("all => all.map(one => one.textContent)")


def shot(page, name):
  """A screenshot for a person, where SCREENSHOTS names a folder."""
  if folder := os.environ.get("SCREENSHOTS"):
    page.screenshot(path=Path(folder) / f"{name}.png")


def test_texts_and_images_are_combined_by_keyboard_and_mouse(page, address):
  shot(page, "start")
  page.keyboard.type("a red square")  # the text has the focus
  page.keyboard.press("Enter")
  page.wait_for_selector(".card")
  settle(page)
  assert page.locator(".card").count() == 24
  scores = [float(text) for text in page.locator(".score").all_text_contents()]
  assert scores == sorted(scores, reverse=True)
  assert page.locator("#range").text_content() == "1–24 of 59"
  shot(page, "results")
  page.fill("#text", "a circle")
  page.keyboard.press("Alt+Enter")
  settle(page)
  page.fill("#text", "small")
  page.keyboard.press("Shift+Enter")
  settle(page)
  assert terms(page) == ["+a red square×", "−a circle×", "+small×"]
  page.locator(".card button").first.click()
  settle(page)
  assert page.locator(".term").count() == 4
  assert page.locator(".term img").evaluate("image => image.naturalWidth") == 60
  shot(page, "combined")
  address_of_query = page.url
  assert "minus=a+circle" in address_of_query
  page.get_by_label("Add a circle instead").click()
  page.get_by_label("Remove small").click()
  settle(page)
  assert terms(page)[:2] == ["+a red square×", "+a circle×"]
  page.goto(address_of_query)
  settle(page)
  assert terms(page)[:3] == ["+a red square×", "−a circle×", "+small×"]
  assert page.locator(".card").count() == 24


def test_pages_are_turned_and_history_works(page):
  page.fill("#text", "a")
  page.keyboard.press("Enter")
  page.wait_for_selector(".card")
  seen = []
  for text in ("1–24 of 59", "25–48 of 59", "49–59 of 59"):
    sync_api.expect(page.locator("#range")).to_have_text(text)
    seen += page.locator(".card a").evaluate_all("all => all.map(one => one.getAttribute('href'))")
    page.locator("#text").blur()
    page.keyboard.press("ArrowRight")
  assert len(set(seen)) == len(seen) == COUNT - 1
  assert page.locator("#next").is_disabled()
  page.go_back()
  sync_api.expect(page.locator("#range")).to_have_text("25–48 of 59")
  page.keyboard.press("/")
  assert page.evaluate("document.activeElement.id") == "text"


def test_captions_are_text_and_a_sample_opens(page):
  page.goto(f"{page.url}?like=0")
  page.wait_for_selector(".card")
  settle(page)
  assert page.locator(".card p").first.text_content() == CAPTION
  assert page.locator("b").count() == 2  # those of the hint
  page.locator(".card a").first.click()
  settle(page)
  assert page.locator("dialog dd").all_text_contents()[-1] == CAPTION
  assert page.locator("dialog img").evaluate("image => image.naturalWidth") == 60
  shot(page, "sample")
  page.keyboard.press("Escape")
  assert not page.locator("dialog").is_visible()


def test_an_image_is_dropped(page):
  page.evaluate(DROP, ["mine.png", [*encoded(8)]])
  page.wait_for_selector(".card")
  settle(page)
  assert terms(page) == ["+mine.png×"]
  assert page.locator(".card a").first.get_attribute("href") == "/images/8"
  assert page.locator("#drop").is_hidden()
  assert page.locator(".term img").evaluate("image => image.naturalWidth") == 60


def test_it_is_dark_and_narrow_where_wanted_and_tells_errors(page):
  page.emulate_media(color_scheme="dark")
  page.set_viewport_size({"width": 420, "height": 800})
  page.goto(f"{page.url}?text=a+star&like=3")
  page.wait_for_selector(".card")
  settle(page)
  assert page.evaluate("document.documentElement.scrollWidth") <= 420
  assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 21, 28)"
  shot(page, "dark")
  for number in range(7):
    page.fill("#text", f"{number}")
    page.keyboard.press("Shift+Enter")
  assert "at most 8 terms" in page.locator("#status").text_content()
  assert page.locator("#status").get_attribute("class") == "error"
