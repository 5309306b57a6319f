"""The table of docs/models.md: one row per model of the zoo, and the message of each refusal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.ranks import REPOSITORY
from tests.zoo.families import SPECIMENS
from tests.zoo.jobs import BROKEN, REFUSED, TRAININGS, WORKS

PAGE = REPOSITORY / "docs" / "models.md"
BEGIN = "<!-- The rest is written by `python -m tests.zoo`. -->"

HEADER = "| model | trained as | attention | positions | " + " | ".join(TRAININGS) + " |"
RULE = "|" + "---|" * (4 + len(TRAININGS))


def row(name: str, found: Mapping[str, Any]) -> str:
    """The table row of a model."""
    cells = [name, SPECIMENS[name].objective, found["attention"], _positions(found["predicted"])]
    return "| " + " | ".join([*cells, *(_cell(found[training]) for training in TRAININGS)]) + " |"


def refusals(name: str, found: Mapping[str, Any]) -> list[str]:
    """One line for each refused training of a model."""
    return [
        f"- {name}, {training}: `{found[training].removeprefix(REFUSED)}`"
        for training in TRAININGS
        if found[training].startswith(REFUSED)
    ]


def _positions(longest: list[int | None]) -> str:
    return "unlimited" if longest == [None, None] else "table"


def _cell(outcome: str) -> str:
    if outcome == WORKS:
        return "yes"
    return "refused" if outcome.startswith(REFUSED) else "broken"


def text(findings: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of the page after `BEGIN`."""
    refused = [line for name, found in findings.items() for line in refusals(name, found)]
    rows = [row(name, found) for name, found in findings.items()]
    return "\n".join(["", HEADER, RULE, *rows, "", "The messages of the refused trainings:", "", *refused, ""])


def lines_of(name: str, page: Path = PAGE) -> list[str]:
    """The lines of the page about one model: its row, then its refusals."""
    lines = page.read_text(encoding="utf-8").splitlines()
    trainings = tuple(f"- {name}, {training}: " for training in TRAININGS)
    return [line for line in lines if line.startswith((f"| {name} | ", *trainings))]


def broken(found: Mapping[str, Any]) -> dict[str, str]:
    """The trainings that neither work nor are refused before the first step, with their outcomes."""
    return {training: found[training] for training in TRAININGS if found[training].startswith(BROKEN)}
