from __future__ import annotations

from pathlib import Path

from cl_dist.integrate.methods import SURROUNDINGS, supported

PAGE = Path(__file__).parents[2] / "docs" / "integrate.md"


def table() -> list[str]:
    """The table of docs/integrate.md."""
    rows = [["method", *SURROUNDINGS], ["---"] * (1 + len(SURROUNDINGS))]
    rows += [
        [f"`{name}`", *("yes" if places[place] else "no" for place in SURROUNDINGS)]
        for name, places in sorted(supported().items())
    ]
    return ["| " + " | ".join(row) + " |" for row in rows]


def test_the_page_says_which_methods_can_be_used_where() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    written = [line for line in lines if line.startswith("| method |") or line.endswith(("| yes |", "| no |"))]
    expected = [line for line in table() if "---" not in line]
    assert written == expected


def test_the_table_says_more_than_one_thing() -> None:
    assert supported()["migu"] == dict.fromkeys(SURROUNDINGS, True)
    assert supported()["ewc"] == dict.fromkeys(SURROUNDINGS, False)
    assert [place for place, fits in supported()["given"].items() if fits] == ["Trainer, SFTTrainer"]
