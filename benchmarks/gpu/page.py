"""Takes the JSON of days with a GPU into docs/performance.md.

    python -m cl_dist.benchmarks.gpu.page [DIR]

With DIR, the folder that `cl-dist bench gpu --out DIR` has filled, its JSON files are first copied to
benchmarks/results/gpu/<device>. The section between the two markers in the page is then written from everything there.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from cl_dist.benchmarks.gpu.findings import Day, tables
from cl_dist.benchmarks.gpu.measuring import GPU_MODE, read_part
from cl_dist.benchmarks.gpu.parts import PARTS
from cl_dist.errors import BadInput, ClDistError

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results" / "gpu"
BEGIN = "<!-- Written by `python -m cl_dist.benchmarks.gpu.page`: -->"
END = "<!-- End of what that command writes. -->"
NOTHING = "**No GPU has been measured yet.** All times, rates and choices of tile sizes for GPUs are predictions."


def read_day(folder: Path) -> Day:
    """The parts in a folder. Raises BadInput if there are none, or if they were not measured on a GPU."""
    day = {name: part for name in PARTS if (part := read_part(folder / f"{name}.json")) is not None}
    if not day:
        raise BadInput(f"{folder}: no results; give the folder that `cl-dist bench gpu --out` has filled")
    modes = {part["mode"] for part in day.values() if part["mode"] is not None}
    if modes != {GPU_MODE}:
        raise BadInput(f"{folder}: not measured on a GPU ({', '.join(sorted(modes)) or 'nothing measured'})")
    return day


def section(days: Mapping[str, Day]) -> str:
    """The text between the markers, for days by the name of their folder."""
    if not days:
        return NOTHING
    return "\n\n".join(f"### {name}\n\n{tables(day)}" for name, day in sorted(days.items()))


def with_section(page: str, text: str) -> str:
    """The page with another section. Raises BadInput if the markers are not there exactly once, in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise BadInput(f"the page needs one line {BEGIN!r} and, below it, one line {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def committed(results: Path = RESULTS) -> dict[str, Day]:
    """The days whose results are part of the project."""
    return {folder.name: read_day(folder) for folder in sorted(results.glob("*")) if folder.is_dir()}


def take_in(folder: Path, results: Path = RESULTS) -> Path:
    """Copy a day's JSON files among the results; returns their new folder. Raises BadInput."""
    day = read_day(folder)
    device = next(part["device"] for part in day.values() if part["device"])
    target = results / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    target.mkdir(parents=True, exist_ok=True)
    for name in day:
        shutil.copyfile(folder / f"{name}.json", target / f"{name}.json")
    return target


def main(arguments: list[str]) -> None:
    """Copy a folder's results, if one is given, and write the section."""
    if arguments:
        print(f"copied to {take_in(Path(arguments[0]))}")
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), section(committed())), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ClDistError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
