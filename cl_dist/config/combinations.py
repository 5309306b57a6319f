"""What settings of different components must agree on: checked once the whole recipe is known.

A setting that contradicts another one is refused, and so is one that nothing in the recipe reads. The recipe alone must
prove it. A setting with its default value is never refused as unread, because a run's config.yaml contains every
setting; nor is a limit that no run reaches. What a method requires of the other settings is in its own `config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from cl_dist.config.ranges import MOST_INT, is_default
from cl_dist.methods.config import check_methods

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


def check_combinations(recipe: Recipe) -> None:
    """Raise ValueError for the first contradiction or unread setting; the message starts with the setting's key."""
    check_methods(recipe)
    problems = (
        _trackers,
        _steps_and_lengths,
        _evaluation,
        _general,
        _precision_and_batch,
        _unread_in_training,
        _unread_in_evaluation,
    )
    first = next(chain.from_iterable(find(recipe) for find in problems), None)
    if first is not None:
        raise ValueError(first)


def _trackers(recipe: Recipe) -> Iterator[str]:
    """A tracker that would get everything twice."""
    twice = next((name for name in recipe.track if recipe.track.count(name) > 1), None)
    if twice is not None:
        yield f'track: "{twice}" is given twice'


def _steps_and_lengths(recipe: Recipe) -> Iterator[str]:
    """Limits so tight that the warm-up never ends or no prompt fits."""
    train, facts = recipe.train, recipe.model.known_facts
    if train.max_steps_per_task is not None:
        most = train.max_steps_per_task
        extra = sum(method.extra_steps(most) for method in recipe.method)
        if train.warmup_steps > most + extra:
            more = f" and the {extra} steps that the method adds" if extra else ""
            yield (
                f"train.warmup_steps: {train.warmup_steps} is more than max_steps_per_task {most}{more}, so that "
                f"learning_rate would never be reached; allowed: at most {most + extra}"
            )
    if facts is not None and facts.answer_in_prompt and train.max_target_length >= train.max_length:
        yield (
            f"train.max_target_length: {train.max_target_length} leaves no room for a prompt in train.max_length "
            f"{train.max_length}, which holds both for a decoder; allowed: less than {train.max_length}"
        )


def _evaluation(recipe: Recipe) -> Iterator[str]:
    """Modes, metrics and templates that the model's objective rules out, if the recipe alone determines it."""
    evaluation, objective, facts = recipe.eval, recipe.model.known_objective, recipe.model.known_facts
    if evaluation.mode == "generate" and facts is not None and not facts.generates:
        yield f"eval.mode: generate needs a model that generates text, but its objective is {objective}"
    if evaluation.mode == "perplexity" and facts is not None and facts.needs_labels:
        yield f"eval.mode: perplexity needs a language model, but its objective is {objective}"
    allowed = {"likelihood": ("auto", "exact_match", "macro_f1"), "perplexity": ("auto",)}.get(evaluation.mode)
    if allowed is not None and evaluation.metric not in allowed:
        yield (
            f"eval.metric: {evaluation.metric} scores generated text, but eval.mode is {evaluation.mode}, which allows "
            + " or ".join(allowed)
        )
    if recipe.train.template == "chat" and facts is not None and not facts.answer_in_prompt:
        yield f"train.template: chat is for decoders, but the model's objective is {objective}"


def _general(recipe: Recipe) -> Iterator[str]:
    general, objective, facts = recipe.eval.general, recipe.model.known_objective, recipe.model.known_facts
    if general is None:
        return
    if facts is not None and not facts.generates:
        yield f"eval.general: needs a model that generates text, but its objective is {objective}"
    # The names of a published order are not known yet: `resolve_order` checks the recipe again with them.
    names = [task.name for task in recipe.stream.tasks]
    allowed = ("untouched", "first", "last", *names)
    unknown = next((place for place in general.after if names and place not in allowed), None)
    if general.after != "all" and unknown is not None:
        yield f'eval.general.after: "{unknown}" is none of all, {", ".join(allowed)}'


