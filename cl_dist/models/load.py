"""From the recipe's model settings to a model and its tokenizer; under ZeRO-3 built and filled shard by shard."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.utils import logging as hf_logging

from cl_dist.config.objectives import FACTS, Family, ObjectiveName
from cl_dist.config.schema import BUILTIN_FAMILIES, ModelConfig
from cl_dist.config.words import show
from cl_dist.errors import BadInput, ClDistError
from cl_dist.models.builtin import builtin_config, byte_tokenizer
from cl_dist.models.check import (
    check_model_config,
    local_folder,
    no_sdpa,
    refuse_long,
    resolve_objective,
    unsupported_architecture,
)
from cl_dist.models.every_expert import run_every_expert
from cl_dist.models.gguf import converted_gguf
from cl_dist.models.initialise import initialise_
from cl_dist.models.positions import longest_inputs
from cl_dist.models.structure import base_model, head_prefixes, is_below, unread_parameters
from cl_dist.tasks.template import ChatTemplate

logger = logging.getLogger(__name__)

AUTO_CLASSES: dict[ObjectiveName, Any] = {
    name: getattr(transformers, facts.auto_class) for name, facts in FACTS.items()
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for adapters and an engine."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    objective: ObjectiveName
    """What the model is trained to do, resolved: never `auto`."""
    drawn: frozenset[str] = frozenset()
    """Names of the parameters that no file had and that were drawn at random: a new head, a pooler below it."""


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
        built, drawn = _build(model, folder, config, objective, dtype, seed)
    if FACTS[objective].answer_apart:
        _set_first_token(built, model.name_or_path)
    _tell_attention(built, model)
    run_every_expert(built)
    unread = unread_parameters(built)
    for name, parameter in built.named_parameters():
        if name in unread:  # a tower for pictures learns nothing from text
            parameter.requires_grad_(False)
    # So that nothing written later points at a cache or a temporary folder.
    built.name_or_path = built.config._name_or_path = model.name_or_path
    tokenizer.name_or_path = model.name_or_path
    return LoadedModel(built, tokenizer, objective, drawn)


def check_length(loaded: LoadedModel, max_length: int, max_target_length: int | None = None) -> None:
    """Raise BadInput where inputs of `max_length` tokens, or an encoder-decoder's answers of `max_target_length`, go
    past the model's last position (`positions.longest_inputs`).
    """
    name = str(base_model(loaded.model).name_or_path)
    refuse_long(longest_inputs(loaded.model), name, max_length, max_target_length)


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
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise BadInput(
            f"model.name_or_path: model_max_length of the tokenizer of {source} is {show(longest)}, no number"
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _fit_to_task(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, objective: ObjectiveName, label_count: int, name: str
) -> None:
    """Enter labels and padding id into `config`; BadInput where tokenizer and objective do not fit."""
    facts = FACTS[objective]
    if facts.needs_labels:
        if label_count < 1:
            raise BadInput(f"model.objective: {name} as a classifier needs a stream whose tasks have labels")
        config.num_labels = label_count
    text = _text_config(config, name)
    for each in (config, text):
        if getattr(each, "pad_token_id", None) is None:
            each.pad_token_id = tokenizer.pad_token_id
    for token in ("pad", *facts.needs_tokens):
        if getattr(tokenizer, f"{token}_token_id") is None:
            raise BadInput(f"model.name_or_path: the tokenizer of {name} has no {token} token, which {objective} needs")
    entries = getattr(text, "vocab_size", None)
    if entries is not None and len(tokenizer) > entries:
        raise BadInput(
            f"model.name_or_path: the tokenizer of {name} has {len(tokenizer)} entries, but its model has embeddings "
            f"for {entries} only"
        )


def _text_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The part of a multimodal model's configuration that is about text; of another model the configuration itself."""
    try:
        text: PreTrainedConfig = config.get_text_config()
    except ValueError as error:  # several parts, and none is the model's only text
        raise BadInput(
            f"model.name_or_path: {name} is a {config.model_type} with more than one text model in it; allowed are "
            "models with one"
        ) from error
    if not isinstance(text, PreTrainedConfig):
        raise BadInput(f"model.name_or_path: text_config of {name} is {show(text)}; allowed: a mapping of settings")
    return text


def _set_first_token(model: PreTrainedModel, name: str) -> None:
    """Let the configuration say what an encoder-decoder's decoder reads first; some have it with generation only."""
    if getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = getattr(model.generation_config, "decoder_start_token_id", None)
    if model.config.decoder_start_token_id is None:
        raise BadInput(
            f"model.name_or_path: neither config.json nor generation_config.json of {name} says what its decoder reads "
            "first; set decoder_start_token_id in config.json"
        )


def _tell_attention(model: PreTrainedModel, settings: ModelConfig) -> None:
    """Log a line where `auto` has fallen back to another attention."""
    if settings.attention == "auto" and model.config._attn_implementation != "sdpa":
        logger.warning(
            "model.attention: %s has no sdpa, so auto uses %s", type(model).__name__, model.config._attn_implementation
        )


def _check_attention(model: ModelConfig, config: PreTrainedConfig, auto_class: Any) -> None:
    """Refuse sdpa by name where the family's code has none; what a model's own code supports shows when it is built."""
    built = auto_class._model_mapping.get(type(config), None)
    if model.attention == "sdpa" and built is not None and not built._supports_sdpa:
        raise no_sdpa(model, built.__name__)


def _build(
    model: ModelConfig,
    source: str | None,
    config: PreTrainedConfig,
    objective: ObjectiveName,
    dtype: torch.dtype,
    seed: int,
) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model, and what of it was drawn at random although the rest came from files."""
    auto_class = AUTO_CLASSES[objective]
    _check_attention(model, config, auto_class)
    attention = None if model.attention == "auto" else model.attention  # None: sdpa, or eager where there is none
    if source is None:
        built = auto_class.from_config(config, dtype=dtype, attn_implementation=attention)
        initialise_(built, seed)
        return built, frozenset()
    built, report = auto_class.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=model.trust_remote_code,
        output_loading_info=True,
    )
    missing = set(report["missing_keys"])
    _check_missing(built, missing, objective, model.name_or_path)
    initialise_(built, seed, only=missing)
    return built, frozenset(missing)


def _check_missing(model: PreTrainedModel, missing: set[str], objective: ObjectiveName, name: str) -> None:
    """A pretrained encoder may get a new head, and a pooler below it; any other tensor that no file had is an error."""
    new = head_prefixes(model) if FACTS[objective].new_head else ()
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
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextmanager
def _told_as_bad_input(model: ModelConfig) -> Iterator[None]:
    """What the libraries raise for a model that is not there, damaged or unknown becomes one sentence."""
    try:
        yield
    except ClDistError:  # a signal that asks to stop among them
        raise
    except Exception as error:  # tokenizers raises Exception itself
        if "scaled_dot_product_attention" in str(error):
            raise no_sdpa(model, "model with code of its own") from error
        raise BadInput(f"model.name_or_path: {model.name_or_path} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The gist of a library's error, on one line."""
    told = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in told:
        return "it brings its own Python code, which runs only with model.trust_remote_code: true"
    if "couldn't connect" in told.lower() or "offline" in told.lower() or "local cache" in told.lower():
        return "there is no such folder, and Hugging Face cannot be reached or does not have it"
    return told if len(told) <= 400 else told[:400] + " ..."
