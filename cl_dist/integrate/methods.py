"""Builds the methods that a script asks for, and says which of them can be used where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_dist.config.load import check_recipe
from cl_dist.config.schema import Recipe
from cl_dist.errors import BadInput
from cl_dist.methods.catalogue import built_in, method_class
from cl_dist.methods.composed import Composed
from cl_dist.methods.config import MethodConfig, Need
from cl_dist.methods.protocol import Method

SURROUNDINGS: Mapping[str, frozenset[Need]] = {
    "PyTorch, DDP, FSDP2": frozenset(),
    "DeepSpeed, ZeRO 0-3": frozenset(),
    "accelerate": frozenset(),
    "Trainer, SFTTrainer": frozenset({Need.START}),
}
"""What trains in a script, and what it can give a method that needs more than passes and steps."""
MethodSettings = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
"""A method's name, a mapping with its name and settings as in a recipe, or a list of them."""


def supported() -> dict[str, dict[str, bool]]:
    """Whether each built-in method can be used, by method and surroundings, with its default settings.

    Settings may need more: KIF with a replay memory does, for example.
    """
    return {
        name: {place: not _lacking(_defaults(cls), has) for place, has in SURROUNDINGS.items()}
        for name, cls in built_in().items()
    }


def _defaults(cls: type[MethodConfig]) -> MethodConfig:
    """A method's settings without those that have no default: only its needs are asked for."""
    return object.__new__(cls)


def _lacking(config: MethodConfig, has: frozenset[Need]) -> list[Need]:
    return [need for need in config.needs if need not in has]


def script_recipe(
    method: MethodSettings,
    settings: Mapping[str, Any],
    *,
    seed: int,
    keep_optimizer: bool,
    stage: int = 0,
    accumulation: int = 1,
    adapters: bool = False,
) -> Recipe:
    """What `cl-dist run` would call the script's training, so that everything is checked as there.

    Args:
        method: One method, or several.
        settings: Those of a single method that is given by its name.
        seed: Seed of everything random that methods do.
        keep_optimizer: Whether AdamW's moments are carried from task to task.
        stage: ZeRO stage; 0 without DeepSpeed.
        accumulation: Micro-batches per optimiser step.
        adapters: Whether the model is trained with LoRA.

    Raises:
        BadInput: A setting is wrong, or methods do not compose.
    """
    if not isinstance(method, str) and settings:
        raise BadInput(
            f"cl_dist.continual: {', '.join(settings)}: not read, because the methods are given with their settings; "
            'allowed: method="NAME" with settings, or settings inside each method\'s mapping'
        )
    entries = [method] if isinstance(method, (str, Mapping)) else list(method)
    methods = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in entries]
    if isinstance(method, str):
        methods[0].update(settings)
    data: dict[str, Any] = {
        "model": {"name_or_path": "the script's own", **({"lora": {}} if adapters else {})},
        "stream": {"order": "the script's own"},  # its tasks are not known in advance
        "method": methods,
        "train": {"seed": seed, "keep_optimizer": keep_optimizer, "gradient_accumulation": accumulation},
        "zero": {"stage": stage},
    }
    return check_recipe(data, "script", Path.cwd())


def build_methods(recipe: Recipe, place: str) -> Composed:
    """The recipe's methods, if they can be used in these surroundings (a key of `SURROUNDINGS`); else BadInput."""
    methods: list[Method] = []
    for config in recipe.method:
        cls = method_class(config.name)
        assert cls is not None, f"{config.name} was there when its settings were checked"
        problems = [need.value for need in _lacking(config, SURROUNDINGS[place])]
        if cls.added_loss is not Method.added_loss and not problems:
            problems = ["adds a loss of its own to the script's, which no loop leaves room for"]
        if problems:
            fitting = [name for name, places in supported().items() if places[place]]
            raise BadInput(
                f"cl_dist.continual: method {config.name} {problems[0]}; allowed here ({place}): {', '.join(fitting)}"
            )
        methods.append(cls(config))
    return Composed(methods)
