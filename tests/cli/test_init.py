"""`cl-dist init`: a recipe for any data that runs, with its reasons."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cl_dist.cli.recipe_text import Source, measure, recipe_text
from cl_dist.config.load import check_recipe, load_recipe
from cl_dist.config.schema import ModelConfig, Recipe
from cl_dist.config.yaml_text import parse_yaml
from cl_dist.machine import Device
from cl_dist.tasks.stream import load_stream
from tests.cli.conftest import Command
from tests.tasks.data import write_lines
from tests.zygote import Zygote

LABELLED = [{"input": f"Is {i} even?", "output": "no" if i % 2 else "yes"} for i in range(40)]
FREE = [{"input": f"Say {i}.", "output": f"It is {i}."} for i in range(30)]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text(text, encoding="utf-8")
    return path


def made(command: Command, *arguments: str | Path) -> Recipe:
    """The recipe that `cl-dist init` writes, loaded."""
    code, _, error = command("init", *arguments)
    assert (code, error) == (0, "")
    return load_recipe(str(arguments[0]))[0]


def test_a_recipe_for_two_files_runs(command: Command, tmp_path: Path, zygote: Zygote) -> None:
    write(tmp_path / "billing.jsonl", LABELLED)
    write(tmp_path / "shipping.csv", FREE)
    code, output, error = command("init", "my.yaml", "--data", "billing.jsonl", "shipping.csv")
    assert (code, error) == (0, "")
    assert output.splitlines() == [
        "wrote my.yaml: 2 tasks, model builtin:llama-tiny, method migu",
        "",
        '  billing   36 training samples, 4 held out; labels "no", "yes", scored by their likelihood',
        "  shipping  27 training samples, 3 held out; free answers, generated and scored by ROUGE-L",
        "",
        "Next:",
        "  cl-dist data my.yaml  shows what the model will read",
        "  cl-dist run my.yaml   trains it and prints a table of scores",
    ]
    recipe, _ = load_recipe("my.yaml")
    assert [(task.name, task.path) for task in recipe.stream.tasks] == [
        ("billing", "billing.jsonl"), ("shipping", "shipping.csv")
    ]  # fmt: skip
    assert (recipe.method[0].name, recipe.output_dir, recipe.launch.processes) == ("migu", "runs/my", "auto")
    # A token per byte, one before the prompt, one behind the answer, in eights.
    longest = max(len(each["input"]) + len(each["output"]) for each in (*LABELLED, *FREE)) + 2
    assert (recipe.train.max_length, recipe.train.max_target_length) == (-(-longest // 8) * 8, 16)
    assert recipe.train.long_answers == "error"
    changes = ["train.epochs=1", "launch.processes=1", f"output_dir={tmp_path / 'runs/my'}"]
    outcome = zygote.run(["run", str(tmp_path / "my.yaml"), *(f"--set={change}" for change in changes)], tmp_path)
    assert outcome.codes == [0], outcome.output[0][-3000:]
    assert json.loads((tmp_path / "runs/my/metrics.json").read_text())["tasks"] == ["billing", "shipping"]


def test_every_choice_has_its_reason(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LABELLED)
    made(command, "my.yaml", "--data", "a.jsonl")
    text = (tmp_path / "my.yaml").read_text()
    for line in text.splitlines():
        key, _, rest = line.strip().lstrip("- ").partition(":")
        if rest and not line.startswith("#") and key not in ("name_or_path", "name", "path") and "# " not in line:
            raise AssertionError(line)
    assert "      eval_fraction: 0.1  # there is no evaluation file: a tenth is held out and never trained on\n" in text
    assert "  epochs: 8  # the smallest task has 36 training samples, 5 steps per epoch\n" in text
    assert "  max_length: 24  # tokens (one token per byte); holds the longest sample\n" in text


def test_evaluation_files_belong_to_their_task(command: Command, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.test.jsonl", "b.csv"):
        write(tmp_path / name, LABELLED)
    recipe = made(command, "my.yaml", "--data", "a.jsonl", "a.test.jsonl", "b.csv")
    assert [task.name for task in recipe.stream.tasks] == ["a", "b"]
    written = parse_yaml((tmp_path / "my.yaml").read_text(), "")["stream"]["tasks"]
    assert [task.get("eval_fraction") for task in written] == [None, 0.1]


def test_names_and_paths_of_any_kind(command: Command, tmp_path: Path) -> None:
    files = ["x/notes.jsonl", "y/notes.jsonl", "x/Größe 2.jsonl.gz", "x/'#: [a].jsonl", "x/日本.csv", "z/train.csv"]
    for file in files:
        write(tmp_path / file, LABELLED)
    (tmp_path / "recipes").mkdir()
    recipe = made(command, "recipes/my.yaml", "--data", *files, "x/Größe 2", str(tmp_path / "y"))
    names = [task.name for task in recipe.stream.tasks]
    assert names == ["notes", "notes-2", "Grosse-2", "a", "task", "z", "Grosse-2-2", "y"]
    written = parse_yaml((tmp_path / "recipes/my.yaml").read_text(), "")["stream"]["tasks"]
    paths = [*(f"../{file}" for file in files), "../x/Größe 2", str(tmp_path / "y")]
    assert [task["path"] for task in written] == paths
    tasks = load_stream(recipe.stream, tmp_path / "recipes", recipe.train)
    assert {len(task.train) + len(task.evaluation) for task in tasks} == {40}


def test_a_recipe_behind_a_link_has_absolute_paths(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LABELLED)
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "here").symlink_to(tmp_path / "far/away")
    recipe = made(command, "here/my.yaml", "--data", "a.jsonl")
    assert recipe.stream.tasks[0].path == str(tmp_path / "a.jsonl")


def test_fields_of_other_names(command: Command, tmp_path: Path) -> None:
    records = [{"question": each["input"], "reply": each["output"]} for each in LABELLED]
    write(tmp_path / "a.csv", records)
    code, _, error = command("init", "my.yaml", "--data", "a.csv")
    assert code == 2
    assert "has no column 'input'; it has: question, reply" in error
    assert error.endswith("; cl-dist init takes their names as --input and --output\n")
    assert not (tmp_path / "my.yaml").exists()
    recipe = made(command, "my.yaml", "--data", "a.csv", "--input", "question", "--output", "reply")
    assert load_stream(recipe.stream, tmp_path, recipe.train)[0].labels == ("no", "yes")


def test_names_of_fields_count_for_the_tasks_that_have_them(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", [{"question": each["input"], "reply": each["output"]} for each in LABELLED])
    write(tmp_path / "b.jsonl", LABELLED)
    recipe = made(command, "my.yaml", "--data", "a.csv", "b.jsonl", "--input", "question", "--output", "reply")
    tasks = load_stream(recipe.stream, tmp_path, recipe.train)
    assert [task.labels for task in tasks] == [("no", "yes")] * 2
    code, _, error = command("init", "no.yaml", "--data", "b.jsonl", "--input", "qestion")
    assert (code, error.count("\n")) == (2, 1)
    assert 'none of the tasks has "qestion", and all can be read without' in error


def test_records_without_an_answer_are_skipped_and_that_is_said(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.jsonl", [*LABELLED, {"input": "q", "output": ""}])
    write_lines(tmp_path / "b.jsonl", [*map(json.dumps, LABELLED), '{"input": "q", "output": null}'])
    code, output, _ = command("init", "my.yaml", "--data", "a.jsonl", "b.jsonl")
    assert code == 0
    assert "  Records without an answer are skipped (stream.empty_answers); cl-dist data counts them.\n" in output
    recipe, folder = load_recipe("my.yaml")
    tasks = load_stream(recipe.stream, folder, recipe.train)
    assert {len(task.train) + len(task.evaluation) for task in tasks} == {len(LABELLED)}
    caplog.clear()
    assert command("data", "my.yaml")[0] == 0
    assert caplog.text.count("skipped 1 records with an empty answer") == 2


def test_no_name_or_label_ends_a_comment(command: Command, tmp_path: Path) -> None:
    strange = [{"input": each["input"], "output": f"{each['output']}\u2028train: {{}}"} for each in LABELLED]
    write(tmp_path / "a\u2028b\nc.jsonl", strange)
    recipe = made(command, "d\ne.yaml", "--data", "a\u2028b\nc.jsonl")
    assert recipe.stream.tasks[0].name == "ab-c"
    assert load_stream(recipe.stream, tmp_path, recipe.train)[0].labels is not None


def test_long_answers_and_long_prompts_are_cut_and_that_is_said(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"input": "why " * 500, "output": f"because {i} " * 90} for i in range(20)])
    recipe = made(command, "my.yaml", "--data", "a.jsonl")
    train = recipe.train
    assert (train.max_length, train.max_target_length, train.long_answers) == (1024, 512, "cut")
    assert train.micro_batch_size == 2
    text = (tmp_path / "my.yaml").read_text()
    assert "the longest sample has 2992; longer prompts are cut in the middle" in text
    assert "  max_target_length: 512  # the longest answer has 991 tokens\n" in text


def test_documents_have_no_answers(command: Command, tmp_path: Path) -> None:
    (tmp_path / "law.txt").write_text("\n".join(f"Paragraph {i} of the law." for i in range(40)))
    made(command, "my.yaml", "--data", "law.txt")
    text = (tmp_path / "my.yaml").read_text()
    assert "plain text, scored by perplexity" in text
    assert "max_target_length" not in text
    assert "  max_length: 512  # tokens (one token per byte); longer documents are divided into pieces" in text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, with a chat template in its tokenizer's settings."""
    import torch  # only here: the other tests need none of it

    from cl_dist.models.export import export_model
    from cl_dist.models.load import load_model

    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(name_or_path="builtin:llama-tiny")
    loaded = load_model(config, 0, zero3_config=None, dtype=torch.float32, seed=1, cache_dir=folder)
    export_model(loaded.model, loaded.tokenizer, folder, dict(loaded.model.named_parameters()))
    return folder


