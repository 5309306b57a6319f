from __future__ import annotations

import csv
import io

import numpy as np

from cl_dist.report.tables import correlation_csv, fusion_csv, importance_csv, markdown
from cl_dist.report.units import UnitResults, UnitTable

UNITS = {
    "x[0]": [{"parameter": "x.weight", "slices": [[0, 1], [0, 3]]}],
    "x[1]": [{"parameter": "x.weight", "slices": [[1, 2], [0, 3]]}],
    "x.bias": [{"parameter": "x.bias", "slices": [[0, 2]]}],
    "y": [{"parameter": "y.weight", "slices": [[0, 4]]}],
}
RESULTS = UnitResults(
    UnitTable.from_json(UNITS),
    importance=np.array([[0.0, 1.0, 0.25, 0.5], [1.0, 0.5, np.nan, 0.0]]),
    share_new=np.array([[1.0, 1.0, 1.0, 1.0], [0.5, 0.25, 0.0, 0.75]]),
    share_old=np.array([[0.0, 0.0, 0.0, 0.0], [0.5, 0.75, 1.0, 0.5]]),
    shares_are_independent=True,
)


def test_importance() -> None:
    assert importance_csv(("a", "b"), RESULTS) == (
        "unit,module,elements,a,b\nx[0],x,3,0.0,1.0\nx[1],x,3,1.0,0.5\nx.bias,x,2,0.25,\ny,y,4,0.5,0.0\n"
    )


def test_correlation() -> None:
    assert correlation_csv(("a", "b"), np.array([[1.0, np.nan], [-0.5, 1.0]])) == "task,a,b\na,1.0,\nb,-0.5,1.0\n"


def test_fusion_by_hand() -> None:
    rows = list(csv.DictReader(io.StringIO(fusion_csv(("a", "b"), RESULTS))))
    assert [(row["task"], row["module"]) for row in rows] == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    assert rows[0] == {
        **{"task": "a", "module": "x", "units": "3", "elements": "8"},
        **{
            "new_mean": "1.0",
            "new_min": "1.0",
            "new_max": "1.0",
            "old_mean": "0.0",
            "old_min": "0.0",
            "old_max": "0.0",
        },
    }
    assert float(rows[2]["new_mean"]) == (3 * 0.5 + 3 * 0.25 + 2 * 0.0) / 8
    assert float(rows[2]["old_mean"]) == (3 * 0.5 + 3 * 0.75 + 2 * 1.0) / 8
    assert [float(rows[2][name]) for name in ("new_min", "new_max", "old_min", "old_max")] == [0.0, 0.5, 0.5, 1.0]
    assert [float(rows[3][name]) for name in ("new_mean", "old_mean")] == [0.75, 0.5]


def test_names_with_commas_are_quoted() -> None:
    units = UnitTable.from_json({'a,"b': [{"parameter": "m.weight", "slices": []}]})
    results = UnitResults(units, np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1)), shares_are_independent=False)
    assert next(csv.DictReader(io.StringIO(importance_csv(("t",), results))))["unit"] == 'a,"b'


def test_markdown() -> None:
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