def _precision_and_batch(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    ranks = 1 if recipe.launch.processes == "auto" else recipe.launch.processes  # checked again once it is known
    yield from _gradient_precision(recipe)
    # Each factor is in range by itself, but their product must fit the index arithmetic too.
    batch = train.micro_batch_size * train.gradient_accumulation * ranks
    if batch > MOST_INT:
        yield (
            f"train.micro_batch_size: {train.micro_batch_size}, with train.gradient_accumulation "
            f"{train.gradient_accumulation} and {ranks} ranks, makes a global batch of {batch}; allowed: at most "
            f"{MOST_INT}"
        )


def _gradient_precision(recipe: Recipe) -> Iterator[str]:
    train, raw = recipe.train, recipe.zero.deepspeed
    at_stage_0 = "at stage 0 with train.dtype bfloat16, DeepSpeed always sums gradients in bfloat16"
    unsupported = recipe.zero.stage == 0 and train.dtype == "bfloat16"
    if unsupported and "grad_accum_dtype" in raw.get("data_types", {}):
        yield (f"zero.deepspeed.data_types.grad_accum_dtype: {at_stage_0}; remove it, or give zero.stage 1, 2 or 3")
    if train.grad_dtype is None:
        return
    if unsupported and train.grad_dtype == "float32":
        yield f"train.grad_dtype: {at_stage_0}; give zero.stage 1, 2 or 3 (on one rank too), or bfloat16"
    if train.dtype == "float32" and train.grad_dtype == "bfloat16":
        yield "train.grad_dtype: bfloat16 needs train.dtype bfloat16: float32 gradients are summed in float32"
    given = ["communication_data_type"] if "communication_data_type" in raw else []
    given += ["data_types.grad_accum_dtype"] if "grad_accum_dtype" in raw.get("data_types", {}) else []
    if given:
        yield f"zero.deepspeed.{given[0]}: set by train.grad_dtype, which is {train.grad_dtype}; give only one of them"


def _unread_in_training(recipe: Recipe) -> Iterator[str]:
    train, tasks, model = recipe.train, recipe.stream.tasks, recipe.model
    if tasks and all(task.reader.only_documents for task in tasks):
        for name, why in (("truncate", "prompts to cut"), ("long_answers", "answers"), ("template", "turns of a chat")):
            if not is_default(train, name):
                yield f"train.{name}: {getattr(train, name)} is not used: all tasks are plain text, without {why}"
    if model.trust_remote_code and model.name_or_path.startswith("builtin:"):
        yield f"model.trust_remote_code: true is not used: {model.name_or_path} comes without any code"


def _unread_in_evaluation(recipe: Recipe) -> Iterator[str]:
    evaluation, stream = recipe.eval, recipe.stream
    # A recipe that gives no max_new_tokens gets train.max_target_length (see `load`); that value was never asked for.
    inherited = evaluation.max_new_tokens == recipe.train.max_target_length
    given = not inherited and not is_default(evaluation, "max_new_tokens")
    if evaluation.mode in ("likelihood", "perplexity") and given:
        yield (
            f"eval.max_new_tokens: {evaluation.max_new_tokens} is not used: eval.mode {evaluation.mode} generates "
            "no text"
        )
    if recipe.zero.stage != 3 and not is_default(evaluation, "gather_weights"):
        yield f"eval.gather_weights: {evaluation.gather_weights} is not used: only zero.stage 3 shards the weights"
    # If all formats bring the same metric, `auto` means that one, and settings of exact match and ROUGE have no effect.
    metrics = {cls.METRIC for cls in stream.formats.values()}
    metric = metrics.pop() if len(metrics) == 1 else None
    for name in ("normalise", "rouge_tokenizer"):
        if stream.tasks and metric and evaluation.metric == "auto" and not is_default(evaluation, name):
            formats = " and ".join(stream.formats)
            yield f"eval.{name}: {getattr(evaluation, name)} is not used: format {formats} is scored by {metric}"
    if evaluation.general is not None and not evaluation.general.after:
        yield "eval.general.after: an empty list measures nothing; leave eval.general out, or list when to measure"
