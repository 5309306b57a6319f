"""From the recipe's model settings to a model and its tokenizer; under ZeRO-3 built and filled shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.utils import logging

from cl_dist.config.schema import ModelConfig
from cl_dist.errors import BadInput, ClDistError
from cl_dist.models.builtin import builtin_config, byte_tokenizer
from cl_dist.models.check import (
    BUILTIN_FAMILIES,
    Family,
    check_model_config,
    local_folder,
    resolve_objective,
    unsupported_architecture,
)
from cl_dist.models.gguf import converted_gguf
from cl_dist.models.initialise import initialise_
from cl_dist.models.structure import base_model, head_prefixes, is_below
from cl_dist.tasks.encode import Objective
from cl_dist.tasks.template import ChatTemplate

POSITION_TABLES = ("position_embeddings", "wpe")
"""Name endings of learnt position embeddings."""

AUTO_CLASSES: dict[Objective, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
    "masked_lm": AutoModelForMaskedLM,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for adapters and an engine."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    """What the model is trained to do, resolved: never `auto`."""


def load_model(
    model: ModelConfig,
    label_count: int,
    *,
    zero3_config: dict[str, Any] | None,
    dtype: torch.dtype,
    seed: int,
    cache_dir: Path,
    chat: bool = False,
) -> LoadedModel:
    """Build or load the model with parameters in `dtype` (float32 or bfloat16), on the CPU or, under ZeRO-3, sharded.

    `label_count` is the number of classes of a classifier. `zero3_config` is the DeepSpeed configuration where
    weights are to be sharded from the start: then the process group must be up, every rank has to call, and the
    configuration's precision must be `dtype`. Weights that do not come from a file (a built-in model, a new head)
    follow from `seed` and their names. A GGUF file is converted once into `cache_dir`. `chat`: the tokenizer's chat
    template will be used. Raises BadInput for anything that is not there or does not fit, before weights are read where
    that shows.
    """
    check_model_config(model)
    with _quiet(), _told_as_bad_input(model):
        folder = _source(model, cache_dir)
        config = _configuration(model, folder)
        tokenizer = _tokenizer(model, folder, config)
    if chat:
        ChatTemplate(tokenizer)
    objective = resolve_objective(model.objective, family_of(config, model.name_or_path), model.name_or_path)
    _fit_to_task(config, tokenizer, objective, label_count, model.name_or_path)
    with _quiet(), _told_as_bad_input(model), _sharded_from_the_start(zero3_config):
        built = _build(model, folder, config, objective, dtype, seed)
    # So that nothing written later points at a cache or a temporary folder.
    built.name_or_path = built.config._name_or_path = model.name_or_path
    tokenizer.name_or_path = model.name_or_path
    return LoadedModel(built, tokenizer, objective)


def check_length(loaded: LoadedModel, max_length: int) -> None:
    """Raise BadInput where inputs of `max_length` tokens have no position embedding.

    Rotary and relative positions (Llama, T5) have no such end; learnt ones (BERT, RoBERTa, GPT-2) do.
    """
    base = base_model(loaded.model)
    tables = [module for name, module in base.named_modules() if name.endswith(POSITION_TABLES)]
    for table in tables:
        longest = int(table.num_embeddings) - (0 if table.padding_idx is None else int(table.padding_idx) + 1)
        if max_length > longest:
            raise BadInput(
                f"train.max_length: {max_length} is too long for {base.name_or_path}, which has {longest} positions"
            )


def family_of(config: PreTrainedConfig, name: str) -> Family:
    """The family that the configuration belongs to; BadInput where it is none of them."""
    kind = type(config)
    if config.is_encoder_decoder and kind in AutoModelForSeq2SeqLM._model_mapping:
        return "encoder-decoder"
    if not config.is_encoder_decoder and kind in AutoModelForMaskedLM._model_mapping and not _is_decoder(config):
        return "encoder"
    if not config.is_encoder_decoder and kind in AutoModelForCausalLM._model_mapping:
        return "decoder"
    raise unsupported_architecture(name, ", ".join(config.architectures or [config.model_type]))


def _is_decoder(config: PreTrainedConfig) -> bool:
    """BERT's relatives serve as decoders where their configuration says so."""
    return bool(getattr(config, "is_decoder", False))


