"""Settings that a recipe gives and that nothing in the same recipe would read.

Only what is certain from the recipe alone is refused, and only a value that is not the default: a run's config.yaml
spells every setting out. Limits that are never reached are no such settings. What a method's own settings make of each
other stands in its `config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cl_dist.config.ranges import is_default

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


def refuse_unread(recipe: Recipe) -> None:
    """Raise ValueError, which names the setting and why nothing reads it, for the first such setting."""
    for sentence in (*_of_training(recipe), *_of_evaluation(recipe), *_of_model(recipe)):
        raise ValueError(sentence)


def _of_training(recipe: Recipe) -> Iterator[str]:
    train, tasks = recipe.train, recipe.stream.tasks
    if tasks and all(task.reader.only_documents for task in tasks):
        for name, why in (("truncate", "prompts to cut"), ("long_answers", "answers"), ("template", "turns of a chat")):
            if not is_default(train, name):
                yield f"train.{name}: {getattr(train, name)} is not used: all tasks are plain text, without {why}"


def _of_evaluation(recipe: Recipe) -> Iterator[str]:
    evaluation = recipe.eval
    # A recipe that says nothing has the answers' length of training (config.load).
    is_own = evaluation.max_new_tokens != recipe.train.max_target_length and not is_default(
        evaluation, "max_new_tokens"
    )
    if evaluation.mode in ("likelihood", "perplexity") and is_own:
        yield (
            f"eval.max_new_tokens: {evaluation.max_new_tokens} is not used: eval.mode {evaluation.mode} generates "
            "no text"
        )
    metrics = {cls.METRIC for cls in recipe.stream.formats.values()}
    metric = metrics.pop() if len(metrics) == 1 else None
    for name in ("normalise", "rouge_tokenizer"):
        if recipe.stream.tasks and metric and evaluation.metric == "auto" and not is_default(evaluation, name):
            told = f"format {' and '.join(recipe.stream.formats)} is scored by {metric}"
            yield f"eval.{name}: {getattr(evaluation, name)} is not used: {told}"
    if evaluation.general is not None and not evaluation.general.after:
        yield "eval.general.after: an empty list measures nothing; leave eval.general out, or say after which tasks"


def _of_model(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.trust_remote_code and model.name_or_path.startswith("builtin:"):
        yield f"model.trust_remote_code: true is not used: {model.name_or_path} comes without code of its own"
