"""`cl-dist run`; tests/runs, tests/faults and tests/distributed have whole runs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Command


def test_a_whole_run_and_its_status(command: Command, tmp_path: Path) -> None:
    changes = ["train.max_steps_per_task=2", "stream.tasks=[{name: spring, format: builtin}]"]
    changes += ["stream.max_eval_samples=8", "launch.processes=2", "output_dir=here"]
    code, output, error = command("run", "quickstart", *(f"--set={change}" for change in changes))
    assert code == 0, error
    assert output.startswith("1 tasks on 2 ranks: spring\n")
    assert "step 2/2  loss " in output
    assert "average performance (AP)" in output.splitlines()[-6]
    assert len(json.loads((tmp_path / "here/metrics.json").read_text())["accuracy_matrix"]) == 2
    assert command("status", "here")[1].startswith("status      finished\ntasks done  1 of 1\n")
    assert command("report", "here")[1].endswith("wrote here/report/loss.png\n")
    assert command("run", "quickstart", "--set=output_dir=here")[0] == 2