def test_a_model_decides_lengths_template_and_learning_rate(command: Command, tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "tiny")
    write(tmp_path / "a.jsonl", FREE)
    recipe = made(command, "sub.yaml", "--data", "a.jsonl", "--model", "tiny")
    assert recipe.model.name_or_path == str(tmp_path / "tiny")
    assert (recipe.model.lora, recipe.train.learning_rate, recipe.train.template) == (None, 2e-5, "chat")
    assert (
        "tokens (with the model's tokenizer); holds the longest sample, with 64 for the chat template"
        in (tmp_path / "sub.yaml").read_text()
    )
    (tmp_path / "tiny/model.safetensors").unlink()
    code, _, error = command("init", "other.yaml", "--data", "a.jsonl", "--model", "tiny")
    assert code == 2
    assert error.startswith("cl-dist: error: model.name_or_path: tiny has no weights; expected model.safetensors")


def test_a_machine_with_gpus_and_a_model_that_is_too_large_for_them(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "a.jsonl", LABELLED)
    config = ModelConfig(name_or_path=str(model))
    source = Source("a", "a.jsonl", {"eval_fraction": 0.1})
    data: dict[str, Any] = {"model": {"name_or_path": str(model)}, "stream": {"tasks": [source.entry]}}
    read = check_recipe({**data, "method": [{"name": "migu"}]}, "my", tmp_path)
    tasks = load_stream(read.stream, tmp_path, read.train)

    def on(memory: int, bfloat16: bool = True) -> Recipe:
        gpu = Device(kind="cuda", name="GPU", memory_bytes=memory, bfloat16=bfloat16)
        text = recipe_text(tmp_path / "my.yaml", [(source, tasks[0])], config, gpu, 2, measure(config, tasks))
        written = parse_yaml(text, "my.yaml")
        return check_recipe({**written, "method": [written["method"]]}, "my", tmp_path)

    size = (model / "model.safetensors").stat().st_size
    whole = on(16 * size)
    assert (whole.model.lora, whole.zero.stage, whole.train.dtype) == (None, 2, "bfloat16")
    assert on(16 * size, bfloat16=False).train.dtype == "float32"
    adapters = on(2 * size)
    assert adapters.model.lora is not None
    assert (adapters.zero.stage, adapters.train.learning_rate) == (2, 3e-4)
    assert on(size // 4).zero.stage == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my.txt"], "FILE: my.txt is not a YAML file; allowed: a name that ends in .yaml or .yml"),
        (["old.yaml"], "FILE: old.yaml exists already; give another name, or --force to replace it"),
        (["none/my.yaml"], "FILE: there is no folder {}/none"),
        (["dir.yaml", "--force"], "FILE: dir.yaml is not a file; give another name"),
        (
            ["my.yaml", "--model", "tiny/none"],
            "model.name_or_path: tiny/none is neither a folder here nor in the cache",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(command: Command, tmp_path: Path, arguments: list[str], message: str) -> None:
    write(tmp_path / "a.jsonl", LABELLED)
    (tmp_path / "old.yaml").write_text("mine")
    (tmp_path / "dir.yaml").mkdir()
    code, output, error = command("init", *arguments, "--data", "a.jsonl")
    assert (code, output) == (2, "")
    assert error.startswith(f"cl-dist: error: {message.format(tmp_path)}")
    assert error.count("\n") == 1
    assert (tmp_path / "old.yaml").read_text() == "mine"


def test_force_replaces_a_file(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LABELLED)
    (tmp_path / "old.yaml").write_text("mine")
    assert made(command, "old.yaml", "--data", "a.jsonl", "--force").stream.tasks[0].name == "a"


def test_data_that_is_not_there_or_broken_is_one_sentence(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "billing.jsonl", LABELLED)
    (tmp_path / "bad.jsonl").write_text("{")
    code, _, error = command("init", "my.yaml", "--data", "biling.jsonl")
    assert code == 2
    assert "did you mean billing.jsonl?" in error
    code, _, error = command("init", "my.yaml", "--data", "billing.jsonl", "bad.jsonl")
    assert code == 2
    assert "task 'bad': " in error
    assert "bad.jsonl, line 1: not valid JSON" in error
    assert not (tmp_path / "my.yaml").exists()
