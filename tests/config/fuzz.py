"""Mutated recipes and `--set` overrides for the pre-flight, and the outcome of each.

`python -m tests.config.fuzz --examples 10000` prints how many were refused, accepted and used, or neither.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cl_dist.cli import run as run_command
from cl_dist.config.fields import Setting, settings_of
from cl_dist.config.load import dump_recipe, load_recipe, shipped_recipes, to_dict
from cl_dist.config.overrides import apply_overrides, parse_override
from cl_dist.config.schema import Recipe
from cl_dist.config.yaml_text import parse_yaml
from cl_dist.errors import BadInput
from cl_dist.tasks.orders import resolve_order

SECONDS = 20
"""A pre-flight of a tiny recipe that takes longer counts as hanging."""
MEMORY = 4 * 2**30
LONGEST_MESSAGE = 4000
"""Most characters of a message."""

RECIPE = """\
model: {name_or_path: builtin:llama-tiny}
stream:
  tasks:
    - {name: spring, format: builtin}
    - {name: mine, format: jsonl, path: mine}
  max_train_samples: 8
  max_eval_samples: 4
method: {name: sequential}
train: {epochs: 1, max_length: 64}
zero: {stage: 2}
output_dir: out
"""

ODD = [
    # wrong types and boundaries
    "null", "true", "false", "0", "-1", "1", "2", "3", "2147483647", "2147483648", "9223372036854775807",
    "9223372036854775808", "18446744073709551616", "1" + "0" * 30, "9" * 5000, "0x" + "f" * 5000, "0o" + "7" * 5000,
    "0.0", "-0.0", "0.5", "1.0", "1e308", "1e400", "5e-324", "1e-320", ".inf", "-.inf", ".nan", "0.9999999999999999",
    # odd texts
    "''", "' '", "x", "auto", "all", "none", "'1'", "'true'", '"\\ud800"', '"a\\udfffb"', '"\\0"', '"a\\nb"', '"\\x07"',
    '"\\u202e"', '"e\\u0301"', "é", "a" * 300, "a" * 70000, "/".join(["a"] * 3000), "2024-01-01", "12:30", "=", "'<<'",
    "'-'", "'--'", "builtin:", "builtin:nothing",
    # structures
    "[]", "{}", "[1]", "[x]", "['', '']", "{a: 1}", "{name: x}", "[[[[]]]]", "{a: {b: {c: {d: 1}}}}", "[null]",
    "[" * 60 + "]" * 60, "[" * 800 + "]" * 800, "{a: " * 300 + "1" + "}" * 300, "[" + "x, " * 5000 + "x]", "[a, a]",
    # YAML itself
    "!!python/object/apply:os.system [id]", "!!binary aGk=", "!!set {a}", "!!timestamp 2024-01-01", "&a [*a]",
    "*nothing", "!x y", "{1: 2}", "{true: 2}", "{[a]: 2}", "{a: 1, a: 2}", "{<<: {a: 1}}", "{<<: 3}", "{? : 1}",
    "| x", "'unclosed", "!!int x", "!!float x", "!!str 5", "!!null x", "!!map 3", "!!seq 3", "!!merge x",
    "? x", "- x", "%YAML 1.1",
]  # fmt: skip
"""Values as YAML texts."""

MERGES = "b0: &b0 {k: 1}\n" + "".join(f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 20)}]}}\n" for n in range(1, 9))
"""Twenty mappings merged, eight times over: 20**8 keys where nobody counts."""
LONG_ALIASES = f"c: &c {'x' * 10000}\nd: [{', '.join(['*c'] * 5000)}]\n"
PATHS = ["output_dir", "model.name_or_path", "stream.root", "stream.tasks.1.path", "stream.instruction_file"]
ODD_PATHS = [
    "'~'", "~/x", "~no_such_user_here/x", "'~no_such_user_here'", ".", "..", "../..", "/", "/dev/null", "/dev/zero",
    "fifo", "./fifo", "mine", "mine/train.jsonl", "loop", "loop/x", "/proc/self/mem", "/proc/x/y", "mine.yaml",
    '"mine\\0x"', "a//b", "a b", "a" * 300, "/".join(["a"] * 3000), '"a\\ud800"', '"a\\nb"', "mine/train.jsonl/x",
]  # fmt: skip
TEXTS = [
    "\0", "\ufeff", "\t", "---\n", "...\n", "&a ", "*a", "<<: *a\n", "{", "}", "[", "]", ": ", "? ", "!!python/none ",
    "'", '"', "#", "%", "\r", "\x85", "\u2028", "\ud7ff", "|\n", ">\n", "[" * 2000, "{a: " * 2000, "- " * 2000,
    "x" * 100000, "@", "`", "\U0010ffff", "a: &a {k: 1}\n", "b: &b {<<: [*a, *a]}\n", MERGES, LONG_ALIASES,
]  # fmt: skip
"""What is inserted into the text of a recipe."""

ENCODINGS = ["utf-16", "utf-32", "latin-1", "utf-8-sig"]


@dataclass(frozen=True)
class Mutant:
    """A recipe and what is typed behind it."""

    recipe: bytes | str
    """The bytes of a recipe file, or the name of a shipped one."""
    changes: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of a mutant."""

    kind: str
    """`refused`, `accepted`, or what is wrong: `crash`, `hang`, `message`, `ignored`."""
    detail: str = ""

    @property
    def good(self) -> bool:
        """Whether the rule is kept: BadInput, or accepted and used."""
        return self.kind in ("refused", "accepted")


