from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cl_dist.errors import BadInput
from cl_dist.report.units import UnitTable, correlation, is_constant, module_of, read_unit_results
from cl_dist.state.run_folder import RunFolder, TaskFolder
from tests.report.runs import llama_lora, write_run, write_units

UNITS = {
    "m.x.lora.default[0]": [
        {"parameter": "m.x.lora_A.default.weight", "slices": [[0, 1], [0, 4]]},
        {"parameter": "m.x.lora_B.default.weight", "slices": [[0, 6], [0, 1]]},
    ],
    "m.x.lora.default[1]": [
        {"parameter": "m.x.lora_A.default.weight", "slices": [[1, 2], [0, 4]]},
        {"parameter": "m.x.lora_B.default.weight", "slices": [[0, 6], [1, 2]]},
    ],
    "m.y.weight": [{"parameter": "m.y.weight", "slices": [[0, 5], [0, 2]]}],
    "m.y.bias": [{"parameter": "m.y.bias", "slices": [[0, 5]]}],
}


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        ("base.layers.0.q_proj.lora_A.default.weight", "base.layers.0.q_proj"),
        ("base.layers.0.q_proj.lora_B.default.weight", "base.layers.0.q_proj"),
        ("base.embed.lora_embedding_A.default", "base.embed"),
        ("base.embed.lora_embedding_B", "base.embed"),
        ("model.layers.0.q_proj.weight", "model.layers.0.q_proj"),
        ("model.norm.bias", "model.norm"),
        ("score.modules_to_save.default.weight", "score.modules_to_save.default"),
        ("scale", "scale"),
    ],
)
def test_the_module_of_a_parameter(parameter: str, module: str) -> None:
    assert module_of(parameter) == module


class TestTable:
    table = UnitTable.from_json(UNITS)

    def test_counts_elements_by_unit_and_module(self) -> None:
        assert self.table.names == tuple(UNITS)
        assert self.table.modules == ("m.x", "m.y")
        assert self.table.module.tolist() == [0, 0, 1, 1]
        assert self.table.elements_of_units().tolist() == [10, 10, 10, 5]

    def test_means_are_weighted_by_elements(self) -> None:
        values = np.array([[0.2, 0.4, 0.9, 0.3], [1.0, 0.0, 0.0, np.nan]])
        mean = self.table.mean(values, self.table.module, 2)
        assert mean[0].tolist() == pytest.approx([0.3, (9.0 + 1.5) / 15])
        assert mean[1, 0] == 0.5
        assert np.isnan(mean[1, 1])

    def test_extremes_are_of_single_units(self) -> None:
        low, high = self.table.extremes(np.array([[0.2, 0.4, 0.9, 0.3]]))
        assert (low.tolist(), high.tolist()) == ([[0.2, 0.3]], [[0.4, 0.9]])

    def test_the_extremes_of_nan_are_nan(self) -> None:
        with np.errstate(invalid="raise"):
            low, high = self.table.extremes(np.array([[0.2, np.nan, 0.9, 0.3]]))
        assert np.isnan([low[0, 0], high[0, 0]]).all()
        assert (low[0, 1], high[0, 1]) == (0.3, 0.9)

    def test_a_unit_of_two_modules_counts_in_both(self) -> None:
        slices = [{"parameter": "a.weight", "slices": [[0, 3]]}, {"parameter": "b.weight", "slices": [[0, 1]]}]
        table = UnitTable.from_json({"both": slices, "b": [{"parameter": "b.bias", "slices": [[0, 1]]}]})
        assert table.mean(np.array([[1.0, 0.0]]), table.module, 2).tolist() == [[1.0, 0.5]]
        assert table.elements_of_units().tolist() == [4, 1]


