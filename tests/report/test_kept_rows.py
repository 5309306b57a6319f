from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cl_dist.errors import BadInput
from cl_dist.report.kept_rows import KeptRows, kept_rows_csv, kept_rows_picture, read_kept_rows, row_overlap_csv
from cl_dist.report.kept_rows import row_overlap_picture as overlap_picture
from cl_dist.state.run_folder import TaskFolder

LAYERS = {"model.layers.0.mlp.up_proj.weight": 40, "model.layers.1.mlp.up_proj.weight": 24}
KEEP = 0.25
STEPS = {"spring": 7, "summer": 5}
Steps = dict[str, np.ndarray]
"""By layer, `(steps, rows)` bool: the rows that each step kept."""


def steps_of(task: str, drift: float) -> Steps:
    """Steps that keep a quarter of the rows: those that score best, by scores that change by `drift` in each step."""
    random = np.random.default_rng(len(task) + ord(task[1]))
    kept = {}
    for layer, rows in LAYERS.items():
        base = np.linspace(0, 1, rows)
        scores = base + drift * random.normal(size=(STEPS[task], rows))
        kept[layer] = scores >= np.sort(scores, axis=1)[:, [-int(KEEP * rows)]]
    return kept


def write(folder: Path, steps: int, counts: dict[str, np.ndarray], **about: Any) -> TaskFolder:
    folder.mkdir(parents=True)
    stated = {"record": json.dumps({"masked": True, "first_step": 1, "steps": steps, "layers": list(counts), **about})}
    save_file({name: each.astype(np.int32) for name, each in counts.items()}, folder / "kept_rows.safetensors", stated)
    return TaskFolder(folder)


def record(tmp_path: Path, task: str, steps: Steps) -> TaskFolder:
    return write(tmp_path / task, STEPS[task], {layer: kept.sum(axis=0) for layer, kept in steps.items()})


def read(tmp_path: Path, **tasks: Steps) -> KeptRows:
    found = read_kept_rows(list(tasks), [record(tmp_path, name, steps) for name, steps in tasks.items()])
    assert found is not None
    return found


def by_enumeration(one: Steps, other: Steps, layers: list[str]) -> tuple[float, float]:
    """Overlap and share in common from every pair of steps, without counts."""
    common = chance = most = own = 0.0
    for layer in layers:
        pairs = [
            (first & second).sum()
            for number, first in enumerate(one[layer])
            for another, second in enumerate(other[layer])
            if one is not other or number != another
        ]
        rows, keep = len(first_row := one[layer][0]), int(KEEP * len(one[layer][0]))
        assert first_row.sum() == keep
        common += float(np.mean(pairs))
        chance, most, own = chance + keep * keep / rows, most + keep, own + keep
    return (common - chance) / (most - chance), common / own


def test_measures_are_those_of_all_pairs_of_steps(tmp_path: Path) -> None:
    spring, summer = steps_of("spring", 0.05), steps_of("summer", 0.6)
    found = read(tmp_path, spring=spring, summer=summer)
    names = list(LAYERS)
    assert (found.tasks, found.layers, found.rows.tolist()) == (("spring", "summer"), tuple(names), [40.0, 24.0])
    for task, steps in enumerate((spring, summer)):
        for column, name in enumerate(names):
            assert found.kept[task, column] == pytest.approx(KEEP)
            assert found.ever[task, column] == pytest.approx(steps[name].any(axis=0).mean())
            assert found.mostly[task, column] == pytest.approx((steps[name].mean(axis=0) >= 0.9).mean())
            assert found.stability[task, column] == pytest.approx(by_enumeration(steps, steps, [name])[0])
        for other, steps_of_other in enumerate((spring, summer)):
            overlap, shared = by_enumeration(steps, steps_of_other, names)
            assert found.overlap[task, other] == pytest.approx(overlap)
            assert found.shared[task, other] == pytest.approx(shared)
    assert found.overlap[0, 0] > 0.5 > found.overlap[1, 1]


