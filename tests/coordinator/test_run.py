"""What rank 0 does for all ranks before they start: if it fails, only rank 0 reports the error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes import write_recipe
from tests.zygote import Outcome, Zygote


def run(zygote: Zygote, folder: Path, moment: str, on_rank: int, *arguments: str, **fault: Any) -> Outcome:
    """Two ranks, as if another launcher had started them."""
    recipe = write_recipe(folder, method={"name": "sequential"}, stream={"max_train_samples": 16})
    armed = {"moment": moment, "on_rank": on_rank, "count": 1, **fault}
    return zygote.run(["run", str(recipe), *arguments], folder, world=2, fault=armed)


@pytest.mark.parametrize(
    ("moment", "sentence"),
    [
        ("folder locked", "{run} is in use by another process: wait for that run to end"),
        ("failing recovery", "the run folder {run} cannot be used: [Errno 5] Input/output error\n"),
    ],
)
def test_only_rank_0_reports_its_error(zygote: Zygote, tmp_path: Path, moment: str, sentence: str) -> None:
    outcome = run(zygote, tmp_path, moment, 0)
    assert outcome.codes == [2, 2], outcome.output
    said = [line for line in outcome.output[0].splitlines() if line.startswith("cl-dist: ")]
    assert len(said) == 1
    assert f"{said[0]}\n".startswith("cl-dist: error: " + sentence.format(run=tmp_path / "run"))
    assert "cl-dist: " not in outcome.output[1]


def test_only_rank_0_reads_the_manifest(zygote: Zygote, tmp_path: Path) -> None:
    """The node of the other rank sees an old version of the folder."""
    outcome = run(zygote, tmp_path, "stop", 0, count=2)
    assert outcome.codes == [75, 75], outcome.output
    outcome = run(zygote, tmp_path, "stale manifest", 1, "--resume")
    assert outcome.codes == [0, 0], outcome.output
    assert "resuming task spring after step" in outcome.output[0]
