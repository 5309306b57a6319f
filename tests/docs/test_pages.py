"""What the pages name exists: links, files, modules, code, commands with their options, make targets and settings."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from io import StringIO
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

from cl_dist.cli import main
from cl_dist.cli.parser import build_parser

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LIVING = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""Pages about the code as it is now. A changelog also names what has since been renamed."""
ABOUT_CODE = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]

CODE = ("benchmarks", "cl_dist", "kernels", "launch", "tests", "tools")
SHELL = ("", "bash", "sh", "console")
SECTIONS = ("checkpoint", "eval", "launch", "method", "model", "stream", "train", "zero")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


@cache
def text_of(page: Path) -> str:
    """The page, without what the zoo writes into it: that quotes other projects' parameter names."""
    return page.read_text(encoding="utf-8").partition("<!-- The rest is written by")[0]


def spans_of(text: str) -> list[str]:
    """What stands in backticks outside of code blocks, also where a line breaks in it."""
    paragraphs = FENCE.sub("", text).split("\n\n")
    return [span for each in paragraphs for span in re.findall(r"`([^`]+)`", re.sub(r"\n *", " ", each))]


def blocks_of(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(params=LIVING, ids=lambda page: page.name)
def text(request: pytest.FixtureRequest) -> str:
    return text_of(request.param)


# Links


def anchors_of(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


def test_relative_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, text_of(page)) == []


# Files, modules, code


def missing_files(text: str) -> list[str]:
    """Paths from the repository's root, in backticks or not, that name nothing."""
    text = re.sub(r"https?://\S+", "", text)
    found = re.findall(rf"(?<![\w./~-])(?:docs|{'|'.join(CODE)})/[\w./*-]*[\w*]", text)
    return [path for path in found if not list(ROOT.glob(path))]


def missing_modules(text: str) -> list[str]:
    """Modules that a command runs and that cannot be imported."""
    found = re.findall(r"python -m (tests[\w.]+|cl_dist[\w.]*)", text)
    return [module for module in found if find_spec(module.rstrip(".")) is None]


@cache
def sources() -> dict[str, str]:
    """Every source file by its path, with a leading slash."""
    files = [ROOT / "setup.py"]
    files += [file for folder in CODE for file in (ROOT / folder).rglob("*") if file.suffix in {".py", ".sh", ".yaml"}]
    return {f"/{file.relative_to(ROOT)}": file.read_text(encoding="utf-8") for file in files}


def missing_code(text: str) -> list[str]:
    """File names in backticks that no file's path ends with; classes, and their attributes, that no source defines."""
    missing = []
    for span in spans_of(text):
        owner, _, attribute = span.partition(".")
        if re.fullmatch(r"[\w/]+\.(py|sh)", span):
            good = any(path.endswith(f"/{span}") for path in sources())
        elif re.fullmatch(r"([A-Z][a-z]+)+(\.[a-z_]+)?", span) and (attribute or re.search(r"[a-z][A-Z]", owner)):
            files = [
                file for file in sources().values() if re.search(rf"^(class {owner}\b|{owner} = )", file, re.MULTILINE)
            ]
            good = any(re.search(rf"\bdef {attribute}\(|\b{attribute} *[:=]", file) for file in files)
            good = good if attribute else bool(files)
        else:
            good = True
        if not good:
            missing.append(span)
    return missing


def test_files_and_modules_exist(text: str) -> None:
    assert missing_files(text) == []
    assert missing_modules(text) == []


@pytest.mark.parametrize("page", ABOUT_CODE, ids=lambda page: page.name)
def test_code_that_is_named_exists(page: Path) -> None:
    assert missing_code(text_of(page)) == []


# Commands


@cache
def parser() -> ArgumentParser:
    return build_parser()


def commands_in(lines: list[str]) -> list[list[str]]:
    """The words behind `cl-dist` or `-m cl_dist` in every line that calls it, without comments and redirections."""
    calls = [
        re.search(r"^(?:[\w./=-]+ )*?(?:[\w./]*/)?(?:cl-dist|(?:-m|--module) cl_dist) (\S.*)", line) for line in lines
    ]
    words = [shlex.split(call[1], comments=True) for call in calls if call]
    return [list(takewhile(lambda word: word not in (">", "|"), each)) for each in words]


def rejected(text: str) -> list[str]:
    """Commands of code blocks that the parser does not take as they are; it would take abridged options."""
    lines = "\n".join(blocks_of(text, *SHELL)).replace("\\\n", " ").splitlines()
    return [" ".join(words) for words in commands_in(lines) if not _parses(words) or not _known(words, parser())]


def _parses(words: list[str]) -> bool:
    try:
        parser().parse_args(words)
    except SystemExit:
        return False
    return True


def unknown(text: str) -> list[str]:
    """Commands in backticks, which may be abridged, whose subcommand or options do not exist, and options of none."""
    spans = spans_of(text)
    commands = [" ".join(words) for words in commands_in(spans) if not _known(words, parser())]
    return [
        *commands,
        *(
            span
            for span in spans
            if span.startswith("--") and span.split()[0].split("=")[0].rstrip(":") not in options()
        ),
    ]


@cache
def options() -> set[str]:
    """The options of all commands, and those of other programs that pages speak of."""
    found = {"--empty_inner_score_flag", "--ipc", "--max-lora-rank", "--no-deps"}
    parsers = [parser()]
    while parsers:
        one = parsers.pop()
        found |= set(one._option_string_actions)
        parsers.extend(
            each for action in one._actions if isinstance(action.choices, dict) for each in action.choices.values()
        )
    return found


def _known(words: list[str], command: ArgumentParser) -> bool:
    choices = [action.choices for action in command._actions if isinstance(action.choices, dict)]
    if choices and words and not words[0].startswith("-"):
        return words[0] in choices[0] and _known(words[1:], choices[0][words[0]])
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    return set(given) <= set(command._option_string_actions)


def unknown_script_options(text: str) -> list[str]:
    """Options of scripts and test programs that their source does not mention."""
    commands = ["\n".join(blocks_of(text, *SHELL)).replace("\\\n", " "), *spans_of(text)]
    calls = re.findall(r"python (benchmarks/\S+\.py|-m tests\.[\w.]+)([^\n]*)", "\n".join(commands))
    bad = []
    for program, arguments in calls:
        path = program if program.endswith(".py") else program.removeprefix("-m ").replace(".", "/")
        files = [file for file in (f"/{path}", f"/{path}.py", f"/{path}/__main__.py") if file in sources()]
        source = "".join(sources()[file] for file in files)
        bad.extend(option for option in re.findall(r"--[a-z-]+", arguments) if f'"{option}"' not in source)
    return bad


def missing_targets(text: str) -> list[str]:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [*"".join(blocks_of(text, *SHELL)).splitlines(), *spans_of(text)]
    called = [line.split()[1] for line in lines if re.match(r"make [a-z-]+", line)]
    return [target for target in called if target not in targets]


def test_commands_are_ones_that_the_parser_takes(text: str) -> None:
    assert rejected(text) == []
    assert unknown(text) == []
    assert missing_targets(text) == []
    assert unknown_script_options(text) == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "cl_dist/recipes").glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_comments_of_recipes_name_what_exists(recipe: Path, settings: set[str]) -> None:
    comments = "\n".join(re.findall(r"# ?(.*)", recipe.read_text(encoding="utf-8")))
    block = "```\n" + re.sub(r"(?m)^ +|[\[\]]", "", comments) + "\n```\n"
    assert rejected(block) == []
    assert unknown_settings(comments, settings) == []
    assert missing_files(comments) == []


