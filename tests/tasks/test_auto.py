"""Data found from `path` alone: every kind of file and layout, and what is said where it cannot be found."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from cl_dist.config.load import load_recipe
from cl_dist.config.schema import TaskConfig, TrainConfig
from cl_dist.tasks.stream import load_stream
from cl_dist.tasks.types import Task
from tests.tasks.damaged import write_cl_benchmark, write_sgd, write_superni, write_tasl
from tests.tasks.data import as_lines, load_one, records, write_json, write_lines
from tests.tasks.test_bad_data import refuse

AWKWARD = [
    {"input": 'He said "no, never"', "output": "a,b"},
    {"input": "two\nlines", "output": "c\r\nd"},
    {"input": " caf\u00e9 \u2028 ", "output": "007"},
    {"input": "\u65e5\u672c;\t|", "output": "None"},
]
"""Quotes, separators and line ends inside of cells; what other readers take for numbers and gaps."""
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".jsonl.zst", ".csv.gz", ".csv.zst", ".json.gz")


def write(path: Path, made: list[dict[str, Any]]) -> Path:
    """Write records to a file of the kind that its ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name[path.name.index(".", 1) :] if path.name.count(".") else ""
    plain = path.with_name("plain")
    if ".parquet" in kind:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path)
        return path
    if ".jsonl" in kind:
        write_lines(plain, as_lines(made))
    elif ".json" in kind:
        write_json(plain, made)
    else:
        with plain.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(made[0]), delimiter="\t" if ".tsv" in kind else ",")
            writer.writeheader()
            writer.writerows(made)
    data = plain.read_bytes()
    plain.unlink()
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix)
    path.write_bytes(data if packed is None else packed(data))
    return path


def texts(task: Task) -> list[tuple[str, str]]:
    return [(example.prompt, example.answer) for example in task.train]


@pytest.mark.parametrize("ending", KINDS)
def test_every_kind_of_file_gives_the_same_samples(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"billing{ending}", AWKWARD)
    write(tmp_path / f"billing.test{ending}", AWKWARD[:2])
    for path in ("billing", f"billing{ending}"):
        task = load_one(tmp_path, path=path)
        assert texts(task) == [(record["input"], record["output"].strip()) for record in AWKWARD]
        assert (len(task.evaluation), task.scored_on) == (2, "test")


@pytest.mark.parametrize("ending", [".jsonl", ".csv.gz", ".parquet"])
def test_folders_of_files(tmp_path: Path, ending: str) -> None:
    made = records("input", "output", 6)
    write(tmp_path / f"named/train{ending}", made)
    write(tmp_path / f"named/valid{ending}", made[:2])
    write(tmp_path / f"named/unread-notes{ending}", made[:1])
    for number in range(3):
        write(tmp_path / f"shards/train-0000{number}-of-00003{ending}", made[2 * number : 2 * number + 2])
        write(tmp_path / f"parts/{number}{ending}", made[2 * number : 2 * number + 2])
    write(tmp_path / f"shards/test-00000-of-00001{ending}", made[:1])
    named, shards = load_one(tmp_path, path="named"), load_one(tmp_path, path="shards")
    parts = load_one(tmp_path, path="parts", eval_fraction=0.2)
    assert (len(named.train), len(named.evaluation), named.scored_on) == (6, 2, "dev")
    assert texts(shards) == texts(named)
    assert (shards.scored_on, len(shards.evaluation)) == ("test", 1)
    assert (len(parts.train), len(parts.evaluation), parts.scored_on) == (5, 1, "held-out")


