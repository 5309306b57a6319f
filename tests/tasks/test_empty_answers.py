"""`stream.empty_answers` in every format that has answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput
from cl_dist.models.builtin import byte_tokenizer
from cl_dist.tasks.encode import Encoder
from tests.tasks.data import as_lines, load_one, records, write_json, write_lines


def emptied(prompt: str, answer: str) -> list[dict[str, str]]:
    """Ten records with answers of their own; two are empty or blank."""
    made = [{prompt: f"say {n}", answer: f"that is {n}"} for n in range(10)]
    made[3][answer], made[7][answer] = "", " \n"
    return made


def tasl(root: Path) -> dict[str, Any]:
    for split in ("train", "test"):
        write_json(root / split / "task_T5.json", emptied("input", "output"))
    return {"format": "tasl"}


def trace(root: Path) -> dict[str, Any]:
    for split in ("train", "test"):
        write_json(root / f"{split}.json", emptied("prompt", "answer"))
    return {"format": "trace"}


def superni(root: Path) -> dict[str, Any]:
    instances = [{**record, "output": [record["output"]]} for record in emptied("input", "output")]
    for split in ("train", "test"):
        write_json(root / f"{split}.json", {"Definition": ["Say it."], "Instances": instances})
    return {"format": "superni"}


def jsonl(root: Path) -> dict[str, Any]:
    for split in ("train", "test"):
        write_lines(root / f"{split}.jsonl", as_lines(emptied("input", "said")))
    return {"format": "jsonl", "output_field": "said"}


def huggingface(root: Path) -> dict[str, Any]:
    for split in ("train", "test"):
        write_lines(root / f"{split}.jsonl", as_lines(emptied("input", "output")))
    return {"format": "huggingface"}


WRITERS = [tasl, trace, superni, jsonl, huggingface]


@pytest.mark.parametrize("write", WRITERS)
def test_error_keep_and_skip(
    write: Callable[[Path], dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {**write(tmp_path / "data"), "path": "data"}
    with pytest.raises(BadInput, match=r"(record|line|instance) [34]: field '.*' is empty; stream.empty_answers: keep"):
        load_one(tmp_path, **given)
    kept = load_one(tmp_path, stream={"empty_answers": "keep"}, **given)
    assert [example.answer for example in kept.train].count("") == 2
    assert (len(kept.train), len(kept.evaluation)) == (10, 10)
    with caplog.at_level(logging.WARNING):
        skipped = load_one(tmp_path, stream={"empty_answers": "skip"}, **given)
    assert (len(skipped.train), len(skipped.evaluation)) == (8, 8)
    assert all(example.answer for example in skipped.train)
    assert "skipped 2 records with an empty answer" in caplog.text


def test_of_several_outputs_the_empty_ones_are_left_out(tmp_path: Path) -> None:
    instances: list[dict[str, Any]] = [{"input": f"say {n}", "output": [f"that is {n}", "it"]} for n in range(5)]
    instances[1]["output"] = ["", "that"]
    for split in ("train", "test"):
        write_json(tmp_path / f"{split}.json", {"Definition": "Say it.", "Instances": instances})
    with pytest.raises(BadInput, match="instance 1: field 'output' is empty"):
        load_one(tmp_path, format="superni", path=".")
    for choice in ("keep", "skip"):
        second = load_one(tmp_path, stream={"empty_answers": choice}, format="superni", path=".").train[1]
        assert (second.answer, second.references) == ("that", ())


def test_an_empty_answer_is_no_label(tmp_path: Path) -> None:
    made = records("input", "output", 40)
    for record in made[:20]:
        record["output"] = ""
    write_lines(tmp_path / "a.jsonl", as_lines(made))
    assert load_one(tmp_path, stream={"empty_answers": "keep"}, path="a.jsonl").labels == ()
    assert load_one(tmp_path, stream={"empty_answers": "skip"}, path="a.jsonl").labels == ("no", "yes")
    with pytest.raises(BadInput, match=r"a\.jsonl, line 1: answer '' is not one of the labels no, yes"):
        load_one(tmp_path, stream={"empty_answers": "keep"}, path="a.jsonl", labels=("yes", "no"))


@pytest.mark.parametrize(("family", "objective"), [("decoder", "causal_lm"), ("encoder-decoder", "seq2seq_lm")])
def test_an_empty_answer_is_the_end_token_alone(tmp_path: Path, family: Any, objective: Any) -> None:
    given = jsonl(tmp_path / "data")
    task = load_one(tmp_path, stream={"empty_answers": "keep"}, path="data", **given)
    tokenizer = byte_tokenizer(family)
    encoder = Encoder(tokenizer, objective, TrainConfig(max_length=64, max_target_length=30), ())
    learnt = encoder.train(task)[3]
    assert [label for label in learnt.labels if label != -100] == [tokenizer.eos_token_id]
