"""Low-rank adapters (LoRA, arXiv 2106.09685) on a loaded model, through peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import peft
from peft import PeftModel, TaskType
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from cl_dist.config.schema import LoraConfig
from cl_dist.errors import BadInput
from cl_dist.models.initialise import initialise_
from cl_dist.models.structure import LINEAR, head_prefixes, is_below
from cl_dist.tasks.encode import Objective

TASK_TYPES: dict[Objective, TaskType | None] = {
    "causal_lm": TaskType.CAUSAL_LM,
    "seq2seq_lm": TaskType.SEQ_2_SEQ_LM,
    "classification": TaskType.SEQ_CLS,
    "masked_lm": None,  # peft has no such task; the adapter's configuration names the model's class instead
}


def add_lora(model: PreTrainedModel, lora: LoraConfig, objective: Objective, seed: int) -> PeftModel:
    """Freeze `model` and add adapters, in the model's dtype, to the linear layers that `lora` names.

    A classifier's head is trained along and becomes part of the adapter. The adapters' values follow from `seed` and
    their names. Under ZeRO-3 the model stays sharded, and the adapters are sharded when the engine is built; every
    rank has to call. Raises BadInput where `target_modules` names no linear layer of the model.
    """
    head = _modules_with_weights(model, head_prefixes(model)) if objective == "classification" else None
    configuration = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, used as a float
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora),
        modules_to_save=head,
        task_type=TASK_TYPES[objective],
        base_model_name_or_path=model.name_or_path,
    )
    # peft would keep the adapters of a bfloat16 model in float32; the engine has float32 master weights for all of
    # them. The warning is about a call of peft's own.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        adapted = peft.get_peft_model(model, configuration, autocast_adapter_dtype=False)
    initialise_(adapted, seed, only={name for name, _ in adapted.named_parameters() if ".lora_" in name})
    return adapted


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


def _modules_with_weights(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the named modules that have parameters at all (a head's dropout has none)."""
    return [name for name in names if list(model.get_submodule(name).parameters())]


def _targets(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """Full names of the linear layers that get an adapter."""
    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
    if lora.target_modules == "all-linear":
        return [name for name in linear if not is_below(name, head_prefixes(model))]
    unknown = [ending for ending in lora.target_modules if not any(_ends(name, ending) for name in linear)]
    if unknown or not lora.target_modules:
        endings = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        raise BadInput(
            f"model.lora.target_modules: the model has no linear layer {', '.join(unknown) or '(the list is empty)'}; "
            f"allowed are all-linear or a list of {endings}"
        )
    return [name for name in linear if any(_ends(name, ending) for ending in lora.target_modules)]


def _ends(name: str, ending: str) -> bool:
    """Whether the dotted `name` is `ending` or ends with its whole components."""
    return name == ending or name.endswith(f".{ending}")
