"""Adds low-rank adapters (LoRA, arXiv 2106.09685) to a loaded model, through peft."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, TaskType
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from cl_dist.config.objectives import FACTS, ObjectiveName
from cl_dist.config.schema import LoraConfig
from cl_dist.config.words import listed, percent
from cl_dist.errors import BadInput
from cl_dist.models.initialise import initialise_
from cl_dist.models.layer_kinds import takes_adapter
from cl_dist.models.structure import base_model, block_prefixes, head_prefixes, is_below, whole_shape
from cl_dist.models.tracked import any_block, is_matrix

LORA_A, LORA_B = ".lora_A.", ".lora_B."
"""Parts of an adapter parameter's name, between the adapted module and the adapter's own name."""

PAST_FORWARD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("x_proj", "dt_proj", "out_proj")),
    **dict.fromkeys(("mamba2", "falcon_h1", "nemotron_h", "bamba", "granitemoehybrid", "zamba2"), ("out_proj",)),
    "jamba": ("dt_proj",),
}
"""By model type, layers whose weight the model's code reads directly, which bypasses an adapter around them."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules without a forward, which peft cannot train alongside an adapter."""

SHOWN = 8
"""Number of names shown in a message."""
FIRST_ADAPTER = "default"
"""peft's default name for an adapter; those of later tasks are called `task1`, `task2` and so on."""


def add_lora(
    model: PreTrainedModel, lora: LoraConfig, objective: ObjectiveName, seed: int, drawn: Collection[str] = ()
) -> PeftModel:
    """Freeze `model` and add adapters, in the model's dtype, to the linear layers that `lora` names.

    A classifier's head is trained too and becomes part of the adapter, and so does every layer with one of the `drawn`
    parameters, which no file of the base model contains (`LoadedModel.drawn`). The initial values are a function of
    `seed` and the parameters' names. Under ZeRO-3 the model stays sharded, and the adapters are sharded when the engine
    is built; the call is collective.

    Raises:
        BadInput: `target_modules` names no linear layer of the model, or one that cannot have an adapter.
    """
    whole, task_type = _trained_whole(model, objective, drawn), FACTS[objective].peft_task
    configuration = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, used as a float
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora, whole),
        modules_to_save=whole or None,
        task_type=None if task_type is None else TaskType(task_type),
        base_model_name_or_path=model.name_or_path,
    )
    # Without `autocast_adapter_dtype=False`, peft would keep the adapters of a bfloat16 model in float32, but the
    # engine has float32 master weights anyway. The first warning is about a call inside peft, the second about a
    # setting that peft corrects by itself.
    with warnings.catch_warnings(), _refusals_as_bad_input(model):
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        adapted = peft.get_peft_model(model, configuration, autocast_adapter_dtype=False)
    initialise_(adapted, seed, only={name for name, _ in adapted.named_parameters() if _is_lora(name)})
    _check_readable(adapted)
    return adapted


def _check_readable(model: PeftModel) -> None:
    """Raise BadInput if peft could not load the exported adapter again: for some model families the libraries rename
    weights on loading, after which the names in the adapter no longer match.
    """
    with warnings.catch_warnings(), _refusals_as_bad_input(base_model(model)):
        warnings.simplefilter("ignore")
        stored = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        result: Any = peft.set_peft_model_state_dict(model, stored)
    if lost := result.unexpected_keys:
        # An unexpected key is the name that peft looked for, with an empty part where the renaming went wrong.
        paths = ([part for part in name.partition(".lora_")[0].split(".") if part] for name in lost)
        modules = ", ".join(sorted({".".join(path[-2:]) for path in paths}))
        raise BadInput(
            f"model.lora.target_modules: peft could not reload adapters on {modules} of {model.config.model_type}, "
            "because it looks for them under another name; allowed are the other linear layers"
        )


