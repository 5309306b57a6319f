"""What MkDocs adds to docs/ for the site: the home page, the settings, and what pages link to outside of docs/.

mkdocs.yml names this file under `hooks`. README.md becomes the home page, so nothing is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from os.path import relpath
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from cl_dist.config.fields import Setting, settings_of
from cl_dist.config.schema import Recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[#)])")
FILE_LINK = re.compile(r"\[(?:[\w-]+/)*[\w-]+\.md\]\(([^)#\s]+\.md)(#[^)\s]+)?\)")
"""A link to a page whose text is the page's file name, which says nothing to readers of the site."""
PICTURE = re.compile(r'<picture>.*?<img src="([^"]+)-light\.svg" alt="([^"]+)"[^>]*>.*?</picture>', flags=re.DOTALL)
"""A figure as README and docs embed it, so that GitHub shows the version for the reader's colour scheme."""


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the files outside of docs/ that pages link to."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    files.append(File.generated(config, "settings.md", content=settings_page()))
    waiting, done = [ROOT / "README.md", *DOCS.rglob("*.md")], set[Path]()
    while waiting:
        page = waiting.pop()
        for target in outside(page):
            if target in done:
                continue
            done.add(target)
            if target.is_dir():
                files.append(File.generated(config, site_path(target), content=listing(target)))
                waiting.append(target)
            else:
                files.append(File.generated(config, site_path(target), abs_src_path=str(target)))
                waiting += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the site's copies, and let the site's own switch choose the version of a figure."""
    source = repository_path(page.file.src_uri)
    if page.file.src_uri.startswith(("repository/", "results/", "api.md")):
        page.meta["search"] = {"boost": 0.2}  # the search shows the pages for users first

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve()
        if "://" in link[1] or not target.exists():
            return link[1]
        return relpath(site_path(target), Path(page.file.src_uri).parent)

    def titled(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve()
        return f"[{title_of(target)}]({link[1]}{link[2] or ''})" if target.exists() else link[0]

    markdown = FILE_LINK.sub(titled, markdown)
    markdown = PICTURE.sub(r"![\2](\1-light.svg#only-light)![\2](\1-dark.svg#only-dark)", markdown)
    return LINK.sub(moved, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Put each table into a box that a keyboard can scroll where the table is too wide for the screen."""
    return re.sub(r"<table>.*?</table>", r'<div class="table-box" tabindex="0">\g<0></div>', html, flags=re.DOTALL)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Name the search dialog, which the theme does not, for screen readers."""
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def title_of(page: Path) -> str:
    """A page's title, up to its colon: `Scoring`."""
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").partition(":")[0]


def outside(page: Path) -> Iterator[Path]:
    """What a page, or a listed folder, leads to outside of docs/; a README leads nowhere new."""
    if page.is_dir():
        yield from sorted(file for file in page.iterdir() if file.is_file())
        return
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve()
        if "://" not in link and target.exists() and DOCS not in target.parents and target != ROOT / "README.md":
            yield target


def site_path(target: Path) -> str:
    """Where the site has a file or folder of the repository, below the site's source."""
    if target == ROOT / "README.md":
        return "index.md"
    if DOCS in target.parents:
        return target.relative_to(DOCS).as_posix()
    path = f"repository/{target.relative_to(ROOT).as_posix()}"
    return f"{path}/index.md" if target.is_dir() else path


def repository_path(site: str) -> Path:
    """The reverse of `site_path`, for pages."""
    if site == "index.md":
        return ROOT / "README.md"
    if site.startswith("repository/"):
        return ROOT / site.removeprefix("repository/").removesuffix("/index.md")
    return DOCS / site


def listing(folder: Path) -> str:
    """A page that links to every file of a folder."""
    names = [file.name for file in sorted(folder.iterdir()) if file.is_file()]
    lines = [f"- [{name}]({folder.name}/{name})" for name in names]
    return f"# {folder.relative_to(ROOT)}\n\n" + "\n".join(lines) + "\n"


# Settings

SECTIONS = {
    "model": "The model",
    "stream": "The tasks and their data",
    "method": "The method",
    "train": "Training",
    "zero": "Sharding",
    "launch": "Ranks and devices",
    "checkpoint": "Checkpoints",
    "eval": "Evaluation",
    "other": "Everything else",
}


def settings_page() -> str:
    """Every setting with its values, default and meaning, from the same classes as `cl-dist recipe --explain`."""
    parts = [
        "# Settings",
        "Look up any setting of a recipe: what it accepts, its default, and what it does. "
        "`cl-dist recipe --explain` prints the same text. `[]` marks a list of mappings; `method(kif).` starts a "
        "setting that only this method has.",
    ]
    found: dict[str, list[Setting]] = {section: [] for section in SECTIONS}
    for setting in settings_of(Recipe):
        section = re.split(r"[.\[(]", setting.key)[0]
        found[section if section in found else "other"].append(setting)
    for section, settings in found.items():
        parts.append(f"## {SECTIONS[section]}")
        parts += [_entry(setting) for setting in settings]
    return "\n\n".join(parts) + "\n"


def _entry(setting: Setting) -> str:
    default = f"; default: `{setting.default}`" if setting.default else ""
    if setting.default is None and setting.key != "output_dir":
        default = "; must be given"
    meaning = setting.help.replace("<", "&lt;").replace("*", "\\*")
    anchor = re.sub(r"[^\w.]+", "-", setting.key).strip("-")
    return f"### `{setting.key}` {{ #{anchor} }}\n\n*{setting.allowed}{default}*\n\n{meaning}"
