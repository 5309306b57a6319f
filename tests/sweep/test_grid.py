from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cl_dist.config.load import load_recipe
from cl_dist.errors import BadInput
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.sweep.grid import Request, build_grid
from tests.recipes import write_recipe
from tests.sweep.cells import make_grid


def problems(folder: Path, **changes: object) -> list[str]:
    with pytest.raises(BadInput) as caught:
        make_grid(folder, **changes)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


def test_a_cell_for_every_order_method_and_seed(tmp_path: Path) -> None:
    request = Request("standard-order1", tmp_path, "sequential,migu", "1,2", "0,1", changes=["stream.root=/data"])
    grid = build_grid(request)
    assert [cell.name for cell in grid.cells] == [
        "order1 sequential seed0",
        "order1 migu seed0",
        "order1 sequential seed1",
        "order1 migu seed1",
        "order2 sequential seed0",
        "order2 migu seed0",
        "order2 sequential seed1",
        "order2 migu seed1",
    ]
    assert len({cell.recipe.output_dir for cell in grid.cells}) == 8
    last = grid.cells[-1]
    assert last.folder.path == tmp_path / "runs" / "order2" / "migu" / "seed1"
    assert (last.recipe.train.seed, last.recipe.method[0].name) == (1, "migu")
    assert [task.name for task in last.recipe.stream.tasks] == ["dbpedia", "amazon", "agnews", "yahoo"]


def test_options_default_to_the_recipe(tmp_path: Path) -> None:
    (cell,) = make_grid(tmp_path, methods=None, seeds=None).cells
    assert cell.name == "own migu seed42"
    (cell,) = build_grid(Request("standard-order3", tmp_path)).cells
    assert cell.name == "order3 migu seed42"


def test_a_method_keeps_the_recipes_settings_of_it(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, method={"name": "migu", "threshold": 0.25})
    grid = build_grid(Request(str(recipe), tmp_path, "sequential,migu", changes=["method.mask=update"]))
    method = grid.cells[1].recipe.method[0]
    assert isinstance(method, MiguConfig)
    assert (method.threshold, method.mask) == (0.25, "update")


def test_compositions_and_named_rows(tmp_path: Path) -> None:
    settings = ("both:method.1.threshold=0.5", "both:train.learning_rate=0.5", "kif:method.units=row")
    settings += ("kif:method.orthogonal=0", "both:method.0.orthogonal=0", "both:method.0.units=matrix")
    grid = make_grid(tmp_path, methods="kif,both=kif+migu", seeds="3", method_changes=settings)
    alone, both = (cell.recipe for cell in grid.cells)
    assert isinstance(alone.method[0], KifConfig)
    assert (alone.method[0].units, alone.train.learning_rate) == ("row", 1e-3)
    assert [method.name for method in both.method] == ["kif", "migu"]
    assert isinstance(both.method[1], MiguConfig)
    assert (both.method[1].threshold, both.train.learning_rate) == (0.5, 0.5)


def test_the_printed_changes_make_the_same_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    request = Request(str(recipe), tmp_path, "migu,both=sequential+migu", seeds="7", changes=["train.epochs=3"])
    for cell in build_grid(request).cells:
        loaded, _ = load_recipe(str(recipe), [*cell.changes, f"output_dir={cell.recipe.output_dir}"])
        assert loaded == cell.recipe


def test_an_order_folder_is_typed_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tmp_path / "my order" / "one"
    stage.mkdir(parents=True)
    entry = '{"TC": [{"sampling strategy": "full", "dataset name": "agnews"}]}'
    for name in ("train_tasks.json", "test_tasks.json"):
        (stage / name).write_text(entry)
    recipe = tmp_path / "elsewhere" / "r.yaml"
    recipe.parent.mkdir()
    recipe.write_text(yaml.safe_dump({"model": {"name_or_path": "builtin:llama-tiny"}, "stream": {"order": 1}}))
    monkeypatch.chdir(tmp_path)
    (cell,) = build_grid(Request(str(recipe), tmp_path, orders="my order")).cells
    assert cell.order == "my-order"
    assert [task.name for task in cell.recipe.stream.tasks] == ["agnews"]


def test_epochs_of_a_task_may_differ_between_methods(tmp_path: Path) -> None:
    settings = [f"multi_task:stream.tasks.{number}.epochs=2" for number in (0, 1)]
    grid = make_grid(tmp_path, methods="sequential,multi_task", seeds="0", method_changes=settings)
    assert [cell.recipe.stream.tasks[0].epochs for cell in grid.cells] == [None, 2]


