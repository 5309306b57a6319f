"""The grid of a sweep: one cell, which is one run, for every order, method and seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cl_dist.config.fields import info_of
from cl_dist.config.load import load_recipe, plugins_of, to_dict
from cl_dist.config.overrides import parse_override
from cl_dist.config.schema import Recipe
from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.methods.catalogue import config_class
from cl_dist.state.run_folder import RunFolder
from cl_dist.sweep.folder import SweepFolder
from cl_dist.sweep.names import (
    MethodChoice,
    OrderChoice,
    Problems,
    order_label,
    parse_methods,
    parse_orders,
    parse_seeds,
)
from cl_dist.tasks.orders import resolve_order

_OUTPUT_DIR = "every cell has its own folder in --out"


@dataclass(frozen=True)
class Request:
    """The options of `cl-dist compare`, as typed."""

    recipe: str
    """Name of a shipped recipe, or a YAML file."""
    out: Path
    """Folder of the sweep."""
    methods: str | None = None
    """None: the recipe's."""
    orders: str | None = None
    """None: the recipe's."""
    seeds: str | None = None
    """None: the recipe's."""
    changes: Sequence[str] = ()
    """`KEY=VALUE` for all cells."""
    method_changes: Sequence[str] = ()
    """`LABEL:KEY=VALUE` for the cells of one method."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    order: str
    """Label of the order."""
    method: str
    """Label of the method."""
    seed: int
    recipe: Recipe
    """The resolved recipe; its output_dir is the cell's run folder."""
    recipe_dir: Path
    """Folder that the recipe's relative paths start from."""
    changes: tuple[str, ...]
    """`KEY=VALUE` changes that turn the given recipe into this one, except for output_dir."""

    @property
    def name(self) -> str:
        """`order1 migu seed0`."""
        return f"{self.order} {self.method} seed{self.seed}"

    @property
    def folder(self) -> RunFolder:
        """The cell's run folder."""
        return RunFolder(Path(self.recipe.output_dir))


@dataclass(frozen=True)
class Grid:
    """All cells of a request in the order in which they run: seed by seed, so that every method has a result early."""

    base: Recipe
    """The recipe with the changes for all cells."""
    cells: tuple[Cell, ...]

    def labels(self, field: str) -> list[str]:
        """The distinct orders, or methods, in the order in which they were given."""
        return list(dict.fromkeys(getattr(cell, field) for cell in self.cells))


def build_grid(request: Request) -> Grid:
    """Check every name and every cell's recipe; `BadInput` has a line for each problem. Reads no data."""
    with plugins_of(request.recipe, request.changes):
        return _build_grid(request)


def _build_grid(request: Request) -> Grid:
    problems = Problems()
    _refuse_owned(request, problems)
    methods = None if request.methods is None else parse_methods(request.methods, request.method_changes, problems)
    orders = None if request.orders is None else parse_orders(request.orders, problems)
    seeds = None if request.seeds is None else parse_seeds(request.seeds, problems)
    # Each step relies on the ones before, so check after each of them.
    problems.check()
    _refuse_others_settings(request, methods or [], problems)
    problems.check()
    base, _ = load_recipe(request.recipe, request.changes)
    # What the options leave open is the recipe's.
    if methods is None:
        own = "+".join(method.name for method in base.method)
        methods = parse_methods(own, request.method_changes, problems)
    if orders is None:
        orders = [OrderChoice(order_label(base.stream.order), None)]
    elif base.stream.tasks:
        problems.add(f"--orders: {request.recipe} lists its tasks itself (stream.tasks); only stream.order can vary")
    problems.check()
    cells = tuple(_cells(request, base, methods, orders, seeds or [base.train.seed], problems))
    problems.check()
    return Grid(base, cells)


def _refuse_owned(request: Request, problems: Problems) -> None:
    """Reject changes to settings that the grid itself sets, because the label of a row would then be wrong."""
    owners: dict[tuple[str, ...], str | None] = {
        ("output_dir",): _OUTPUT_DIR,
        ("train", "seed"): "use --seeds to choose seeds" if request.seeds is not None else None,
        ("stream", "order"): "use --orders to choose orders" if request.orders is not None else None,
    }
    for text in request.changes:
        path = _path(text)
        reason = owners.get(path)
        if request.methods is not None and _is_method(path):
            reason = "use --methods to choose methods"
        _add_owned(text, reason, problems)
    for setting in request.method_changes:
        text = setting.partition(":")[2]
        _add_owned(text, _owner_for_one_method(_path(text)), problems)


def _add_owned(text: str, reason: str | None, problems: Problems) -> None:
    if reason is not None:
        problems.add(f"{text.partition('=')[0].strip()} cannot be set here: {reason}")


def _path(text: str) -> tuple[str, ...]:
    """The key of `KEY=VALUE`, split into parts; empty for any other text, which is reported elsewhere."""
    return parse_override(text).path if "=" in text else ()


