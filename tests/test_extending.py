"""The method that docs/extending.md shows, run from the page: outside the package, resumed and compared."""

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
    """The page's method, as the file that it is called there."""
    section = PAGE.read_text(encoding="utf-8").partition("## A method")[2]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "projection.py"
    path.write_text(code)
    return path


def recipe(folder: Path, name: str = NAME) -> Path:
    """Two tasks of four steps, a checkpoint after every third, with the method beside the recipe."""
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
    # A comment is another source, and the same method.
    plugin = killed.parent / "projection.py"
    plugin.write_text(f"# Repaired.\n{plugin.read_text()}")
    outcome = zygote.run(["run", str(killed), "--resume", "--debug"], killed.parent, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    told = "projection.py: the source of this plugin has changed since the run was last started"
    assert told in outcome.output[0]
    assert told not in outcome.output[1]
    runs = [path.parent / "run" for path in (killed, undisturbed)]
    assert any(json.loads(line).get("message") == told for line in (runs[0] / "log.jsonl").read_text().splitlines())
    assert_same_end(*runs)
    assert f"- {undisturbed.parent / 'projection.py'}" in (runs[1] / "config.yaml").read_text()
    plain = recipe(tmp_path / "plain", "sequential")
    assert zygote.run(["run", str(plain)], plain.parent, world=2).codes == [0, 0]
    with pytest.raises(AssertionError):
        assert_same_end(runs[1], plain.parent / "run")


@pytest.mark.slow
def test_a_comparison_runs_it_and_its_runs_are_evaluated_from_anywhere(tmp_path: Path) -> None:
    path = recipe(tmp_path, "sequential")
    words = [PROGRAM, "compare", path, "--methods", f"sequential,{NAME}", "--out", tmp_path / "sweep"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| own \| GradientProjection \| 1 \|", (tmp_path / "sweep" / "table.md").read_text())
    (run,) = (tmp_path / "sweep" / "runs").rglob("*GradientProjection*/*")
    done = subprocess.run([PROGRAM, "eval", run], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
