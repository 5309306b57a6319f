"""A run folder as a Python object."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import cl_dist
from cl_dist.errors import BadInput
from tests.export.runs import write_run
from tests.report.runs import write_run as write_scores

PNG = b"\x89PNG\r\n"


def test_scores_have_names(tmp_path: Path) -> None:
    write_scores(tmp_path / "run", ["yelp", "amazon", "yahoo"], done=2, losses=(3.0, None, 1.0))
    run = cl_dist.load_run(tmp_path / "run")
    assert (run.tasks, run.completed, run.status) == (("yelp", "amazon", "yahoo"), ("yelp", "amazon"), "interrupted")
    matrix = run.accuracy_matrix
    assert list(matrix.index) == ["untouched", "yelp", "amazon"]
    assert list(matrix.columns) == ["yelp", "amazon", "yahoo"]
    assert matrix.loc["amazon", "yelp"] == 6 / 12
    assert {str(kind) for kind in matrix.dtypes} == {"float64"}
    losses = run.losses
    assert list(losses["task"]) == ["yelp"] * 3 + ["amazon"] * 3
    assert list(losses["step"]) == [1, 2, 3] * 2
    assert losses["loss"][0] == 3.0
    assert math.isnan(losses["loss"][1])
    with pytest.raises(BadInput, match=r"run has finished 2 of 3 tasks, and there are no metrics before the last one"):
        _ = run.metrics
    assert repr(run) == f"<run {tmp_path}/run: interrupted, 2 of 3 tasks>"
    assert "0.5000" in run._repr_html_()
    assert run.recipe.method[0].name == "kif"


def test_a_figure_shows_itself_in_a_notebook(tmp_path: Path) -> None:
    write_scores(tmp_path / "run", ["yelp", "amazon"], done=2)
    figure = cl_dist.load_run(tmp_path / "run").plot()
    figure.axes[0].set_title("changed")
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    assert figure._repr_png_().startswith(PNG)  # type: ignore[attr-defined]


def test_models_by_task(tmp_path: Path) -> None:
    for name, settings in (("full", {}), ("adapter", {"lora": {"r": 2}})):
        run = cl_dist.load_run(write_run(tmp_path / name, "builtin:roberta-tiny", **settings))
        first, last = run.model("spring"), run.model()
        assert not last.training
        ids = torch.arange(5, 20)[None]
        assert not torch.equal(first(ids).logits, last(ids).logits)
        assert torch.equal(last(ids).logits, run.model("summer")(ids).logits)
        assert run.tokenizer("spring")("ab").input_ids
        with pytest.raises(BadInput, match=r"task autumn: not a finished task of .*; finished: spring, summer"):
            run.model("autumn")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder; give the run folder"):
        cl_dist.load_run(tmp_path / "nothing")
    with pytest.raises(BadInput, match="holds no run"):
        cl_dist.load_run(tmp_path)
    write_scores(tmp_path / "run", ["yelp"], done=0)
    with pytest.raises(BadInput, match="no task is finished yet, so it has saved no model"):
        cl_dist.load_run(tmp_path / "run").model()
