"""The benchmarks' command-line options, which are checked before anything is measured. Imports no framework."""

from __future__ import annotations

import math
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_dist.benchmarks.shapes import MODELS
from cl_dist.errors import BadInput

DTYPES = ("float32", "bfloat16", "float16")
ORDERS = ("first", "second", "mixed")
DEVICES = ("cpu", "cuda")
SELECTORS = ("hft", "s2ft", "ssu")
MASKS = ("update", "gradient")
MEBI = 2**20


@dataclass(frozen=True)
class Option:
    """One command-line option."""

    flag: str
    help: str
    read: Callable[[str], Any]
    """Converts one word to a value; raises ValueError for invalid words."""
    allowed: str
    """Describes the valid values, for messages."""
    metavar: str = "N"
    many: bool = False
    """Accepts several words; the value is a tuple."""

    @property
    def name(self) -> str:
        """`--zero-stage` -> `zero_stage`."""
        return self.flag.lstrip("-").replace("-", "_")

    def value(self, words: str | Sequence[str]) -> Any:
        """The option's value, a tuple if it accepts several words. Raises BadInput."""
        return tuple(self._one(word) for word in words) if self.many else self._one(str(words))

    def _one(self, word: str) -> Any:
        try:
            return self.read(word)
        except ValueError as error:
            raise BadInput(f"{self.flag} {word}: invalid value; allowed: {self.allowed}") from error


def add_options(
    parser: ArgumentParser, names: Sequence[str], defaults: Mapping[str, Any], without_effect: Collection[str] = ()
) -> None:
    """Add the options `names`, whose values `read_options` reads."""
    for name in names:
        option = OPTIONS[name]
        many: dict[str, Any] = {"nargs": "+", "action": "extend"} if option.many else {}
        text = "accepted, but has no effect here" if name in without_effect else _help(option, defaults.get(name))
        parser.add_argument(option.flag, dest=name, metavar=option.metavar, help=text, **many)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")


def read_options(arguments: Namespace, names: Sequence[str], defaults: Mapping[str, Any]) -> Namespace:
    """The options' values: the given value, otherwise the default, otherwise None. Raises BadInput."""
    values: dict[str, Any] = {"json": arguments.json}
    for name in names:
        given = getattr(arguments, name)
        values[name] = defaults.get(name) if given is None else OPTIONS[name].value(given)
    return Namespace(**values)


def _help(option: Option, default: Any) -> str:
    if default is None or "(default: " in option.help:
        return option.help
    text = " ".join(map(_short, default)) if isinstance(default, tuple) else _short(default)
    return f"{option.help} (default: {text})"


def _short(value: Any) -> str:
    return f"{value // MEBI}Mi" if isinstance(value, int) and value and value % MEBI == 0 else str(value)


def _whole(least: int) -> Callable[[str], int]:
    """A reader of whole numbers of at least `least`, such as 4096 or 16Mi (times 2^20)."""

    def read(word: str) -> int:
        number = int(word[:-2]) * MEBI if word.endswith("Mi") else int(word)
        if number < least:
            raise ValueError(word)
        return number

    return read


def _fraction(word: str) -> float:
    number = float(word)
    if not (math.isfinite(number) and 0 <= number < 1):
        raise ValueError(word)
    return number


def _share(word: str) -> float:
    number = float(word)
    if not 0 < number <= 1:
        raise ValueError(word)
    return number


def _one_of(*words: str) -> Callable[[str], str]:
    def read(word: str) -> str:
        if word not in words:
            raise ValueError(word)
        return word

    return read


def _stage(word: str) -> int:
    return int(_one_of("0", "1", "2", "3")(word))


def _rate(word: str) -> str:
    """A rate as tc(8) writes it."""
    if not re.fullmatch(r"[1-9]\d*[kmg]bit", word):
        raise ValueError(word)
    return word


def _writable(word: str) -> Path:
    path = Path(word)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(word)
    return path


_POSITIVE = "a whole number of at least 1"


_OPTIONS = (
    Option("--hidden", "hidden sizes to measure", _whole(1), _POSITIVE, many=True),
    Option("--tokens", "numbers of tokens per step to measure", _whole(1), _POSITIVE, many=True),
    Option("--threshold", "quantile T below which rows are masked", _fraction, "a number >= 0 and < 1", "T"),
    Option("--runs", "number of rounds; each round runs every variant", _whole(1), _POSITIVE),
    Option("--dtype", ", ".join(DTYPES), _one_of(*DTYPES), ", ".join(DTYPES), "NAME"),
    Option("--threads", "threads of PyTorch (default: PyTorch's choice)", _whole(1), _POSITIVE),
    Option("--device", "cpu or cuda (default: cuda if there is a GPU)", _one_of(*DEVICES), "cpu, cuda", "NAME"),
    Option("--csv", "also write the numbers to this file", _writable, "a file in an existing folder", metavar="FILE"),
    Option("--shapes", f"the layers of a model: {', '.join(MODELS)}", _one_of(*MODELS), ", ".join(MODELS), "NAME"),
    Option("--layers", "transformer layers", _whole(1), _POSITIVE),
    Option("--intermediate", "width of the MLP (default: as in published models)", _whole(1), _POSITIVE),
    Option("--lora", "train rank-R adapters on all linear layers instead of the weights", _whole(1), _POSITIVE, "R"),
    Option("--processes", "train under DeepSpeed with N ranks on this machine", _whole(1), _POSITIVE),
    Option("--zero-stage", "ZeRO stage of the ranks (default: 2)", _stage, "0, 1, 2, 3"),
    Option(
        "--selector",
        f"train a part of the weights with a method: {', '.join(SELECTORS)}",
        _one_of(*SELECTORS),
        ", ".join(SELECTORS),
        "NAME",
    ),
    Option("--accumulation", "micro-batches of a step, with --selector (default: 1)", _whole(1), _POSITIVE),
    Option("--rate", "what each end of the link sends at most (default: as fast as the machine can)", _rate,
           "a whole number with kbit, mbit or gbit, such as 400mbit", "RATE"),
    Option("--mask", f"what happens to dropped rows, as MIGU's setting: {', '.join(MASKS)}", _one_of(*MASKS),
           ", ".join(MASKS), "NAME"),
    Option("--elements", "numbers of elements of the parameter to measure", _whole(1), _POSITIVE, many=True),
    Option("--keep", "share of the rows that are kept", _share, "a number > 0 and <= 1", "SHARE"),
    Option("--order", ", ".join(ORDERS), _one_of(*ORDERS), ", ".join(ORDERS), "NAME"),
    Option("--memory", "whether to measure peak memory too, in a separate process for each variant",
           _one_of("yes", "no"), "yes, no", "yes|no"),
)  # fmt: skip
OPTIONS = {option.name: option for option in _OPTIONS}
"""All options by name; each benchmark has some of them."""
