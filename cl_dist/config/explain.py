"""The text of `cl-dist recipe --explain`: every setting with its values, its default and its meaning."""

from __future__ import annotations

import textwrap

from cl_dist.config.fields import Setting, settings_of
from cl_dist.config.schema import Recipe

WIDTH = 100


def explain() -> str:
    """All settings of a recipe, in the order of its sections."""
    return "\n\n".join(_paragraph(setting) for setting in settings_of(Recipe))


def _paragraph(setting: Setting) -> str:
    meaning = textwrap.fill(setting.help, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return f"{setting.key}\n    {setting.allowed}{_default(setting)}\n{meaning}"


def _default(setting: Setting) -> str:
    if setting.default is None:
        return " (must be given)" if setting.key != "output_dir" else ""
    return f" (default: {setting.default})" if setting.default else ""
