"""The method in docs/extending.md works as the page says: outside the package, resumed and compared."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.test_kill_and_resume import assert_same_end
from tests.ranks import REPOSITORY
from tests.recipes import write_recipe
from tests.zygote import Zygote

PAGE = REPOSITORY / "docs" / "extending.md"
NAME = "projection:GradientProjection"
PROGRAM = Path(sys.executable).with_name("cl-dist")
STEPS = 4


def example(folder: Path) -> Path:
    """Write the page's method to the file that the page names."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "class GradientProjection" in block)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "projection.py"
    path.write_text(code)
    return path


def recipe(folder: Path, name: str = NAME) -> Path:
    """Two tasks of four steps with a checkpoint after every third step, and the method next to the recipe."""
    example(folder)
    return write_recipe(
        folder,
        method={"name": name, **({"strength": 0.9} if name == NAME else {})},
        stream={"max_train_samples": 8 * STEPS},
        checkpoint={"every_steps": 3},
    )


def test_it_is_short(tmp_path: Path) -> None:
    code = [line for line in example(tmp_path).read_text().splitlines() if line.strip()]
    assert len(code) < 60


def test_killed_and_resumed_it_trains_the_same_weights(zygote: Zygote, tmp_path: Path) -> None:
    undisturbed = recipe(tmp_path / "undisturbed")
    outcome = zygote.run(["run", str(undisturbed), "--debug"], undisturbed.parent, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    killed = recipe(tmp_path / "killed")
    fault = {"moment": "step", "on_rank": 1, "count": 2 * STEPS}
    outcome = zygote.run(["run", str(killed)], killed.parent, world=2, fault=fault)
    assert outcome.codes[1] == -signal.SIGKILL, "the moment never came"
    # A comment changes the source, but not the method.
    plugin = killed.parent / "projection.py"
    plugin.write_text(f"# Repaired.\n{plugin.read_text()}")
    outcome = zygote.run(["run", str(killed), "--resume", "--debug"], killed.parent, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    message = "projection.py: the source of this plugin has changed since the run was last started"
    assert message in outcome.output[0]
    assert message not in outcome.output[1]
    runs = [path.parent / "run" for path in (killed, undisturbed)]
    assert any(json.loads(line).get("message") == message for line in (runs[0] / "log.jsonl").read_text().splitlines())
    assert_same_end(*runs)
    assert f"- {undisturbed.parent / 'projection.py'}" in (runs[1] / "config.yaml").read_text()


@pytest.mark.slow
def test_a_comparison_runs_it_and_its_runs_are_evaluated_from_anywhere(tmp_path: Path) -> None:
    path = recipe(tmp_path, "sequential")
    words = [PROGRAM, "compare", path, "--methods", f"sequential,{NAME}", "--out", tmp_path / "sweep"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| own \| GradientProjection \| 1 \|", (tmp_path / "sweep" / "table.md").read_text())
    (run,) = (tmp_path / "sweep" / "runs").rglob("*GradientProjection*/*")
    (plain,) = (tmp_path / "sweep" / "runs").rglob("*sequential*/*")
    with pytest.raises(AssertionError, match="differs"):  # the method has changed the weights
        assert_same_end(run, plain)
    done = subprocess.run([PROGRAM, "eval", run], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