def test_an_evaluation_file_may_be_of_another_kind(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", AWKWARD)
    write(tmp_path / "a.dev.csv", AWKWARD[:1])
    assert load_one(tmp_path, path="a").scored_on == "dev"
    write(tmp_path / "a.dev.json.gz", AWKWARD[:1])
    refuse(tmp_path, "is ambiguous: it has a.dev.csv, a.dev.json.gz;", path="a")


MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello "},
]
LAYOUTS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({"input": "q", "output": "a", "id": "3"}, ("q", "a")),
    ({"prompt": "q", "completion": "a"}, ("q", "a")),
    ({"prompt": "q", "response": "a"}, ("q", "a")),
    ({"prompt": "q", "answer": "a"}, ("q", "a")),
    ({"instruction": "Add.", "input": "1 2", "output": "3", "text": "all of it"}, ("Add.\n1 2", "3")),
    ({"instruction": "Add.", "input": "", "output": "3"}, ("Add.", "3")),
    ({"instruction": "Add.", "output": "3"}, ("Add.", "3")),
    ({"messages": MESSAGES[1:], "id": 1}, ("Hi", "Hello")),
    ({"messages": MESSAGES[1:], "input": "q", "output": "a", "prompt": "p", "answer": "b"}, ("q", "a")),
    ({"text": "a document"}, ("", "a document")),
    ({"messages": MESSAGES, "prompt": "Hi"}, ("Be kind.\n\nHi", "Hello")),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, ("Hi", "Hello")),
]


@pytest.mark.parametrize(("record", "expected"), LAYOUTS)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_columns_say_what_a_record_holds(
    tmp_path: Path, record: dict[str, Any], expected: tuple[str, str], ending: str
) -> None:
    write(tmp_path / f"a{ending}", [record])
    task = load_one(tmp_path, path="a")
    assert texts(task) == [expected]
    assert re.fullmatch("(prompts and answers|conversations|documents|Alpaca's records), from .*", task.read_as)


def test_an_input_that_the_first_record_lacks_is_read_where_it_comes(tmp_path: Path) -> None:
    made = [{"instruction": "Smile.", "output": ":)"}, {"instruction": "Add.", "input": "1 2", "output": "3"}]
    write_lines(tmp_path / "a.jsonl", as_lines(made))
    assert texts(load_one(tmp_path, path="a")) == [("Smile.", ":)"), ("Add.\n1 2", "3")]


def test_columns_and_templates(tmp_path: Path) -> None:
    made = [{"question": "q", "answer": "a", "topic": "t"}, {"question": "r", "answer": "b", "topic": ""}]
    write(tmp_path / "a.csv", made)
    renamed = load_one(tmp_path, path="a", columns={"input": "question", "output": "answer"})
    assert texts(renamed) == [("q", "a"), ("r", "b")]
    template = "{topic}: {question} {{x}}\n"
    filled = load_one(tmp_path, path="a", prompt=template, columns={"output": "answer"})
    assert texts(filled) == [("t: q {x}\n", "a"), (": r {x}", "b")]
    both = load_one(
        tmp_path, path="a", prompt="{subject} {question}", output_field="answer", columns={"subject": "topic"}
    )
    assert both.train[0].prompt == "t q"
    swapped = load_one(
        tmp_path,
        path="a",
        columns={"question": "answer", "answer": "question"},
        prompt="{question}",
        output_field="answer",
    )
    assert texts(swapped)[0] == ("a", "q")


def test_columns_named_in_the_recipe_come_before_those_that_happen_to_be_there(tmp_path: Path) -> None:
    made = {"messages": MESSAGES, "prompt": "p", "completion": "c", "question": "q", "answer": "a"}
    write_lines(tmp_path / "a.jsonl", as_lines([made]))
    refuse(
        tmp_path, "the records can be read as conversations (messages), prompts and answers (prompt, compl", path="a"
    )
    task = load_one(tmp_path, path="a", columns={"input": "question", "output": "answer"})
    assert texts(task) == [("q", "a")]
    assert texts(load_one(tmp_path, path="a", messages_field="messages")) == [("Be kind.\n\nHi", "Hello")]