@dataclass
class Counts:
    """Outcomes of many mutants."""

    kinds: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


class Hang(BaseException):
    """Raised by the alarm."""


def keys() -> list[str]:
    """Dotted keys of every setting, as `--set` takes them; those of methods behind `method.`."""
    return [typed(setting) for setting in settings_of(Recipe)]


def typed(setting: Setting) -> str:
    """A setting's key as `--set` takes it."""
    key = setting.key.replace("tasks[].", "tasks.1.").replace("[]", "")
    return f"method.{key.partition(').')[2]}" if key.startswith("method(") else key


def raw_deepspeed() -> list[str]:
    """Dotted keys below `zero.deepspeed`, known to DeepSpeed or not."""
    zero = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "zenflow", "offload_param.device", "nonsense", "stage")
    return [
        *(f"zero.deepspeed.zero_optimization.{name}" for name in zero),
        *(f"zero.deepspeed.{name}" for name in ("torch_autocast", "data_types.grad_accum_dtype", "x", "bf16.enabled")),
    ]


METHODS = ("sequential", "migu", "kif", "tasl", "recurrent_kif", "ewc", "lwf", "agem", "replay", "olora", "per_task")


@st.composite
def assignments(draw: st.DrawFn) -> str:
    """`key=value` with a known or a misspelt key and an odd or a listed value."""
    key = draw(st.sampled_from(KEYS) | st.sampled_from(PATHS))
    if key in PATHS and draw(st.booleans()):
        return f"{key}={draw(st.sampled_from(ODD_PATHS))}"
    if draw(st.integers(0, 2)) > 0:
        return f"{key}={draw(st.sampled_from(FITTING[key]))}"
    if draw(st.integers(0, 9)) == 0:
        key = draw(
            st.sampled_from(
                [
                    key[:-1],
                    key + "s",
                    f"{key}.x",
                    f"{key}.0",
                    key.upper(),
                    f"x.{key}",
                    f"{key}. ",
                    f"{key}{'.a' * 2000}",
                ]
            )
        )
    value = draw(st.sampled_from(ODD) | st.sampled_from(WORDS))
    return f"{key}={value}"


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """The recipe's text with a piece put in, taken out or doubled, in some encoding."""
    text = RECIPE
    for _ in range(draw(st.integers(1, 3))):
        starts = [0, *(place + 1 for place, letter in enumerate(text) if letter == "\n")]
        start = draw(st.integers(0, len(text)) | st.sampled_from(starts))
        stop = start + draw(st.integers(0, 12))
        piece = draw(st.sampled_from([*TEXTS, "", text[start:stop] * 2]) | st.sampled_from(ODD))
        text = text[:start] + piece + text[stop:]
    encoding = draw(st.sampled_from(["utf-8"] * 9 + ENCODINGS))
    return text.encode(encoding, errors="replace") + draw(st.sampled_from([b""] * 9 + [b"\xff", b"\xed\xa0\x80"]))


