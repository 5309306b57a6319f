"""`python -m tests.zoo`: try every model of the zoo and write the results into docs/models.md."""

from __future__ import annotations

import sys

from tests.ranks import run_ranks
from tests.zoo.families import SPECIMENS
from tests.zoo.table import BEGIN, PAGE, broken, text


def main() -> int:
    """Write the table; return 1 if a model neither works nor is refused."""
    (findings,) = run_ranks("tests.zoo.jobs:tour", 1, {"names": list(SPECIMENS)}, timeout=1200)
    before, _, _ = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text(findings)}", encoding="utf-8")
    failures = {name: broken(found) for name, found in findings.items() if broken(found)}
    for name, endings in failures.items():
        print(name, endings, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
