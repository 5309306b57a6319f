"""Whole runs: what the ranks share of tokenised data and of weights in generation changes no bit of a result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import write_recipe
from tests.zygote import Zygote

METHODS: dict[str, Any] = {
    "migu": {"model": {"lora": None}, "method": {"name": "migu"}},
    "kif": {"model": {"lora": {"r": 4}}, "method": {"name": "kif", "replay_ratio": 0.2}},
}
TASKS = {"tasks": [{"name": name, "format": "builtin"} for name in ("spring", "reverse", "prose")]}


def results(zygote: Zygote, folder: Path, cache: Path, **changes: Any) -> dict[str, str]:
    """Digests of all weights, states and predictions of a run on two ranks, and its scores."""
    folder.mkdir()
    path = write_recipe(folder, stream={**TASKS, "max_train_samples": 16, "max_eval_samples": 6}, **changes)
    outcome = zygote.run(["run", str(path), "--debug"], folder, world=2, environment={"CL_DIST_CACHE": str(cache)})
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    run = folder / "run"
    kept = [
        path for path in sorted(run.rglob("*")) if path.suffix in (".safetensors", ".jsonl") and "tasks" in str(path)
    ]
    assert len(kept) > 10
    found = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
    return {**found, "scores": json.dumps(json.loads((run / "metrics.json").read_text())["accuracy_matrix"])}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_neither_gathered_weights_nor_a_cache_changes_a_bit(zygote: Zygote, tmp_path: Path, method: str) -> None:
    """The first run tokenises and gathers, the second one does neither, the third one cannot use its cache."""
    found = []
    for name, gather in (("first", "always"), ("second", "never"), ("no-cache", "auto")):
        place = tmp_path / ("cache" if name != "no-cache" else "file")
        if name == "no-cache":
            place.write_text("")
        settings = {"zero": {"stage": 3}, "eval": {"gather_weights": gather}, **METHODS[method]}
        found.append(results(zygote, tmp_path / name, place, **settings))
        if name == "first":
            files = {path: path.stat().st_mtime_ns for path in (place / "tokens").glob("*.safetensors")}
            assert len(files) == 6  # for each task, its training data and what it is scored on
        elif name == "second":
            assert {path: path.stat().st_mtime_ns for path in (place / "tokens").glob("*.safetensors")} == files
        else:
            assert "tokenised data is not cached" in (tmp_path / name / "rank-0.txt").read_text()
            assert "tokenised data is not cached" not in (tmp_path / name / "rank-1.txt").read_text()
    assert found[0] == found[1] == found[2]