@st.composite
def mutants(draw: st.DrawFn) -> Mutant:
    """A recipe with one to four things that are odd about it."""
    base = draw(st.sampled_from(["plain"] * 6 + ["text"] * 3 + ["shipped"]))
    changes = draw(st.lists(assignments(), min_size=0 if base == "text" else 1, max_size=4))
    if draw(st.booleans()):
        changes = [f"method.name={draw(st.sampled_from(METHODS))}", *changes]
    if base == "shipped":
        return Mutant(draw(st.sampled_from(list(shipped_recipes()))), tuple(changes))
    return Mutant(draw(texts()) if base == "text" else RECIPE.encode(), tuple(changes))


BY_KIND = {
    "true or false": ["true", "false"],
    "a whole number": ["1", "2", "3", "8", "100", "2147483648", "9223372036854775807", "1" + "0" * 18, "1" + "0" * 30],
    "a number": ["0.1", "0.5", "1", "20", "1e-3", "1e308", "5e-324"],
    "null": ["null"],
    "a string": ["x", "mine", "input", "output", "builtin:llama-tiny", "builtin:t5-tiny", "'~/x'", "~no_user/x", "a/b"],
    "a list of strings": ["[x]", "[y, n]", "[mine]", "[first]", "[q_proj, v_proj]"],
    "a mapping of settings": [
        "{}",
        "{r: 4}",
        "{name: migu}",
        "{name_or_path: builtin:t5-tiny}",
        "{tasks: [hellaswag]}",
    ],
    "a list of mappings": ["[{name: spring, format: builtin}]", "[{name: migu}, {name: ewc}]"],
}
"""Values that a setting may well have, by the words of its description."""


def fitting(allowed: str) -> list[str]:
    """Values that a setting may well have, by the words that describe it."""
    fitting = [value for kind, values in BY_KIND.items() if kind in allowed for value in values]
    return [*fitting, *(word for word in allowed.split(", ") if " " not in word)]


KEYS = [*keys(), *raw_deepspeed()]
FITTING: dict[str, list[str]] = {key: ["1", "true", "cpu", "fp32", "{}", "5e8"] for key in KEYS} | {
    typed(setting): fitting(setting.allowed) for setting in settings_of(Recipe)
}
WORDS = sorted({word for setting in settings_of(Recipe) for word in setting.allowed.split(", ") if " " not in word})


@contextlib.contextmanager
def playground() -> Iterator[Path]:
    """An empty home and working folder with a little data, a FIFO and a link to itself; memory is limited."""
    before, home = Path.cwd(), os.environ.get("HOME")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        (folder / "mine").mkdir()
        for split in ("train", "test"):
            lines = [f'{{"input": "{split} {number}", "output": "{"yn"[number % 2]}"}}' for number in range(6)]
            (folder / "mine" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        os.mkfifo(folder / "fifo")
        (folder / "loop").symlink_to("loop")
        os.chdir(folder)
        os.environ["HOME"] = name
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY, limits[1]))
        try:
            yield folder
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            os.chdir(before)
            os.environ.pop("HOME")
            if home is not None:
                os.environ["HOME"] = home


