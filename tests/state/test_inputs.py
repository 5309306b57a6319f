"""A run's inputs: the same content is accepted from any path and format, and different content is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from cl_dist.config.load import load_recipe
from cl_dist.config.schema import LoraConfig, ModelConfig, Recipe
from cl_dist.errors import BadInput
from cl_dist.state.inputs import (
    Inputs,
    input_changes,
    input_places,
    moved_inputs,
    plugin_changes,
    read_inputs,
    refuse_other_inputs,
    with_data,
)
from cl_dist.tasks.stream import load_stream
from cl_dist.tasks.types import Example, Task
from tests.plugin_memory import plugins_forgotten
from tests.recipes import write_recipe
from tests.tasks.data import as_lines, records, write_lines

SAMPLES = [Example(f"question {i}", ("yes", "no")[i % 2]) for i in range(8)]
TASK = Task("one", "classification", SAMPLES, SAMPLES[:4], ("no", "yes"), ("data/train.jsonl", "data/test.jsonl"))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(str(write_recipe(tmp_path)))[0]


def with_last(task: Task, **change: Any) -> Task:
    """The task with a different last sample."""
    return replace(task, train=[*SAMPLES[:-1], replace(SAMPLES[-1], **change)])


def digest(recipe: Recipe, *tasks: Task) -> Inputs:
    found = read_inputs(recipe, tasks)
    assert found is not None
    return found


class TestData:
    """Digests of samples."""

    def test_another_format_of_the_same_samples(self, recipe: Recipe, tmp_path: Path) -> None:
        records = [{"input": sample.prompt, "output": sample.answer} for sample in SAMPLES]
        for name, field in (("lines", "input"), ("other", "question")):
            for split in ("train", "test"):
                path = tmp_path / name / f"{split}.jsonl"
                path.parent.mkdir(exist_ok=True)
                renamed = [{field: each["input"], "output": each["output"]} for each in records]
                path.write_text("\n\n".join(json.dumps(each, indent=None) for each in renamed) + "\n")
        found = []
        for name, field in (("lines", "input"), ("other", "question")):
            task = {"name": "one", "format": "jsonl", "path": name, "input_field": field}
            loaded, folder = load_recipe(str(write_recipe(tmp_path, stream={"tasks": [task]})))
            found.append(digest(recipe, *load_stream(loaded.stream, folder, loaded.train)).data)
        assert found[0] == found[1]

    @pytest.mark.parametrize(
        ("change", "phrase"),
        [
            (
                lambda t: replace(t, train=SAMPLES[:-1]),
                "'one' (data/train.jsonl) changed: 8 samples before, 7 now",
            ),
            (lambda t: replace(t, train=SAMPLES[::-1]), "8 samples as before, but not the same ones in the same order"),
            (lambda t: with_last(t, prompt="Question 7"), "8 samples as before"),
            (lambda t: with_last(t, answer="yes"), "8 samples as before"),
            (lambda t: with_last(t, references=("no", "nay")), "8 samples as before"),
            (lambda t: replace(t, evaluation=SAMPLES[:3]), "evaluation data of task 'one' (data/test.jsonl) changed:"),
            (lambda t: replace(t, labels=("no", "perhaps", "yes")), "the labels of task 'one' changed"),
            (lambda t: replace(t, kind="generation"), "the labels of task 'one' changed"),
            (lambda t: replace(t, name="two"), "task 'one' is gone; task 'two' is new"),
        ],
    )
    def test_every_change_is_one(self, recipe: Recipe, change: Callable[[Task], Task], phrase: str) -> None:
        before, changed = digest(recipe, TASK), change(TASK)
        now = with_data(before, [changed])
        with pytest.raises(BadInput) as caught:
            refuse_other_inputs(before, now, [changed], Path("run"))
        message = str(caught.value)
        assert message.startswith("--resume: the run in run was started with other inputs: ")
        assert phrase in message
        assert message.endswith("; restore the old ones, or start anew with --fresh or another output_dir")

    def test_where_it_lies_is_no_change(self, recipe: Recipe) -> None:
        before = digest(recipe, TASK)
        assert input_changes(before, with_data(before, [replace(TASK, origins=("elsewhere", "there"))])) == []

    def test_what_two_samples_share_is_not_moved_between_them(self, recipe: Recipe) -> None:
        """The digest depends on where one field ends and the next one begins."""
        tasks = [replace(TASK, train=[Example(*pair)]) for pair in (("ab", "c"), ("a", "bc"), ("", "abc"))]
        assert len({digest(recipe, task).data["one"].train.sha256 for task in tasks}) == 3

    def test_many_changes_are_counted(self, recipe: Recipe) -> None:
        tasks = [replace(TASK, name=f"t{number}") for number in range(7)]
        before = digest(recipe, *tasks)
        with pytest.raises(BadInput, match="'t3' is gone; and 3 more; restore"):
            refuse_other_inputs(before, with_data(before, []), [], Path("run"))


class TestModel:
    """Digests of the base model and the tokenizer."""

    def folder(self, path: Path) -> Path:
        path.mkdir()
        files = {"config.json": {"hidden_size": 4}, "tokenizer_config.json": {"chat_template": "{{ a }}"}}
        for name, content in files.items():
            (path / name).write_text(json.dumps(content))
        (path / "model.safetensors").write_bytes(b"weights")
        (path / "tokenizer.json").write_text("{}")
        (path / "README.md").write_text("a model")
        return path

    def inputs(self, recipe: Recipe, name: Path) -> Inputs:
        return digest(replace(recipe, model=ModelConfig(name_or_path=str(name), lora=LoraConfig())))

    def test_the_same_files_elsewhere(self, recipe: Recipe, tmp_path: Path) -> None:
        before = self.inputs(recipe, self.folder(tmp_path / "a"))
        there = self.folder(tmp_path / "b")
        (there / "config.json").write_text('{"transformers_version": "9", "_name_or_path": "x",\n "hidden_size": 4}')
        (there / "README.md").write_text("the same model")
        (tmp_path / "link").symlink_to(there)
        for place in (there, tmp_path / "link"):
            assert input_changes(before, self.inputs(recipe, place)) == []

    @pytest.mark.parametrize(
        ("name", "content", "phrase"),
        [
            ("model.safetensors", "Weights", "the base model changed (PATH: model.safetensors)"),
            ("config.json", '{"hidden_size": 8}', "the base model changed (PATH: config.json)"),
            ("generation_config.json", "{}", "the base model changed (PATH: generation_config.json)"),
            ("tokenizer.json", '{"a": 1}', "the tokenizer changed (PATH: tokenizer.json)"),
            (
                "tokenizer_config.json",
                '{"chat_template": "{{ b }}"}',
                "the tokenizer changed (PATH: tokenizer_config.j",
            ),
            ("chat_template.jinja", "{{ c }}", "the tokenizer changed (PATH: chat_template.jinja)"),
            ("added_tokens.json", "{}", "the tokenizer changed (PATH: added_tokens.json)"),
        ],
    )
    def test_every_file_counts(self, recipe: Recipe, tmp_path: Path, name: str, content: str, phrase: str) -> None:
        place = self.folder(tmp_path / "a")
        before = self.inputs(recipe, place)
        (place / name).write_text(content)
        (change,) = input_changes(before, self.inputs(recipe, place))
        assert phrase.replace("PATH", str(place)) in change

    def test_the_tokenizer_of_rouge_l(self, recipe: Recipe, tmp_path: Path) -> None:
        place, there = self.folder(tmp_path / "a"), self.folder(tmp_path / "b")

        def scored_by(folder: Path) -> Inputs:
            scored = replace(recipe.eval, rouge_tokenizer="xlingual", rouge_tokenizer_path=str(folder))
            return digest(replace(recipe, eval=scored))

        before = scored_by(place)
        assert before.places["eval.rouge_tokenizer_path"].endswith("a")
        assert input_changes(before, scored_by(there)) == []
        (place / "merges.txt").write_text("a b")
        phrase = "ROUGE-L's tokenizer changed (eval.rouge_tokenizer_path: merges.txt)"
        assert input_changes(before, scored_by(place)) == [phrase]

    def test_its_own_code_counts_where_it_is_run(self, recipe: Recipe, tmp_path: Path) -> None:
        place = self.folder(tmp_path / "a")
        for trusted, changes in ((False, 0), (True, 2)):  # for the model and for the tokenizer
            model = ModelConfig(name_or_path=str(place), trust_remote_code=trusted)
            before = digest(replace(recipe, model=model))
            (place / "modeling.py").write_text(f"trusted = {trusted}")
            assert len(input_changes(before, digest(replace(recipe, model=model)))) == changes

    def test_a_built_in_model_is_its_name_and_its_seed(self, recipe: Recipe) -> None:
        before, other = digest(recipe), replace(recipe, train=replace(recipe.train, seed=7))
        assert input_changes(before, digest(recipe)) == []
        assert len(input_changes(before, digest(other))) == 1

    def test_a_model_of_the_hub_has_its_commit(
        self, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        model = replace(recipe, model=ModelConfig(name_or_path="owner/name"))
        assert read_inputs(model, []) is None, "it is not on this machine yet"
        found = []
        for commit in ("a" * 40, "b" * 40):
            snapshots = tmp_path / "models--owner--name" / "snapshots"
            snapshots.mkdir(parents=True, exist_ok=True)
            place = self.folder(snapshots / commit)
            (place / "model.safetensors").write_text(commit)
            (tmp_path / "models--owner--name" / "refs").mkdir(exist_ok=True)
            (tmp_path / "models--owner--name" / "refs" / "main").write_text(commit)
            found.append(digest(model))
        assert [each.base_model.revision for each in found] == ["a" * 40, "b" * 40]
        (change,) = input_changes(found[0], found[1])
        assert f"commit {'a' * 40} before and {'b' * 40} now" in change


def test_plugins_are_digested_and_may_change(tmp_path: Path) -> None:
    for name in ("recorded.py", "helper.py"):
        (tmp_path / name).write_text("")
    with plugins_forgotten():
        found, _ = load_recipe(str(write_recipe(tmp_path, plugins=["recorded"])))
        before = digest(found, TASK)
        assert list(before.plugins) == ["recorded.py"]
        assert plugin_changes(before, digest(found, TASK)) is None
        (tmp_path / "recorded.py").write_text("# Repaired.")
        now = digest(found, TASK)
    phrase = "recorded.py: the source of this plugin has changed since the run was last started"
    assert plugin_changes(before, now) == phrase
    assert input_changes(before, now, [TASK]) == []


def test_a_manifest_of_a_release_without_plugins_is_read(recipe: Recipe) -> None:
    stored = json.loads(json.dumps(dataclasses.asdict(digest(recipe, TASK))))
    del stored["plugins"]
    assert TypeAdapter(Inputs).validate_python(stored).plugins == {}


def project(folder: Path) -> Recipe:
    for split in ("train", "test"):
        write_lines(folder / "data" / f"{split}.jsonl", as_lines(records("input", "output", 4)))
    (folder / "base").mkdir()
    (folder / "run").mkdir()
    task = {"name": "one", "format": "jsonl", "path": "data"}
    path = write_recipe(folder, model={"name_or_path": str(folder / "base")}, stream={"tasks": [task]})
    return load_recipe(str(path))[0]


def test_what_moved_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    recipe = project(tmp_path / "a")
    places = input_places(recipe, tmp_path / "a" / "run")
    assert moved_inputs(recipe, places, tmp_path / "a" / "run") == recipe
    (tmp_path / "a").rename(tmp_path / "b")
    found = moved_inputs(recipe, places, tmp_path / "b" / "run")
    assert found.model.name_or_path == str(tmp_path / "b" / "base")
    assert found.stream.root == str(tmp_path / "b")
    assert found.output_dir == recipe.output_dir


def test_what_is_still_there_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    recipe = project(tmp_path / "a")
    places = input_places(recipe, tmp_path / "a" / "run")
    (tmp_path / "a" / "run").rename(tmp_path / "run")
    assert moved_inputs(recipe, places, tmp_path / "run") == recipe


def test_what_is_nowhere_stays_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    recipe = project(tmp_path / "a")
    places = input_places(recipe, tmp_path / "a" / "run")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "base").rmdir()
    assert moved_inputs(recipe, places, tmp_path / "b" / "run").model == recipe.model
