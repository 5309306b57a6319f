"""No code outside a method's folder refers to it by name, so a new method touches one folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from cl_dist.methods.catalogue import built_in

ROOT = Path(__file__).parents[2]
ROOMS = ROOT / "cl_dist" / "methods"
FAMILIES = {
    "tasl": "kif",
    "recurrent_kif": "kif",
    "olora": "inclora",
    **dict.fromkeys(("given", "hft", "s2ft", "sift", "ssu"), "selective"),
    **dict.fromkeys(("gmt", "mofo"), "elements"),
}
"""Methods that build on another one."""
REASONS = {
    ("cl_dist/methods/catalogue.py", "sequential"): "the default method",
    ("cl_dist/cli/init.py", "migu"): "the method of a first recipe",
    ("cl_dist/methods/shared/samples.py", "replay"): "names a stream of random numbers and must not change",
}
DATA_FORMATS = {"tasl"}
"""Methods whose names also belong to data formats, outside `cl_dist/methods`."""
WORDS = {"given"}
"""Methods whose names are also names of variables."""


def sources() -> Iterator[Path]:
    for folder in ("cl_dist", "kernels", "launch"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def words(path: Path) -> Iterator[str]:
    """Every string, name and attribute in a file, and the methods' folders that it imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cl_dist.methods."):
            yield str(node.module).split(".")[2]


def room_of(path: Path) -> str:
    """The method's folder that a file is in, or ""."""
    parts = path.relative_to(ROOMS).parts if path.is_relative_to(ROOMS) else ()
    return parts[0] if len(parts) > 1 else ""


def classes() -> dict[str, str]:
    """The folder of each class of settings and each method's class."""
    found = {}
    for name, cls in built_in().items():
        found[cls.__name__] = name
        room, _, method = cls.METHOD.partition(":")
        found[method] = room.split(".")[2]
    return found


def strangers() -> Iterator[str]:
    """Yield the places that name a method outside its folder."""
    homes = {**{name: name for name in built_in()}, **classes()}
    for path in sources():
        place, own = path.relative_to(ROOT).as_posix(), room_of(path)
        for word in dict.fromkeys(words(path)):
            if (
                word in WORDS
                or word not in homes
                or homes[word] in (own, FAMILIES.get(own))
                or own == FAMILIES.get(homes[word])
            ):
                continue
            if (place, word) in REASONS or (word in DATA_FORMATS and not path.is_relative_to(ROOMS)):
                continue
            yield f"{place}: {word}"


def test_no_method_is_named_outside_its_folder() -> None:
    assert list(strangers()) == []


def test_every_exception_is_needed() -> None:
    assert [key for key in REASONS if key[1] not in words(ROOT / key[0])] == []
