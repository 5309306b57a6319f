"""The model card of an exported model: README.md with the Hub's YAML front matter. Imports no torch."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cl_dist import __version__
from cl_dist.config.load import to_dict
from cl_dist.config.objectives import FACTS, ObjectiveName
from cl_dist.config.schema import BUILTIN_FAMILIES, Recipe
from cl_dist.config.words import listed
from cl_dist.config.yaml_text import render_yaml
from cl_dist.evaluation.metrics import all_metrics
from cl_dist.models.check import local_folder
from cl_dist.report.escape import Markdown, markdown_code, markdown_text
from cl_dist.report.tables import markdown
from cl_dist.state.manifest import Manifest
from cl_dist.state.saved_models import SavedModel

PIPELINES: dict[ObjectiveName, str] = {
    "causal_lm": "text-generation",
    "seq2seq_lm": "text2text-generation",
    "classification": "text-classification",
    "masked_lm": "fill-mask",
}
"""What the Hub calls a model's use, by objective."""
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "safetensors")
"""Libraries whose releases stand in a card."""
SHOWN_TASKS = 6
"""How many tasks are named in the title."""


def model_card(saved: SavedModel, objective: ObjectiveName, labels: Sequence[str], *, adapter: bool) -> str:
    """The text of README.md beside an exported model.

    Args:
        saved: The exported model.
        objective: What it was trained to do.
        labels: The names of a classifier's classes, in the order of its outputs; empty for other models.
        adapter: Whether the folder holds an adapter, not whole weights.
    """
    title = _title(saved)
    parts = [
        f"---\n{render_yaml(_front_matter(saved, objective, title, adapter=adapter))}---",
        f"# {markdown_text(title)}",
        _what_it_is(saved, adapter=adapter),
        "## Use",
        f"```python\n{_example(saved, objective, labels, adapter=adapter)}```",
        *_serving(saved, objective, adapter=adapter),
        "## Accuracy",
        "Each row is the model after training on that task, each column a task that it was scored on; `untouched` is "
        "the model before any training. This folder holds the model of the row in bold.",
        _matrix(saved),
        *_metrics(saved),
        *(f"- {markdown_text(note)}" for note in saved.manifest.notes),
        "## Training",
        f"```yaml\n{render_yaml(_settings(saved.recipe))}```",
        "## Versions",
        _versions(saved.manifest),
    ]
    return "\n\n".join(parts) + "\n"


def published_name(recipe: Recipe) -> str | None:
    """The base model's id on the Hub; None for a built-in model and for a folder."""
    name = recipe.model.name_or_path
    return None if name in BUILTIN_FAMILIES or local_folder(name) is not None else name


def _base(recipe: Recipe) -> str:
    """The base model's name without the folders of this machine."""
    name = recipe.model.name_or_path
    return published_name(recipe) or (name if name in BUILTIN_FAMILIES else Path(name).name)


def _methods(recipe: Recipe) -> str:
    return " + ".join(method.name for method in recipe.method)


def _title(saved: SavedModel) -> str:
    return f"{Path(_base(saved.recipe)).name}: {listed(saved.learnt, SHOWN_TASKS)} with {_methods(saved.recipe)}"


