"""Low-rank adapters (LoRA, arXiv 2106.09685) on a loaded model, through peft."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
"""Layers, by model type, whose weight the model's own code reads: an adapter around them would be passed by."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules without a forward of their own, which cannot be trained whole beside an adapter."""

SHOWN = 8
"""Names in a message."""
FIRST_ADAPTER = "default"
"""peft's own name for an adapter; those of later tasks are `task1`, `task2` and so on."""


def add_lora(
    model: PreTrainedModel, lora: LoraConfig, objective: ObjectiveName, seed: int, drawn: Collection[str] = ()
) -> PeftModel:
    """Freeze `model` and add adapters, in the model's dtype, to the linear layers that `lora` names.

    A classifier's head is trained along and becomes part of the adapter, and so does every layer with one of the
    `drawn` parameters, which no file of the base model has (`LoadedModel.drawn`). The adapters' values follow from
    `seed` and their names. Under ZeRO-3 the model stays sharded, and the adapters are sharded when the engine is built;
    every rank has to call. Raises BadInput where `target_modules` names no linear layer of the model, or one that
    cannot have an adapter.
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
    # peft would keep the adapters of a bfloat16 model in float32; the engine has float32 master weights for all of
    # them. The first warning is about a call of peft's own, the second about what it sets right itself.
    with warnings.catch_warnings(), _refusals_told(model):
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        adapted = peft.get_peft_model(model, configuration, autocast_adapter_dtype=False)
    initialise_(adapted, seed, only={name for name, _ in adapted.named_parameters() if _is_lora(name)})
    _check_readable(adapted)
    return adapted


def _check_readable(model: PeftModel) -> None:
    """BadInput where what is going to be exported would not be found again: for some families the libraries rename
    weights on loading in such a way that an adapter of theirs no longer fits.
    """
    with warnings.catch_warnings(), _refusals_told(base_model(model)):
        warnings.simplefilter("ignore")
        stored = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        result: Any = peft.set_peft_model_state_dict(model, stored)
    if lost := result.unexpected_keys:
        # A key that is left over is the name peft looked for, with an empty part where the renaming went wrong.
        paths = ([part for part in name.partition(".lora_")[0].split(".") if part] for name in lost)
        modules = ", ".join(sorted({".".join(path[-2:]) for path in paths}))
        raise BadInput(
            f"model.lora.target_modules: peft would not load adapters on {modules} of {model.config.model_type} again, "
            "because it looks for them under another name; allowed are the other linear layers"
        )


def without_adapter(model: nn.Module) -> str | None:
    """A sentence about the matrices in the blocks that `all-linear` leaves without an adapter; None: there are none.

    Experts and their routers are parameters of their own modules in transformers, not linear layers, and so are some
    weights of state-space models; of others the model reads the weight itself (`PAST_FORWARD`). Embedding tables are
    not meant.
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
        "the blocks), which an adapter would not reach: they stay as they are"
    )


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter that `export_model` wrote into `folder` on `model`, for evaluation.

    Raises BadInput where there is no adapter, or a damaged one.
    """
    if not (folder / "adapter_config.json").is_file():
        raise BadInput(f"{folder} holds no adapter (adapter_config.json)")
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"the adapter in {folder} cannot be loaded: {' '.join(str(error).split())}") from error


def adapter_names(model: PeftModel) -> list[str]:
    """The model's adapters, in the order in which they were added."""
    return list(model.peft_config)


def grow_adapters(model: PeftModel, count: int, seed: int) -> bool:
    """Let the model have `count` adapters like its first one, all of them active and the newest alone trained.

    Adapters are added or, the newest first, taken away; what is trained beside them (a classifier's head) stays so.
    New values follow from `seed` and the adapters' names. Where anything has changed, which is returned, an engine
    around the model must be built anew; under ZeRO-3 that shards what is new.
    """
    names = adapter_names(model)
    wanted = [FIRST_ADAPTER, *(f"task{number}" for number in range(1, count))]
    if names == wanted:
        return False
    beside = {name for name, parameter in model.named_parameters() if parameter.requires_grad and not _is_lora(name)}
    for name in reversed(names[count:]):
        _take_away(model, name)
    for name in wanted[len(names) :]:
        _add(model, name, seed)
    _activate(model, wanted)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in beside or _belongs(name, wanted[-1]))
    return True


def _add(model: PeftModel, name: str, seed: int) -> None:
    """Add a copy of the first adapter with initial values of its own."""
    configuration = copy.deepcopy(model.peft_config[FIRST_ADAPTER])
    assert isinstance(configuration, peft.LoraConfig)
    configuration.modules_to_save = None  # the first adapter's head serves all of them
    # Not the subclass's method: a classifier's would add a head again.
    PeftModel.add_adapter(model, name, configuration, autocast_adapter_dtype=False)
    initialise_(model, seed, only={each for each, _ in model.named_parameters() if _belongs(each, name)})


def _take_away(model: PeftModel, name: str) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.delete_adapter(name)
    del model.peft_config[name]