def test_benchmarks_are_recognised(tmp_path: Path) -> None:
    writers = {"tasl": write_tasl, "cl_benchmark": write_cl_benchmark, "superni": write_superni, "sgd": write_sgd}
    names = {"superni": "001"}
    for name, writer in writers.items():
        writer(tmp_path / name)
        task = names.get(name, "weather")
        assert load_one(tmp_path, task, path=name) == load_one(tmp_path, task, path=name, format=name)
    refuse(tmp_path, 'prompt: "{x}" is not read for', "format tasl", name="weather", path="tasl", prompt="{x}")


def test_text_and_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_lines(tmp_path / "corpus.txt", [f"line {number}" for number in range(10)])
    text = load_one(tmp_path, path="corpus", eval_fraction=0.3)
    assert (text.kind, len(text.train), len(text.evaluation)) == ("text", 7, 3)
    split = datasets.Dataset.from_list([{"messages": MESSAGES[1:]}, {"messages": MESSAGES[1:]}])
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "saved"))
    assert texts(load_one(tmp_path, path="saved")) == [("Hi", "Hello")] * 2
    single = datasets.Dataset.from_list([{"prompt": str(number), "completion": "a"} for number in range(4)])
    single.save_to_disk(str(tmp_path / "single"))
    assert len(load_one(tmp_path, path="single", eval_fraction=0.25).train) == 3
    write(tmp_path / "clone/data/train-00000-of-00001.parquet", [{"prompt": "q", "completion": "a"}])
    write(tmp_path / "clone/data/test-00000-of-00001.parquet", [{"prompt": "r", "completion": "b"}])
    assert texts(load_one(tmp_path, path="clone")) == [("q", "a")]


@pytest.mark.parametrize("path", ["set/train.parquet", "set"])
def test_parquet_files_keep_the_names_of_their_classes(tmp_path: Path, path: str) -> None:
    datasets = pytest.importorskip("datasets")
    classes = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"prompt": datasets.Value("string"), "answer": classes})
    split = datasets.Dataset.from_dict({"prompt": ["u", "v"], "answer": [1, 0]}, features=features)
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        split.to_parquet(str(tmp_path / f"set/{name}.parquet"))
    task = load_one(tmp_path, path=path)
    assert (texts(task), task.labels) == ([("u", "good"), ("v", "bad")], ("bad", "good"))


def test_a_path_without_its_ending_is_found_in_the_recipes_folder_too(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    write(tmp_path / "root/other.csv", AWKWARD)
    write(tmp_path / "mine/billing.csv", AWKWARD)
    recipe = tmp_path / "mine/r.yaml"
    recipe.write_text(
        f"model: {{name_or_path: 'builtin:llama-tiny'}}\nstream:\n  root: {tmp_path}/root\n"
        "  tasks: [{name: a, path: billing, eval_fraction: 0.5}, {name: b, path: other}]\n"
    )
    loaded, folder = load_recipe(str(recipe))
    assert loaded.stream.tasks[0].path == str(tmp_path / "mine/billing")
    assert [len(task.train) for task in load_stream(loaded.stream, folder, loaded.train)] == [2, 4]


# What is said about data that cannot be read


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for name in ("billing.jsonl", "billing.csv.gz"):
        write(tmp_path / name, AWKWARD)
    refuse(
        tmp_path, f"path: 'billing' is ambiguous in {tmp_path}: name billing.jsonl or billing.csv.gz", path="billing"
    )
    refuse(tmp_path, "no file or folder", "did you mean billing.jsonl?", "owner/name", path="biling.jsonl")
    write_lines(tmp_path / "a.xlsx", ["x"])
    refuse(tmp_path, "a.xlsx has an unknown ending; allowed: .jsonl, .json, .csv, .tsv, .parquet, .txt;", path="a.xlsx")
    refuse(tmp_path, "a.xlsx has an unknown ending", path="a.xlsx")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, "empty has no data files (.jsonl,", "it has: nothing", path="empty")
    for name in ("one.csv", "two.jsonl"):
        write(tmp_path / "mixed" / name, AWKWARD)
    refuse(tmp_path, "mixed is ambiguous: it has one.csv, two.jsonl; name one file", path="mixed")
    write(tmp_path / "twice/train.csv", AWKWARD)
    write(tmp_path / "twice/train.csv.gz", AWKWARD)
    refuse(tmp_path, "twice is ambiguous: it has train.csv, train.csv.gz;", path="twice")
    write(tmp_path / "alone/train.csv", AWKWARD)
    refuse(tmp_path, "alone/test.csv", "eval_fraction: 0.1 would hold out", path="alone")
    refuse(tmp_path, "streaming: true is not read for the file", path="billing.jsonl", streaming=True)


