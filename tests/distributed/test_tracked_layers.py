"""MIGU on layers that are no nn.Linear, and on outputs that are not (batch, length): equal to plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.distributed.test_exactness import FLOAT32_BOUND, RELEASED
from tests.ranks import run_ranks

EXPERTS = ("mixtral", "qwen3moe", "gptoss")
FAST: list[dict[str, Any]] = [
    # Skipped in backward, on the shards, and with the rows that are not kept frozen.
    {"name": "mixtral", "stage": 2},
    {"name": "mixtral", "stage": 3, "accumulation": 3},
    {"name": "qwen3moe", "stage": 3},
    {"name": "qwen3moe", "stage": 2, "accumulation": 3, "mask": "update"},
    {"name": "gptoss", "stage": 3},
    {"name": "gptoss", "stage": 2, "accumulation": 3, "mask": "update"},
    {"name": "gptoss-idle", "stage": 2, "mask": "update"},
    {"name": "gpt2", "stage": 2, "accumulation": 3, "mask": "update"},
    {"name": "opt", "stage": 3},
    {"name": "deberta", "stage": 2},
    {"name": "mamba", "stage": 2, "untracked": "dense"},
    # A kind that the tests define.
    {"name": "lowrank", "stage": 2},
    {"name": "lowrank", "stage": 1, "accumulation": 3, "mask": "update"},
]
SLOW: list[dict[str, Any]] = [
    *({"name": name, "stage": stage} for name in EXPERTS for stage in (2, 3)),
    *({"name": name, "stage": stage, "accumulation": 3} for name in EXPERTS for stage in (2, 3)),
    *({"name": name, "stage": stage, "mask": "update"} for name in EXPERTS for stage in (2, 3)),
    {"name": "mixtral", "stage": 3, "skip": False, "recompute": True, "deepspeed": RELEASED},
    {"name": "gptoss", "stage": 3, "recompute": True, "deepspeed": RELEASED},
    {"name": "qwen3moe", "stage": 0},
    {"name": "qwen2moe", "stage": 2},
    *({"name": "gpt2", "stage": stage} for stage in (0, 3)),
    {"name": "gpt2", "stage": 3, "skip": False, "mask": "update", "deepspeed": RELEASED},
    {"name": "opt", "stage": 2},
    {"name": "opt", "stage": 3, "accumulation": 3, "mask": "update"},
    {"name": "deberta-v3", "stage": 2, "recompute": True},
    {"name": "mamba", "stage": 3, "untracked": "dense", "accumulation": 3},
]
CASES = [*FAST, *(case for case in SLOW if case not in FAST)]
TRIALS = [("2", "float32"), ("3", "bfloat16")]
SLOW_TRIALS = [(stage, dtype) for stage in "0123" for dtype in ("float32", "bfloat16") if (stage, dtype) not in TRIALS]


def marked(values: Sequence[Any], fast: int, ids: Sequence[str]) -> list[Any]:
    """Parameters, those behind the first `fast` ones slow."""
    marks = [[] if number < fast else [pytest.mark.slow] for number in range(len(values))]
    return [pytest.param(*each, id=name, marks=mark) for each, name, mark in zip(values, ids, marks, strict=True)]


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What two ranks say of the cases that the chosen tests look at, and of the models that are refused."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    parameters = [call.params for call in calls if call is not None]
    # The fast ones always: a test looks at several of them.
    cases = sorted({*range(len(FAST)), *(each["case"] for each in parameters if "case" in each)})
    trials = [f"{each['stage']}-{each['dtype']}" for each in parameters if "dtype" in each]
    arguments = {"cases": [CASES[number] for number in cases], "trials": trials}
    found: dict[str, Any] = run_ranks("tests.distributed.tracked_jobs:everything", 2, arguments, timeout=600)[0]
    return {**found, "cases": dict(zip(cases, found["cases"], strict=True))}


@pytest.fixture(scope="module")
def reports(said: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Of the cases alone, by number."""
    cases: dict[int, dict[str, Any]] = said["cases"]
    return cases


@pytest.mark.parametrize(
    "case", marked([(n,) for n in range(len(CASES))], len(FAST), ["-".join(map(str, case.values())) for case in CASES])
)
def test_equals_the_dense_oracle(reports: dict[int, dict[str, Any]], case: int) -> None:
    report = reports[case]
    assert report["rows"] > 0
    assert report["flips"] == 0, "other rows were kept than the oracle keeps"
    assert report["moved_wrong"] == 0, "an element of a row that is not kept moved in the first step"
    assert report["frozen_moved"] == 0, "mask: update let an element of a dropped row move"
    assert report["error"] <= FLOAT32_BOUND
    assert report["exp_avg"] <= 1e-6
    assert report["exp_avg_sq"] <= 2e-6
    if CASES[case]["name"] != "mamba":
        assert report["unmasked"] == [], "a matrix in the blocks was trained without a mask"


