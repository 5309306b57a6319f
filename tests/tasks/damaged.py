"""Small data sets in every format, with one file damaged or replaced in the ways that happen in practice."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tasks.data import as_lines, records, write_json, write_lines

TASK = "weather"

MARK = "@damaged@"
LITERALS = (
    "null", "3", "0.5", "1e308", "1e999", "-1e999", "NaN", "Infinity", "9" * 5000, "true", "[]", '["a", 3]', "{}",
    '{"input": "a"}', '""', '"  "', '"\\ud800"', '"a \\udfff b"', '"\\u0000"', '"\\u2028"', '"x"',
    "[" * 3000 + "]" * 3000, '"' + "long " * 4000 + '"',
)  # fmt: skip
"""Replacements for a value in a JSON file, as written there."""


def write_cl_benchmark(root: Path) -> None:
    """One data set of the group TC, with an instruction file."""
    for split in ("train", "dev", "test"):
        write_json(root / "TC" / TASK / f"{split}.json", records("sentence", "label", 6))
    write_json(root / "TC" / TASK / "labels.json", ["yes", "no"])
    write_json(root / "instruction_config.json", {"TC": [{"instruction": "Which is it?\n"}], "SC": []})


def write_tasl(root: Path) -> None:
    """One task of three splits."""
    for split in ("train", "dev", "test"):
        write_json(root / split / f"{TASK}_T5.json", records("input", "output", 6))


def write_trace(root: Path) -> None:
    """One task of three splits."""
    for split in ("train", "eval", "test"):
        write_json(root / TASK / f"{split}.json", records("prompt", "answer", 6))


def write_superni(root: Path) -> None:
    """One task of two splits, its outputs in lists."""
    instances = [{**record, "output": [record["output"], "or so"]} for record in records("input", "output", 6)]
    for split in ("train", "test"):
        content = {"Definition": ["Say it."], "Instances": instances}
        write_json(root / "task001_weather" / f"{split}.json", content)


def write_sgd(root: Path) -> None:
    """One service of two splits, two slots a turn."""
    for split in ("train", "test"):
        folder = root / f"SGD_single_service_{split}"
        write_json(folder / f"{TASK}-{split}-LLM_T5.json", records("input", "output", 6))
        lines = [f"d|||d|||{n // 2}|||none|||{TASK}|||slot{n % 2}" for n in range(6)]
        write_lines(folder / f"{TASK}-{split}.idx", lines)


def write_jsonl(root: Path) -> None:
    """A folder with a training and a test file."""
    for split in ("train", "test"):
        write_lines(root / f"{split}.jsonl", as_lines(records("input", "output", 6)))


def write_text(root: Path) -> None:
    """A folder with a training and a test file."""
    for split in ("train", "test"):
        write_lines(root / f"{split}.txt", [f"a document {n}" for n in range(6)])


def write_csv(root: Path) -> None:
    """A folder of the `datasets` library's own kind, of CSV files."""
    for split in ("train", "test"):
        lines = [f"{record['input']},{record['output']}" for record in records("input", "output", 6)]
        write_lines(root / f"{split}.csv", ["input,output", *lines])


def write_parquet(root: Path) -> None:
    """A folder of the `datasets` library's own kind, of Parquet files."""
    import pyarrow
    import pyarrow.parquet

    for split in ("train", "test"):
        root.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records("input", "output", 6)), root / f"{split}.parquet")


def write_gz(root: Path) -> None:
    """A folder of compressed files."""
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        data = "\n".join(as_lines(records("input", "output", 6))).encode()
        (root / f"{split}.jsonl.gz").write_bytes(gzip.compress(data))


def write_messages(root: Path) -> None:
    """A folder of conversations."""
    for split in ("train", "test"):
        turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "Yes")]
        messages = [{"role": role, "content": text} for role, text in turns]
        write_lines(root / f"{split}.jsonl", as_lines([{"messages": messages}] * 6))


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "cl_benchmark": ("cl_benchmark", write_cl_benchmark),
    "tasl": ("tasl", write_tasl),
    "trace": ("trace", write_trace),
    "superni": ("superni", write_superni),
    "sgd": ("sgd", write_sgd),
    "jsonl": ("jsonl", write_jsonl),
    "text": ("text", write_text),
    "own csv": ("auto", write_csv),
    "own parquet": ("auto", write_parquet),
    "gz": ("auto", write_gz),
    "messages": ("auto", write_messages),
    "csv": ("huggingface", write_csv),
    "parquet": ("huggingface", write_parquet),
}
"""Format and writer of each kind of data."""

