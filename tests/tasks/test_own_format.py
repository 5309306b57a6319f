"""A data format from a file outside the package: the one in docs/extending.md."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from cl_dist.config.formats import format_inputs
from cl_dist.config.load import dump_recipe, load_recipe
from cl_dist.errors import BadInput
from cl_dist.state.inputs import input_places, moved_inputs
from cl_dist.state.stored_files import as_plain, stored_recipe
from cl_dist.tasks.formats import catalogue
from cl_dist.tasks.formats.catalogue import builtin_formats, find_format
from cl_dist.tasks.stream import load_stream
from tests.plugin_memory import plugins_forgotten
from tests.recipes import write_recipe
from tests.tasks.data import write_lines
from tests.zygote import Zygote

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cl_dist"
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## A data format") :]
CODE = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)[0]
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo"}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with plugins_forgotten():
        yield


def project(folder: Path, **task: object) -> Path:
    """A recipe with the format's module and its data beside it; `task` changes the first task's settings."""
    folder.mkdir(exist_ok=True)
    (folder / "pairs.py").write_text(CODE)
    lines = [f"{country} {number}; {city}" for number in range(8) for country, city in CAPITALS.items()]
    write_lines(folder / "capitals.txt", lines)
    write_lines(folder / "capitals.test.txt", lines[:4])
    own = {"name": "capitals", "format": "pairs:Pairs", "path": "capitals.txt", "separator": ";", **task}
    return write_recipe(folder, stream={"tasks": [own, {"name": "spring", "format": "builtin"}]})


def test_it_is_read_and_its_settings_are_in_the_recipe(tmp_path: Path) -> None:
    recipe, folder = load_recipe(str(project(tmp_path)))
    task, _ = load_stream(recipe.stream, folder, recipe.train)
    assert (len(task.train), len(task.evaluation), task.scored_on) == (32, 4, "test")
    assert (task.train[0].prompt, task.train[0].answer) == ("France 0", "Paris")
    assert task.labels == tuple(sorted(CAPITALS.values()))
    assert as_plain(recipe)["stream"]["tasks"][0]["separator"] == ";"


def test_the_stored_recipe_is_found_from_anywhere(tmp_path: Path) -> None:
    recipe, _ = load_recipe(str(project(tmp_path / "project")))
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe))
    code = f"from cl_dist.state.stored_files import *; print(stored_recipe(Path({str(tmp_path / 'config.yaml')!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "Pairs(separator=';')" in done.stdout, done.stderr
    assert stored_recipe(tmp_path / "config.yaml") == recipe


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"seperator": "|"}, r"^stream\.tasks\.0\.seperator: unknown key; did you mean separator\?$"),
        ({"separator": 3}, r"^stream\.tasks\.0\.separator: 3 is not allowed; allowed: a string \(in quotes"),
        ({"separator": " "}, r'^stream\.tasks\.0\.separator: " " is blank; allowed: any other text$'),
        ({"streaming": True}, r"^stream\.tasks\.0\.streaming: true is read by formats auto and huggingface only, not"),
        ({"format": "pairs:Pears"}, r'tasks\[\]\.format: pairs:Pears: .*no class "Pears".* did you mean Pairs\?'),
        ({"format": "pears:Pairs"}, r'stream\.tasks\[\]\.format: no module "pears" is installed or in '),
        ({"format": "pairs:Path"}, r"pairs:Path is not a format; .* from cl_dist\.tasks\.formats\.Format"),
        ({"format": "pairs"}, r'^stream\.tasks\.0\.format: "pairs" is not allowed; .*: auto, .*, or module:Class'),
        ({"format": "jsnl"}, r'^stream\.tasks\.0\.format: "jsnl" is not allowed; .*did you mean jsonl\?$'),
    ],
)  # fmt: skip
def test_every_problem_is_named(task: dict[str, object], message: str, tmp_path: Path) -> None:
    path = project(tmp_path, **task)
    with pytest.raises(BadInput, match=message):
        load_recipe(str(path))


def test_all_problems_of_a_task_are_reported_at_once(tmp_path: Path) -> None:
    path = project(tmp_path, separator=3, epochs=0, seperator=1)
    with pytest.raises(BadInput) as refusal:
        load_recipe(str(path))
    keys = [line.partition(":")[0] for line in str(refusal.value).splitlines()]
    assert sorted(keys) == [f"stream.tasks.0.{name}" for name in ("epochs", "separator", "seperator")]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    recipe, folder = load_recipe(str(project(tmp_path)))
    write_lines(tmp_path / "capitals.txt", ["France; Paris", "", "Italy, Rome"])
    with pytest.raises(BadInput, match=r"^task 'capitals': .*capitals\.txt, line 3: no ';' between"):
        load_stream(recipe.stream, folder, recipe.train)


def test_read_can_be_called_like_the_protocols(tmp_path: Path) -> None:
    path = project(tmp_path, format="short_pairs:Pairs")
    (tmp_path / "short_pairs.py").write_text(CODE.replace("def read(self, source: Source)", "def read(self)"))
    with pytest.raises(BadInput, match=r"Pairs: its read cannot be called as read\(self, source\): too many"):
        load_recipe(str(path))


READ = re.search(r"        train, evaluation = split_files.*?\n.*?\n", CODE).group()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", r"^task 'capitals': format odd_pairs:Pairs: its read returned null of type N"),
        ("return RawTask([], [])", r"RawTask whose train is of type list; allowed: a Split"),
        ("s = Split(iter('a'), 'o', [0]); return RawTask(s, s)", r"train is not usable; allowed: lists"),
        ("s = Split([Example('q', 3)], 'o', [7]); return RawTask(s, s)", r"o, record 7: .* not a string; allowed"),
        ("s = Split([Example('q', 'a')], 'o', [0]); return RawTask(s, s, ('a', 1))", r"labels: .* allowed: a tuple"),
        ("s = Split([Example('q', 'a')], 'o', [0]); return RawTask(s, s, kind='x')", r'kind: "x" is not allowed'),
    ],
)  # fmt: skip
def test_what_read_returns_is_checked(body: str, message: str, tmp_path: Path) -> None:
    path = project(tmp_path, format="odd_pairs:Pairs")
    (tmp_path / "odd_pairs.py").write_text(CODE.replace(READ, f"        {body}\n"))
    recipe, folder = load_recipe(str(path))
    with pytest.raises(BadInput, match=message):
        load_stream(recipe.stream, folder, recipe.train)


def test_a_setting_that_every_task_has_cannot_be_a_formats_own(tmp_path: Path) -> None:
    path = project(tmp_path, format="clashing_pairs:Pairs")
    (tmp_path / "clashing_pairs.py").write_text(
        CODE.replace("separator: str =", 'labels: str = ""\n    separator: str =')
    )
    with pytest.raises(BadInput, match="clashing_pairs:Pairs: labels is a setting of every format; rename the"):
        load_recipe(str(path))


def test_the_formats_own_path_is_looked_up_like_a_tasks_path(tmp_path: Path) -> None:
    path = project(tmp_path, format="placed_pairs:Pairs", words="words.txt")
    setting = '    PATHS = ("words",)\n    words: str | None = None\n    separator: str ='
    (tmp_path / "placed_pairs.py").write_text(CODE.replace("    separator: str =", setting))
    write_lines(tmp_path / "words.txt", ["a"])
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data/capitals.txt", ["Peru; Lima"])
    recipe, _ = load_recipe(str(path), [f"stream.root={tmp_path / 'data'}"])
    assert recipe.stream.tasks[0].reader.words == str(tmp_path / "words.txt")  # type: ignore[attr-defined]
    places = input_places(recipe, tmp_path / "run")
    assert places["stream.tasks[0].words"] == "../words.txt"
    (tmp_path / "words.txt").rename(tmp_path / "data/words.txt")
    moved = moved_inputs(recipe, {"stream.tasks[0].words": "../data/words.txt"}, tmp_path / "run")
    assert moved.stream.tasks[0].reader.words == str(tmp_path / "data/words.txt")  # type: ignore[attr-defined]
    assert "stream.tasks[].words" in format_inputs()


def test_a_resumed_run_may_change_settings_that_leave_the_samples_the_same() -> None:
    assert {"stream.tasks[].input_field", "stream.tasks[].streaming", "stream.instruction_file"} <= format_inputs()
    assert "stream.name_tasks" not in format_inputs()


def test_an_installed_package_offers_formats_under_plain_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "offered_pairs.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(catalogue, "_found", {})
    entry = EntryPoint("pairs", "offered_pairs:Pairs", catalogue.GROUP)
    monkeypatch.setattr(catalogue, "offered", lambda group: {"pairs": entry} if group == "cl_dist.formats" else {})
    found = find_format("pairs", "stream.tasks[].format")
    assert found is not None
    assert found(separator=";").read  # type: ignore[call-arg]
    assert find_format("pears", "stream.tasks[].format") is None
    recipe, folder = load_recipe(str(project(tmp_path, format="pairs")))
    assert len(load_stream(recipe.stream, folder, recipe.train)[0].train) == 32


@pytest.fixture(scope="module")
def finished(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that was interrupted between its tasks, resumed and evaluated."""
    folder = tmp_path_factory.mktemp("own") / "project"
    recipe = str(project(folder))
    outcome = zygote.run(["run", recipe, "--debug"], folder, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    return folder


def test_a_run_trains_resumes_and_is_evaluated(finished: Path, zygote: Zygote) -> None:
    folder = finished
    run = folder / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    assert set(manifest["inputs"]["data"]) == {"capitals", "spring"}
    assert manifest["inputs"]["data"]["capitals"]["train"]["samples"] == 32
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["metric"]["capitals"] == "exact_match"
    # The setting says how the data is read: another one is taken while the samples are the same ...
    text = (folder / "capitals.txt").read_text()
    (folder / "capitals.txt").write_text(text.replace(";", "="))
    (folder / "capitals.test.txt").write_text((folder / "capitals.test.txt").read_text().replace(";", "="))
    arguments = ["run", str(folder / "recipe.yaml"), "--resume", "--set", "stream.tasks.0.separator=="]
    outcome = zygote.run([*arguments, "--debug"], folder, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    # ... and refused when they are not.
    (folder / "capitals.txt").write_text(text.replace("; Paris", "; Lyon").replace(";", "="))
    outcome = zygote.run(arguments, folder, world=2)
    assert outcome.codes[0] == 2
    assert "the training data of task 'capitals'" in outcome.output[0]
    (folder / "capitals.txt").write_text(text)
    (folder / "capitals.test.txt").write_text("France; Paris\n")
    outcome = zygote.run(["eval", str(run), "--debug"], folder, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)


ELSEWHERE = {
    ("state/inputs.py", "builtin"): "the digest of a built-in model's weights",
    ("sweep/checks.py", "builtin"): "the digest of a built-in model's weights",
}
"""Where a text is equal to a format's name, and why."""
OTHER_MEANINGS = {"text": "a kind of task too", "tasl": "a method too", "auto": "a value of other settings too"}


def test_no_formats_name_occurs_outside_its_module() -> None:
    found, compared = set(), []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) else None
            if text in builtin_formats() and place != f"tasks/formats/{text}.py" and text not in OTHER_MEANINGS:
                found.add((place, text))
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                is_format = any(
                    isinstance(side, ast.Attribute) and side.attr in ("format", "formats") for side in sides
                )
                literal = any(isinstance(each, ast.Constant) for side in sides for each in ast.walk(side))
                compared += [f"{place}, line {node.lineno}"] if is_format and literal else []
    assert found == set(ELSEWHERE)
    assert compared == []


def test_a_new_file_is_a_new_format(tmp_path: Path) -> None:
    for name, cls in builtin_formats().items():
        assert cls.__module__ == f"cl_dist.tasks.formats.{name}"
        assert cls.summary
    code = f"""
import sys, pathlib, cl_dist.tasks.formats as formats
folder = pathlib.Path(sys.argv[1]); formats.__path__.append(str(folder))
(folder / "pairs.py").write_text({CODE!r}.replace('    separator: str', '    name = "pairs"\\n    separator: str', 1))
from cl_dist.config.fields import explain
from cl_dist.config.schema import TaskConfig
print(TaskConfig(name="a", format="pairs", path="x", separator=";").reader)
print(explain())
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Pairs(separator=';')")
    assert (
        "stream.tasks[].separator\n    a string (default: |)\n    Format pairs: Text between the quest" in done.stdout
    )