# Settings


@pytest.fixture(scope="module")
def explained() -> dict[str, str]:
    """The text of every setting by its name, such as `method(kif).tau`, as `cl-dist recipe --explain` prints it."""
    printed = StringIO()
    with redirect_stdout(printed):
        assert main(["recipe", "--explain"]) == 0
    return {block.partition("\n")[0]: block for block in printed.getvalue().strip().split("\n\n")}


@pytest.fixture(scope="module")
def settings(explained: dict[str, str]) -> set[str]:
    """Every setting's dotted name; a method's own as `method.threshold`."""
    return {_plain(name) for name in explained}


def _plain(name: str) -> str:
    """Without positions in lists and without the method that has the setting."""
    return re.sub(r"\[\]|\(\w+\)|\.\d+(?=\.)", "", name)


def unknown_settings(text: str, settings: set[str]) -> list[str]:
    """Dotted names that are no settings: what `--set` assigns, backticks that hold nothing else, and words in prose."""
    prose = re.sub(r"https?://\S+", "", FENCE.sub("", text))
    found = [
        *re.findall(r"--set '?([\w.]+)=", text),
        *re.findall(r"--set-for '?[\w+-]+:([\w.]+)=", text),
        *re.findall(rf"`((?:{'|'.join(SECTIONS)})(?:\.[\w\[\]]+)+)(?:[=:][^`]*)?`", prose),
        *re.findall(r"(?<![\w./])(?:checkpoint|eval|launch|stream|train|zero)(?:\.[\w\[\]]+)+", prose),
    ]
    names = [
        name for name in found if not re.search(r"(^|\.)(KEY|py|sh|json|jsonl|safetensors|txt|yaml|md|csv)$", name)
    ]
    return [name for name in names if not _is_setting(_plain(name), settings) and not _is_moment(name)]


def _is_moment(name: str) -> bool:
    """Whether it is a call on a method's object, such as `method.before_update`, and no setting."""
    owner, _, moment = name.partition(".")
    methods = (source for path, source in sources().items() if path.startswith("/cl_dist/methods/"))
    return owner == "method" and any(f"def {moment}(" in source for source in methods)


