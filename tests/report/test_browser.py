"""The pages in a browser: errors, network, width, keyboard, and what axe finds, in light and in dark.

Needs Chromium (`tests/report/install_chromium.sh`). The screenshots go to a temporary folder, or to that in
`CL_DIST_SCREENSHOTS`: set it to `docs/images` to write those that the documentation shows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from cl_dist.report.write import write_report, write_several
from cl_dist.sweep.page import write_page
from tests.report.demo import ODD, kif_run, migu_run, odd_run, write_demo
from tests.report.test_growth import names
from tests.sweep.cells import finish, make_grid, matrix
from tests.sweep.test_tables import results_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
OPTIONS += ["--disable-sync", "--no-first-run"]
LOCAL = ("file:", "data:")
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 360, "height": 740}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("CL_DIST_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind that the fast tests look at, by name."""
    folder = tmp_path_factory.mktemp("pages")
    return {"migu": write_report(migu_run(folder / "migu").path).folder / "index.html"}


def opened(browser: Browser, path: Path, scheme: str, size: dict[str, int]) -> tuple[Page, list[str]]:
    """The page, and what was wrong: messages on the console, errors, and requests that leave the file."""
    context = browser.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on(
        "request", lambda request: problems.append(request.url) if request.url[:5] not in ("file:", "data:") else None
    )
    page.goto(path.as_uri())
    return page, problems


def violations(page: Page) -> list[str]:
    """What axe finds that is serious or critical, with the first element that it concerns."""
    from axe_playwright_python.sync_playwright import Axe

    found: list[dict[str, Any]] = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {each['nodes'][0]['html'][:200]} {each['nodes'][0]['failureSummary'][:300]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than the window."""
    return int(page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


def check(browser: Browser, path: Path) -> None:
    """Light on a desktop and dark on a phone."""
    for scheme, size in (("light", DESKTOP), ("dark", PHONE)):
        page, problems = opened(browser, path, scheme, size)
        for details in page.locator("details").all():
            details.evaluate("each => each.open = true")
        assert overflow(page) == 0, f"{path} is too wide for {size}"
        assert violations(page) == []
        assert problems == []
        page.context.close()


def test_a_page_is_clean_accessible_and_fits(browser: Browser, pages: dict[str, Path]) -> None:
    check(browser, pages["migu"])


def test_the_first_screen_says_how_much_was_forgotten(browser: Browser, pages: dict[str, Path], pictures: Path) -> None:
    for name, size in (("desktop", DESKTOP), ("phone", PHONE)):
        page, _ = opened(browser, pages["migu"], "light", size)
        box = page.locator("h2").first.bounding_box()
        assert page.locator("h2").first.inner_text().startswith("Scores on the first 7 tasks fell by 0.")
        assert box is not None
        assert box["y"] + box["height"] < size["height"] / 2
        page.screenshot(path=pictures / f"report-{name}.png")
        page.context.close()


def test_the_keyboard_reaches_the_content(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["migu"], "light", DESKTOP)
    page.keyboard.press("Tab")
    focused = "document.activeElement"
    assert page.evaluate(f"{focused}.textContent") == "Skip to the results"
    assert page.evaluate(f"{focused}.getBoundingClientRect().left >= 0"), "the link shows when it has the focus"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.className") == "scroll"
    assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(each => each.tagName)")
    assert levels == ["H1", *["H2"] * (len(levels) - 1)]
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    ids = page.locator("[id]").evaluate_all("all => all.map(each => each.id)")
    assert len(ids) == len(set(ids))
    page.context.close()


def test_text_of_users_is_text(browser: Browser, tmp_path: Path) -> None:
    """HTML, right-to-left text, emoji and a hundred letters; half of the tasks, and scores that are missing."""
    path = write_report(odd_run(tmp_path).path).folder / "index.html"
    check(browser, path)
    page, _ = opened(browser, path, "light", PHONE)
    assert page.locator("main b:not(.track b), main script").count() == 0
    assert page.locator("h1").inner_text() == ODD.replace("/", "")
    page.locator("details").evaluate_all("all => all.forEach(each => each.open = true)")
    assert page.locator("td", has_text=ODD).count() >= 1 + 3, "the device, and an answer to each example"
    assert page.locator("th", has_text="x" * 100).count() > 1
    page.context.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "none", "thirty", "hundred"])
def test_other_numbers_of_tasks(kind: str, browser: Browser, tmp_path: Path) -> None:
    count = {"one": 1, "none": 2, "thirty": 30, "hundred": 100}[kind]
    folder = write_demo(tmp_path / kind, "migu", tuple(names(count)), done=0 if kind == "none" else count)
    check(browser, write_report(folder.path).folder / "index.html")


@pytest.mark.slow
def test_units_several_runs_and_sweeps(browser: Browser, tmp_path: Path, pictures: Path) -> None:
    kif, migu = kif_run(tmp_path / "kif").path, migu_run(tmp_path / "migu").path
    plain = write_demo(tmp_path / "plain", "sequential", loss=0.2).path
    grid = make_grid(tmp_path / "grid", methods="sequential,migu", seeds="0,1,2")
    for cell in grid.cells:
        kept = (0.3 if cell.method == "sequential" else 0.6) + 0.03 * cell.seed
        finish(cell, matrix(0.8, kept, 0.75 + 0.02 * cell.seed))
    found = {
        "kif": (write_report(kif).folder / "index.html", "#units"),
        "migu": (write_report(migu).folder / "index.html", "#kept-rows"),
        "several": (write_several([plain, migu, kif]), "#summary"),
        "compare": (write_page(results_of(grid, tmp_path / "grid"), "standard", tmp_path / "sweep"), "#summary"),
    }
    for name, (path, section) in found.items():
        check(browser, path)
        page, _ = opened(browser, path, "dark" if name == "several" else "light", DESKTOP)
        page.locator(section).scroll_into_view_if_needed()
        page.evaluate("section => document.querySelector(section).scrollIntoView()", section)
        page.screenshot(path=pictures / f"report-{name}.png")
        page.context.close()
