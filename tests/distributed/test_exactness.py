"""MIGU on ZeRO shards equals MIGU on one process in plain PyTorch, at every stage and any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import pytest

from cl_dist.config.deepspeed import ALLOWED
from tests.distributed.chosen import WORLDS, Reports, parameters, run_chosen

STAGES = (0, 1, 2, 3)
FACTORS: dict[str, tuple[Any, Any]] = {
    "dtype": ("float32", "bfloat16"),
    "accumulation": (1, 3),
    "clip": (None, 0.1),
    "decay": (0.0, 0.1),
    "recompute": (False, True),
    "mask": ("gradient", "update"),
}
SELECTION = [
    dict(zip(FACTORS, (values[i] for values, i in zip(FACTORS.values(), row, strict=True)), strict=True))
    for row in [
        (0, 0, 0, 0, 0, 0),
        (0, 1, 1, 1, 0, 1),
        (0, 0, 1, 0, 1, 1),
        (1, 1, 0, 0, 1, 1),
        (1, 0, 0, 1, 0, 1),
        (1, 1, 1, 0, 0, 0),
        (0, 1, 0, 1, 1, 0),
        (1, 0, 1, 1, 1, 0),
    ]
]
PAIRED = [{"stage": stage, **settings} for settings in SELECTION for stage in STAGES]
RELEASED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
SPECIAL: list[dict[str, Any]] = [
    {"stage": 1, "offload": True, "clip": 0.1, "accumulation": 3, "mask": "update"},
    {"stage": 2, "offload": True, "clip": 0.1},
    {"stage": 3, "offload": True, "clip": 0.1, "accumulation": 3, "decay": 0.1, "mask": "update"},
    {"stage": 0, "family": "t5", "accumulation": 3, "mask": "update", "clip": 0.1},
    {"stage": 2, "family": "t5"},
    {"stage": 3, "family": "t5", "recompute": True},
    {"stage": 1, "family": "roberta", "mask": "update"},
    {"stage": 3, "family": "roberta", "clip": 0.1},
    {"stage": 2, "magnitude": "batch", "threshold": 0.45},
    {"stage": 3, "threshold": 0.0},
    {"stage": 2, "average": "micro_batch", "accumulation": 3, "clip": 0.1},
    {"stage": 2, "masked": False, "clip": 0.1, "decay": 0.1},
    {"stage": 0, "dtype": "bfloat16", "decay": 10.0},  # DeepSpeed steps once while it initialises: no decay then
    {"stage": 1, "dtype": "bfloat16", "clip": 0.1, "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}},
    {
        "stage": 2,
        "clip": 0.1,
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 500, "allgather_bucket_size": 500}},
    },
    {"stage": 3, "clip": 0.1, "deepspeed": RELEASED},
]
SKIPPING: list[dict[str, Any]] = [
    # One micro-batch, masked on the shards all the same: the other way to the same weights.
    {"stage": 0, "skip": False},
    {"stage": 1, "skip": False, "clip": 0.1, "mask": "update", "recompute": True},
    {"stage": 2, "skip": False, "clip": 0.1},
    {"stage": 3, "skip": False, "decay": 0.1, "dtype": "bfloat16"},
    {"stage": 2, "skip": False, "family": "roberta", "offload": True, "clip": 0.1},
    # Several micro-batches, each masked by the magnitudes so far.
    {"stage": 0, "scope": "micro_batch", "accumulation": 3},
    {"stage": 1, "scope": "micro_batch", "accumulation": 3, "mask": "update", "clip": 0.1},
    {"stage": 2, "scope": "micro_batch", "accumulation": 3, "clip": 0.1, "family": "roberta"},
    {"stage": 3, "scope": "micro_batch", "accumulation": 3, "recompute": True, "family": "t5"},
    # The magnitudes of the whole task so far; known before a step, they skip rows.
    {"stage": 0, "sums": "task"},
    {"stage": 2, "sums": "task", "accumulation": 3, "clip": 0.1, "magnitude": "batch"},
    {"stage": 3, "sums": "task", "skip": False, "mask": "update"},
    {"stage": 0, "sums": "task", "scope": "ahead"},
    {"stage": 1, "sums": "task", "scope": "ahead", "accumulation": 3, "mask": "update", "clip": 0.1},
    {"stage": 2, "sums": "task", "scope": "ahead", "accumulation": 3, "family": "roberta"},
    {"stage": 3, "sums": "task", "scope": "ahead", "accumulation": 3, "recompute": True, "deepspeed": RELEASED},
    {"stage": 2, "sums": "task", "scope": "ahead", "accumulation": 3, "skip": False},
    # A head whose weight is the embedding too, and layers by name.
    {"stage": 0, "layers": "all", "tied_head": "mask", "family": "t5", "accumulation": 3, "mask": "update"},
    {"stage": 2, "layers": "all", "tied_head": "mask", "family": "t5"},
    {"stage": 3, "layers": "all", "tied_head": "mask", "family": "t5", "deepspeed": RELEASED},
    {"stage": 3, "layers": ["*.mlp.*", "lm_head"], "clip": 0.1},
    # Adapters: A and B are layers of their own.
    {"stage": 0, "lora": True, "clip": 0.1},
    {"stage": 2, "lora": True, "family": "t5", "mask": "update"},
    {"stage": 3, "lora": True, "family": "roberta", "recompute": True},
    {"stage": 2, "lora": True, "skip": False},
    {"stage": 3, "lora": True, "accumulation": 3},
    # Weights that ZeRO-3 really takes away between forward, recomputation and backward.
    {"stage": 3, "recompute": True, "clip": 0.1, "deepspeed": RELEASED},
    {"stage": 3, "recompute": True, "lora": True, "deepspeed": RELEASED},
    {"stage": 3, "recompute": True, "family": "t5", "deepspeed": RELEASED},
    {"stage": 3, "recompute": True, "dtype": "bfloat16", "deepspeed": RELEASED},
]
# Every raw setting that a recipe may give (cl_dist.config.deepspeed), away from its default.
RAW: list[dict[str, Any]] = [
    {"stage": 1, "clip": 0.1, "deepspeed": {"zero_optimization": {
        "contiguous_gradients": False, "reduce_scatter": False, "reduce_bucket_size": 500, "overlap_comm": True,
        "allgather_bucket_size": 2, "use_multi_rank_bucket_allreduce": False, "ignore_unused_parameters": False,
        "parameter_alignment": True}}},
    {"stage": 2, "mask": "update", "deepspeed": {"zero_optimization": {
        "contiguous_gradients": True, "reduce_bucket_size": 1, "overlap_comm": True, "allgather_bucket_size": 500,
        "use_multi_rank_bucket_allreduce": False, "ignore_unused_parameters": False, "parameter_alignment": True}}},
    {"stage": 2, "clip": 0.1, "accumulation": 3, "deepspeed": {"zero_optimization": {
        "contiguous_gradients": False, "reduce_scatter": False, "overlap_comm": True}}},
    {"stage": 3, "clip": 0.1, "deepspeed": {"zero_optimization": {
        "contiguous_gradients": False, "reduce_scatter": False, "reduce_bucket_size": 500, "overlap_comm": True,
        "sub_group_size": 1000, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
        "stage3_use_all_reduce_for_fetch_params": True, "memory_efficient_linear": False,
        "override_module_apply": False, "enable_sanity_checks": True}}},
    {"stage": 3, "mask": "update", "recompute": True, "deepspeed": {"zero_optimization": {
        "stage3_param_persistence_threshold": 0, "stage3_allgather_sequential": True,
        "offload_param": {"device": "cpu", "pin_memory": False}}}},
    {"stage": 3, "accumulation": 3, "offload": True, "deepspeed": {"zero_optimization": {
        "stage3_param_persistence_threshold": 0, "offload_param": {"device": "cpu", "pin_memory": False}}}},
    *({"stage": stage, "dtype": "bfloat16", "deepspeed": {"communication_data_type": "fp32"}} for stage in (0, 2)),
    *({"stage": stage, "dtype": "bfloat16", "deepspeed": {"communication_data_type": "bf16"}} for stage in (1, 3)),
    *({"stage": stage, "dtype": "bfloat16", "accumulation": 3, "clip": 0.1,
       "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}} for stage in (1, 2, 3)),
]  # fmt: skip
# Gradients of bfloat16 models, summed over micro-batches and ranks in float32.
SUMS: list[dict[str, Any]] = [
    {"stage": stage, "dtype": "bfloat16", "grad_dtype": "float32", "accumulation": 3, "clip": 0.1, **rest}
    for stage, rest in (
        (1, {}), (2, {}), (3, {}), (1, {"offload": True}), (2, {"offload": True}), (3, {"offload": True}),
        (2, {"deepspeed": {"zero_optimization": {"contiguous_gradients": False}}}),
        (2, {"deepspeed": {"zero_optimization": {"reduce_scatter": False}}, "mask": "update"}),
        (3, {"deepspeed": {"zero_optimization": {"reduce_scatter": False}}, "recompute": True}),
        (2, {"accumulation": 1}), (3, {"accumulation": 1}),
        (2, {"lora": True}), (3, {"lora": True}), (3, {"lora": True, "accumulation": 1, "skip": False}),
    )
]  # fmt: skip
CASES = PAIRED + SPECIAL + SKIPPING + RAW + SUMS

STEPS = 3
FLOAT32_BOUND = STEPS * 2**-23
"""One unit in the last place of a weight of one (relative for larger weights) per step: every step rounds once."""
BFLOAT16_STEP = 2**-7
"""Relative spacing of bfloat16: gradients are reduced in it, so moments and movement may differ by a few of these."""


def test_the_selection_covers_every_pair_of_settings() -> None:
    for (first, first_values), (second, second_values) in combinations(FACTORS.items(), 2):
        for pair in product(first_values, second_values):
            assert any((row[first], row[second]) == pair for row in SELECTION), (first, second, pair)


def test_every_raw_setting_is_run() -> None:
    run = {(key, case["stage"]) for case in CASES for key in keys(case.get("deepspeed", {}))}
    for key, setting in ALLOWED.items():
        stages = {stage for name, stage in run if name == key}
        assert stages <= set(setting.stages), key
        assert (3 in stages) == (3 in setting.stages), key
        assert bool(stages & {0, 1, 2}) == bool({0, 1, 2} & set(setting.stages)), key


def keys(settings: dict[str, Any], section: str = "") -> Iterator[str]:
    """Dotted keys of nested settings."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from keys(value, f"{section}{name}.")
        else:
            yield f"{section}{name}"


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Reports:
    """See `run_chosen`."""
    return run_chosen(request, "tests.distributed.exactness_jobs:run_cases", CASES)


