"""After a power loss at any moment, everything that a run has promised is on disk, and every sync is needed for that.

Two recordings are made: a whole run of `cl-dist run`, and single writes that it does not reach, because they take
several machines or a task that is started again.
"""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cl_dist.errors import ClDistError
from cl_dist.state import atomic
from cl_dist.state.data_order import DataOrder
from cl_dist.state.integrity import read_sealed, write_sealed
from cl_dist.state.manifest import Manifest
from cl_dist.state.scores import ScoreFile, TaskScored
from cl_dist.state.spans import Span, SpanReader, write_spans
from tests.ranks import REPOSITORY
from tests.recipes import write_recipe
from tests.state.crash_states import Contents, Crash, Tree, View, crashes, read_events, swapped, without
from tests.state.recorded_disk import Event, known, recorded
from tests.zygote import Zygote

WRAPPER = ("atomic.py", "sync")
"""The function that calls fsync; its callers are the places that are tested."""


class Life(NamedTuple):
    """A recording, and its judge: returns which promise a crash breaks, or an empty string."""

    events: list[Event]
    judge: Judge


class Judge:
    """Common to both recordings.

    Args:
        contents: Of the recorded files.
        scratch: A folder to write states of the disk to.
    """

    def __init__(self, contents: Contents, scratch: Path) -> None:
        self._contents, self._scratch = contents, scratch
        self._remembered: dict[Any, Any] = {}

    def __call__(self, crash: Crash) -> str:
        raise NotImplementedError

    def written(self, tree: Tree) -> Path:
        """A folder with these files."""
        key = frozenset(tree.items())
        if key not in self._remembered:
            folder = self._scratch / str(len(self._remembered))
            for name, content in tree.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(self._contents.read(content))
            folder.mkdir(exist_ok=True)
            self._remembered[key] = folder
        folder = self._remembered[key]
        assert isinstance(folder, Path)
        return folder

    def is_whole(self, state: Tree) -> bool:
        """Whether a saved state is intact, checked as a resume does."""
        key = ("whole", frozenset(state.items()))
        if key not in self._remembered:
            folder = self.written(state)
            try:
                SpanReader(folder, read_sealed(folder / "state.json")["writers"]).verify()
                self._remembered[key] = True
            except ClDistError:
                self._remembered[key] = False
        return bool(self._remembered[key])


class RunJudge(Judge):
    """For a run: everything that its manifest says must be true."""

    def __call__(self, crash: Crash) -> str:
        live, found = crash.live, crash.found
        if crash.promised is None and found.content("run/manifest.json") is None:
            return ""
        manifest = self._manifest(found)
        if manifest is None:
            return "the manifest is lost"
        promised = [each["known"] for each in (crash.promised, crash.next) if each is not None]
        if known(manifest) not in promised:
            return f"the manifest says {known(manifest)}, promised was one of {promised}"
        if crash.promised is not None and found.content("run/config.yaml") != live.content("run/config.yaml"):
            return "the recipe is lost"
        if (crash.promised or {}).get("metrics") and found.content("run/metrics.json") != live.content(
            "run/metrics.json"
        ):
            return "the metrics are lost"
        return next(filter(None, (*self._states(manifest, found), *self._results(manifest, found, live))), "")

    def _manifest(self, found: View) -> Manifest | None:
        names = ("manifest.json", "scores.jsonl")
        files = {name: found.content(f"run/{name}") for name in names}
        folder = self.written({name: content for name, content in files.items() if content is not None})
        key = ("manifest", folder)
        if key not in self._remembered:
            try:
                self._remembered[key] = Manifest.read(folder / "manifest.json")
            except ClDistError:
                self._remembered[key] = None
        manifest = self._remembered[key]
        assert manifest is None or isinstance(manifest, Manifest)
        return manifest

    def _states(self, manifest: Manifest, found: View) -> Iterator[str]:
        """States that a resume may need: those in the manifest, and the final states of the last two tasks."""
        done = manifest.completed
        needed = [entry.folder for entry in manifest.checkpoints]
        finished = done == len(manifest.tasks)
        needed += [
            _folder(manifest, task) + "/state" for task in range(done - 1 if finished else max(0, done - 2), done)
        ]
        for folder in needed:
            if not self.is_whole(found.tree(f"run/{folder}")):
                yield f"{folder} is not whole"

    def _results(self, manifest: Manifest, found: View, live: View) -> Iterator[str]:
        """The results of finished tasks, and the data order."""
        for number in range(len(manifest.accuracy_matrix)):
            folder = "tasks/00-untouched" if number == 0 else _folder(manifest, number - 1)
            left, lives = (_kept(view.tree(f"run/{folder}")) for view in (found, live))
            if left != lives:
                yield f"{folder} lacks {sorted(lives.items() - left.items())}"
        inside = manifest.checkpoint.step if manifest.checkpoint is not None else 0
        learnt = [self._steps(view.content("run/data_order.jsonl"), manifest, inside) for view in (found, live)]
        if learnt[0] != learnt[1]:
            yield f"data_order.jsonl lacks {sorted(learnt[1] - learnt[0])}"

    def _steps(self, content: str | None, manifest: Manifest, inside: int) -> set[tuple[int, int]]:
        """Tasks and steps in the data order that a saved state covers."""
        steps = set()
        for line in self._contents.read(content or "").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                steps.add((manifest.tasks.index(record["task"]), record["step"]))
        return {step for step in steps if step <= (manifest.completed, inside)}


