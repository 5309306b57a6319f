from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cl_dist.errors import BadInput
from cl_dist.report.flips import Example, adjusted, flips_csv, guess_rate, read_flips
from cl_dist.report.reading import RunData, read_run
from cl_dist.state.manifest import Manifest
from tests.report.runs import write_run

TASKS = ("yelp", "amazon", "notes", "last")


def write_predictions(run: RunData, position: int, task: str, answers: Sequence[tuple[str, str]]) -> None:
    folder = run.folder.task(position, TASKS[position]).predictions
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"index": index, "prediction": said, "reference": right, "score": float(said.lower() == right), "weight": 1}
        for index, (said, right) in enumerate(answers)
    ]
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(tmp_path: Path, **metrics: str) -> RunData:
    folder = write_run(tmp_path / "run", TASKS, 4)
    scoring: dict[str, dict[str, str | int]] = {task: {"metric": metric} for task, metric in metrics.items()}
    replace(Manifest.read(folder.manifest), scoring=scoring).write(folder.manifest)
    return read_run(folder.path)


BEFORE = [
    ("yes", "yes"),
    ("Yes", "yes"),
    ("no", "yes"),
    ("no", "no"),
    ("no", "no"),
    ("yes", "no"),
    ("yes", "yes"),
    ("no", "no"),
]
NOW = [
    ("yes", "yes"),
    ("no", "yes"),
    ("yes", "yes"),
    ("no", "no"),
    ("yes", "no"),
    ("yes", "no"),
    ("no", "yes"),
    ("no", "no"),
]


def test_samples_that_changed_sides(tmp_path: Path) -> None:
    run = make_run(tmp_path, yelp="exact_match", amazon="macro_f1", notes="rouge_l", last="exact_match")
    write_predictions(run, 0, "yelp", BEFORE)
    write_predictions(run, 3, "yelp", NOW)
    write_predictions(run, 1, "amazon", BEFORE)
    write_predictions(run, 3, "amazon", BEFORE)
    flips, reasons = read_flips(run)
    yelp, amazon = flips
    assert (yelp.task, yelp.samples, yelp.right_to_wrong, yelp.wrong_to_right) == ("yelp", 8, 3, 1)
    assert (yelp.still_right, yelp.still_wrong) == (3, 1)
    assert yelp.lost == (
        Example(1, "yes", "Yes", "no"), Example(4, "no", "no", "yes"), Example(6, "yes", "yes", "no"),
    )  # fmt: skip
    assert yelp.found == (Example(2, "yes", "no", "yes"),)
    # Half of the answers and of the references are yes, before and now: g = 1/2, so u = (1/8) / (1/4).
    assert yelp.forgotten == pytest.approx(3 / 8 / 0.5 - 0.5 * 0.5)
    assert yelp.gained == pytest.approx(1 / 8 / 0.5 - 0.5 * 0.5)
    assert yelp.forgotten - yelp.gained == pytest.approx((6 / 8 - 0.5) / 0.5 - (4 / 8 - 0.5) / 0.5)
    assert (amazon.right_to_wrong, amazon.wrong_to_right, amazon.lost, amazon.found) == (0, 0, (), ())
    assert reasons == {
        "notes": "ROUGE-L grades answers, it calls none right or wrong",
        "last": "no task was trained after it",
    }
    header, first, *_ = flips_csv(flips).splitlines()
    assert header == "task,samples,right_to_wrong,wrong_to_right,still_right,still_wrong,forgotten,gained"
    assert first == "yelp,8,3,1,3,1,0.5,0.0"


@pytest.mark.parametrize(
    ("frequency", "error"),
    [([0.25] * 4, 0.003), ([0.4, 0.3, 0.2, 0.1], 0.008)],  # of frequent labels, both models guess more right
    ids=["equal", "unequal"],
)
def test_the_adjustment_finds_what_was_known(frequency: list[float], error: float) -> None:
    """Two models that know some samples and guess the others, with the frequencies of the four labels."""
    random, count = np.random.default_rng(0), 200_000
    references = random.choice(4, count, p=frequency)
    state = random.choice(4, count, p=[0.35, 0.25, 0.1, 0.3])  # both know it, forgotten, gained, neither knows it
    knows = [np.isin(state, (0, 1)), np.isin(state, (0, 2))]
    said = [np.where(known, references, random.choice(4, count, p=frequency)) for known in knows]
    right = [each == references for each in said]
    rates = [guess_rate(list(zip(each.tolist(), references.tolist(), strict=True)), str) for each in said]
    assert rates == pytest.approx([sum(share**2 for share in frequency)] * 2, abs=0.003)
    forgotten, gained = adjusted(
        (right[0] & ~right[1]).mean(), (~right[0] & right[1]).mean(), (~right[0] & ~right[1]).mean(), *rates
    )
    assert (forgotten, gained) == pytest.approx((0.25, 0.1), abs=error)
    known = forgotten - gained
    accuracies = [(each.mean() - rate) / (1 - rate) for each, rate in zip(right, rates, strict=True)]
    assert known == pytest.approx(accuracies[0] - accuracies[1])
    assert (~right[0] & right[1]).mean() > 0.11, "not adjusted, more seems to be gained"


def test_a_model_that_always_gives_one_answer_knows_nothing() -> None:
    always = [("yes", "yes")] * 9 + [("yes", "no")]
    assert guess_rate(always, str.lower) == pytest.approx(0.9), "its accuracy"
    assert all(map(math.isnan, adjusted(0.0, 0.0, 0.0, 1.0, 0.5)))


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, yelp="exact_match", amazon="jga", last="exact_match", notes="log_likelihood")
    write_predictions(run, 0, "yelp", BEFORE)
    write_predictions(run, 1, "amazon", BEFORE)
    write_predictions(run, 3, "amazon", BEFORE[:-1])
    flips, reasons = read_flips(run)
    assert flips == []
    assert reasons == {
        "yelp": "tasks/04-last/predictions/yelp.jsonl is missing",
        "amazon": "it was scored on other samples then",
        "notes": "text has no answers",
        "last": "no task was trained after it",
    }
    path = run.folder.task(3, "last").predictions / "amazon.jsonl"
    first, second = path.read_text().splitlines(keepends=True)[:2]
    line = "line 2 is not a JSON object with index, prediction, reference and score"
    for damage in ("", f"{first}[]\n", f'{first}{{"index": 0}}\n', f"{first}{second[:9]}", f"{first}\udcff"):
        path.write_text(damage, errors="surrogateescape")
        with pytest.raises(BadInput) as caught:
            read_flips(run)
        assert str(caught.value) == f"{path} is damaged: {line if damage else 'it has no predictions'}"
    nothing = write_run(tmp_path / "nothing", TASKS, 0)
    assert read_flips(read_run(nothing.path)) == ([], {})