def test_paths_of_other_kinds(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", AWKWARD)
    (tmp_path / "gone.csv").symlink_to(tmp_path / "elsewhere.csv")
    for path, problem in (
        (
            "https://example.com/a.csv",
            "path: https://example.com/a.csv is an address; download the file and name it here",
        ),
        ("s3://bucket/a.csv", "path: s3://bucket/a.csv is an address;"),
        ("*.csv", "; patterns are not expanded: name a file, or a folder of files"),
        ("$DATA/a.csv", "; variables of the environment are not replaced: write the path itself"),
        ("gone.csv", f"gone.csv (it is a link to {tmp_path}/elsewhere.csv, which is not there); "),
        ("a\nb.csv", "no file or folder"),
    ):
        refuse(tmp_path, problem, path=path)


def test_endings_may_be_in_capitals(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", AWKWARD).rename(tmp_path / "billing.CSV")
    write(tmp_path / "a.csv", AWKWARD[:1]).rename(tmp_path / "billing.Test.CSV")
    for path in ("billing", "billing.CSV"):
        assert (load_one(tmp_path, path=path).scored_on, len(load_one(tmp_path, path=path).evaluation)) == ("test", 1)


@pytest.mark.parametrize(
    "names", [("b_train", "b_test"), ("b-train", "b-test"), ("training", "testing"), ("b.train", "b.test")]
)
@pytest.mark.parametrize("ending", [".csv", ".txt"])
def test_no_test_file_is_trained_on(tmp_path: Path, names: tuple[str, str], ending: str) -> None:
    for name, count in zip(names, (4, 2), strict=True):
        if ending == ".txt":
            write_lines(tmp_path / f"d/{name}.txt", [f"{name} {number}" for number in range(count)])
        else:
            write(tmp_path / f"d/{name}.csv", records("input", "output", count))
    task = load_one(tmp_path, path="d")
    assert (len(task.train), len(task.evaluation), task.scored_on) == (4, 2, "test")
    refuse(tmp_path, "eval_fraction: 0.5 is for data without an evaluation split", path="d", eval_fraction=0.5)
    if ending == ".csv" and names[0] != "training":
        beside = load_one(tmp_path, path=f"d/{names[0]}.csv")
        assert (len(beside.train), len(beside.evaluation), beside.scored_on) == (4, 2, "test")


def test_files_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "train-2", "notes", "test"):
        write(tmp_path / f"d/{name}.csv", AWKWARD)
    assert len(load_one(tmp_path, path="d").train) == len(AWKWARD)
    assert f"{tmp_path}/d: not read: notes.csv, train-2.csv" in caplog.text


CSV: list[tuple[bytes, str]] = [
    (
        b"question,answer\nq,a\n",
        "a.csv has no column 'input'; it has: answer, question; if other columns hold prompt and",
    ),
    (b"input,outputs\nq,a\n", "a.csv has no column 'output'; it has: input, outputs; did you mean outputs?"),
    (b"input,output\nq,a\n\nq,a,b\n", "a.csv, line 4: 3 cells, but the header has 2"),
    (b'input,output\n"q\nr",a\nq\n', "a.csv, line 4: 1 cells, but the header has 2"),
    (b'input,output\nq,a\n"q,a\n', "a.csv, line 3: not valid CSV (a quotation mark is never closed)"),
    (
        b'input,output\n"q"r,a\n',
        "a.csv, line 2: not valid CSV (',' expected after '\"'; a cell that starts with a quotation mark ends with",
    ),
    (
        b"input|output\nq|a\n",
        'separated by \'|\'; allowed: commas (","), semicolons (";") or tabs ("\\t")',
    ),
    ("input,output\n".encode("utf-16-le"), "(it looks like UTF-16: convert it to UTF-8)"),
    (b"PK\x03\x04\0\0", "(it looks like a zip file or an Excel workbook: unpack it, or export it as CSV in UTF-8)"),
    (b"input,output\nq,caf\xe9\n", "a.csv, line 2: not UTF-8 text (byte 0xe9); save the file as UTF-8"),
    (b"input,output,output\nq,a,b\n", "a.csv, line 2: field 'output' is given twice"),
    (b"input,output\nq,\n", "a.csv, line 2: field 'output' is empty"),
    (b"input,output\n", "a.csv holds no samples"),
    (b"", "a.csv is empty"),
    (gzip.compress(b"input,output\nq,a\n", mtime=0), "(it looks like gzip: unpack it, or let its name end in .gz)"),
]


@pytest.mark.parametrize(("content", "problem"), CSV)
def test_broken_csv_files(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    refuse(tmp_path, problem, path="a.csv")


SPREADSHEETS = {
    "semicolons": b'input;output\n"q; r";a, b\n',
    "semicolons, all in quotes": b'"input";"output"\r\n"q; r";"a, b"\r\n',
    "Excel's own first line": b'\xef\xbb\xbfsep=;\ninput;output\n"q; r";"a, b"\n',
    "tabs": b"input\toutput\nq; r\ta, b\n",
    "spaces and rows without anything": b'input , output\n"q; r","a, b"\n,\n  ,\n\n',
    "commas win": b'input,"output","a;b"\n"q; r","a, b",c\n',
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_what_spreadsheets_write(tmp_path: Path, kind: str, ending: str) -> None:
    (tmp_path / f"a{ending}").write_bytes(SPREADSHEETS[kind])
    assert texts(load_one(tmp_path, path="a")) == [("q; r", "a, b")]


def test_lines_are_counted_behind_excels_own(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"sep=;\ninput;output\nq;\n")
    refuse(tmp_path, "a.csv, line 3: field 'output' is empty", path="a.csv")


def test_a_column_that_occurs_twice_is_refused_if_it_is_read(tmp_path: Path) -> None:
    columns = [pyarrow.array([text]) for text in ("q", "a", "b", "c", "d")]
    names = ["input", "output", "output", "note", "note"]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=names), tmp_path / "a.parquet")
    refuse(tmp_path, "a.parquet, record 0: field 'output' is given twice", path="a")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays(columns[1:], names=names[:1] + names[2:]), tmp_path / "b.parquet"
    )
    assert texts(load_one(tmp_path, path="b")) == [("a", "b")]


