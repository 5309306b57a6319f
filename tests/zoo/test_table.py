"""docs/models.md lists exactly the models of the zoo."""

from __future__ import annotations

from tests.zoo.families import SPECIMENS
from tests.zoo.table import BEGIN, HEADER, PAGE, RULE


def test_the_page_has_exactly_the_models_of_the_zoo() -> None:
    _, _, written = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert rows[:2] == [HEADER, RULE]
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows[2:]] == list(SPECIMENS)
    assert len(SPECIMENS) >= 25