@pytest.mark.parametrize("name", EXPERTS)
def test_exactly_the_kept_share_of_every_expert_s_rows_moves(reports: dict[int, dict[str, Any]], name: str) -> None:
    for number, report in reports.items():
        if CASES[number]["name"] != name:
            continue
        groups = [group for of_weight in report["groups"].values() for group in of_weight]
        assert len(report["groups"]) == 2 * 2 * (2 if name == "gptoss" else 1)  # two blocks, two projections, biases
        assert all(kept in (0, rows - -(-7 * (rows - 1) // 10)) for kept, rows in groups)
        assert sum(kept > 0 for kept, _ in groups) > len(groups) // 2


def test_what_cannot_be_measured_is_refused_by_name(said: dict[str, Any]) -> None:
    message = said["mamba"]
    assert message.startswith("method.untracked: ")
    for part in ("dt_proj.weight (its forward does not run)", "conv1d.weight", "A_log", "% of the trainable", "dense"):
        assert part in message
    assert "in_proj" not in message


def test_layers_that_are_left_out_at_random_are_refused(said: dict[str, Any]) -> None:
    for message, words in zip(said["layerdrop"], ("migu measures every layer", "zero.stage: 0"), strict=True):
        assert "'layerdrop': 0.5" in message
        assert words in message


def test_experts_that_are_modules_are_refused_by_name(said: dict[str, Any]) -> None:
    message = said["switch"]
    assert message.startswith("method.untracked: ")
    assert "expert_0.wi.weight (it runs over the tokens that are routed to it)" in message
    # Eight experts with two matrices in encoder and decoder: those that the trials route no token to as well.
    assert "24 more: " in message


def test_experts_that_are_modules_train_as_on_one_process(said: dict[str, Any]) -> None:
    """Each rank's sample is routed to other experts."""
    assert len(said["module experts"]) == 3
    for case, difference in said["module experts"].items():
        assert difference < FLOAT32_BOUND, case


def test_a_model_that_cannot_run_is_refused_before_training(said: dict[str, Any]) -> None:
    assert said["broken"].startswith("model.name_or_path: one forward and backward pass on a tiny batch")
    assert "TypeError: " in said["broken"]


def test_a_layer_that_is_not_measured_in_a_step_is_an_error_by_name(said: dict[str, Any]) -> None:
    masked, dense = said["unused"]
    assert "the output of model.layers.1.mlp.experts.gate_up_proj and 2 other layers was not measured" in masked
    # In the first step of a first task without a mask already, not after all of it.
    assert "the output of model.layers.1.mlp.gate was not measured" in dense


@pytest.mark.parametrize(
    ("stage", "dtype"), marked([*TRIALS, *SLOW_TRIALS], len(TRIALS), ["-".join(pair) for pair in TRIALS + SLOW_TRIALS])
)
def test_a_trial_changes_nothing(said: dict[str, Any], stage: str, dtype: str) -> None:
    assert said["trials"][f"{stage}-{dtype}"] == {"generator and counters": True, "weights and moments": True}


def test_lora_says_what_all_linear_leaves_out(said: dict[str, Any]) -> None:
    for part in ("all-linear leaves out", "model.layers.*.mlp.experts.gate_up_proj", "experts.down_proj", "%"):
        assert part in said["adapters"]
    assert "q_proj" not in said["adapters"]
    assert said["no experts"] is None


def test_dense_says_what_is_not_masked(reports: dict[int, dict[str, Any]]) -> None:
    number = next(number for number, case in enumerate(CASES) if case["name"] == "mamba")
    report = reports[number]
    parts = {name.split("mixer.")[1] for name in report["unmasked"]}
    assert parts == {"dt_proj.weight", "conv1d.weight", "A_log"}
    assert all(part in report["message"] for part in parts)


def test_an_expert_without_a_token_keeps_no_row(reports: dict[int, dict[str, Any]]) -> None:
    number = next(number for number, case in enumerate(CASES) if case["name"] == "gptoss-idle")
    groups = reports[number]["groups"].values()
    assert all(of_weight[-1][0] == 0 for of_weight in groups)
    assert all(kept > 0 for of_weight in groups for kept, _ in of_weight[:1])