def _folder(manifest: Manifest, task: int) -> str:
    return f"tasks/{task + 1:02d}-{manifest.tasks[task]}"


def _kept(tree: Tree) -> Tree:
    """The permanent files of a task: not its state, nor unfinished files."""
    return {
        name: content
        for name, content in tree.items()
        if not name.startswith("state/") and not any(part.startswith(".") for part in Path(name).parts)
    }


class PieceJudge(Judge):
    """For the single writes: a replaced model, a state written by two machines, the first score and step."""

    def __call__(self, crash: Crash) -> str:
        folder = self._recovered(crash.found)
        promised = [each for each in (crash.promised, crash.next) if each is not None]
        model = folder / "tasks" / "model" / "sub" / "weights"
        versions = [each["model"] for each in promised] + [0] * (crash.promised is None)
        if (model.read_bytes().count(b"\n") if model.exists() else 0) not in [1000 * version for version in versions]:
            return "the model is not the promised one"
        if crash.promised is not None and crash.promised["state"] and not self.is_whole(crash.found.tree("state")):
            return "the state is not whole"
        order = folder / "data_order.jsonl"
        learnt = order.read_bytes().count(b"}\n") if order.exists() else 0
        if crash.promised is not None and learnt < crash.promised["learnt"]:
            return "a line of the data order is lost"
        scores = len(list(ScoreFile(folder / "scores.jsonl").scores_after(0)))
        return (
            ""
            if scores in [each["scores"] for each in promised] + [0] * (crash.promised is None)
            else "a score is lost"
        )

    def _recovered(self, found: View) -> Path:
        folder = self.written(found.tree(""))
        atomic.recover(folder)
        return folder


def _pieces(root: Path, log: Path) -> None:
    """Replace a model, where one of the versions must survive; write a state on two machines; score."""
    with recorded(root, log) as recorder:
        promise = {"model": 0, "state": False, "scores": 0, "learnt": 0}
        for version in (1, 2):
            with atomic.publishing(root / "tasks" / "model") as temporary:
                (temporary / "sub").mkdir()
                (temporary / "sub" / "weights").write_text(f"{version}\n" * 1000 * version)
            promise["model"] = version
            recorder.mark(promise)
        staging = atomic.stage(root / "state")
        for machine in (1, 0):
            recorder.machine = machine
            write_spans(staging, machine, {"master": {"w": Span(8 * machine, torch.arange(8.0))}})
        write_sealed(staging / "state.json", {"writers": 2})
        atomic.publish(root / "state", synced=True)
        promise["state"] = True
        recorder.mark(promise)
        order = DataOrder(root / "data_order.jsonl", ["spring"], writer=True)
        for step in (1, 2):
            order.append(0, step, [step])
            order.sync()
            promise["learnt"] = step
            recorder.mark(promise)
        for task in range(2):
            ScoreFile(root / "scores.jsonl").append_scores([TaskScored(task, 0.5, {})])
            promise["scores"] += 1
            recorder.mark(promise)