def test_the_scale_goes_from_chance_to_the_same_rows(tmp_path: Path) -> None:
    always = {layer: np.tile(np.arange(rows) < KEEP * rows, (7, 1)) for layer, rows in LAYERS.items()}
    disjoint = {layer: np.tile(np.arange(rows) >= (1 - KEEP) * rows, (5, 1)) for layer, rows in LAYERS.items()}
    found = read(tmp_path / "fixed", spring=always, summer=disjoint)
    assert found.overlap.diagonal().tolist() == found.stability.min(axis=1).tolist() == [1.0, 1.0]
    assert found.shared[0, 1] == 0.0
    assert found.overlap[0, 1] == pytest.approx(-KEEP / (1 - KEEP)), "fewer rows in common than by chance"
    # Rows drawn anew in each step: around 0, on the diagonal too, where the counts of one task are compared.
    random, layer = np.random.default_rng(3), next(iter(LAYERS))
    counts = [
        {layer: sum(random.permutation(400) < 100 for _ in range(200)).astype(np.int64)}
        for _ in range(2)  # type: ignore[union-attr]
    ]
    drawn = read_kept_rows("ab", [write(tmp_path / str(name), 200, each) for name, each in enumerate(counts)])
    assert drawn is not None
    assert np.abs(drawn.overlap).max() < 0.01


def test_tasks_without_masks_without_records_and_with_other_layers(tmp_path: Path) -> None:
    spring = record(tmp_path, "spring", steps_of("spring", 0.2))
    dense = write(tmp_path / "dense", 0, {}, masked=False, layers=list(LAYERS))
    other = write(tmp_path / "other", 1, {"adapter.2.weight": np.array([1, 0, 0, 1])}, first_step=4)
    older = TaskFolder(tmp_path / "older")
    found = read_kept_rows(["older", "dense", "spring", "other"], [older, dense, spring, other])
    assert found is not None
    assert (found.tasks, found.masked) == (("dense", "spring", "other"), (False, True, True))
    assert found.recorded == ((1, 0), (1, 7), (4, 1))
    assert found.layers == (*LAYERS, "adapter.2.weight")
    assert np.isnan([found.overlap[0], found.kept[0]]).all()
    assert np.isnan(found.overlap[1, 2]), "no layer in common"
    assert found.kept[2, 2] == 0.5
    assert np.isnan([found.stability[2, 2], found.overlap[2, 2]]).all(), "a single step"
    lines = list(csv.reader(io.StringIO(kept_rows_csv(found))))
    assert [line[:5] for line in lines[1:]] == [
        ["spring", next(iter(LAYERS)), "40", "1", "7"],
        ["spring", list(LAYERS)[1], "24", "1", "7"],
        ["other", "adapter.2.weight", "4", "4", "1"],
    ]
    assert lines[-1][5:] == ["0.5", "0.5", "0.5", ""]
    pairs = list(csv.reader(io.StringIO(row_overlap_csv(found))))
    assert [line[:2] for line in pairs[1:]] == [
        [one, two] for one in ("spring", "other") for two in ("spring", "other")
    ]
    for picture in (kept_rows_picture(found), overlap_picture(found)):
        assert picture.startswith(b"\x89PNG")
    assert read_kept_rows(["older"], [older]) is None


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    layer = next(iter(LAYERS))
    small = write(tmp_path / "small", 3, {layer: np.array([1, 2])})
    cases = {
        "too-many": write(tmp_path / "too-many", 3, {layer: np.array([1, 4])}),
        "negative": write(tmp_path / "negative", 3, {layer: np.array([-1, 2])}),
        "no-mask": write(tmp_path / "no-mask", 3, {layer: np.array([1, 2])}, masked="perhaps"),
        "no-layer": write(tmp_path / "no-layer", 3, {}, layers=[layer]),
    }
    for name, folder in cases.items():
        with pytest.raises(BadInput, match=f"{name}/kept_rows.safetensors is damaged"):
            read_kept_rows([name], [folder])
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "kept_rows.safetensors").write_bytes(small.kept_rows.read_bytes()[:-3])
    with pytest.raises(BadInput, match=r"cut/kept_rows\.safetensors is damaged"):
        read_kept_rows(["cut"], [TaskFolder(tmp_path / "cut")])
    large = write(tmp_path / "large", 3, {layer: np.array([1, 2, 3])})
    with pytest.raises(BadInput, match=f"do not fit together: {layer} has 2, 3 rows"):
        read_kept_rows("ab", [small, large])
