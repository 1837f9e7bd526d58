"""A Chromium of the machine, driven by Playwright's Python package, which brings none of its own here."""

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def started_browser() -> Iterator[Browser]:
    """A browser without a window. Without one on the machine the test is skipped; in CI it fails.

    While it runs, this thread has a running event loop, so it must end before other tests call asyncio.run.
    """
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = f"there is no Chromium, looked for {', '.join(NAMES)}: install your system's package"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)  # Playwright's default is no sandbox, so root may
        try:
            yield browser
        finally:
            browser.close()