class TestRefusals:
    """All problems of a command line are reported at once."""

    def test_all_names_at_once(self, tmp_path: Path) -> None:
        found = problems(
            tmp_path,
            methods="sequental,migu+kfi,a/b=migu,migu,migu",
            seeds="0,x,0,-1",
            orders="1,9",
            method_changes=["mgu:method.threshold=1", "nonsense"],
        )
        assert [text.partition(":")[0] for text in found] == [
            "--methods sequental",
            "--methods migu+kfi",
            "--methods a/b=migu",
            "--methods",
            "--set-for mgu",
            "--set-for nonsense",
            "--orders 9",
            "--seeds",
            "--seeds",
            "--seeds",
        ]
        assert found[0].endswith("; did you mean sequential?")
        assert found[1].endswith("; did you mean kif?")

    def test_settings_that_a_method_does_not_have(self, tmp_path: Path) -> None:
        settings = ["migu:method.thresold=0.5", "hot:method.threshold=2"]
        found = problems(tmp_path, methods="sequential,migu,hot=migu", method_changes=settings)
        assert found == [
            "method migu: method.thresold: unknown key; did you mean threshold?",
            "method hot: method.threshold: 2 is not allowed; allowed: a number, at least 0, below 1",
        ]

    def test_methods_that_do_not_compose(self, tmp_path: Path) -> None:
        assert problems(tmp_path, methods="migu,kif+tasl") == [
            "method kif+tasl: method: kif and tasl do not compose: "
            "kif, tasl and recurrent_kif all fuse weights; give one of them"
        ]

    @pytest.mark.parametrize(
        "change",
        [
            "output_dir=x",
            "train.seed=1",
            "method=kif",
            "method.name=kif",
            "method.0=kif",
            "method.0={name: kif}",
            "method.0.name=kif",
        ],
    )
    def test_settings_of_the_grid_itself(self, tmp_path: Path, change: str) -> None:
        (found,) = problems(tmp_path, changes=[change])
        assert found.startswith(f"{change.partition('=')[0]} cannot be set here: ")

    def test_the_method_may_be_changed_without_methods(self, tmp_path: Path) -> None:
        (cell,) = make_grid(tmp_path, methods=None, seeds=None, changes=["method.0.name=kif"]).cells
        assert cell.name == "own kif seed42"

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ("output_dir=x", "every cell has its own folder"),
            ("train.seed=3", "all methods share the same seeds; use --seeds"),
            ("stream.order=2", "all methods learn the same tasks in the same orders; choose orders with --orders"),
            ("stream.tasks=[{name: x, format: builtin}]", "all methods learn the same tasks"),
            ("stream.tasks.0.name=x", "all methods learn the same tasks"),
            ("stream={tasks: [{name: x, format: builtin}]}", "it would replace the whole section"),
            ("method=kif", "a row is named after its methods; choose others with --methods"),
            ("method.name=kif", "a row is named after its methods"),
            ("method.0={name: kif}", "a row is named after its methods"),
            ("method.0.name=kif", "a row is named after its methods"),
            ("train={seed: 3}", "it would replace the whole section"),
        ],
    )
    @pytest.mark.parametrize("given", [{}, {"methods": None, "seeds": None}], ids=["named", "own"])
    def test_changes_that_would_make_a_rows_label_wrong(
        self, tmp_path: Path, change: str, reason: str, given: dict[str, None]
    ) -> None:
        (problem,) = problems(tmp_path, method_changes=[f"migu:{change}"], **given)
        assert problem.startswith(f"{change.partition('=')[0]} cannot be set here: {reason}")

    def test_a_setting_that_only_another_method_has(self, tmp_path: Path) -> None:
        found = problems(tmp_path, methods="replay,both=replay+kif,sequential", changes=["method.ratio=0.5"])
        assert found == [
            "--set method.ratio: this changes the recipe's own method, migu, which has no ratio; "
            "use --set-for replay:method.ratio=0.5 or --set-for both:method.0.ratio=0.5"
        ]

    def test_a_setting_that_no_method_has(self, tmp_path: Path) -> None:
        (found,) = problems(tmp_path, methods="replay", changes=["method.thresold=0.5"])
        assert found == "method.thresold: unknown key; did you mean threshold?"

    def test_orders_of_a_recipe_that_lists_its_tasks(self, tmp_path: Path) -> None:
        (found,) = problems(tmp_path, orders="1")
        assert "lists its tasks itself" in found
