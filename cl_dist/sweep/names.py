"""Parses the options of `cl-dist compare` that name methods, orders, seeds, and settings of single methods.

Problems are collected, so that all of them are reported at once, before anything runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cl_dist.config.boundary import refusing
from cl_dist.config.files import expand
from cl_dist.config.words import did_you_mean, shorten
from cl_dist.errors import BadInput
from cl_dist.methods.catalogue import config_class, known
from cl_dist.tasks.orders import ORDERS

_SEED = re.compile(r"[0-9]{1,12}")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
OWN_ORDER = "own"
"""Label of the order of a recipe that lists its tasks itself."""


@dataclass(frozen=True)
class MethodChoice:
    """One entry of `--methods`."""

    label: str
    """Identifies it in the table, in folder names and in `--set-for`."""
    parts: tuple[str, ...]
    """The composed methods, in order."""
    changes: tuple[str, ...] = ()
    """`KEY=VALUE` of each `--set-for`."""


@dataclass(frozen=True)
class OrderChoice:
    """One entry of `--orders`."""

    label: str
    """Identifies it in the table and in folder names."""
    order: str | None
    """A published order, or the absolute path of a CL_Benchmark order folder; None: the recipe's order."""


class Problems:
    """Collects the problems of a command line."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def add(self, text: str) -> None:
        """Add a problem, unless it has been added before."""
        if text not in self._texts:
            self._texts.append(text)

    def check(self) -> None:
        """Raise `BadInput` with a line for every problem, if there are any."""
        if self._texts:
            raise BadInput("\n".join(self._texts))


def parse_methods(text: str, settings: Sequence[str], problems: Problems) -> list[MethodChoice]:
    """Parse `--methods a,b+c,name=d` and `--set-for LABEL:KEY=VALUE`.

    `b+c` composes two methods in that order; `name=d` names a row, so that the table can have the same method twice
    with different settings.
    """
    entries = [_parse_method(entry.strip(), problems) for entry in text.split(",")]
    labels = [label for label, _ in entries]
    _refuse_twice("--methods", labels, problems)
    changes: dict[str, list[str]] = {label: [] for label in labels}
    for setting in settings:
        label, colon, change = setting.partition(":")
        if not colon or "=" not in change or "=" in label:
            problems.add(f'--set-for {setting}: not in the form METHOD:KEY=VALUE, such as "migu:method.threshold=0.5"')
        elif label not in changes:
            known = ", ".join(labels)
            problems.add(f"--set-for {setting}: {label} is not in --methods ({known}){did_you_mean(label, labels)}")
        else:
            changes[label].append(change)
    return [MethodChoice(label, parts, tuple(changes[label])) for label, parts in entries]


def _parse_method(entry: str, problems: Problems) -> tuple[str, tuple[str, ...]]:
    """The label and the methods of one entry."""
    label, equals, methods = entry.partition("=")
    label, methods = (label.strip(), methods.strip()) if equals else ("", entry)
    parts = tuple(part.strip() for part in methods.split("+"))
    for part in parts:
        try:
            found = config_class(part) is not None
        except BadInput as error:
            problems.add(f"--methods {entry}: {error}")
            continue
        if not found:
            shown = part or '""'
            allowed = f"allowed: {', '.join(known())}{did_you_mean(part, known())}"
            problems.add(f"--methods {entry}: {shown} is not a method; {allowed}")
    if equals and not _LABEL.fullmatch(label):
        problems.add(f'--methods {entry}: "{label}" cannot name a folder; allowed: letters, digits, ".", "_", "+", "-"')
    # `module:Class` is called by its class: a label names a folder, and ends at the colon in --set-for.
    return label if equals else "+".join(part.rpartition(":")[2] for part in parts), parts


def parse_orders(text: str, problems: Problems) -> list[OrderChoice]:
    """Parse `--orders 1,superni-2,FOLDER`."""
    choices = [_parse_order(entry.strip(), problems) for entry in text.split(",")]
    _refuse_twice("--orders", [choice.label for choice in choices], problems)
    return choices


def _parse_order(entry: str, problems: Problems) -> OrderChoice:
    if entry in ORDERS:
        return OrderChoice(order_label(entry), entry)
    folder = Path(entry)
    try:
        with refusing("--orders"):
            folder = expand(entry, "--orders").absolute()
            found = bool(entry) and folder.is_dir()
    except BadInput as error:
        problems.add(str(error))
        found = True  # the problem is already reported
    if not found:
        shown = entry or '""'
        problems.add(
            f"--orders {shown}: neither a folder nor a published order; allowed: {', '.join(ORDERS)}"
            f"{did_you_mean(entry, ORDERS)}"
        )
    return OrderChoice(order_label(str(folder)), str(folder))


def order_label(order: int | str | None) -> str:
    """The label of an order: `order1`, `superni-1`, the name of an order folder, or `own` for a recipe's own tasks."""
    if order is None:
        return OWN_ORDER
    text = str(order)
    if text in ORDERS:
        return f"order{text}" if text.isdecimal() else text
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(text).name).strip(".-") or "order"


def parse_seeds(text: str, problems: Problems) -> list[int]:
    """Parse `--seeds 0,1,2`."""
    entries = [entry.strip() for entry in text.split(",")]
    seeds = [int(entry) for entry in entries if _SEED.fullmatch(entry) and int(entry) < 2**31]
    for entry in entries:
        if not _SEED.fullmatch(entry) or int(entry) >= 2**31:
            problems.add(f'--seeds: "{shorten(entry)}" is not a seed; allowed: whole numbers from 0 to {2**31 - 1}')
    _refuse_twice("--seeds", [str(seed) for seed in seeds], problems)
    return seeds


def _refuse_twice(option: str, labels: Sequence[str], problems: Problems) -> None:
    for label in dict.fromkeys(labels):
        if labels.count(label) > 1:
            problems.add(f"{option}: {label} is given twice")