@pytest.fixture(scope="module")
def lives(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> list[Life]:
    """A run with checkpoints and a method that writes its own files; and the single writes."""
    found = []
    for name, judge in (("run", RunJudge), ("pieces", PieceJudge)):
        folder = tmp_path_factory.mktemp(name)
        for part in ("disk", "log", "scratch"):
            (folder / part).mkdir()
        log = folder / "log" / "events.jsonl"
        if name == "run":
            _run(zygote, folder, log)
        else:
            _pieces(folder / "disk", log)
        found.append(Life(read_events(log), judge(Contents(folder / "log"), folder / "scratch")))
    return found


def _run(zygote: Zygote, folder: Path, log: Path) -> None:
    recipe = write_recipe(
        folder,
        model={"lora": {"r": 2}},
        stream={"max_train_samples": 20, "max_eval_samples": 4},
        method={"name": "kif", "keep_unfused": True},
        checkpoint={"every_steps": 2, "keep": 2},
        launch={"processes": 1},
        output_dir=str(folder / "disk" / "run"),
    )
    fault = {"module": "tests.state.recorded_disk", "root": str(folder / "disk"), "log": str(log)}
    outcome = zygote.run(["run", str(recipe), "--debug"], folder, fault=fault)
    assert outcome.codes == [0], outcome.output[0][-3000:]


def sites() -> list[str]:
    """Every place in the product that syncs a file or a folder."""
    found = []
    for path in sorted((REPOSITORY / "cl_dist").rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        functions = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and _syncs(node.func) and (path.name, function.name) != WRAPPER:
                    line = lines[node.lineno - 1].partition("  #")[0].strip()
                    found.append(f"{path.parent.name}/{path.name} {function.name}: {line}")
    return found


def _syncs(function: ast.expr) -> bool:
    return ast.unparse(function) in ("sync", "os.fsync", "atomic.sync")


SITES = sites()
RENAMED_AFTER = [site for site in SITES if "_sync_tree: " in site or "sync(temporary)" in site]
"""Where something is synced that is renamed next."""
RENAMED_BEFORE = [site for site in SITES if "replacing: sync(path.parent)" in site or "publish: " in site]
"""Where a folder is synced after a rename in it."""


def first_violation(life: Life, events: Sequence[Event], begin: int = 0) -> str:
    """The promise that a crash breaks, or an empty string."""
    return next((f"event {c.moment}: {why}" for c in crashes(events, begin) if (why := life.judge(c))), "")


def test_a_power_loss_takes_away_nothing_that_was_promised(lives: list[Life]) -> None:
    for life in lives:
        assert first_violation(life, life.events) == ""
    promised = [event["state"]["known"] for event in lives[0].events if event["do"] == "mark"]
    assert promised[-1][:2] == ["finished", 2]
    assert max(len(state[2]) for state in promised) == 2, "several checkpoints were named at once"


def test_what_another_process_writes_is_recorded(tmp_path: Path) -> None:
    """A rename that the recorder cannot order relative to the syncs is an error."""
    root, log = tmp_path / "root", tmp_path / "events.jsonl"
    root.mkdir()
    with recorded(root, log) as recorder:
        subprocess.run(["sh", "-c", "echo text > a"], cwd=root, check=True)
        recorder.mark("written")
        subprocess.run(["mv", "a", "b"], cwd=root, check=True)
        with pytest.raises(AssertionError, match="b was renamed past the recorder"):
            recorder.mark("renamed")
    events = read_events(log)
    assert [event["do"] for event in events] == ["root", "link", "write", "mark"]
    found = {crash.found.content("a") for crash in crashes(events)}
    contents = Contents(tmp_path)
    assert {name if name is None else contents.read(name) for name in found} == {None, b"", b"te", b"text\n", bytes(5)}


def test_every_sync_of_the_product_is_recorded(lives: list[Life]) -> None:
    assert {event["site"] for life in lives for event in life.events if event["do"] == "sync"} == set(SITES)


def _first_difference(events: Sequence[Event], others: Sequence[Event]) -> int:
    """Number of the first event that differs; all crashes before it are the same."""
    pairs = enumerate(zip(events, others, strict=False))
    return next((number for number, (one, other) in pairs if one != other), len(events))


def assert_a_loss(lives: list[Life], changed: Callable[[list[Event]], list[Event]]) -> None:
    """With this change to the recordings, some crash breaks a promise."""
    for life in lives:
        events = changed(life.events)
        if first_violation(life, events, _first_difference(events, life.events)):
            return
    pytest.fail("nothing is lost: the sync is not needed, or no crash that is tried shows why")


@pytest.mark.parametrize("site", SITES)
def test_a_sync_that_is_removed_is_missed(lives: list[Life], site: str) -> None:
    assert_a_loss(lives, lambda events: without(events, site))


@pytest.mark.parametrize("site", RENAMED_AFTER)
def test_what_is_renamed_before_its_sync_is_lost(lives: list[Life], site: str) -> None:
    assert_a_loss(lives, lambda events: swapped(events, site, forwards=True))


@pytest.mark.parametrize("site", RENAMED_BEFORE)
def test_a_rename_after_its_folders_sync_is_lost(lives: list[Life], site: str) -> None:
    assert_a_loss(lives, lambda events: swapped(events, site, forwards=False))
