"""The end of a run: its metrics, which follow from its manifest."""

from __future__ import annotations

import dataclasses
from typing import Any

from cl_dist.engine.distributed import leave
from cl_dist.evaluation.metrics import all_metrics, general_ability, general_forgetting
from cl_dist.progress import Reporter
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import Manifest


def finish(ledger: Ledger, reporter: Reporter) -> dict[str, Any]:
    """Write and report the metrics of a finished run; they follow from its manifest."""
    metrics = run_metrics(ledger.manifest)
    ledger.write_metrics(metrics)
    reporter.run_finished(metrics)
    leave()
    return metrics


def run_metrics(manifest: Manifest) -> dict[str, Any]:
    """The content of metrics.json."""
    seconds = sum(entry.get("train_seconds", 0.0) for entry in manifest.timings)
    steps = sum(entry.get("steps", 0) for entry in manifest.timings)
    return {
        "tasks": list(manifest.tasks),
        "accuracy_matrix": [list(row) for row in manifest.accuracy_matrix],
        **all_metrics(manifest.accuracy_matrix),
        **manifest.scoring_by_task(),
        "general": [dict(entry) for entry in manifest.general],
        "general_ability": general_ability(manifest.general, manifest.tasks),
        "general_forgetting": general_forgetting(manifest.general, manifest.tasks),
        "tokens_per_second": sum(entry.get("tokens", 0) for entry in manifest.timings) / max(seconds, 1e-9),
        "step_seconds": seconds / max(steps, 1),
        "peak_memory_bytes": list(manifest.peak_memory_bytes),
        "timings": [dict(entry) for entry in manifest.timings],
        "world_size": manifest.world_size,
        "zero_stage": manifest.zero_stage,
        "segments": [dataclasses.asdict(segment) for segment in manifest.segments],
        "restarts": manifest.restarts,
    }
