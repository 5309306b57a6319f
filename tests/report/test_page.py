"""Single parts of the page; test_write has whole reports."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from cl_dist.evaluation import metrics
from cl_dist.report.page import definition
from cl_dist.report.write import PAGE, write_report
from cl_dist.state.manifest import Manifest, Segment
from tests.report.runs import write_run

LONG = ["yelp", "amazon", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst-2", "dbpedia", "agnews", "yahoo", "multirc"]


def test_the_ranks_of_all_segments_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a", "b"], 1)
    first = Segment(task=0, step=0, world_size=2, zero_stage=1, micro_batch_size=4, gradient_accumulation=1)
    second = replace(first, step=2, world_size=1, zero_stage=3, gradient_accumulation=2)
    replace(Manifest.read(folder.manifest), segments=(first, second)).write(folder.manifest)
    page = (write_report(folder.path).folder / PAGE).read_text()
    assert "| ranks | 2, ZeRO stage 1; then 1, ZeRO stage 3 |" in page


def test_definitions_are_whole_sentences() -> None:
    names = metrics.all_metrics([[0.0], [1.0]])
    assert all(definition(name).endswith(".") and "\n" not in definition(name) for name in names)
    assert "(TaSL, eval_fwt.py of its code)" in definition("forward_transfer_absolute")


def test_general_ability_has_a_table_and_a_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", LONG[:2], 2)

    def score(value: float) -> dict[str, object]:
        return {"score": value, "metric": "acc", "metrics": {"acc,none": value}, "samples": 4}

    places = {"untouched": {"a": score(0.5), "b": score(0.75)}, LONG[1]: {"a": score(0.25), "b": score(0.5)}}
    measured = tuple({"after": place, "scores": scores} for place, scores in places.items())
    replace(Manifest.read(folder.manifest), general=measured).write(folder.manifest)
    report = write_report(folder.path)
    page = (report.folder / PAGE).read_text()
    assert "| after | a | b |" in page
    assert f"| {LONG[1]} | 0.2500 | 0.5000 |" in page
    assert "| `general_ability` | 0.3750 |" in page
    assert "| `general_forgetting` | 0.2500 |" in page
    with (report.folder / "general.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["after"], line["task"], float(line["value"])) for line in lines][2:] == [
        (LONG[1], "a", 0.25),
        (LONG[1], "b", 0.5),
    ]