NAMES = {"superni": "001"}
"""The task's name in the recipe, where it is not `TASK`."""


def damage(rng: random.Random, path: Path) -> str:
    """Damage a file in a way that `rng` chooses; returns which."""
    ways = [*WAYS, *(JSON_WAYS if path.suffix in (".json", ".jsonl") else ())]
    way = rng.choice(ways)
    way(rng, path)
    return way.__name__


def cut_off(rng: random.Random, path: Path) -> None:
    """Lose the end."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def flip_bytes(rng: random.Random, path: Path) -> None:
    """Change a few bytes."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.choice((0, 10, 13, 34, 44, 92, 128, 200, 255))
    path.write_bytes(bytes(data))


def noise(rng: random.Random, path: Path) -> None:
    """Other bytes altogether."""
    path.write_bytes(bytes(rng.randrange(256) for _ in range(rng.randint(0, 60))))


def recoded(rng: random.Random, path: Path) -> None:
    """Another encoding, or compressed."""
    data = path.read_bytes()
    text = data.decode("utf-8", "replace") + "\n\u00e9"
    path.write_bytes(
        rng.choice(
            (
                gzip.compress(data),
                text.encode("utf-16"),
                data.decode("latin-1").encode("utf-16-le"),
                b"\xef\xbb\xbf" + data,
                b"\xef\xbb\xbf\xef\xbb\xbf" + data,
                data.replace(b"\n", b"\r\n"),
                data.replace(b"\n", b"\r"),
                text.encode("latin-1", "replace"),
            )
        )
    )


def emptied(rng: random.Random, path: Path) -> None:
    """Nothing in it, or nothing but blanks."""
    path.write_bytes(rng.choice((b"", b"\n\n", b"  ", b"\xef\xbb\xbf")))


def replaced(rng: random.Random, path: Path) -> None:
    """Not there, or something that is no file."""
    path.unlink()
    kind = rng.choice(("missing", "folder", "pipe", "loop", "dangling", "device"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to({"loop": path.name, "dangling": "nowhere", "device": "/dev/null"}[kind])


def doubled_lines(rng: random.Random, path: Path) -> None:
    """The content twice, one behind the other."""
    path.write_bytes(path.read_bytes() * 2)


def odd_value(rng: random.Random, path: Path) -> None:
    """One value of a JSON file replaced."""
    _rewrite(rng, path, lambda holder, key: holder.__setitem__(key, MARK))


def lost_value(rng: random.Random, path: Path) -> None:
    """One value of a JSON file lost."""
    _rewrite(rng, path, lambda holder, key: holder.__delitem__(key))


def key_twice(rng: random.Random, path: Path) -> None:
    """Some key of a JSON file given twice."""
    text = path.read_text()
    keys = [key for key in ("input", "output", "label", "prompt", "answer", "Instances", "TC") if f'"{key}":' in text]
    if keys:
        key = rng.choice(keys)
        path.write_text(text.replace(f'"{key}":', f'"{key}": "before", "{key}":', 1))


WAYS: tuple[Callable[[random.Random, Path], None], ...] = (
    cut_off, flip_bytes, noise, recoded, emptied, replaced, doubled_lines
)  # fmt: skip
JSON_WAYS: tuple[Callable[[random.Random, Path], None], ...] = (odd_value, odd_value, odd_value, lost_value, key_twice)


def _rewrite(rng: random.Random, path: Path, change: Callable[[Any, Any], None]) -> None:
    """Change one value of a JSON file, or of a line of JSON Lines."""
    lines = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
    number = rng.randrange(max(1, len(lines) - 1))
    content = [json.loads(lines[number])]
    holder, key = _place(rng, content)
    change(holder, key)
    text = json.dumps(content[0]) if content else ""
    lines[number] = text.replace(f'"{MARK}"', rng.choice(LITERALS))
    path.write_text("\n".join(lines))


def _place(rng: random.Random, holder: Any) -> tuple[Any, Any]:
    """A value somewhere below `holder`, as what holds it and its key or index."""
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
            return holder, key
        holder = inner


def make_damaged(rng: random.Random, root: Path, kinds: tuple[str, ...] = tuple(WRITERS)) -> tuple[str, str]:
    """Write a data set below `root` with one damaged file; returns its kind and the way of the damage."""
    kind = rng.choice(kinds)
    shutil.rmtree(root, ignore_errors=True)
    WRITERS[kind][1](root)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return kind, damage(rng, rng.choice(files))