def _activate(model: PeftModel, names: list[str]) -> None:
    """Let every layer add up these adapters; a head, of which there is one, is left as it is."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(names)
    model.base_model.active_adapter = names  # type: ignore[assignment]  # peft's own annotation is of one adapter


def frozen_adapters(model: PeftModel) -> list[str]:
    """Names of the parameters of the adapters that are not trained (any more), in model order."""
    return [name for name, parameter in model.named_parameters() if _is_lora(name) and not parameter.requires_grad]


def in_adapter(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a PeftModel is a part of what is exported: of any adapter, or trained beside them."""
    return parameter.requires_grad or _is_lora(name)


def joined_adapters(weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The matrices of several adapters of the same scale as those of one, whose output is the sum of theirs.

    Args:
        weights: Whole tensors by parameter name; lora_A is `(r, in)` and lora_B `(out, r)`.
        names: The adapters, oldest first.

    Returns:
        Under the first adapter's names lora_A `(r * adapters, in)` and lora_B `(out, r * adapters)`; what belongs to no
        adapter as it is.
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
    """Whether a parameter is a LoRA matrix of the adapter."""
    return _is_lora(name) and f".{adapter}." in name


@contextmanager
def _refusals_told(model: PreTrainedModel) -> Iterator[None]:
    """What peft refuses beyond what is checked before is one sentence, too."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(
            f"model.lora.target_modules: {type(model).__name__} cannot have these adapters: {reason[:400]}"
        ) from error


def _trained_whole(model: PreTrainedModel, objective: ObjectiveName, drawn: Collection[str]) -> list[str]:
    """Names of the modules that are trained as they are: a classifier's head, and owners of drawn parameters."""
    head = head_prefixes(model) if FACTS[objective].needs_labels else ()
    # A bias begins with zero wherever it is made, and the one of a tied head cannot be trained apart from its module.
    owners = dict.fromkeys(name.rpartition(".")[0] for name in sorted(drawn) if not name.endswith("bias"))
    wanted = [*head, *(owner for owner in owners if not is_below(owner, head))]
    outermost = [name for name in wanted if not is_below(name, [each for each in wanted if each != name])]
    if "" in outermost or any(isinstance(model.get_submodule(name), _CONTAINERS) for name in outermost):
        raise BadInput(
            f"model.lora: {model.name_or_path} lacks weights that are no part of a layer ({sorted(drawn)[0]} first), "
            "which an adapter cannot hold; leave model.lora out, or use a checkpoint that has them"
        )
    return _modules_with_weights(model, outermost)


def _modules_with_weights(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the named modules that have parameters at all (a head's dropout has none)."""
    return [name for name in names if list(model.get_submodule(name).parameters())]


def _targets(model: PreTrainedModel, lora: LoraConfig, whole: Sequence[str]) -> list[str]:
    """Full names of the linear layers that get an adapter."""
    linear = [name for name, module in model.named_modules() if takes_adapter(module) is not None and _is_read(module)]
    barred = _barred(model, linear)
    if lora.target_modules == "all-linear":
        passed_over = (*head_prefixes(model), *whole, *barred)
        targets = [name for name in linear if not is_below(name, passed_over)]
        if not targets:
            raise BadInput(
                f"model.lora: {type(model).__name__} has no linear layer that can have an adapter; leave model.lora out"
            )
        return targets
    _check_named(lora.target_modules, linear)
    named = [name for name in linear if any(_ends(name, ending) for ending in lora.target_modules)]
    if refused := [name for name in named if name in barred]:
        raise BadInput(
            f"model.lora.target_modules: {refused[0]} of {type(model).__name__} cannot have an adapter: its weight is "
            "read past the layer, or it does more than a linear layer; allowed are the others, or all-linear"
        )
    if trained := [name for name in named if is_below(name, whole)]:
        raise BadInput(
            f"model.lora.target_modules: {trained[0]} is trained whole already, being new; leave it out here"
        )
    return named


def _is_read(module: nn.Module) -> bool:
    """Whether text goes through the layer: `load_model` has frozen what it does not."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _barred(model: PreTrainedModel, linear: Sequence[str]) -> list[str]:
    """The layers that an adapter cannot be put around: those of `PAST_FORWARD`, and those that do something else than a
    linear layer (routers, that choose experts).
    """
    names = PAST_FORWARD.get(model.config.get_text_config().model_type, ())
    return [name for name in linear if name.rpartition(".")[2] in names or not takes_adapter(model.get_submodule(name))]


def _check_named(endings: Sequence[str], linear: Sequence[str]) -> None:
    """BadInput for an ending that no linear layer's name has, and where there is none at all."""
    unknown = [ending for ending in endings if not any(_ends(name, ending) for name in linear)]
    if unknown or not endings:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        raise BadInput(
            f"model.lora.target_modules: the model has no linear layer {', '.join(unknown) or '(the list is empty)'}; "
            f"allowed are all-linear or a list of {known}"
        )


def _ends(name: str, ending: str) -> bool:
    """Whether the dotted `name` is `ending` or ends with its whole components."""
    return name == ending or name.endswith(f".{ending}")
