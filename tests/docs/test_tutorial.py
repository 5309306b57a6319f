"""The commands of the tutorial and of README's first screen do what the pages say, as written."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.docs.test_pages import blocks_of
from tools.write_examples import written

ROOT = Path(__file__).parents[2]
TASKS = ["billing", "shipping"]


def commands_of(page: str) -> list[str]:
    """The commands in the page's blocks, without the set-up, which the tests themselves run in."""
    lines = "".join(blocks_of((ROOT / page).read_text(encoding="utf-8"), "")).splitlines()
    return [re.sub(r"^make install( && |$)", "", line) for line in lines]


def in_a_checkout(folder: Path, commands: list[str]) -> str:
    """Run commands one after the other in a folder that has what a checkout has, and return what they print."""
    for name in (".venv", "examples"):
        (folder / name).symlink_to(ROOT / name)
    variables = {**os.environ, "CL_DIST_CACHE": str(folder / "cache")}
    script = "\n".join(["set -eu -o pipefail", *commands])
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=variables, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def check_run(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["tasks"] == TASKS
    assert len(metrics["accuracy_matrix"]) == 3
    events = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for task in TASKS:
        losses = [event["loss"] for event in events if event["event"] == "step" and event["task"] == task]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])  # it has learnt something


def check_tutorial(folder: Path, printed: str) -> None:
    for row in ("before", "after billing", "after shipping", "average performance (AP)", "forgetting"):
        assert f"\n{row}  " in printed
    for run in ("my", "sequential"):
        check_run(folder / f"runs/{run}")
    for page in ("runs/my/report/index.html", "runs/report/index.html"):
        report = (folder / page).read_text(encoding="utf-8")
        assert all(task in report for task in TASKS)


@pytest.fixture(scope="module")
def commands() -> list[str]:
    return commands_of("docs/tutorial.md")


def test_examples_are_those_that_the_script_writes() -> None:
    assert sorted(written()) == [f"{task}.jsonl" for task in TASKS]
    for name, content in written().items():
        assert (ROOT / "examples" / name).read_text(encoding="utf-8") == content


def test_the_tutorial_quotes_the_examples() -> None:
    [quoted] = blocks_of((ROOT / "docs/tutorial.md").read_text(encoding="utf-8"), "json")
    assert set(quoted.splitlines()) <= set(written()["shipping.jsonl"].splitlines())


def test_tutorial_as_written(tmp_path: Path, commands: list[str]) -> None:
    check_tutorial(tmp_path / "my-first-run", in_a_checkout(tmp_path, commands))


# The same with other kinds of files

Records = list[dict[str, str]]


def write_csv(path: Path, records: Records) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def write_parquet(path: Path, records: Records) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


def write_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_gzip(path: Path, records: Records) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def write_messages(path: Path, records: Records) -> None:
    turns = [
        [("system", "You sort messages."), ("user", one["input"]), ("assistant", one["output"])] for one in records
    ]
    write_lines(path, [{"messages": [{"role": who, "content": said} for who, said in each]} for each in turns])


def write_alpaca(path: Path, records: Records) -> None:
    write_lines(path, [{"instruction": "What is this message about?", **record} for record in records])


KINDS: dict[str, tuple[str, Callable[[Path, Records], None]]] = {
    "csv": (".csv", write_csv),
    "parquet": (".parquet", write_parquet),
    "gzip": (".jsonl.gz", write_gzip),
    "messages": (".jsonl", write_messages),
    "alpaca": (".jsonl", write_alpaca),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tutorial_with_other_files(kind: str, tmp_path: Path, commands: list[str]) -> None:
    ending, write = KINDS[kind]
    (tmp_path / "data").mkdir()
    for task in TASKS:
        lines = (ROOT / f"examples/{task}.jsonl").read_text(encoding="utf-8").splitlines()
        write(tmp_path / f"data/{task}{ending}", [json.loads(line) for line in lines])
    # The same commands; only the files that they copy and name are others.
    changed = [re.sub(r"\.jsonl\b", ending, line.replace("../examples/", "../data/")) for line in commands]
    assert changed != commands
    check_tutorial(tmp_path / "my-first-run", in_a_checkout(tmp_path, changed))


@pytest.mark.slow
def test_first_screen_of_the_readme(tmp_path: Path) -> None:
    printed = in_a_checkout(tmp_path, commands_of("README.md"))
    assert "after shipping" in printed
    check_run(tmp_path / "runs/my")
