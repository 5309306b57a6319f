"""The metrics that end a run; tests/runs and tests/faults step through whole streams."""

from __future__ import annotations

import json
from pathlib import Path

from cl_dist.coordinator.stream import run_metrics
from cl_dist.state.manifest import Manifest, Segment
from tests.coordinator.clock import DEVICE_SECONDS, HOST_SECONDS
from tests.recipes import write_recipe
from tests.zygote import Zygote

SEGMENT = Segment(task=0, step=0, world_size=2, zero_stage=2, micro_batch_size=4, gradient_accumulation=1)
TIMINGS = (
    {"train_seconds": 2.0, "steps": 4, "tokens": 300, "evaluate_seconds": 1.0},
    {"train_seconds": 6.0, "steps": 12, "tokens": 500, "evaluate_seconds": 1.0},
)


def manifest(**changes: object) -> Manifest:
    values: dict[str, object] = {
        "tasks": ("a", "b"), "world_size": 2, "zero_stage": 2, "completed": 2, "status": "finished",
        "accuracy_matrix": ((0.0, 0.25), (1.0, 0.5), (0.5, 0.75)), "segments": (SEGMENT,), "timings": TIMINGS,
        "peak_memory_bytes": (7, 5), "restarts": 3, "kept_share": (1.0, 0.3), "state_bytes": (3, 4),
        "scoring": {"a": {"metric": "rouge_l", "scored_on": "test"}},
    }  # fmt: skip
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def test_metrics_follow_from_the_manifest() -> None:
    metrics = run_metrics(manifest())
    assert metrics["accuracy_matrix"] == [[0.0, 0.25], [1.0, 0.5], [0.5, 0.75]]
    assert metrics["average_performance"] == 0.625
    assert metrics["backward_transfer"] == -0.5
    assert metrics["tokens_per_second"] == 100.0
    assert metrics["step_seconds"] == 0.5
    assert metrics["metric"] == {"a": "rouge_l"}
    assert metrics["cut_generations_matrix"] == [[None, None]] * 3
    assert (metrics["notes"], metrics["average_performance_by_metric"]) == ([], {"rouge_l": 0.5})
    assert metrics["segments"][0]["world_size"] == 2
    assert (metrics["peak_memory_bytes"], metrics["restarts"]) == ([7, 5], 3)
    assert (metrics["kept_share"], metrics["state_bytes_per_rank"]) == ({"a": 1.0, "b": 0.3}, [3, 4])
    assert (metrics["general"], metrics["general_ability"]) == ([], None)


def test_what_the_metrics_are_means_of() -> None:
    scoring = {"a": {"metric": "rouge_l", "cut_generations": 2}, "b": {"metric": "exact_match", "scored_on": "train"}}
    metrics = run_metrics(manifest(scoring=scoring, cut_matrix=((), (3, None), (2, None))))
    assert metrics["cut_generations"] == {"a": 2}
    assert metrics["cut_generations_matrix"] == [[None, None], [3, None], [2, None]]
    assert metrics["average_performance_by_metric"] == {"rouge_l": 0.5, "exact_match": 0.75}
    assert metrics["notes"] == [
        "the metrics are means of different scores: rouge_l (a); exact_match (b)",
        "scored on training data: b",
        "generations cut at eval.max_new_tokens in the last evaluation: a 2",
    ]


def test_the_time_of_a_step_includes_what_the_device_still_does(zygote: Zygote, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"max_steps_per_task": 3}, eval={"before_training": False})
    outcome = zygote.run(["run", str(recipe)], tmp_path, world=1, fault={"module": "tests.coordinator.clock"})
    assert outcome.codes == [0], outcome.output
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines if line["event"] == "step"] == [HOST_SECONDS + DEVICE_SECONDS] * 6
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["step_seconds"] == HOST_SECONDS + DEVICE_SECONDS
    tokens = sum(entry["tokens"] for entry in metrics["timings"])
    assert metrics["tokens_per_second"] == tokens / 24.0


def test_a_run_without_steps_has_metrics() -> None:
    metrics = run_metrics(manifest(timings=({"train_seconds": 0.0, "steps": 0, "tokens": 0},) * 2))
    assert (metrics["tokens_per_second"], metrics["step_seconds"]) == (0.0, 0.0)
