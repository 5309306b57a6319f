"""Settings that a recipe gives and that nothing in the same recipe would read.

Only what is certain from the recipe alone is refused, and only a value that is not the default: a run's config.yaml
spells every setting out. Limits that are never reached are no such settings. What a method's own settings make of each
other stands in `methods`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


def refuse_unread(recipe: Recipe) -> None:
    """Raise ValueError, which names the setting and why nothing reads it, for the first such setting."""
    for sentence in (*_of_training(recipe), *_of_evaluation(recipe), *_of_model(recipe)):
        raise ValueError(sentence)


def _of_training(recipe: Recipe) -> Iterator[str]:
    train, tasks = recipe.train, recipe.stream.tasks
    if tasks and all(task.format == "text" or task.text_field is not None for task in tasks):
        for name, why in (("truncate", "prompts to cut"), ("long_answers", "answers"), ("template", "turns of a chat")):
            if _given(train, name):
                yield f"train.{name}: {getattr(train, name)} is read by no task: all are plain text, without {why}"
    if train.keep_optimizer and any(method.name == "multi_task" for method in recipe.method):
        yield "train.keep_optimizer: true is read by nothing: multi_task trains once, and no task follows"


def _of_evaluation(recipe: Recipe) -> Iterator[str]:
    evaluation = recipe.eval
    derived = recipe.train.max_target_length  # what a recipe that says nothing gets, and its config.yaml spells out
    limited = _given(evaluation, "max_new_tokens") and evaluation.max_new_tokens != derived
    if evaluation.mode in ("likelihood", "perplexity") and limited:
        yield (
            f"eval.max_new_tokens: {evaluation.max_new_tokens} is read by nothing: eval.mode {evaluation.mode} "
            "generates no text"
        )
    if evaluation.general is not None and not evaluation.general.after:
        yield "eval.general.after: an empty list measures nothing; leave eval.general out, or say after which tasks"


def _of_model(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.trust_remote_code and model.name_or_path.startswith("builtin:"):
        yield f"model.trust_remote_code: true is read by nothing: {model.name_or_path} comes without code of its own"


def _given(component: Any, name: str) -> bool:
    """Whether a setting differs from its default."""
    return bool(getattr(component, name) != getattr(type(component), name))
