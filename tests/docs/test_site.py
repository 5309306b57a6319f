"""The site: every page is in its navigation, its figures are current, and messages that it quotes exist in the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from mkdocs.structure.files import Files

from cl_dist.config.fields import settings_of
from cl_dist.config.schema import Recipe
from tools import draw_figures
from tools.site_hooks import PICTURE, on_page_content, on_page_markdown, settings_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = {"index.md", "settings.md"}
BESIDES = {"repository/ARCHITECTURE.md", "repository/CONTRIBUTING.md", "repository/CHANGELOG.md"}


@cache
def config() -> dict[str, Any]:
    """mkdocs.yml, without the Python object in it that makes the anchors of headings."""
    return yaml.safe_load(re.sub(r"!!python/\S+ ", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))


def pages_in(navigation: object) -> Iterator[str]:
    if isinstance(navigation, str):
        yield navigation
    elif isinstance(navigation, dict):
        for inner in navigation.values():
            yield from pages_in(inner)
    elif isinstance(navigation, list):
        for inner in navigation:
            yield from pages_in(inner)


def test_the_navigation_has_every_page_once() -> None:
    listed = list(pages_in(config()["nav"]))
    on_disk = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(on_disk | GENERATED | BESIDES)


def test_nothing_is_fetched_from_elsewhere() -> None:
    assert config()["theme"]["font"] is False
    assert not {"extra_javascript", "site_url", "repo_url"} & set(config())
    assert all((DOCS / path).exists() for path in config()["extra_css"])


# Figures


def test_figures_are_those_that_the_script_draws() -> None:
    drawn = draw_figures.drawn()
    there = {file.name: file.read_text(encoding="utf-8") for file in (DOCS / "images").glob("*-*.svg")}
    assert {name: there.get(name) for name in drawn} == drawn


def test_the_matrices_are_the_measured_ones() -> None:
    sequential, migu = draw_figures.measured("sequential"), draw_figures.measured("migu")
    assert sequential.tasks == migu.tasks == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert sequential.rows[0] == migu.rows[0] == [0.10, 0.32, 0.18, 0.46]
    assert (sequential.rows[-1], migu.rows[-1]) == ([0.52, 0.22, 0.10, 0.78], [0.74, 0.32, 0.14, 0.74])
    for matrix in (sequential, migu):
        best = [max(row[task] for row in matrix.rows[1:-1]) for task in range(3)]
        drop = sum(high - last for high, last in zip(best, matrix.rows[-1][:3], strict=True)) / 3
        assert matrix.forgetting == pytest.approx(drop, abs=5e-4)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.name)
def test_pictures_of_pages_exist_in_both_versions(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = PICTURE.findall(text)
    assert len(found) == text.count("<picture>")
    for path, words in found:
        assert words
        for theme in draw_figures.THEMES:
            assert (page.parent / f"{path}-{theme.name}.svg").exists()
            assert f"{path}-{theme.name}.svg" in text


def test_links_whose_text_is_a_file_name_get_the_title_of_the_page() -> None:
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="results/first-run.md"), meta={})
    text = "[scoring.md](../scoring.md#labels), [kif](../kif.md), [ARCHITECTURE.md](../../ARCHITECTURE.md)"
    titled = "[Scoring](../scoring.md#labels), [kif](../kif.md), [Architecture](../repository/ARCHITECTURE.md)"
    assert on_page_markdown(text, page, config(), Files([])) == titled


def test_every_table_can_be_scrolled_by_keyboard() -> None:
    box = '<div class="table-box" tabindex="0">'
    html = on_page_content("<table>1</table>\n<table>\n2</table>", None, config(), Files([]))
    assert html == f"{box}<table>1</table></div>\n{box}<table>\n2</table></div>"


def test_settings_page_has_every_setting() -> None:
    page = settings_page()
    missing = [setting.key for setting in settings_of(Recipe) if f"### `{setting.key}`" not in page]
    assert missing == []


def test_the_differences_to_migus_public_code_mention_every_setting() -> None:
    section = (DOCS / "methods.md").read_text(encoding="utf-8").partition("## MIGU and its public code\n")[2]
    section = section.partition("\n## ")[0]
    settings = {
        setting.key.rpartition(".")[2] for setting in settings_of(Recipe) if setting.key.startswith("method(migu).")
    }
    assert {"threshold", "tied_head"} <= settings
    assert {name for name in settings if not re.search(rf"\b{name}\b", section)} - {"by_task"} == set()


# Messages


@cache
def literals() -> list[str]:
    """Every text in the code, with … for what it fills in."""
    found = []
    for file in (ROOT / "cl_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def messages_in(page: str) -> list[str]:
    """The first cells of the tables, which quote messages."""
    return re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)


def missing_messages(page: str) -> list[str]:
    """Messages of which no text in the code has all parts in order."""
    missing = []
    for message in messages_in(page):
        parts = [re.escape(part) for part in re.split(" ?… ?", message) if part.strip()]
        pattern = re.compile(".*?".join(parts), flags=re.DOTALL)
        if not any(pattern.search(text) for text in literals()):
            missing.append(message)
    return missing


def test_messages_of_troubleshooting_exist_in_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(messages_in(page)) > 25
    assert missing_messages(page) == []


def test_a_message_that_does_not_exist_is_found() -> None:
    page = "| `no such message …` | x |\n| `… holds no samples` | x |\n"
    assert missing_messages(page) == ["no such message …"]
