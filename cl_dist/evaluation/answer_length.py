"""Whether generated answers fit the model's positions. Training inputs are checked when the model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from cl_dist.config.schema import EvalConfig
from cl_dist.errors import BadInput
from cl_dist.models.positions import longest_inputs
from cl_dist.models.structure import base_model
from cl_dist.tasks.tokenised import TokenisedData
from cl_dist.tasks.types import Task

if TYPE_CHECKING:
    from cl_dist.evaluation.general import HarnessTasks

HARNESS_NEW_TOKENS = 256
"""Number of tokens that lm-evaluation-harness generates if a task's file does not say."""


def check_room(model: nn.Module, data: TokenisedData, tasks: Iterable[Task], config: EvalConfig) -> None:
    """Raise `BadInput` if an answer to one of `tasks`, which are all generated, could exceed the last position.

    A decoder's answer follows its prompt; the last token of the answer is never read.
    """
    longest, name, new = longest_inputs(model), base_model(model).name_or_path, config.max_new_tokens
    if longest.target is not None and new > longest.target:
        raise BadInput(
            f"eval.max_new_tokens: {new} is too long for {name}, whose decoder has {longest.target} positions; "
            f"allowed: at most {longest.target}"
        )
    if longest.source is None or base_model(model).config.is_encoder_decoder:
        return
    # Most models have room for the longest prompt that there can be: then no prompt has to be tokenised now.
    if data.encoder.longest_prompt + new - 1 <= longest.source:
        return
    for task in tasks:
        prompt = int(data.prompts(task).lengths.max(initial=0))
        over = prompt + new - 1 - longest.source
        if over > 0:
            raise BadInput(
                f"eval.max_new_tokens: {new} tokens after prompts of up to {prompt} (task {task.name!r}) exceed "
                f"the {longest.source} positions of {name}; allowed: at most {new - over}, or reduce "
                f"train.max_length by {over}"
                if new > over
                else f"train.max_length: the prompts of task {task.name!r} have up to {prompt} tokens, which leaves no "
                f"room for an answer in the {longest.source} positions of {name}; reduce it"
            )


def check_general_room(model: nn.Module, tasks: HarnessTasks) -> None:
    """Raise `BadInput` if a task of lm-evaluation-harness generates more tokens than a decoder has positions.

    The harness itself truncates prompts that are too long for the remaining positions.
    """
    longest, base = longest_inputs(model).source, base_model(model)
    if longest is None or base.config.is_encoder_decoder:
        return
    from lm_eval.models.utils import normalize_gen_kwargs

    for loaded in tasks.loaded.values():
        for name, part in loaded["tasks"].items():
            if part.OUTPUT_TYPE != "generate_until":
                continue
            new = normalize_gen_kwargs(dict(part.config.generation_kwargs or {}), HARNESS_NEW_TOKENS)["max_gen_toks"]
            if new >= longest:
                raise BadInput(
                    f"eval.general.tasks: {name} generates up to {new} tokens, but {base.name_or_path} has {longest} "
                    "positions; leave it out, or use a model with more"
                )