def _front_matter(saved: SavedModel, objective: ObjectiveName, title: str, *, adapter: bool) -> dict[str, Any]:
    scoring = saved.manifest.scoring_by_task()["metric"]
    row = _row(saved)
    results = [
        {
            "task": {"type": PIPELINES[objective]},
            "dataset": {"name": task, "type": task},
            "metrics": [{"type": str(scoring.get(task, "score")), "value": round(score, 6)}],
        }
        for task, score in zip(saved.manifest.tasks, row, strict=True)
        if score is not None
    ]
    base = published_name(saved.recipe)
    return {
        **({} if base is None else {"base_model": base}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": PIPELINES[objective],
        "tags": ["continual-learning", "cl_dist", *(method.name for method in saved.recipe.method)],
        **({"model-index": [{"name": title, "results": results}]} if results else {}),
    }


def _row(saved: SavedModel) -> tuple[float | None, ...]:
    """The scores of the exported model. Tasks that share its model have their own rows, which are the same."""
    rows = saved.manifest.accuracy_matrix
    return rows[saved.index + 1] if saved.index + 1 < len(rows) else (None,) * len(saved.manifest.tasks)


def _what_it_is(saved: SavedModel, *, adapter: bool) -> str:
    recipe, tasks = saved.recipe, saved.learnt
    what = "A LoRA adapter for" if adapter else "A fine-tuned copy of"
    return (
        f"{what} {markdown_code(_base(recipe))}, trained on {len(tasks)} of {len(saved.manifest.tasks)} tasks: "
        f"{', '.join(map(markdown_text, tasks))}. Method: {markdown_text(_methods(recipe))}. "
        f"Trained with cl_dist {saved.manifest.cl_dist_version} on {saved.manifest.world_size} ranks at ZeRO stage "
        f"{saved.manifest.zero_stage}, in {recipe.train.dtype}."
    )


def _example(saved: SavedModel, objective: ObjectiveName, labels: Sequence[str], *, adapter: bool) -> str:
    """Python that loads the folder with transformers, and peft for an adapter, and runs it."""
    model, facts = saved.recipe.model, FACTS[objective]
    trust = ", trust_remote_code=True" if model.trust_remote_code else ""
    names = [facts.auto_class, "AutoTokenizer", *(["GenerationConfig"] if adapter and facts.generates else [])]
    lines = [f"from transformers import {', '.join(names)}", "", 'folder = "."  # this folder, or its id on the Hub']
    if adapter:
        gguf = "" if model.gguf_file is None else f", gguf_file={model.gguf_file!r}"
        heads = f", num_labels={len(labels)}, id2label={dict(enumerate(labels))!r}" if labels else ""
        lines.insert(0, "from peft import PeftConfig, PeftModel")
        lines += [
            f"name = PeftConfig.from_pretrained(folder).base_model_name_or_path  # {_base(saved.recipe)}",
            f'base = {facts.auto_class}.from_pretrained(name{gguf}{heads}, dtype="auto"{trust})',
            "model = PeftModel.from_pretrained(base, folder).eval()",
        ]
    else:
        lines.append(f'model = {facts.auto_class}.from_pretrained(folder, dtype="auto"{trust}).eval()')
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        'text = "Write here what the model should read."',
    ]
    if saved.recipe.train.template == "chat":
        lines += [
            'messages = [{"role": "user", "content": text}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer(text, return_tensors="pt")')
    if facts.generates:
        settings = ", generation_config=GenerationConfig.from_pretrained(folder)" if adapter else ""
        lines.append(f"print(tokenizer.decode(model.generate(**inputs{settings})[0]))")
    else:
        lines.append("print(model(**inputs).logits)")
    return "\n".join(lines) + "\n"


def _serving(saved: SavedModel, objective: ObjectiveName, *, adapter: bool) -> list[str]:
    """How vLLM serves the folder; only decoders are shown."""
    if objective != "causal_lm":
        return []
    command = "vllm serve ."
    if adapter:
        command = f"vllm serve {_base(saved.recipe)} --enable-lora --lora-modules tuned=. --max-lora-rank 64"
    return [f"In vLLM:\n\n```\n{command}\n```"]


def _matrix(saved: SavedModel) -> str:
    manifest = saved.manifest
    places = ["untouched", *manifest.tasks]
    lines = []
    for number, (place, row) in enumerate(zip(places, manifest.accuracy_matrix, strict=False)):
        shown = ["" if score is None else f"{score:.4f}" for score in row]
        name = markdown_text(place)
        lines.append([Markdown(f"**{name}**" if number == saved.index + 1 else name), *shown])
    return markdown(["after", *manifest.tasks], lines)


def _metrics(saved: SavedModel) -> list[str]:
    """The metrics of the whole run as a table, once it has finished."""
    manifest = saved.manifest
    if manifest.completed < len(manifest.tasks):
        return ["The run has not finished, so there are no metrics of the whole stream yet."]
    meaningless = {name for method in saved.recipe.method for name in method.MEANINGLESS}
    values = {
        name: value
        for name, value in all_metrics(manifest.accuracy_matrix).items()
        if value is not None and name not in meaningless
    }
    return [markdown(["metric of the whole run", "value"], [[name, f"{value:.4f}"] for name, value in values.items()])]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What was trained and how, without the folders of this machine."""
    settings = to_dict(recipe)
    return {
        "method": settings["method"],
        "lora": settings["model"]["lora"],
        "train": settings["train"],
        "zero": {name: value for name, value in settings["zero"].items() if value},
    }


def _versions(manifest: Manifest) -> str:
    lines = [["cl_dist, training", manifest.cl_dist_version], ["cl_dist, export", __version__]]
    lines.append(["Python, export", platform.python_version()])
    for name in LIBRARIES:
        try:
            lines.append([f"{name}, export", version(name)])
        except PackageNotFoundError:
            continue
    return markdown(["library", "version"], lines)