def _mapped() -> int:
    """Bytes of address space that this process has already: libraries alone may take gigabytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def judge(mutant: Mutant, folder: Path) -> Outcome:
    """Send a mutant through everything that comes before ranks are started, and see what happens."""
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return _outcome(mutant, folder)
    except Hang:
        return Outcome("hang", f"still busy after {SECONDS} s")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _outcome(mutant: Mutant, folder: Path) -> Outcome:
    try:
        return _judge(mutant, folder)
    except BadInput as error:
        return _judge_message(str(error))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome("crash", f"{type(error).__name__} in {Path(place.filename).name}: {str(error)[:80]!r}")


def _judge(mutant: Mutant, folder: Path) -> Outcome:
    name = mutant.recipe
    if isinstance(name, bytes):
        (folder / "mine.yaml").write_bytes(name)
        name = "mine.yaml"
    recipe, recipe_dir = load_recipe(name, mutant.changes)
    recipe = resolve_order(recipe, recipe_dir)
    run_command._check(recipe, recipe_dir, False, False, True)
    problem = unused(mutant, recipe, folder)
    return Outcome("accepted") if problem is None else Outcome("ignored", problem)


def _judge_message(message: str) -> Outcome:
    """A refusal must be readable: not empty, not endless, and printable on any terminal."""
    try:
        message.encode("utf-8")
    except UnicodeEncodeError:
        return Outcome("message", "cannot be printed")
    if not message.strip() or len(message) > LONGEST_MESSAGE:
        return Outcome("message", f"{len(message)} characters")
    return Outcome("refused", message)


RESOLVED = ("stream.root", "stream.instruction_file", "output_dir", "eval.general.include_path")
"""Paths, which come out absolute."""


def unused(mutant: Mutant, recipe: Recipe, folder: Path) -> str | None:
    """What of an accepted mutant is not in the recipe that would be run and kept; None: all of it is."""
    written = folder / "written.yaml"
    written.write_text(dump_recipe(recipe), encoding="utf-8")
    if resolve_order(*load_recipe(str(written))) != recipe:
        return "config.yaml loads to another recipe"
    if recipe.output_dir.startswith("~"):
        return "output_dir: ~ is not a home"
    asked = _asked(mutant)
    used = dict(_leaves(to_dict(recipe)))
    for key, value in _leaves(asked):
        path = key.endswith((".path", ".file", *RESOLVED)) or key in RESOLVED or key == "stream.order"
        if not path and value not in ({}, None) and used.get(key) != value:
            return f"{key}: {value!r} was asked for, {used.get(key)!r} is used"
    return None


def _asked(mutant: Mutant) -> dict[str, Any]:
    """The settings that were given, as plain data."""
    if isinstance(mutant.recipe, bytes):
        data = parse_yaml(mutant.recipe.decode("utf-8-sig"), "mutant")
    else:
        data = {}
        if any(change.startswith("method.") for change in mutant.changes):
            data["method"] = to_dict(load_recipe(mutant.recipe)[0])["method"]
        if any(change.startswith("stream.tasks.") for change in mutant.changes):
            data["stream"] = {"tasks": to_dict(load_recipe(mutant.recipe)[0])["stream"]["tasks"]}
    apply_overrides(data, [parse_override(change) for change in mutant.changes])
    if isinstance(mutant.recipe, str) and not any(change.startswith("method") for change in mutant.changes):
        del data["method"]
    return data


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value with its dotted key."""
    entries: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    if not entries:
        yield key, value
    for name, entry in entries:
        yield from _leaves(entry, f"{key}.{name}" if key else str(name))


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Hang


def campaign(examples: int) -> Counts:
    """Judge so many mutants, the same ones every time."""
    counts = Counts()
    with playground() as folder:

        @settings(
            max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(mutants())
        def every(mutant: Mutant) -> None:
            outcome = judge(mutant, folder)
            counts.kinds[outcome.kind] += 1
            if not outcome.good:
                counts.faults[f"{outcome.kind}: {outcome.detail}"] += 1

        every()
    return counts


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10000)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    counts = campaign(parser.parse_args().examples)
    print("\n".join(f"{kind:<10} {count}" for kind, count in counts.kinds.most_common()))
    print("\n".join(f"  {count:>5} {fault}" for fault, count in counts.faults.most_common()))


if __name__ == "__main__":
    main()