class TestCorrelation:
    def test_by_hand(self) -> None:
        # Centred: (-1, 0, 1), (-1, 1, 0) and (1, 0, -1); the sums of squares are all 2.
        scores = np.array([[0.0, 0.5, 1.0], [0.0, 1.0, 0.5], [1.0, 0.5, 0.0]])
        expected = [[1.0, 0.5, -1.0], [0.5, 1.0, -0.5], [-1.0, -0.5, 1.0]]
        assert correlation(scores) == pytest.approx(np.array(expected))
        assert np.diag(correlation(scores)).tolist() == [1.0, 1.0, 1.0]

    def test_with_a_constant_it_is_undefined(self) -> None:
        scores = np.array([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [np.nan, 0.5]])
        result = correlation(scores)
        assert np.isnan(result[[1, 3]]).all()
        assert np.isnan(result[:, [1, 3]]).all()
        assert result[np.ix_([0, 2], [0, 2])] == pytest.approx(np.array([[1.0, -1.0], [-1.0, 1.0]]))
        assert is_constant(scores).tolist() == [False, True, False, False]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of three tasks, two of which are done, with ten rank units of three elements each."""
    folder = write_run(tmp_path / "run", ["a", "b", "c"], 2)
    write_units(folder, {"m.lora_A.d.weight": (10, 1), "m.lora_B.d.weight": (2, 10)}, "rank", [SCORES, SCORES.flip(0)])
    return folder


SCORES = torch.arange(10.0)


def done(folder: RunFolder) -> list[TaskFolder]:
    return [folder.task(0, "a"), folder.task(1, "b")]


class TestReading:
    def test_the_methods_results(self, folder: RunFolder) -> None:
        results = read_unit_results(done(folder))
        assert results is not None
        assert results.table.elements.tolist() == [3.0] * 10
        assert results.importance == pytest.approx(np.array([SCORES.numpy() / 9, SCORES.flip(0).numpy() / 9]))
        assert results.share_new[0].tolist() == [1.0] * 10
        assert results.share_new[1, 0] == pytest.approx(1 / (1 + np.exp(-4)))  # u = 1, before 0, tau 0.25
        assert results.share_old == pytest.approx(1 - results.share_new)
        assert not results.shares_are_independent

    def test_the_old_share_may_be_independent(self, folder: RunFolder) -> None:
        path = folder.task(1, "b").unit_scores
        save_file(load_file(path) | {"share_old": torch.full((10,), 0.75).double()}, path)
        results = read_unit_results(done(folder))
        assert results is not None
        assert results.shares_are_independent
        assert results.share_old.tolist() == [[0.0] * 10, [0.75] * 10]

    def test_a_run_without_units_has_none(self, tmp_path: Path) -> None:
        assert read_unit_results(done(write_run(tmp_path / "run", ["a", "b"], 2))) is None
        assert read_unit_results([]) is None

    @pytest.mark.parametrize("name", ["units.json", "unit_scores.safetensors"])
    def test_a_missing_file_is_named(self, folder: RunFolder, name: str) -> None:
        (folder.task(1, "b").path / name).unlink()
        with pytest.raises(BadInput, match=f"02-b/{name} is missing"):
            read_unit_results(done(folder))

    def test_damaged_scores_are_named(self, folder: RunFolder) -> None:
        path = folder.task(1, "b").unit_scores
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(BadInput, match=r"02-b/unit_scores\.safetensors is damaged: "):
            read_unit_results(done(folder))

    def test_a_vector_of_another_length_is_damage(self, folder: RunFolder) -> None:
        path = folder.task(0, "a").unit_scores
        save_file(load_file(path) | {"share_new": torch.zeros(3)}, path)
        with pytest.raises(BadInput, match=r"01-a/.* share_new has shape \(3,\), but there are 10 units"):
            read_unit_results(done(folder))

    def test_a_missing_vector_is_damage(self, folder: RunFolder) -> None:
        save_file({"share_new": torch.zeros(10)}, folder.task(0, "a").unit_scores)
        with pytest.raises(BadInput, match="it has no vector current_normalised"):
            read_unit_results(done(folder))

    def test_units_that_change_are_damage(self, folder: RunFolder) -> None:
        path = folder.task(1, "b").units
        path.write_text(path.read_text().replace("m.lora.d[3]", "m.lora.d[x]"))
        with pytest.raises(BadInput, match=r"02-b/units\.json is damaged: it differs from "):
            read_unit_results(done(folder))

    @pytest.mark.parametrize(
        "content",
        [
            "{",
            "{}",
            "[1]",
            '{"u": []}',
            '{"u": 3}',
            '{"u": [{"slices": []}]}',
            '{"u": [{"parameter": 1, "slices": []}]}',
            '{"u": [{"parameter": "p", "slices": [[0]]}]}',
            '{"u": [{"parameter": "p", "slices": [[2, 2]]}]}',
        ],
    )
    def test_malformed_units_are_damage(self, folder: RunFolder, content: str) -> None:
        for task in done(folder):
            task.units.write_text(content)
        with pytest.raises(BadInput, match=r"01-a/units\.json is damaged: "):
            read_unit_results(done(folder))

    def test_many_units_are_read(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", ["a"], 1)
        units = write_units(folder, llama_lora(30, 8), "rank", [torch.rand(30 * 7 * 8)])
        results = read_unit_results([folder.task(0, "a")])
        assert results is not None
        assert results.table.names == units.names
        assert len(results.table.modules) == 210
        assert list(json.loads(folder.task(0, "a").units.read_text())) == list(units.names)