def without_adapter(model: nn.Module) -> str | None:
    """Describes in one sentence the matrices in the blocks that `all-linear` leaves without an adapter; None: none.

    In transformers, experts, their routers and some weights of state-space models are bare parameters, not linear
    layers. In other cases the model reads a layer's weight directly (`PAST_FORWARD`). Embedding tables do not count.
    """
    modules, prefixes = dict(model.named_modules(remove_duplicate=False)), block_prefixes(model)
    sizes = {
        name: whole_shape(parameter).numel()
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes) and not _is_lora(name) and is_matrix(parameter)
    }
    left = {
        name: size
        for name, size in sizes.items()
        if ".base_layer." not in name and not isinstance(modules[name.rpartition(".")[0]], nn.Embedding)
    }
    if not left:
        return None
    names = list(dict.fromkeys(any_block(name).removeprefix("base_model.model.") for name in left))
    share = percent(sum(left.values()) / sum(sizes.values()))
    return (
        f"model.lora.target_modules: all-linear leaves out {listed(names, SHOWN)} ({share} of the matrices in "
        "the blocks), which an adapter cannot reach: they are not trained"
    )


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter that `export_model` wrote into `folder` on `model`, for evaluation.

    Raises BadInput if the adapter is missing or damaged.
    """
    if not (folder / "adapter_config.json").is_file():
        raise BadInput(f"{folder} has no adapter (adapter_config.json)")
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"the adapter in {folder} cannot be loaded: {' '.join(str(error).split())}") from error


def adapter_names(model: PeftModel) -> list[str]:
    """Names of the model's adapters, oldest first."""
    return list(model.peft_config)


def grow_adapters(model: PeftModel, count: int, seed: int) -> bool:
    """Give the model `count` adapters like its first one: all are active, and only the newest is trained.

    Adapters are added, or removed starting with the newest. A classifier's head stays trained. The initial values of a
    new adapter are a function of `seed` and its name.

    Returns:
        Whether anything changed. If so, the engine around the model has to be rebuilt, which under ZeRO-3 also shards
        the new adapters.
    """
    names = adapter_names(model)
    wanted = [FIRST_ADAPTER, *(f"task{number}" for number in range(1, count))]
    if names == wanted:
        return False
    # Switching adapters on and off changes what peft trains, so remember the head.
    beside = {name for name, parameter in model.named_parameters() if parameter.requires_grad and not _is_lora(name)}
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for name in reversed(names[count:]):
        for layer in layers:
            layer.delete_adapter(name)
        del model.peft_config[name]
    for name in wanted[len(names) :]:
        _add(model, name, seed)

    # Every layer adds up all adapters. Only the LoRA layers are switched: the head exists once and stays active.
    for layer in layers:
        layer.set_adapter(wanted)
    model.base_model.active_adapter = wanted  # type: ignore[assignment]  # peft annotates a single adapter
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in beside or _belongs(name, wanted[-1]))
    return True


def _add(model: PeftModel, name: str, seed: int) -> None:
    """Add an adapter configured like the first, with its own initial values."""
    configuration = copy.deepcopy(model.peft_config[FIRST_ADAPTER])
    assert isinstance(configuration, peft.LoraConfig)
    configuration.modules_to_save = None  # all adapters share the first one's head
    # Bypass the subclass: a classifier's method would add a second head.
    PeftModel.add_adapter(model, name, configuration, autocast_adapter_dtype=False)
    initialise_(model, seed, only={each for each, _ in model.named_parameters() if _belongs(each, name)})


def frozen_adapters(model: PeftModel) -> list[str]:
    """Names of the adapter parameters that are frozen, in model order: those of past tasks."""
    return [name for name, parameter in model.named_parameters() if _is_lora(name) and not parameter.requires_grad]