def _is_setting(name: str, settings: set[str]) -> bool:
    free = ("zero.deepspeed.", "method.by_task.", "stream.epochs_by_task.")
    return name in settings or name.startswith(free)


def flattened(value: object, prefix: str = "") -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from flattened(item, prefix)
    elif isinstance(value, dict):
        for key in ("name", "format"):  # a method or format from outside the package brings its own settings
            if ":" in str(value.get(key)):
                value = {key: value[key]}
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from flattened(inner, f"{prefix}{key}.")


def unknown_keys(text: str, settings: set[str]) -> list[str]:
    """Keys of the YAML blocks, which are recipes or parts of them."""
    recipes = [yaml.safe_load(block) for block in blocks_of(text, "yaml")]
    return [name for recipe in recipes for name in flattened(recipe) if not _is_setting(name, settings)]


def test_settings_are_ones_of_the_schema(text: str, settings: set[str]) -> None:
    assert unknown_settings(text, settings) == []
    assert unknown_keys(text, settings) == []


def wrong_defaults(text: str, explained: dict[str, str]) -> list[str]:
    """Rows of the tables of one or more methods' settings whose defaults are not those of the schema."""
    wrong = []
    for section in text.split("\n## "):
        rows = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in section.splitlines()]
        header = next((row for row in rows if row[0] == "| setting" or row[0] == "setting"), ["", ""])
        named = re.findall(r"`method\.name: (\w+)`", section)[:1]
        methods = named if header[1] == "default" else header[1:-1]
        for row in rows:
            names = [name.strip("| `") for name in row[0].split(", ")]
            for method, value in zip(methods, row[1:], strict=False):
                values = value.split(", ") if len(names) > 1 and ", " in value else [value] * len(names)
                keys = [f"method({method}).{name}" for name in names]
                pairs = [
                    (key, each.strip("`"))
                    for key, each in zip(keys, values, strict=True)
                    if key in explained and each != "as in kif"
                ]
                wrong.extend(key for key, each in pairs if _number(each) != _number(_default(explained[key])))
    return wrong


def _default(block: str) -> str:
    found = re.findall(r"\(default: (.*?)\)", block.replace("\n    ", " "))
    return found[0] if found else "none"


def _number(value: str) -> float | str:
    return float(value) if re.fullmatch(r"[\d.]+", value) else value


@pytest.mark.parametrize("page", ["kif.md", "methods-penalties.md"])
def test_defaults_are_those_of_the_schema(page: str, explained: dict[str, str]) -> None:
    assert wrong_defaults(text_of(ROOT / "docs" / page), explained) == []


# The checks themselves


def test_each_check_finds_a_fault(settings: set[str], explained: dict[str, str]) -> None:
    table = "## A\n`method.name: lwf`\n| setting | default | meaning |\n| `top_k`, `temperature` | 32, 2 | x |\n"
    assert wrong_defaults(table, explained) == ["method(lwf).top_k"]
    assert broken_links(ROOT / "README.md", "[a](docs/none.md) [b](docs/data.md#none) [c](docs/data.md#text)") == [
        "docs/none.md",
        "docs/data.md#none",
    ]
    assert missing_files("`tests/none.py`, docs/none.md, kernels/reference.py") == ["tests/none.py", "docs/none.md"]
    assert missing_modules("python -m tests.none, python -m tests.zoo") == ["tests.none"]
    assert missing_code("`none.py` `reference.py` `BatchPlan.no_such` `BatchPlan.micro_batches` `NoneSuch`") == [
        "none.py",
        "BatchPlan.no_such",
        "NoneSuch",
    ]
    block = "```\n.venv/bin/cl-dist run a.yaml --none\ncl-dist none\ncl-dist run a.yaml --resume  # go\n```\n"
    assert rejected(block) == ["run a.yaml --none", "none"]
    abridged = (
        "`cl-dist compare ... --none`, `cl-dist bench none`, `cl-dist slurm`, `torchrun -m cl_dist runs x`, `--nope`"
    )
    assert unknown(abridged) == ["compare ... --none", "bench none", "runs x", "--nope"]
    assert missing_targets("`make none`, `make lint`") == ["none"]
    scripts = "`python benchmarks/first_run.py --data a --none b`, `python -m tests.faults.campaign --runs 1 --nope`"
    assert unknown_script_options(scripts) == ["--none", "--nope"]
    wrong = "`train.none`, `train.epochs=3`, `stream.tasks[].epochs`, `method.1.none`, `train.jsonl`, --set eval.none=1"
    assert set(unknown_settings(wrong, settings)) == {"eval.none", "train.none", "method.1.none"}
    assert unknown_keys("```yaml\ntrain: {epochs: 1, none: 2}\n```\n", settings) == ["train.none"]
