"""Renders a page as one HTML file that needs no network: style and figures are inside, and nothing is executed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cl_dist.report.blocks import Page
from cl_dist.report.drawing import BLUE, GREY, INK, LIGHT, ORANGE, PALE, PAPER
from cl_dist.report.escape import one_line

THEMED = {
    INK: "ink",
    GREY: "muted",
    PALE: "faint",
    LIGHT: "rule",
    BLUE: "blue",
    ORANGE: "orange",
    PAPER: "paper",
}
"""Colours of the pictures that follow the page's light or dark theme, as CSS variables. Numbers in coloured cells keep
theirs, as the cells do."""
_COLOUR = re.compile("|".join(THEMED))
_HEAD = re.compile(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<defs>\s*<style[^>]*>.*?</style>\s*</defs>", re.DOTALL)
_NAMED = re.compile(r'(\bid="|"#|url\(#)')
_SIZE = re.compile(r'<svg [^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>')
_BACKGROUND = re.compile(r'<g id="patch_1">.*?</g>', re.DOTALL)


def render(page: Page, pictures: Mapping[str, bytes]) -> str:
    """The page as HTML.

    Args:
        page: Its content.
        pictures: SVG files by the names of the page's figures. The page leaves out a figure without a picture.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def breakable(text: str) -> Markup:
        """Text that may continue on a new line after `_` and `.`, as long names of metrics and settings should."""
        return Markup(re.sub(r"([_.])(?=\w)", r"\1<wbr>", str(escape(one_line(text)))))

    environment = Environment(
        loader=PackageLoader("cl_dist.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Control characters and overrides of the direction of text have no place on a page.
        finalize=lambda value: one_line(value) if type(value) is str else value,
    )
    environment.filters["breakable"] = breakable
    embedded = {name: embed(name, svg) for name, svg in pictures.items()}
    return environment.get_template("page.html").render(page=page, pictures=embedded)


def embed(name: str, svg: bytes) -> str:
    """An SVG file of matplotlib as an element of a page: ids unique to the picture, colours of the page's theme."""
    text = _HEAD.sub("", svg.decode("utf-8"))
    text = _BACKGROUND.sub("", text, count=1)
    text = _NAMED.sub(lambda found: f"{found[0]}{name}-", text)
    text = _COLOUR.sub(lambda found: f"var(--{THEMED[found[0]]})", text)
    return _SIZE.sub(_flexible, text, count=1).strip()


def _flexible(found: re.Match[str]) -> str:
    """The opening tag of a picture that adapts to the page, but not below the size at which its text can be read."""
    points = float(found[1])
    size = f"min-width:{1.15 * points:.0f}px;width:{1.35 * points:.0f}px"
    return f'<svg viewBox="0 0 {found[1]} {found[2]}" style="{size}" aria-hidden="true" focusable="false">'
