"""What MIGU does in each of its modes, on two ranks under ZeRO-2 (exactness is in tests/distributed)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks write their records of kept rows."""
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[str, Any]]:
    """The two ranks' observations."""
    return run_ranks("tests.methods.migu.jobs:behaviours", 2, {"folder": str(folder)}, timeout=300)


def published(rows: int) -> int:
    return rows - -(-7 * (rows - 1) // 10)


LAYERS = [30, 10, 10, 33, 47, 47, 33] * 2


def test_the_first_task_is_dense_by_default(reports: list[dict[str, Any]]) -> None:
    moved, rows = reports[0]["dense_first_task"]
    assert moved == rows == sum(LAYERS)


@pytest.mark.parametrize("case", ["masked_first_task", "masked_second_task"])
def test_a_masked_task_moves_the_published_number_of_rows(reports: list[dict[str, Any]], case: str) -> None:
    assert reports[0][case] == [sum(published(rows) for rows in LAYERS), sum(LAYERS)]


def test_random_rows_are_as_many_new_each_step_and_the_same_on_all_ranks(reports: list[dict[str, Any]]) -> None:
    masks = reports[0]["random"]["masks"]
    assert masks == reports[1]["random"]["masks"]
    for step in masks:
        assert [sum(keep) for keep in step.values()] == [published(rows) for rows in LAYERS]
    assert masks[0] != masks[1] != masks[2]
    layers = list(masks[0].values())
    assert layers[4] != layers[5], "two layers of equal size drew the same rows"


def test_the_kept_share_is_that_of_the_elements_that_a_step_updates(reports: list[dict[str, Any]]) -> None:
    """Also after a resume; not known if no step was counted, and everything in a task without masks."""
    for report in reports:
        record = report["record"]
        assert 0.3 < record["updated"] < 0.9
        assert record["shares"] == {
            "made": pytest.approx(record["updated"], rel=1e-12),
            "resumed": pytest.approx(record["updated"], rel=1e-12),
            "nothing": None,
            "dense": 1.0,
        }


def test_evaluation_counts_nothing(reports: list[dict[str, Any]]) -> None:
    assert reports[0]["evaluation"] == 0.0


def test_padding_is_left_out_unless_asked_for(reports: list[dict[str, Any]]) -> None:
    counted, real, positions = reports[0]["padding"]["False"]
    assert counted == real < positions
    counted, real, positions = reports[0]["padding"]["True"]
    assert counted == positions > real


def test_recomputed_activations_are_counted_once(reports: list[dict[str, Any]]) -> None:
    for counted, tokens in reports[0]["recomputed"]:
        assert counted == tokens


def test_the_output_head_is_masked_with_layers_all(reports: list[dict[str, Any]]) -> None:
    ((moved, rows),) = reports[0]["all_layers"]["llama"]
    assert (moved, rows) == (published(59), 59)
    assert reports[0]["all_layers"]["roberta"] == [[published(33), 33], [published(5), 5]]


def test_a_bias_follows_its_rows_unless_left_alone(reports: list[dict[str, Any]]) -> None:
    for skip in (False, True):
        assert reports[0]["bias"][f"True {skip}"] == [True, False]
        assert reports[0]["bias"][f"False {skip}"] == [False, True]


def test_one_sum_over_ranks_between_forward_and_backward(reports: list[dict[str, Any]]) -> None:
    order = reports[0]["order"]
    assert order["one"] == ["forward", "sum", "backward", "update"]
    # The callbacks wrap MIGU's own, so "update" is recorded before the sum of the exact mask.
    assert order["step"] == ["forward", "backward", "forward", "backward", "update", "sum"]
    assert order["micro_batch"] == ["forward", "sum", "backward", "forward", "sum", "backward", "update"]


def test_a_destroyed_engine_leaves_the_model_as_before(reports: list[dict[str, Any]]) -> None:
    assert reports[0]["left_behind"] == []


def test_ranks_that_chose_different_rows_are_found(reports: list[dict[str, Any]]) -> None:
    for rank, report in enumerate(reports):
        same, different = report["disagreement"]
        assert same == ""
        assert f"rank {rank}: the ranks chose different rows" in different


def test_the_record_of_kept_rows_counts_the_steps_and_survives_a_resume(
    reports: list[dict[str, Any]], folder: Path
) -> None:
    counted = {name: each.tolist() for name, each in load_file(folder / "made" / "kept_rows.safetensors").items()}
    assert counted == reports[0]["record"]["sums"] == reports[1]["record"]["sums"]
    assert len({count for counts in counted.values() for count in counts}) > 2, "rows come and go"
    assert sum(report["record"]["saved"] for report in reports) == len(LAYERS), "each layer is saved once"
    with safe_open(folder / "made" / "kept_rows.safetensors", framework="np") as file:
        stated = json.loads(file.metadata()["record"])
    assert stated.pop("layers") == list(reports[0]["record"]["sums"])
    assert stated == {"masked": True, "first_step": 1, "steps": 3}
    for rank in (0, 1):
        made, resumed = (folder / name / "kept_rows.safetensors" for name in ("made", f"resumed-{rank}"))
        assert made.read_bytes() == resumed.read_bytes()


def test_a_state_without_a_record_begins_one_with_the_next_step(reports: list[dict[str, Any]], folder: Path) -> None:
    assert reports
    assert not (folder / "nothing-0").exists()
    with safe_open(folder / "later-0" / "kept_rows.safetensors", framework="np") as file:
        stated = json.loads(file.metadata()["record"])
        assert (stated["first_step"], stated["steps"]) == (4, 1)
        layers = [file.get_tensor(name) for name in stated["layers"]]
    assert [layer.sum() for layer in layers] == [published(rows) for rows in LAYERS]


def test_a_task_without_masks_has_a_record_that_says_so(reports: list[dict[str, Any]], folder: Path) -> None:
    assert reports
    with safe_open(folder / "dense-0" / "kept_rows.safetensors", framework="np") as file:
        stated = json.loads(file.metadata()["record"])
        assert (stated["masked"], stated["steps"]) == (False, 0)
        assert list(file.keys()) == []


def test_sums_of_a_task_survive_a_state_a_resume_and_a_skipped_step(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        for scope in ("step", "ahead"):
            assert report["task_sums"][scope] == dict.fromkeys(("straight", "saved", "resumed", "skipped"), [True] * 2)
