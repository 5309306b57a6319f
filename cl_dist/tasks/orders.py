"""The task orders of the papers, and the order folders that come with CL_Benchmark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cl_dist.config.boundary import refusing
from cl_dist.config.files import expand, is_folder
from cl_dist.config.problems import describe_problems
from cl_dist.config.schema import Recipe, TaskConfig
from cl_dist.config.words import shorten
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import enumerate_names, json_type, missing, read_json_object, require_folder

ORDERS: dict[str, tuple[str, ...]] = {
    order: tuple(names.split())
    for order, names in {
        "1": "dbpedia amazon yahoo agnews",
        "2": "dbpedia amazon agnews yahoo",
        "3": "yahoo amazon agnews dbpedia",
        "4": "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
        "5": "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
        "6": "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
        "superni-1": "1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875",
        "superni-2": "748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875",
    }.items()
} | {
    order: tuple(f"sgd_{service}" for service in services.split())
    for order, services in {
        "sgd-1": "services_4 flights_1 services_3 flights_3 trains_1 homes_2 rentalcars_2 restaurants_1 music_1 "
        "hotels_4 media_2 hotels_3 rentalcars_3 hotels_1 homes_1",
        "sgd-2": "hotels_4 flights_3 rentalcars_2 rentalcars_3 media_2 restaurants_1 music_1 trains_1 services_3 "
        "homes_2 hotels_3 flights_1 services_4 homes_1 hotels_1",
        "sgd-3": "services_4 hotels_3 music_1 flights_1 hotels_1 hotels_4 media_2 flights_3 trains_1 homes_1 "
        "restaurants_1 rentalcars_2 services_3 homes_2 rentalcars_3",
        "sgd-4": "hotels_1 media_2 homes_1 music_1 services_4 restaurants_1 flights_1 hotels_4 services_3 homes_2 "
        "hotels_3 trains_1 flights_3 rentalcars_2 rentalcars_3",
        "sgd-5": "services_4 flights_3 homes_1 flights_1 music_1 services_3 rentalcars_3 media_2 restaurants_1 "
        "hotels_1 rentalcars_2 hotels_4 hotels_3 homes_2 trains_1",
        "sgd-6": "restaurants_1 services_3 flights_1 trains_1 hotels_1 services_4 hotels_3 rentalcars_2 flights_3 "
        "hotels_4 homes_2 homes_1 rentalcars_3 media_2 music_1",
    }.items()
}
"""Orders 1 to 3: standard benchmark; 4 to 6: long benchmark; superni: task numbers of Super-NaturalInstructions; sgd:
services of Schema-Guided Dialogue.
"""


def resolve_order(recipe: Recipe, recipe_dir: Path) -> Recipe:
    """Replace `stream.order` by the tasks that it names. A recipe without an order is returned unchanged.

    A relative order folder starts from `recipe_dir`. Raises BadInput if no such order or folder exists.
    """
    if recipe.stream.order is None:
        return recipe
    with refusing("stream.order"):
        return _with_tasks(recipe, recipe_dir)


def _with_tasks(recipe: Recipe, recipe_dir: Path) -> Recipe:
    stream = recipe.stream
    order = str(stream.order)
    names = ORDERS.get(order) or read_order(_order_folder(recipe_dir, order))
    epochs = stream.epochs_by_task
    unknown = next((name for name in epochs if name not in names), None)
    if unknown is not None:
        raise BadInput(f'stream.epochs_by_task: "{unknown}" is no task of order {order}: {enumerate_names(names)}')
    root = str(stream.root or recipe_dir)
    try:
        tasks = tuple(TaskConfig(name=n, format=stream.format, path=root, epochs=epochs.get(n)) for n in names)
        return replace(recipe, stream=replace(stream, tasks=tasks, order=None, epochs_by_task={}))
    except ValidationError as error:  # settings of the recipe that name tasks which this order does not have
        raise BadInput("\n".join(describe_problems(error, [each.name for each in recipe.method]))) from error


def _order_folder(recipe_dir: Path, order: str) -> Path:
    folder = recipe_dir / expand(order, "stream.order")
    if not is_folder(folder):
        raise BadInput(f"stream.order: {shorten(order)!r} is neither a folder nor one of {enumerate_names(ORDERS)}")
    return folder


def read_order(folder: Path) -> list[str]:
    """The data sets of a CL_Benchmark order folder, in the order in which the model learns them.

    The folder has one sub-folder per stage. `train_tasks.json` names the data set that the stage learns, and
    `test_tasks.json` all data sets learnt so far. The names of the sub-folders show no order, but the growing test
    lists do.

    Raises BadInput if a stage does not learn exactly one data set, or if the test lists do not grow stage by stage.
    """
    stages = [read_stage(path) for path in sorted(require_folder(folder).iterdir()) if path.is_dir()]
    if not stages:
        raise missing(folder / "*" / "train_tasks.json")
    stages.sort(key=lambda stage: len(stage[1]))
    order = [name for name, _ in stages]
    for position, (name, tested) in enumerate(stages, start=1):
        if tested != set(order[:position]):
            raise BadInput(
                f"{folder}: the order is unclear, because stage {name!r} tests {enumerate_names(tested)}; every stage "
                "must test the data sets learnt so far"
            )
    return order


def read_stage(folder: Path) -> tuple[str, set[str]]:
    """The data set that a stage learns, and the ones that it tests."""
    learnt = read_task_list(folder / "train_tasks.json")
    if len(learnt) != 1:
        raise BadInput(f"{folder / 'train_tasks.json'} must name one data set, not {enumerate_names(learnt)}")
    return learnt[0], set(read_task_list(folder / "test_tasks.json"))


def read_task_list(path: Path) -> list[str]:
    """The data sets in a `*_tasks.json`, from all of its groups."""
    content = read_json_object(path, "of groups")
    for group, entries in content.items():
        if not isinstance(entries, list):
            raise BadInput(f"{path}: group {group!r} must be a list of data sets, not {json_type(entries)}")
    return [dataset_name(entry, path) for entries in content.values() for entry in entries]


def dataset_name(entry: Any, path: Path) -> str:
    """The name in one entry of a task list. Raises BadInput for an entry without one."""
    name = entry.get("dataset name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise BadInput(f"{path}: every entry must be an object with a text `dataset name`")
    return name
