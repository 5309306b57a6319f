from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from cl_dist.config.load import dump_recipe, load_recipe, shipped_recipes, to_dict
from cl_dist.config.problems import describe_problems
from cl_dist.config.schema import Recipe
from cl_dist.config.yaml_text import render_yaml
from cl_dist.errors import BadInput
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.sequential.config import SequentialConfig
from cl_dist.tasks.orders import resolve_order


def minimal() -> dict[str, Any]:
    """The smallest recipe that loads."""
    return {
        "model": {"name_or_path": "builtin:llama-tiny"},
        "stream": {"tasks": [{"name": "spring", "format": "builtin"}]},
    }


def write(path: Path, data: dict[str, Any]) -> str:
    """Write a recipe file and return its path as typed on a command line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_yaml(data), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_its_dump_loads_to_the_same(name: str, tmp_path: Path) -> None:
    recipe, _ = load_recipe(name)
    dumped = tmp_path / "elsewhere" / "config.yaml"
    dumped.parent.mkdir()
    dumped.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(dumped))[0] == recipe


def test_the_shipped_recipes_are_there() -> None:
    assert {"quickstart", "standard-order1", "standard-order2", "standard-order3"} <= set(shipped_recipes())


def test_quickstart_is_two_ranks_zero_2_and_at_least_four_built_in_tasks() -> None:
    recipe, _ = load_recipe("quickstart")
    assert (recipe.launch.processes, recipe.zero.stage) == (2, 2)
    assert len(recipe.stream.tasks) >= 4
    assert {task.format for task in recipe.stream.tasks} == {"builtin"}


@pytest.mark.parametrize(
    ("number", "order"),
    [
        (1, "dbpedia amazon yahoo agnews"),
        (2, "dbpedia amazon agnews yahoo"),
        (3, "yahoo amazon agnews dbpedia"),
    ],
)
def test_the_standard_orders_are_the_published_ones(number: int, order: str) -> None:
    recipe = resolve_order(*load_recipe(f"standard-order{number}"))
    assert [task.name for task in recipe.stream.tasks] == order.split()
    assert recipe.method == (MiguConfig(name="migu", threshold=0.7),)


def test_output_dir_is_named_after_the_recipe_where_it_is_absent(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path / "mine.yaml", minimal()))[0].output_dir == "runs/mine"
    recipe, _ = load_recipe(write(tmp_path / "mine.yaml", {**minimal(), "output_dir": "elsewhere"}))
    assert recipe.output_dir == "elsewhere"


@pytest.mark.parametrize("given", [None, {"name": "sequential"}, [{"name": "sequential"}], {}])
def test_one_method_may_be_absent_a_mapping_or_a_list(given: Any, tmp_path: Path) -> None:
    data = minimal() if given is None else {**minimal(), "method": given}
    file = write(tmp_path / "mine.yaml", data)
    if given == {}:
        with pytest.raises(BadInput, match=r"^method.name: missing; allowed: agem, .*sift, sparse_memory, ssu, tasl$"):
            load_recipe(file)
    else:
        assert load_recipe(file)[0].method == (SequentialConfig(),)


@pytest.mark.parametrize(
    ("train", "longest"),
    [({}, 50), ({"max_length": 200}, 50), ({"max_length": 32}, 16), ({"max_length": 32, "max_target_length": 4}, 4)],
)
def test_the_longest_answer_leaves_room_for_the_prompt(train: dict[str, int], longest: int, tmp_path: Path) -> None:
    recipe, _ = load_recipe(write(tmp_path / "mine.yaml", {**minimal(), "train": train}))
    assert recipe.train.max_target_length == longest


def test_to_dict_spells_every_setting_out_in_json_types() -> None:
    data = to_dict(load_recipe("quickstart")[0])
    assert data["method"] == [{"name": "sequential"}]
    assert data["model"]["lora"] is None
    assert isinstance(data["stream"]["tasks"], list)
    assert data["zero"] == {"stage": 2, "offload": False, "deepspeed": {}}


class TestPaths:
    """Paths of data mean the same from the recipe and from the run folder's config.yaml."""

    def tasks(self, *paths: str | None) -> list[dict[str, str | None]]:
        return [{"name": f"t{number}", "format": "jsonl", "path": path} for number, path in enumerate(paths)]

    def test_they_start_from_the_recipes_folder(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a" / "mine.yaml", {**minimal(), "stream": {"root": "data", "tasks": self.tasks("x")}})
        recipe, folder = load_recipe(file)
        assert folder == tmp_path / "a"
        assert recipe.stream.root == str(tmp_path / "a" / "data")
        assert recipe.stream.tasks[0].path == "x"

    def test_without_a_root_the_recipes_folder_is_the_root(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a" / "mine.yaml", {**minimal(), "stream": {"tasks": self.tasks("x")}})
        assert load_recipe(file)[0].stream.root == str(tmp_path / "a")

    def test_one_beside_the_recipe_and_not_below_the_root_becomes_absolute(self, tmp_path: Path) -> None:
        for folder in ("a/data/both", "a/both", "a/beside"):
            (tmp_path / folder).mkdir(parents=True)
        stream = {"root": "data", "tasks": self.tasks("both", "beside", "nowhere")}
        recipe, _ = load_recipe(write(tmp_path / "a" / "mine.yaml", {**minimal(), "stream": stream}))
        assert [task.path for task in recipe.stream.tasks] == ["both", str(tmp_path / "a/beside"), "nowhere"]

    def test_a_root_typed_on_the_command_line_starts_from_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = write(tmp_path / "a" / "mine.yaml", {**minimal(), "stream": {"tasks": self.tasks("x")}})
        monkeypatch.chdir(tmp_path)
        assert load_recipe(file, ["stream.root=data"])[0].stream.root == str(tmp_path / "data")

    def test_a_shipped_recipes_paths_start_from_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        recipe, folder = load_recipe("standard-order1")
        assert (recipe.stream.root, folder) == (str(tmp_path / "data/long_sequence"), tmp_path)

    def test_a_stream_without_paths_is_left_alone(self) -> None:
        assert load_recipe("quickstart")[0].stream.root is None


@pytest.mark.parametrize(
    ("train", "evaluation", "longest"),
    [
        ({}, {}, 50),
        ({"max_target_length": 128}, {}, 128),
        ({"max_length": 32}, {"batch_size": 3}, 16),
        ({"max_target_length": 128}, {"max_new_tokens": 9}, 9),
    ],
)
def test_what_is_generated_is_as_long_as_what_is_learnt(
    tmp_path: Path, train: dict[str, int], evaluation: dict[str, int], longest: int
) -> None:
    recipe, _ = load_recipe(write(tmp_path / "mine.yaml", {**minimal(), "train": train, "eval": evaluation}))
    assert recipe.eval.max_new_tokens == longest
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "dumped.yaml"))[0] == recipe