def _source(model: ModelConfig, cache_dir: Path) -> str | None:
    """Where transformers loads from: None for a built-in model, a folder or a Hugging Face id."""
    if model.name_or_path in BUILTIN_FAMILIES:
        return None
    folder = local_folder(model.name_or_path)
    source = model.name_or_path if folder is None else str(folder)
    return source if model.gguf_file is None else str(converted_gguf(source, model.gguf_file, cache_dir))


def _configuration(model: ModelConfig, source: str | None) -> PreTrainedConfig:
    if source is None:
        return builtin_config(model.name_or_path)
    return AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code)


def _tokenizer(model: ModelConfig, source: str | None, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right and with a padding token (the end token serves where there is none)."""
    if source is None:
        return byte_tokenizer(BUILTIN_FAMILIES[model.name_or_path])
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _fit_to_task(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, objective: Objective, label_count: int, name: str
) -> None:
    """Enter labels and padding id into `config`; BadInput where tokenizer and objective do not fit."""
    if objective == "classification":
        if label_count < 1:
            raise BadInput(f"model.objective: {name} as a classifier needs a stream whose tasks have labels")
        config.num_labels = label_count
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    for token, wanted in (("pad", True), ("eos", objective.endswith("s_lm")), ("mask", objective == "masked_lm")):
        if wanted and getattr(tokenizer, f"{token}_token_id") is None:
            raise BadInput(f"model.name_or_path: the tokenizer of {name} has no {token} token, which {objective} needs")
    if len(tokenizer) > config.vocab_size:
        raise BadInput(
            f"model.name_or_path: the tokenizer of {name} has {len(tokenizer)} entries, but its model has embeddings "
            f"for {config.vocab_size} only"
        )


def _build(
    model: ModelConfig,
    source: str | None,
    config: PreTrainedConfig,
    objective: Objective,
    dtype: torch.dtype,
    seed: int,
) -> PreTrainedModel:
    auto_class = AUTO_CLASSES[objective]
    if source is None:
        built = auto_class.from_config(config, dtype=dtype, attn_implementation=model.attention)
        initialise_(built, seed)
        return built
    built, report = auto_class.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        attn_implementation=model.attention,
        trust_remote_code=model.trust_remote_code,
        output_loading_info=True,
    )
    missing = set(report["missing_keys"])
    _check_missing(built, missing, objective, model.name_or_path)
    initialise_(built, seed, only=missing)
    return built


def _check_missing(model: PreTrainedModel, missing: set[str], objective: Objective, name: str) -> None:
    """A pretrained encoder may get a new head, and a pooler below it; any other tensor that no file had is an error."""
    new = head_prefixes(model) if objective in ("classification", "masked_lm") else ()
    if lost := sorted(key for key in missing if not is_below(key, new) and ".pooler." not in key):
        raise BadInput(
            f"model.name_or_path: the weights of {name} lack {len(lost)} tensors of the model, {lost[0]} first"
        )


@contextmanager
def _sharded_from_the_start(zero3_config: dict[str, Any] | None) -> Iterator[None]:
    """While it lasts transformers builds every module under `deepspeed.zero.Init`.

    transformers keeps only a weak reference, so that leaving the block ends it; were it kept, generation and resizing
    later would behave as if all models of the process were sharded.
    """
    keep = None if zero3_config is None else HfDeepSpeedConfig(zero3_config)
    try:
        yield
    finally:
        del keep


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, which every rank would draw."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _told_as_bad_input(model: ModelConfig) -> Iterator[None]:
    """What the libraries raise for a model that is not there, damaged or unknown becomes one sentence."""
    try:
        yield
    except ClDistError:  # a signal that asks to stop among them
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise BadInput(f"model.name_or_path: {model.name_or_path} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The gist of a library's error, on one line."""
    told = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in told:
        return "it brings its own Python code, which runs only with model.trust_remote_code: true"
    if "couldn't connect" in told.lower() or "offline" in told.lower() or "local cache" in told.lower():
        return "there is no such folder, and Hugging Face cannot be reached or does not have it"
    return told if len(told) <= 400 else told[:400] + " ..."