@pytest.mark.parametrize(("case", "world"), parameters(CASES))
def test_equals_the_dense_oracle(reports: Reports, world: int, case: int) -> None:
    report, settings = reports[world][case], CASES[case]
    assert report["frozen_moved"] == 0, "mask: update let an element of a dropped row move"
    assert report["moved_wrong"] == 0, "the rows that moved are not the rows that were kept"
    assert report["published"] == 0.0, "the model's weights are not its masters"
    in_time = settings.get("accumulation", 1) == 1 or settings.get("scope") in ("micro_batch", "ahead")
    assert report["skipped"] == (settings.get("skip", True) and in_time), (
        "backward skips rows, or does not, against its settings"
    )
    if settings.get("dtype") == "bfloat16":
        rows = sum(total for _, total in report["kept"].values())
        assert report["flips"] <= 0.01 * rows * STEPS, "more rows differ than rounding at the threshold explains"
        assert max(report["relative"], report["exp_avg"], report["exp_avg_sq"]) <= 4 * BFLOAT16_STEP
        if settings.get("grad_dtype") == "float32":
            assert report["sum"] <= 1e-6, "gradients were rounded while they were summed"
        elif settings.get("accumulation", 1) > 1 and not settings.get("deepspeed"):
            assert report["sum"] > BFLOAT16_STEP / 16, "the comparison would not notice a sum in bfloat16"
    else:
        assert report["flips"] == 0
        assert report["error"] <= FLOAT32_BOUND
        assert report["exp_avg"] <= 1e-6
        assert report["exp_avg_sq"] <= 2e-6  # a square: twice the relative error


@pytest.mark.parametrize("world", WORLDS)
def test_the_number_of_kept_rows_is_the_published_one(reports: Reports, world: int) -> None:
    report = reports[world][0]
    assert len(report["kept"]) == 14  # q, k, v, o, gate, up, down of two blocks
    for kept, rows in report["kept"].values():
        assert kept == rows - -(-7 * (rows - 1) // 10)