def _refuse_others_settings(request: Request, methods: Sequence[MethodChoice], problems: Problems) -> None:
    """Reject `--set method.X`, which changes the recipe's own method, if only other methods have a setting X."""
    given = [text for text in request.changes if _path(text)[:1] == ("method",)]
    if not given or not methods:
        return
    # Load the recipe without these changes, which may not even be valid for it.
    own, _ = load_recipe(request.recipe, [text for text in request.changes if text not in given])
    known = {field for method in own.method for field in info_of(type(method))}
    for text in given:
        key, _, value = text.partition("=")
        path = _path(text)  # method.0.x.y or method.x.y; the setting is (x, y)
        setting = path[2:] if path[1].isdecimal() else path[1:]
        hints = [f"--set-for {hint}={value}" for method in methods for hint in _places(method, setting)]
        if setting[0] not in known and hints:
            names = "+".join(method.name for method in own.method)
            problems.add(
                f"--set {key.strip()}: this changes the recipe's own method, {names}, which has no {setting[0]}; "
                f"use {listed(hints, last='or')}"
            )


def _places(method: MethodChoice, setting: tuple[str, ...]) -> Iterator[str]:
    """The `--set-for` keys of a setting in an entry of `--methods`."""
    for number, part in enumerate(method.parts):
        cls = config_class(part)
        if cls is not None and setting[0] in info_of(cls):
            place = f"{number}." if len(method.parts) > 1 else ""
            yield f"{method.label}:method.{place}{'.'.join(setting)}"


def _is_method(path: tuple[str, ...]) -> bool:
    """Whether a key can select another method: `method`, `method.name`, `method.0` or `method.0.name`."""
    if path[:1] != ("method",):
        return False
    rest = path[2:] if len(path) > 1 and path[1].isdecimal() else path[1:]
    return rest in ((), ("name",))


def _owner_for_one_method(path: tuple[str, ...]) -> str | None:
    """Why a setting cannot be changed for one method only: its row would have a different seed, order or method than
    its label says.
    """
    if _is_method(path):
        return "a row is named after its methods; choose others with --methods, such as --methods NAME=B+C"
    if path in (("train",), ("stream",)):
        return f"it would replace the whole section, including seed and tasks; set single keys, such as {path[0]}.KEY"
    if path == ("train", "seed"):
        return "all methods share the same seeds; use --seeds to choose them"
    if path[:2] in (("stream", "order"), ("stream", "tasks")) and path[3:] != ("epochs",):
        return "all methods learn the same tasks in the same orders; choose orders with --orders, or tasks with --set"
    return _OUTPUT_DIR if path == ("output_dir",) else None


def _cells(
    request: Request,
    base: Recipe,
    methods: Sequence[MethodChoice],
    orders: Sequence[OrderChoice],
    seeds: Sequence[int],
    problems: Problems,
) -> Iterator[Cell]:
    sweep = SweepFolder(request.out)
    for order in orders:
        for seed in seeds:
            for method in methods:
                changes = _changes(request, base, method, order, seed)
                path = sweep.run(order.label, method.label, seed)
                try:
                    recipe, recipe_dir = load_recipe(request.recipe, changes)
                    recipe = resolve_order(replace(recipe, output_dir=str(path.absolute())), recipe_dir)
                except BadInput as error:
                    for text in str(error).splitlines():
                        problems.add(f"method {method.label}: {text}")
                    continue
                yield Cell(order.label, method.label, seed, recipe, recipe_dir, tuple(changes))


def _changes(request: Request, base: Recipe, method: MethodChoice, order: OrderChoice, seed: int) -> list[str]:
    """The `--set` values of one cell; the cell's own come last, so that they win."""
    changes = [*request.changes]
    if request.methods is not None:
        # Changes to the recipe's own method must not be applied to all methods.
        changes = [text for text in changes if parse_override(text).path[0] != "method"]
        changes.append(f"method={json.dumps(_settings(base, method.parts))}")
    if order.order is not None:
        changes.append(f"stream.order={order.order if order.order.isdecimal() else json.dumps(order.order)}")
    return [*changes, f"train.seed={seed}", *method.changes]


def _settings(base: Recipe, parts: Sequence[str]) -> list[dict[str, object]]:
    """The `method` section for these methods; methods that the recipe has already keep the recipe's settings."""
    own = {entry["name"]: _without_defaults(entry) for entry in to_dict(base)["method"]}
    return [own.get(part, {"name": part}) for part in parts]


def _without_defaults(entry: dict[str, object]) -> dict[str, object]:
    """A method's settings without those that have their defaults, so that commands stay short."""
    cls = config_class(entry["name"])
    assert cls is not None  # the recipe has been read
    fields = info_of(cls)
    defaults = {key: info.get_default(call_default_factory=True) for key, info in fields.items()}
    return {key: value for key, value in entry.items() if key == "name" or value != defaults[key]}
