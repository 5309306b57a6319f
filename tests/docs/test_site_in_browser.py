"""The built site in a browser: nothing leaves the machine, no errors, readable, and the search finds pages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.report.test_browser import CHROMIUM, DESKTOP, OPTIONS, PHONE, overflow, violations

ROOT = Path(__file__).parents[2]
PAGES = ["index", "tutorial", "concepts", "troubleshooting", "settings", "api", "data", "methods", "performance"]
"""Among them the ones with the widest tables and with every kind of code."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The site, built with warnings as errors and served on this machine."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


def opened(browser: Browser, address: str, name: str, scheme: str, size: dict[str, int]) -> tuple[Page, list[str]]:
    """The page, and what was wrong: messages on the console, errors, and requests to other machines."""
    page, problems = browser.new_context(viewport=size, color_scheme=scheme).new_page(), []  # type: ignore[arg-type]
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    here = (address, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(here) else problems.append(request.url))
    page.goto(f"{address}/{name}.html")
    return page, problems


@pytest.mark.parametrize(("scheme", "size"), [("light", DESKTOP), ("dark", PHONE)], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", PAGES)
def test_pages(browser: Browser, address: str, name: str, scheme: str, size: dict[str, int]) -> None:
    page, problems = opened(browser, address, name, scheme, size)
    assert problems == []
    assert violations(page) == []
    assert overflow(page) <= 0
    shown = [picture for picture in page.locator("article img").all() if picture.is_visible()]
    assert all(f"-{scheme}.svg" in (picture.get_attribute("src") or "") for picture in shown)
    assert bool(shown) == (name in ("index", "concepts"))
    page.context.close()


def test_search(browser: Browser, address: str) -> None:
    page, problems = opened(browser, address, "index", "light", DESKTOP)
    page.keyboard.press("/")
    page.keyboard.type("preemption")
    page.locator(".md-search-result__item").first.wait_for()
    assert page.locator(".md-search-result__item a[href*='slurm.html']").count() > 0
    assert problems == []
