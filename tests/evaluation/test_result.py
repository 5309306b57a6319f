"""The mean of predictions, and the file that they are written to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cl_dist.evaluation.result import Prediction, weighted_mean, write_predictions


def test_weighted_mean() -> None:
    assert weighted_mean([Prediction(0, "", "", 1.0, 3), Prediction(1, "", "", 0.0, 1)]) == 0.75
    with pytest.raises(ValueError, match="nothing to take the mean of"):
        weighted_mean([])


def test_predictions_are_written_as_json_lines(tmp_path: Path) -> None:
    predictions = [Prediction(0, "zwei\nZeilen", "ü", 0.5), Prediction(1, "b", "c", 0.0, 4)]
    write_predictions(tmp_path / "new" / "predictions.jsonl", predictions)
    lines = (tmp_path / "new" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Prediction(**json.loads(line)) for line in lines] == predictions
