"""Whether generated answers stay within the model's positions; those of training are checked when it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from cl_dist.config.schema import EvalConfig
from cl_dist.errors import BadInput
from cl_dist.models.positions import longest_inputs
from cl_dist.models.structure import base_model
from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.types import Task

if TYPE_CHECKING:
    from cl_dist.evaluation.general import HarnessTasks

HARNESS_NEW_TOKENS = 256
"""What lm-evaluation-harness generates where a task's file says nothing."""


def check_room(model: nn.Module, encoder: Encoder, tasks: Iterable[Task], config: EvalConfig) -> None:
    """Raise BadInput where an answer to one of `tasks`, which are all generated, could go past the last position.

    A decoder's answer comes after its prompt; the last token of it is never read.
    """
    longest, name, new = longest_inputs(model), base_model(model).name_or_path, config.max_new_tokens
    if longest.target is not None and new > longest.target:
        raise BadInput(
            f"eval.max_new_tokens: {new} is too long for {name}, whose decoder has {longest.target} positions; allowed "
            f"is at most {longest.target}"
        )
    if longest.source is None or base_model(model).config.is_encoder_decoder:
        return
    for task in tasks:
        prompt = max((len(encoder.prompt_ids(example.prompt)) for example in task.evaluation), default=0)
        over = prompt + new - 1 - longest.source
        if over > 0:
            raise BadInput(
                f"eval.max_new_tokens: {new} tokens after prompts of up to {prompt} (task {task.name!r}) go "
                f"past the {longest.source} positions of {name}; allowed is at most {new - over}, or make "
                f"train.max_length {over} smaller"
                if new > over
                else f"train.max_length: the prompts of task {task.name!r} have up to {prompt} tokens, which leaves no "
                f"room for an answer in the {longest.source} positions of {name}; make it smaller"
            )


def check_general_room(model: nn.Module, tasks: HarnessTasks) -> None:
    """Raise BadInput where a task of lm-evaluation-harness generates more than a decoder has positions for; a prompt
    that is too long for the rest of them the harness cuts itself.
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
                    f"eval.general.tasks: {name} generates up to {new} tokens, and {base.name_or_path} has {longest} "
                    "positions; leave it out, or use a model with more"
                )
