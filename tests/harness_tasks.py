"""Task files of lm-evaluation-harness with their data, for tests without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

CHOICES = ("north", "south", "east", "west")


def write_harness_tasks(folder: Path, documents: int = 7) -> Path:
    """`compass` (multiple choice), `heading` (generation), the group `both` of the two, and `run_it`, which says
    that it runs code; `documents` of each.
    """
    folder.mkdir(parents=True)
    compass = [
        {"question": f"old calm pale {name} {season}?", "choices": CHOICES, "answer": number % 4}
        for number, (name, season) in enumerate(_names(documents))
    ]
    heading = [{**document, "answer": f" {CHOICES[document['answer']]}"} for document in compass]
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "metric_list": [_mean("acc")]}
    _write(folder, "compass", compass, **choice)
    generation = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    generate = {"output_type": "generate_until", "generation_kwargs": generation, "metric_list": [_mean("exact_match")]}
    _write(folder, "heading", heading, **generate)
    _write(folder, "run_it", heading, **generate, unsafe_code=True)
    group = {"group": "both", "task": ["compass", "heading"]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


def _names(count: int) -> list[tuple[str, str]]:
    animals = ("fox", "owl", "deer", "crane", "mole", "swan", "bear", "toad")
    return [(animals[number % 8], ("spring", "summer")[number % 2]) for number in range(count)]


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _write(folder: Path, name: str, documents: list[dict[str, Any]], **settings: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