def test_a_date_is_a_string_in_yaml(tmp_path: Path) -> None:
    recipe, _ = load_recipe("quickstart", ["train.date=2031-01-02"])
    assert recipe.train.date == "2031-01-02"
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "dumped.yaml"))[0] == recipe


def test_a_tokenizer_folder_is_found_next_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for written, found in (("mine", str(tmp_path / "mine")), ("openai-community/gpt2", "openai-community/gpt2")):
        settings = {"rouge_tokenizer": "xlingual", "rouge_tokenizer_path": written}
        recipe, _ = load_recipe(write(tmp_path / "mine.yaml", {**minimal(), "eval": settings}))
        assert recipe.eval.rouge_tokenizer_path == found


def test_problems_of_a_whole_recipe_are_one_sentence() -> None:
    with pytest.raises(ValidationError) as error:
        TypeAdapter(Recipe).validate_json("{")
    assert describe_problems(error.value)[0].startswith("recipe: Invalid JSON")


def test_a_message_lists_the_first_ten_problems(tmp_path: Path) -> None:
    data = {**minimal(), "train": {f"x{number}{'y' * 1000}": 1 for number in range(30)}}
    with pytest.raises(BadInput) as error:
        load_recipe(write(tmp_path / "mine.yaml", data))
    lines = str(error.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 20 more problems"
    assert all(len(line) < 600 for line in lines)


def test_numbers_and_waits_beyond_any_machine_are_refused() -> None:
    for setting, message in {
        "train.epochs=2147483648": "at least 1 (and never above 2147483647)",
        "train.learning_rate=1e308": "above 0 (and never above 1e+30)",
        "train.eps=1e-320": "a number, at least 1e-30",
        "launch.timeout_seconds=1e308": "a number, at least 0.1, at most 31536000",
        "launch.hang_seconds=1e308": "a number, at least 0.1, at most 31536000",
        "checkpoint.every_minutes=1e308": "a number, above 0, at most 525600",
        "stream.max_train_samples=99999999999999999999": "(and never above 2147483647)",
    }.items():
        with pytest.raises(BadInput) as error:
            load_recipe("quickstart", [setting])
        assert message in str(error.value)


class TestHome:
    """`~` is the home folder in every path of a recipe; a user that is not there is named."""

    KEYS = ("output_dir", "stream.root", "stream.instruction_file", "stream.tasks.0.path", "eval.general.include_path")

    def load(self, key: str, path: str, folder: Path) -> Recipe:
        data = {**minimal(), "stream": {"tasks": [{"name": "t", "format": "cl_benchmark"}]}}
        data["eval"] = {"general": {"tasks": ["hellaswag"]}}
        return load_recipe(write(folder / "mine.yaml", data), [f"{key}={path}"])[0]

    def value(self, recipe: Recipe, key: str) -> Any:
        value: Any = to_dict(recipe)
        for part in key.split("."):
            value = value[int(part)] if part.isdecimal() else value[part]
        return value

    @pytest.mark.parametrize("key", KEYS)
    def test_it_is_put_in(self, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert self.value(self.load(key, "~/x", tmp_path), key) == str(tmp_path / "home" / "x")
        assert self.value(self.load("output_dir", "a~/x", tmp_path), "output_dir") == "a~/x"

    @pytest.mark.parametrize("key", KEYS)
    def test_an_unknown_user_is_refused(self, key: str, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=f"^{key}: ~no_such_user/x: there is no user 'no_such_user'"):
            self.load(key, "~no_such_user/x", tmp_path)

    @pytest.mark.parametrize("key", KEYS[1:])
    def test_a_name_that_is_too_long_is_reported_with_its_setting(self, key: str, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=f"^{key}: the path .*aaa.* cannot be used: File name too long"):
            self.load(key, "a" * 300, tmp_path)


def test_a_folder_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"d\xff")
    file = write(folder / "mine.yaml", {**minimal(), "stream": {"root": "data", "tasks": [{"name": "t"}]}})
    with pytest.raises(BadInput, match=r"^recipe: the path .*d\\udcff is not UTF-8 text"):
        load_recipe(file)
