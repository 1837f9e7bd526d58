"""Takes the pictures of the server's page into docs/images: `python docs/screenshots.py`. Needs the demo model,
Chromium and '.[test]'."""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.browser import started_browser
from helpers.paths import DEMO, ROOT
from helpers.servers import ServerProcess

TIME = 300_000  # ms for an answer


def ask(page: Page, url: str, mode: str, text: str, max_tokens: int) -> None:
    page.goto(url)
    page.get_by_role("radio", name=mode).check()
    page.locator("summary").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill(str(max_tokens))
    page.keyboard.press("Escape")
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=TIME)


def save(page: Page, name: str) -> None:
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(ROOT / "docs" / "images" / name, optimize=True)


def desktop(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport={"width": 920, "height": 600}, device_scale_factor=2, color_scheme="light")
    ask(page, url, "Chat", "Why is the sky blue?", 70)
    page.locator("#chat .token", has_text="intricate").click()
    save(page, "page-light.png")


def phone(browser: Browser, url: str) -> None:
    page = browser.new_page(
        viewport={"width": 375, "height": 667},
        device_scale_factor=2,
        is_mobile=True,
        has_touch=True,
        color_scheme="dark",
    )
    ask(page, url, "Complete", "The llama is a domesticated animal of South America. Llamas are", 40)
    page.evaluate("scrollTo(0, 0)")
    page.locator("h1").tap()
    save(page, "page-dark.png")


def main() -> None:
    with ServerProcess(DEMO, "--dtype", "float32") as server, started_browser() as browser:
        url = server.url()
        desktop(browser, url)
        phone(browser, url)


if __name__ == "__main__":
    main()