def test_null_is_an_answer_that_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines([{"input": "q", "output": None}, {"input": "r", "output": "b"}]))
    problem = "line 1: field 'output' must be a string, not null; stream.empty_answers: skip drops such records"
    for empty in ("error", "keep"):
        refuse(tmp_path, problem, path="a", stream={"empty_answers": empty})
    assert texts(load_one(tmp_path, path="a", stream={"empty_answers": "skip"})) == [("r", "b")]
    assert "a.jsonl: skipped 1 records with an empty answer" in caplog.text


def test_empty_documents_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines([{"text": text} for text in ("one", "", None, " ", "two")]))
    assert [answer for _, answer in texts(load_one(tmp_path, path="a"))] == ["one", "two"]
    assert "a.jsonl: skipped 3 empty documents" in caplog.text


def test_other_broken_files(tmp_path: Path) -> None:
    for name, content, problem in (
        ("a.jsonl.gz", gzip.compress(b"{}")[:-4], "a.jsonl.gz cannot be unpacked: "),
        ("b.jsonl.gz", b"{}", "b.jsonl.gz cannot be unpacked: Not a gzipped file"),
        ("c.csv.zst", zstandard.ZstdCompressor().compress(b"input,output\n" * 99)[:-3], "unpacked: its end is missing"),
        ("d.csv.zst", b"input", "d.csv.zst cannot be unpacked: "),
        ("e.parquet", b"PAR1", "e.parquet cannot be read as Parquet: "),
        ("f.json", b'{\n"data": []\n}', "f.json must hold a JSON list of records, or one record per line, not a singl"),
        (
            "i.json",
            b'{"version": "1", "data": [{"input": "q"}]}',
            'a single object; make the list in "data" the whole file',
        ),
        (
            "j.json",
            b'{\n"input": "q"\n}\n{\n"input": "r"\n}',
            "j.json, line 4: not valid JSON (Extra data, column 1): a second",
        ),
        (
            "k.jsonl",
            b'[{"input": "q"}]',
            "k.jsonl holds one JSON list, not a record per line: let its name end in .json",
        ),
        ("l.jsonl", b'[\n{"input": "q"}\n]', "l.jsonl holds one JSON list"),
        ("m.jsonl", b"[1, 2]\n[3]", "line 1: must be an object with 'input' and 'output', not a list"),
        (
            "n.jsonl",
            b'{"text": "t", "url": "u"}',
            ": columns: {input: COLUMN, output: COLUMN}, and for documents text_field: text",
        ),
        ("g.json", b'"text"', "g.json must hold a JSON list of records, not a string"),
        ("h.json", b'{\n"data": [}', "h.json, line 2: not valid JSON"),
    ):
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path, problem, path=name)
    write_lines(tmp_path / "lines.json", as_lines(records("input", "output", 3)))
    assert len(load_one(tmp_path, path="lines.json").train) == 3


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "{input"}, "has a brace without its partner"),
    ({"prompt": "no field"}, "must name fields in braces"),
    ({"prompt": "{}"}, "must name fields in braces"),
    ({"prompt": "{input!r}"}, "must name fields in braces"),
    ({"prompt": "{a}", "messages_field": "m"}, 'prompt: "{a}" is not read if messages_field is given'),
    ({"prompt": "{a}", "input_field": "m"}, 'input_field: "m" is not read if prompt is given'),
    ({"messages_field": "m", "output_field": "o"}, 'output_field: "o" is not read if messages_field is given'),
    ({"columns": {"input": ""}}, "columns: a name is empty"),
    (
        {"columns": {"input": "a", "output": "a"}},
        'columns: input and output are the same column "a"; each needs its own',
    ),
    ({"prompt": "{q} {output}"}, 'prompt: the prompt has the answer, "output"'),
    ({"prompt": "{q} {a}", "output_field": "a"}, 'prompt: the prompt has the answer, "a"'),
    ({"input_field": "a", "output_field": "a"}, 'input_field: the prompt has the answer, "a"'),
    ({"eval_fraction": 0.1, "streaming": True}, "eval_fraction: 0.1 needs all samples"),
    ({"eval_fraction": 1.0}, "allowed: a number, above 0, below 1, or null"),
    ({"columns": ["a"]}, "columns"),
    ({"format": "trace", "columns": {"input": "a"}}, "columns: .* is read by formats auto, huggingface and jsonl only"),
]