def in_adapter(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a PeftModel is exported: it belongs to an adapter or is trained alongside."""
    return parameter.requires_grad or _is_lora(name)


def joined_adapters(weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Join several adapters of the same scale into one whose output is the sum of theirs.

    Args:
        weights: Unsharded tensors by parameter name; lora_A is `(r, in)` and lora_B `(out, r)`.
        names: The adapters, oldest first.

    Returns:
        lora_A `(r * adapters, in)` and lora_B `(out, r * adapters)` under the first adapter's names, and all tensors
        that belong to no adapter, unchanged.
    """
    joined = {}
    for name, weight in weights.items():
        if not _is_lora(name):
            joined[name] = weight
        elif _belongs(name, names[0]):
            parts = [weights[name.replace(f".{names[0]}.", f".{each}.")] for each in names]
            joined[name] = torch.cat(parts, dim=0 if LORA_A in name else 1)
    return joined


def _is_lora(name: str) -> bool:
    return LORA_A in name or LORA_B in name


def _belongs(name: str, adapter: str) -> bool:
    """Whether a parameter is one of the adapter's LoRA matrices."""
    return _is_lora(name) and f".{adapter}." in name


@contextmanager
def _refusals_as_bad_input(model: PreTrainedModel) -> Iterator[None]:
    """Turn whatever else peft refuses into one sentence."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(
            f"model.lora.target_modules: {type(model).__name__} cannot have these adapters: {reason[:400]}"
        ) from error


def _trained_whole(model: PreTrainedModel, objective: ObjectiveName, drawn: Collection[str]) -> list[str]:
    """Names of the modules trained without an adapter: a classifier's head, and the owners of `drawn` parameters."""
    head = head_prefixes(model) if FACTS[objective].needs_labels else ()
    # A missing bias starts at zero anyway, and that of a tied head cannot be trained without its module.
    owners = dict.fromkeys(name.rpartition(".")[0] for name in sorted(drawn) if not name.endswith("bias"))
    wanted = [*head, *(owner for owner in owners if not is_below(owner, head))]
    outermost = [name for name in wanted if not is_below(name, [each for each in wanted if each != name])]
    if "" in outermost or any(isinstance(model.get_submodule(name), _CONTAINERS) for name in outermost):
        raise BadInput(
            f"model.lora: {model.name_or_path} lacks weights that belong to no layer ({sorted(drawn)[0]} first), "
            "which an adapter cannot hold; leave model.lora out, or use a checkpoint that has them"
        )
    # A head may contain modules without parameters, such as dropout.
    return [name for name in outermost if list(model.get_submodule(name).parameters())]


def _targets(model: PreTrainedModel, lora: LoraConfig, whole: Sequence[str]) -> list[str]:
    """Full names of the linear layers that get an adapter; BadInput if there are none or one cannot have any."""
    # `load_model` has frozen the layers that text never passes through.
    linear = [
        name
        for name, module in model.named_modules()
        if takes_adapter(module) is not None and any(each.requires_grad for each in module.parameters())
    ]
    # An adapter has no effect on the layers of `PAST_FORWARD`, and some layers do more than a linear layer: routers
    # choose experts.
    past = PAST_FORWARD.get(model.config.get_text_config().model_type, ())
    barred = [n for n in linear if n.rpartition(".")[2] in past or not takes_adapter(model.get_submodule(n))]

    if lora.target_modules == "all-linear":
        skipped = (*head_prefixes(model), *whole, *barred)
        targets = [name for name in linear if not is_below(name, skipped)]
        if not targets:
            raise BadInput(
                f"model.lora: {type(model).__name__} has no linear layer that can have an adapter; leave model.lora out"
            )
        return targets

    _check_named(lora.target_modules, linear)
    named = [name for name in linear if any(_ends(name, ending) for ending in lora.target_modules)]
    if refused := [name for name in named if name in barred]:
        raise BadInput(
            f"model.lora.target_modules: {refused[0]} of {type(model).__name__} cannot have an adapter: the "
            "model reads its weight directly, or it does more than a linear layer; allowed are others, or all-linear"
        )
    if trained := [name for name in named if is_below(name, whole)]:
        raise BadInput(f"model.lora.target_modules: {trained[0]} is new and already trained in full; leave it out here")
    return named


def _check_named(endings: Sequence[str], linear: Sequence[str]) -> None:
    """Raise BadInput for an ending that matches no linear layer, and for an empty list."""
    unknown = [ending for ending in endings if not any(_ends(name, ending) for name in linear)]
    if unknown or not endings:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        raise BadInput(
            f"model.lora.target_modules: the model has no linear layer {', '.join(unknown) or '(the list is empty)'}; "
            f"allowed are all-linear or a list of {known}"
        )


def _ends(name: str, ending: str) -> bool:
    """Whether the dotted `name` equals `ending` or ends with its components."""
    return name == ending or name.endswith(f".{ending}")