@pytest.mark.parametrize(("settings", "problem"), SETTINGS)
def test_settings_that_make_no_sense(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TaskConfig(name="a", path="a", **settings)


def test_names_that_the_data_does_not_have(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    refuse(
        tmp_path,
        "line 1: columns: input: no field 'qestion'",
        "did you mean question?",
        path="a",
        columns={"input": "qestion", "output": "answer"},
    )
    refuse(
        tmp_path,
        "columns: 'ouput' is not read; the records are read as prompts and answers, from input and output; "
        "did you mean output?",
        path="a",
        columns={"input": "question", "ouput": "answer"},
    )
    refuse(tmp_path, "line 1: no field 'topic'", path="a", prompt="{topic} {question}", output_field="answer")
    write(tmp_path / "b.jsonl", [{"question": None, "answer": "a"}])
    refuse(
        tmp_path, "'question': nothing to fill into the prompt", path="b", prompt="x {question}", output_field="answer"
    )
    write(tmp_path / "c.jsonl", [{"question": 3, "answer": "a"}])
    refuse(
        tmp_path,
        "field 'question' must be a string, not a number",
        path="c",
        prompt="{question}",
        output_field="answer",
    )


# Samples held out


def held(task: Task) -> set[str]:
    return {example.prompt for example in task.evaluation}


def test_held_out_samples_depend_on_seed_and_content_only(tmp_path: Path) -> None:
    made = [{"input": f"question {number % 90}", "output": f"answer {number % 90}"} for number in range(100)]
    write(tmp_path / "a.jsonl", made)
    write(tmp_path / "b.csv", made[::-1])
    first = load_one(tmp_path, path="a", eval_fraction=0.2)
    assert (len(first.train) + len(first.evaluation), first.scored_on) == (100, "held-out")
    assert 20 <= len(first.evaluation) <= 21
    assert not held(first) & {example.prompt for example in first.train}, "identical samples stay on one side"
    again = load_one(tmp_path, path="b", eval_fraction=0.2)
    assert held(again) == held(first)
    other = load_one(tmp_path, path="a", eval_fraction=0.2, train=TrainConfig(seed=7))
    assert held(other) != held(first)
    positions = [int(example.prompt.split()[1]) for example in first.train]
    assert positions[:50] == sorted(positions[:50]), "file order is kept"


def test_samples_cannot_be_held_out_where_there_is_a_test_file_or_only_one_sample(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", AWKWARD)
    write(tmp_path / "a.test.jsonl", AWKWARD)
    for data_format in ("auto", "jsonl", "huggingface"):
        refuse(
            tmp_path,
            "eval_fraction: 0.5 is for data without an evaluation split",
            path="a.jsonl",
            eval_fraction=0.5,
            format=data_format,
        )
    write(tmp_path / "same.jsonl", AWKWARD[:1] * 3)
    refuse(tmp_path, "eval_fraction needs at least two different samples", path="same", eval_fraction=0.5)
    write(tmp_path / "lone.csv", AWKWARD)
    for data_format in ("auto", "huggingface"):
        task = load_one(tmp_path, path="lone.csv", eval_fraction=0.5, format=data_format)
        assert (len(task.train), len(task.evaluation), task.scored_on) == (2, 2, "held-out")


def test_a_recipe_with_all_of_it_survives_its_run_folder(tmp_path: Path) -> None:
    from cl_dist.config.load import dump_recipe

    recipe = tmp_path / "r.yaml"
    write(tmp_path / "a.csv", [{"q": "x", "a": "1"}, {"q": "y", "a": "2"}])
    task = {"name": "a", "path": "a", "prompt": "{q}?", "columns": {"output": "a"}, "eval_fraction": 0.5}
    recipe.write_text(json.dumps({"model": {"name_or_path": "builtin:llama-tiny"}, "stream": {"tasks": [task]}}))
    loaded, folder = load_recipe(str(recipe))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(dump_recipe(loaded))
    again, elsewhere = load_recipe(str(tmp_path / "run/config.yaml"))
    assert again == loaded
    assert load_stream(again.stream, elsewhere, again.train) == load_stream(loaded.stream, folder, loaded.train)
